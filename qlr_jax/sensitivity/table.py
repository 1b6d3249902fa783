"""Model and statistics -> allocators.OptionTable: exact bytes and predicted damage of every option of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from allocators import ModelFacts, Option, OptionTable, Row
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.quantizers import Nothing
from qlr_jax.core.solver import Solution
from qlr_jax.core.spec import Spec, expand_backbones
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama, LlamaConfig, kind_of, layer_of, tensor_names
from qlr_jax.progress import Progress
from qlr_jax.sensitivity.attribution import Case, attribute
from qlr_jax.sensitivity.predict import Correction, Profile, predict, profile

PROBE = "trellis-2"  # solved for every matrix: anchors its prediction, and its error is what KL is attributed to
ANCHORED = 100  # matrices, at most, that are solved with factors as well
NOTED = 64  # components of every spectrum that a saved table carries


@dataclass(frozen=True)
class Statistics:
    """What calibration found of the matrices to compress.

    Attributes:
        weights: name -> W (out, in).
        hessians: name -> H of its input; matrices of one input share the array.
        outputs: name -> G of its output; empty where all outputs count alike.
    """

    weights: Mapping[str, np.ndarray]
    hessians: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def problem(self, name: str, spec: str) -> tuple[np.ndarray, np.ndarray, str, np.ndarray | None]:
        """What `solve_many` takes."""
        return self.weights[name], self.hessians[name], spec, self.outputs.get(name)


def final_error(solution: Solution) -> float:
    """The relative error that a solve minimised: felt by the outputs' metric where it had one."""
    return solution.stats.get("felt_error", solution.stats["relative_error"])


@dataclass(frozen=True)
class Sensitivity:
    """An option table whose notes say what it was made of; what `measure` returns, and what is read back from a saved table.

    Attributes:
        table: the options with their predicted damage, nats of KL a token; notes["matrices"] has for every row its coefficient
            (KL per unit of squared relative error), its probe and its spectra.
    """

    table: OptionTable

    def __post_init__(self) -> None:
        known = self.table.notes.get("matrices", {})
        if missing := [row.name for row in self.table.rows if "coefficient" not in known.get(row.name, {})]:
            raise QLRError(f"the table's notes say nothing of {missing[0]}; pass a table that qlr sensitivity wrote")

    def coefficient(self, name: str) -> float:
        """KL a matrix causes per unit of its squared relative error, nats a token."""
        return self.table.notes["matrices"][name]["coefficient"]

    def damage(self, name: str, spec: str) -> float:
        """Predicted damage: coefficient · error², nats of KL a token."""
        return self.table[name].option(spec).damage

    def error(self, name: str, spec: str) -> float:
        """Predicted relative error."""
        coefficient = self.coefficient(name)
        return (self.damage(name, spec) / coefficient) ** 0.5 if coefficient > 0 else 0.0

    def check(self, prices: OptionTable) -> None:
        """Refuse a table that is of other matrices, or that prices a spec otherwise, than the model at hand."""
        for row in self.table.rows:
            if row.name not in prices.index:
                raise QLRError(f"the table has a row {row.name}, which is not to be compressed here; measure this model anew")
            shape = tuple(self.table.notes["matrices"][row.name]["shape"])
            if row.weights != prices[row.name].weights or any(Spec.parse(o.spec).nbytes(shape) != o.bytes for o in row.options):
                raise QLRError(f"the table's row {row.name} is of another matrix or of another version; measure this model anew")
        if missing := [name for name in prices.index if name not in self.table.index]:
            raise QLRError(f"the table has no row {missing[0]}; measure this model anew, or exclude that matrix")


def options(backbones: Sequence[str], ranks: Sequence[int], factors: Sequence[str], shape: tuple[int, int]) -> list[str]:
    """The specs that a matrix of `shape` may get: every backbone, with factors of every rank that it can have and every grid,
    as far as that saves bytes."""
    found = []
    for backbone in expand_backbones(backbones):
        sides = [f"+r{rank}@{grids}" for rank in ranks if 0 < rank < min(shape) for grids in factors]
        sides = sides if backbone.startswith("none") else ["", *sides]
        specs = [Spec.parse(backbone + side) for side in sides]
        found += [str(spec) for spec in specs if spec.nbytes(shape) < 2 * shape[0] * shape[1]]
    return list(dict.fromkeys(found))


def price(
    config: LlamaConfig, shapes: Mapping[str, tuple[int, int]], specs: Callable[[tuple[int, int]], Sequence[str]]
) -> OptionTable:
    """The table with its exact bytes and no damage yet: enough to tell whether a budget can be met, before anything is computed.

    Args:
        shapes: name -> (out, in) of the matrices to compress.
        specs: the options of a shape, e.g. `options` with a recipe's settings.
    """
    priced = {(m, n): tuple(Option(s, Spec.parse(s).nbytes((m, n)), 0.0) for s in specs((m, n))) for m, n in set(shapes.values())}
    rows = tuple(Row(name, shape[0] * shape[1], priced[shape]) for name, shape in shapes.items())
    return OptionTable(rows, model=facts(config, shapes))


def measure(
    model: Llama,
    found: Statistics,
    reference: Reference,
    table: OptionTable,
    *,
    config: SolverConfig,
    search: SolverConfig,
    seed: int,
    method: str,
    progress: Progress,
) -> Sensitivity:
    """Measure every matrix a little, predict all of its options.

    Every matrix is solved as `PROBE`, and once with factors (of many matrices a part); one matrix of each kind with all the
    offered factors: these anchor the predictions. The model's KL is attributed to the probes' errors, and then
    damage(option) = KL(probe) · (predicted error(option) / error(probe))².

    Args:
        found: of the matrices to compress.
        reference: the original's log-probabilities on calibration text.
        table: the options, from `price`.
        config: of the final solves; search: of these (fewer state bits).
        method: one of `ATTRIBUTIONS`.
    """
    offered = {row.name: [Spec.parse(option.spec) for option in row.options] for row in table.rows}
    top = max((s.rank for listed in offered.values() for s in listed), default=0)
    with progress.stage("spectra", total=len(offered)) as stage:
        profiles = {}
        for name in offered:
            profiles[name] = profile(
                found.weights[name],
                found.hessians[name],
                top,
                output=found.outputs.get(name),
                seed=seed,
                block=config.rotation_block,
                damping=config.damping,
            )
            stage.advance(note=name)
    problems = {key: found.problem(*key) for key in _anchors(offered)}
    with progress.stage("probing", total=len(problems)) as stage:
        solved = solve_many(problems, seed=seed, config=search, on_done=lambda key, _: stage.advance(note=f"{key[0]} {key[1]}"))
    errors = {key: final_error(solution) for key, solution in solved.items()}
    ratios = {}
    for (name, spec), error in errors.items():
        parsed, expected = Spec.parse(spec), predict(profiles[name], spec, search.state_bits)
        ratios[name, (parsed.rank, parsed.grids)] = error / expected if expected > 0 else 1.0
    with progress.stage("sensitivity", total=len(offered)) as stage:
        changes = {n: np.asarray(solved[n, PROBE].value.dense()) - found.weights[n] for n in offered}
        case = Case(model, changes, reference, found.hessians, found.outputs)
        attributed = attribute(method, case, seed=seed, on_done=lambda n: stage.advance(note=n))
    coefficient = {n: attributed.kl[n] / errors[n, PROBE] ** 2 if errors[n, PROBE] > 0 else 0.0 for n in offered}
    correction = Correction(ratios, {n: kind_of(n) for n in offered})
    exact = errors if config == search else {}  # the solves that would be made again are measured, all others predicted

    def filled(name: str, option: Option, spec: Spec) -> Option:
        error = exact.get((name, option.spec))
        if error is None:
            # what factors alone reach needs no correction: no rounding of a backbone is in it
            factor = 1.0 if isinstance(spec.quantizer(), Nothing) else correction.factor(name, spec.rank, spec.grids)
            error = min(factor * predict(profiles[name], spec, config.state_bits), 1.0)
        return replace(option, damage=coefficient[name] * error**2, measured=(name, option.spec) in exact)

    rows = tuple(
        replace(row, options=tuple(filled(row.name, o, spec) for o, spec in zip(row.options, offered[row.name], strict=True)))
        for row in table.rows
    )
    matrices = {n: _noted(n, profiles[n], coefficient[n], errors[n, PROBE], attributed.kl[n]) for n in offered}
    notes = {"unit": "nats of KL a token", "attribution": method, "state_bits": config.state_bits, "matrices": matrices}
    return Sensitivity(replace(table, rows=rows, notes=notes))


def _noted(name: str, found: Profile, coefficient: float, error: float, kl: float) -> dict[str, Any]:
    """What a saved table says of a matrix."""

    def shares(values: np.ndarray, whole: float) -> list[float]:
        return [float(f"{v / whole:.4g}") for v in values[:NOTED]] if whole > 0 else []

    return {
        "layer": layer_of(name),
        "kind": kind_of(name),
        "shape": list(found.shape),
        "coefficient": coefficient,
        "probe": {"spec": PROBE, "error": error, "kl": kl},
        "spectrum": shares(found.explained, found.energy),
        "plain_spectrum": shares(found.captured, found.size),
    }


def _anchors(offered: Mapping[str, Sequence[Spec]]) -> list[tuple[str, str]]:
    """(matrix, spec) to solve: the probe of every matrix; its middle rank with its coarsest factors, of so many matrices as are
    anchored; and of one matrix of each kind, of the middle layer, the least and the largest rank and the finest factors too.
    Backbones are those nearest to the probe's rate."""
    keys = [(name, PROBE) for name in offered]
    by_kind: dict[str, list[str]] = {}
    for name in sorted(offered, key=layer_of):
        by_kind.setdefault(kind_of(name), []).append(name)
    for names in by_kind.values():
        count = max(1, min(len(names), ANCHORED // len(by_kind)))
        spread = {names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)} | {names[len(names) // 2]}
        for name in (n for n in names if n in spread):
            ranked = sorted((s for s in offered[name] if s.rank and s.quantizer().unit), key=_far)
            nearest = {(s.rank, s.grids): s for s in reversed(ranked)}
            if not nearest:
                continue
            ranks = sorted({rank for rank, _ in nearest})
            grids = [s.grids for s in sorted((s for s in nearest.values() if s.rank == ranks[0]), key=_grain)]
            middle = ranks[(len(ranks) - 1) // 2]
            wanted = [(middle, grids[0])]
            if name == names[len(names) // 2]:
                wanted += [(ranks[0], grids[0]), (ranks[-1], grids[0]), (middle, grids[-1])]
            keys += [(name, str(nearest[key])) for key in wanted if key in nearest]
    return list(dict.fromkeys(keys))


def _far(spec: Spec) -> float:
    return abs(spec.quantizer().bits - Spec.parse(PROBE).quantizer().bits)


def _grain(spec: Spec) -> float:
    return sum(q.bits for q in spec.factor_quantizers())


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
