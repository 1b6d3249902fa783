"""Which solves a measurement makes: the probe of every matrix, and those that anchor the predictions of the other options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from allocators import OptionTable
from qlr_jax.core.spec import Spec
from qlr_jax.models import is_linear, kind_of, layer_of
from qlr_jax.sensitivity.correction import METRIC_BACKBONE

# Solved for every matrix: it anchors the predictions, and its error is what KL is attributed to; the second where a backbone whose
# rates follow the metrics is offered. Where no trellis nor lattice is offered it is the offered one of about so many bits.
PROBE, PLAIN_BITS = "trellis-2", 3
NEAR_LOSSLESS = 8  # bits, from which on an unrotated grid is predicted from its error alone: what outliers add matters no more
ANCHORED = 21  # matrices, at most, that are solved with factors as well: a hundred predict the others no better (benchmarks)


def probe(offered: Sequence[Spec]) -> str:
    """The spec that stands for all options of a matrix while KL is attributed.

    Example:
        >>> probe([Spec.parse("int-2"), Spec.parse("int-3")]), probe([Spec.parse("int-2"), Spec.parse("trellis-3")])
        ('int-3', 'trellis-2')
    """
    grids = [spec.quantizer() for spec in offered]
    if any(grid.follows_metric for grid in grids):
        return METRIC_BACKBONE
    if any(grid.always_rotated or grid.empty for grid in grids):
        return PROBE
    bare = {str(spec): spec for spec in offered if not spec.rank}
    listed = sorted(bare, key=lambda text: abs(bare[text].quantizer().bits - PLAIN_BITS))
    nearest = [text for text in listed if bare[text].quantizer().bits == bare[listed[0]].quantizer().bits]
    return nearest[len(nearest) // 2]


def linear_offers(table: OptionTable) -> dict[str, list[Spec]]:
    """Linear layer -> the specs that a table offers it."""
    return {row.name: [Spec.parse(option.spec) for option in row.options] for row in table.rows if is_linear(row.name)}


def solved_first(table: OptionTable) -> list[tuple[str, str]]:
    """The (matrix, spec) of linear layers that `measure` solves for a table of these options, before it is measured."""
    offered = linear_offers(table)
    return anchors(offered, {name: probe(listed) for name, listed in offered.items()})


def anchors(offered: Mapping[str, Sequence[Spec]], probes: Mapping[str, str]) -> list[tuple[str, str]]:
    """(matrix, spec) to solve, so that predictions can be corrected by what they come out at.

    The probe of every matrix; its middle rank with its coarsest factors, of so many matrices as are anchored; and of one matrix of
    each kind, of the middle layer, the least and the largest rank and the finest factors too. Backbones are those nearest to the
    probe's rate. Of backbones that are not rotated, whose outliers no theory predicts, one at every number of bits below
    `NEAR_LOSSLESS`, and all of them of one matrix of each kind.

    Args:
        offered: matrix -> its options.
        probes: matrix -> its `probe`.
    """
    keys = list(probes.items())
    by_kind: dict[str, list[str]] = {}
    for name in sorted(offered, key=layer_of):
        by_kind.setdefault(kind_of(name), []).append(name)
    for names in by_kind.values():
        count = max(1, min(len(names), ANCHORED // len(by_kind)))
        anchored = {names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)} | {names[len(names) // 2]}
        for name in names:
            keys += [(name, text) for text in _plain(offered[name], everything=name == names[len(names) // 2])]
        for name in (n for n in names if n in anchored):
            ranked = sorted((s for s in offered[name] if s.rank), key=lambda s: _distance(s, probes[name]))
            nearest = {(s.rank, s.grids): s for s in reversed(ranked)}
            if not nearest:
                continue
            ranks = sorted({rank for rank, _ in nearest})
            grids = [s.grids for s in sorted((s for s in nearest.values() if s.rank == ranks[0]), key=_factor_bits)]
            middle = ranks[(len(ranks) - 1) // 2]
            wanted = [(middle, grids[0])]
            if name == names[len(names) // 2]:
                wanted += [(ranks[0], grids[0]), (ranks[-1], grids[0]), (middle, grids[-1])]
            keys += [(name, str(nearest[key])) for key in wanted if key in nearest]
    return list(dict.fromkeys(keys))


def _plain(offered: Sequence[Spec], everything: bool) -> list[str]:
    """The rank-0 options that no rotation makes alike: all, or the middle one at every number of bits."""
    by_bits: dict[tuple[type, float], list[str]] = {}
    for spec in offered:
        if not spec.rank and not (grid := spec.quantizer()).always_rotated and not grid.empty and grid.bits < NEAR_LOSSLESS:
            by_bits.setdefault((type(grid), grid.bits), []).append(str(spec))
    return [text for texts in by_bits.values() for text in (texts if everything else texts[len(texts) // 2 :][:1])]


def _distance(spec: Spec, probed: str) -> tuple[bool, float, bool]:
    grid, wanted = spec.quantizer(), Spec.parse(probed)
    return (
        grid.always_rotated != wanted.quantizer().always_rotated,
        abs(grid.bits - wanted.quantizer().bits),
        spec.backbone != wanted.backbone,
    )


def _factor_bits(spec: Spec) -> float:
    return sum(q.bits for q in spec.factor_quantizers())
