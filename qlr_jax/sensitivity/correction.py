"""What predictions of relative errors are multiplied by, from the solves that were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from qlr_jax.core.spec import Spec

METRIC_BACKBONE = "trellis-2w"  # stands for all of its rates


class CorrectionKey(NamedTuple):
    """What of a spec a correction depends on, as the spec writes it.

    Attributes:
        rank: 0 without factors.
        grids: the factors'; "" without them.
        backbone: "" for every backbone of unit variance, which are rotated and err alike at all rates; one of them for all whose
            rates follow the metrics.
    """

    rank: int
    grids: str
    backbone: str


@lru_cache(maxsize=65536)
def correction_key(spec: Spec) -> CorrectionKey:
    """The key of a spec.

    Example:
        >>> tuple(correction_key(Spec.parse("int-3g64/rot+r4@bf16"))), tuple(correction_key(Spec.parse("trellis-3")))
        ((4, 'bf16', 'int-3g64/rot'), (0, '', ''))
    """
    grid = spec.quantizer()
    if grid.follows_metric:
        return CorrectionKey(spec.rank, spec.grids, METRIC_BACKBONE)
    alike = grid.always_rotated or grid.empty
    return CorrectionKey(spec.rank, spec.grids, "" if alike else str(replace(spec, rank=0, left="", right="")))


@dataclass(frozen=True)
class Correction:
    """How far solves came out from their predictions, as ratios of relative errors, solved over predicted.

    Attributes:
        measured: (matrix, key) -> ratio, of the solves that were made; every matrix has one at rank 0.
        kinds: matrix -> its kind: where a matrix lacks a key that another of its kind was solved for, the other's ratio over
            that of a key that both were solved for stands in.
    """

    measured: Mapping[tuple[str, CorrectionKey], float]
    kinds: Mapping[str, str]

    @cached_property
    def _by_name(self) -> dict[str, dict[CorrectionKey, float]]:
        out: dict[str, dict[CorrectionKey, float]] = {}
        for (name, key), ratio in self.measured.items():
            out.setdefault(name, {})[key] = ratio
        return out

    @cached_property
    def _richest(self) -> dict[str, dict[CorrectionKey, float]]:
        """Of each kind the ratios of the matrix that has most of them."""
        out: dict[str, dict[CorrectionKey, float]] = {}
        for name, ratios in self._by_name.items():
            kind = self.kinds[name]
            if len(ratios) > len(out.get(kind, {})):
                out[kind] = ratios
        return out

    def factor(self, name: str, key: CorrectionKey) -> float:
        """What a prediction for matrix `name` is multiplied by; the nearest key that was solved for stands in for this one."""
        own = self._by_name.get(name, {})
        if key in own:
            return own[key]
        near = _nearest(own, key)
        if near is None:
            return 1.0
        (rank, _, backbone), (near_rank, _, near_backbone) = key, near
        if rank and near_rank and near_backbone != backbone:
            # of another backbone: what rank did there, on what this one does alone
            alone, near_alone = (self.factor(name, CorrectionKey(0, "", text)) for text in (backbone, near_backbone))
            return own[near] * alone / near_alone
        kind = self._richest[self.kinds[name]]
        like = _nearest(kind, key)
        return own[near] * (kind[like] / kind[near] if like is not None and near in kind and kind[near] > 0 else 1.0)


def _nearest(ratios: Mapping[CorrectionKey, float], key: CorrectionKey) -> CorrectionKey | None:
    """The nearest of the keys: without factors where `key` is, then by backbone, then by grids, then by the ranks' ratio."""
    rank, grids, backbone = key
    alike = [other for other in ratios if (other[0] > 0) == (rank > 0)] or list(ratios)
    return min(
        alike, key=lambda k: (_distance(k[2], backbone), k[1] != grids, abs(math.log((k[0] + 1) / (rank + 1)))), default=None
    )


@lru_cache(maxsize=4096)
def _distance(one: str, other: str) -> float:
    """How different two backbones' rounding is: bits first, then groups."""
    if one == other:
        return 0.0
    if not one or not other:
        return 100.0
    a, b = Spec.parse(one), Spec.parse(other)
    groups = [spec.quantizer().group or 1024 for spec in (a, b)]
    kind = 10.0 * (type(a.quantizer()) is not type(b.quantizer()) or a.rotated != b.rotated)
    return kind + abs(a.quantizer().bits - b.quantizer().bits) + 0.01 * abs(math.log2(groups[0] / groups[1]))
