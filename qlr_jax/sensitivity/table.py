"""Model and statistics -> allocators.OptionTable: exact bytes and predicted damage of every option of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from allocators import ModelFacts, Option, OptionTable, Row
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.spec import Spec, expand_backbones
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama, LlamaConfig, kind_of, layer_of, tensor_names
from qlr_jax.progress import Progress
from qlr_jax.sensitivity.knockout import knockout
from qlr_jax.sensitivity.predict import Correction, Profile, predict, profile

PROBE = "trellis-2"  # solved for every matrix: anchors its prediction, and is what KL is measured with


@dataclass(frozen=True)
class Sensitivity:
    """What was measured, and the table that follows from it.

    Attributes:
        table: the options, for the allocators.
        coefficient: KL a matrix causes per unit of its squared relative error, nats a token.
        profiles, correction: what the predictions were made of.
        state_bits: the predictions are for trellises of so many.
    """

    table: OptionTable
    coefficient: Mapping[str, float]
    profiles: Mapping[str, Profile]
    correction: Correction
    state_bits: int

    def error(self, name: str, spec: str) -> float:
        """Predicted relative error."""
        factor = self.correction.factor(name, kind_of(name), Spec.parse(spec).rank)
        return min(factor * predict(self.profiles[name], spec, self.state_bits), 1.0)

    def damage(self, name: str, spec: str) -> float:
        """Predicted damage: coefficient · error², nats of KL a token."""
        return self.coefficient[name] * self.error(name, spec) ** 2


def options(backbones: Sequence[str], ranks: Sequence[int], factors: str, shape: tuple[int, int]) -> list[str]:
    """The specs that a matrix of `shape` may get: every backbone with every rank that it can have and that saves bytes."""
    found = []
    for backbone in expand_backbones(backbones):
        for rank in ranks:
            if rank < min(shape):
                spec = Spec.parse(f"{backbone}+r{rank}@{factors}" if rank else backbone)
                if spec.nbytes(shape) < 2 * shape[0] * shape[1]:
                    found.append(str(spec))
    return list(dict.fromkeys(found))


def price(
    config: LlamaConfig, shapes: Mapping[str, tuple[int, int]], specs: Callable[[tuple[int, int]], Sequence[str]]
) -> OptionTable:
    """The table with its exact bytes and no damage yet: enough to tell whether a budget can be met, before anything is computed.

    Args:
        shapes: name -> (out, in) of the matrices to compress.
        specs: the options of a shape, e.g. `options` with a recipe's settings.
    """
    rows = tuple(
        Row(name, m * n, tuple(Option(s, Spec.parse(s).nbytes((m, n)), 0.0) for s in specs((m, n))))
        for name, (m, n) in shapes.items()
    )
    return OptionTable(rows, model=facts(config, shapes))


def measure(
    model: Llama,
    weights: Mapping[str, np.ndarray],
    hessians: Mapping[str, np.ndarray],
    reference: Reference,
    table: OptionTable,
    *,
    config: SolverConfig,
    search: SolverConfig,
    seed: int,
    progress: Progress,
) -> Sensitivity:
    """Measure every matrix once, predict all of its options.

    Three measurements: every matrix solved as `PROBE` with few state bits (anchors the prediction), one matrix of each kind
    solved with factors (anchors what rank gains), and KL with one matrix at a time in its probed form. Then
    damage(option) = KL(probe) · (predicted error(option) / error(probe))².

    Args:
        weights: name -> (out, in) of the matrices to compress.
        hessians: name -> H of the matrix's input.
        reference: the original's log-probabilities on calibration text.
        table: the options, from `price`.
        config: of the final solves; search: of the probes (fewer state bits).
    """
    offered = {row.name: [option.spec for option in row.options] for row in table.rows}
    top = max((Spec.parse(s).rank for listed in offered.values() for s in listed), default=0)
    with progress.stage("spectra", total=len(weights)) as stage:
        profiles = {}
        for name, w in weights.items():
            profiles[name] = profile(w, hessians[name], top, seed=seed, block=config.rotation_block, damping=config.damping)
            stage.advance(note=name)
    anchors = _rank_anchors(offered)
    problems = {(n, PROBE): (w, hessians[n], PROBE) for n, w in weights.items()}
    problems |= {(n, s): (weights[n], hessians[n], s) for n, s in anchors}
    with progress.stage("probing", total=len(problems)) as stage:
        solved = solve_many(problems, seed=seed, config=search, on_done=lambda key, _: stage.advance(note=f"{key[0]} {key[1]}"))
    errors = {key: s.stats["relative_error"] for key, s in solved.items()}

    def ratio(name: str, spec: str) -> float:
        expected = predict(profiles[name], spec, search.state_bits)
        return errors[name, spec] / expected if expected > 0 else 1.0

    by_matrix = {name: ratio(name, PROBE) for name in weights}
    by_rank = {(kind_of(n), Spec.parse(s).rank): ratio(n, s) / by_matrix[n] for n, s in anchors if by_matrix[n] > 0}
    with progress.stage("sensitivity", total=len(weights)) as stage:
        kl = knockout(
            model, {n: solved[n, PROBE].value.dense() for n in weights}, reference, on_done=lambda n: stage.advance(note=n)
        )
    coefficient = {n: kl[n] / errors[n, PROBE] ** 2 if errors[n, PROBE] > 0 else 0.0 for n in weights}
    found = Sensitivity(table, coefficient, profiles, Correction(by_matrix, by_rank), config.state_bits)
    rows = tuple(
        replace(row, options=tuple(replace(o, damage=found.damage(row.name, o.spec)) for o in row.options)) for row in table.rows
    )
    return replace(found, table=replace(table, rows=rows))


def _rank_anchors(offered: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """One matrix of each kind, of the middle layer, with each rank on the offered backbone nearest to the probe's rate."""
    by_kind: dict[str, list[str]] = {}
    for name in offered:
        by_kind.setdefault(kind_of(name), []).append(name)
    anchors = []
    for names in by_kind.values():
        name = sorted(names, key=layer_of)[len(names) // 2]
        specs = [Spec.parse(s) for s in offered[name]]
        for rank in sorted({s.rank for s in specs if s.rank})[:2]:
            having = [s for s in specs if s.rank == rank and s.quantizer().unit]
            if having:
                anchors.append((name, str(min(having, key=lambda s: abs(s.quantizer().bits - 2.0)))))
    return anchors


def facts(config: LlamaConfig, compressed: Container[str]) -> ModelFacts:
    """What byte and device budgets must know: tensors that stay as they are (bf16), and the shape of the KV cache."""
    kept = [shape for name, shape in tensor_names(config).items() if name.removesuffix(".weight") not in compressed]
    fixed = sum(2 * int(np.prod(shape)) for shape in kept)
    return ModelFacts(fixed, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


def prediction_quality(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Predicted relative errors against those solved: median, 10th and 90th percentile of solved / predicted."""
    ratios = [solved / predicted for predicted, solved in pairs if predicted > 0]
    if not ratios:
        return {}
    low, high = np.quantile(ratios, [0.1, 0.9])
    return {"median": float(median(ratios)), "p10": float(low), "p90": float(high), "count": len(ratios)}
