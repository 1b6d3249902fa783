"""Model and statistics -> allocators.OptionTable: exact bytes and predicted damage of every option of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

from allocators import ModelFacts, Option, OptionTable, Row
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.lazy import Lazy, LazyMap
from qlr_jax.core.quantizers import Nothing
from qlr_jax.core.solution import Solution
from qlr_jax.core.spec import Spec, expand_backbones
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama, LlamaConfig, kind_of, layer_of, tensor_names
from qlr_jax.progress import Progress
from qlr_jax.sensitivity.attribution import Case, attribute
from qlr_jax.sensitivity.predict import Correction, Profile, predict, profile, side_of

# Solved for every matrix: it anchors the predictions, and its error is what KL is attributed to. Where no trellis nor lattice is
# offered it is the offered one of about so many bits.
PROBE, PLAIN_BITS = "trellis-2", 3
Bytes = Callable[[Spec, tuple[int, int]], int]
ANCHORED = 100  # matrices, at most, that are solved with factors as well
NOTED = 64  # components of every spectrum that a saved table carries


@dataclass(frozen=True)
class Statistics:
    """What calibration found of the matrices to compress.

    Attributes:
        weights: name -> W (out, in).
        hessians: name -> H of its input; matrices of one input share the array.
        outputs: name -> G of its output; empty where all outputs count alike.
        backbones: name -> Q, where backbones are given and only factors are to be found.
    """

    weights: Mapping[str, np.ndarray | Lazy]
    hessians: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    backbones: Mapping[str, np.ndarray | Lazy] = field(default_factory=dict)

    def problem(self, name: str, spec: str) -> tuple[np.ndarray, np.ndarray, str, np.ndarray | None, np.ndarray | None]:
        """What `solve_many` takes."""
        return self.weights[name], self.hessians[name], spec, self.outputs.get(name), self.backbones.get(name)


def final_error(solution: Solution) -> float:
    """The relative error that a solve minimised: weighted by the outputs' metric where it had one."""
    return solution.stats.get("weighted_error", solution.stats["relative_error"])


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

    def check(self, prices: OptionTable, nbytes: Bytes = Spec.nbytes) -> None:
        """Refuse a table that is of other matrices, or that prices a spec otherwise, than the model and format at hand."""
        for row in self.table.rows:
            if row.name not in prices.index:
                raise QLRError(f"the table has a row {row.name}, which is not to be compressed here; measure this model anew")
            shape = tuple(self.table.notes["matrices"][row.name]["shape"])
            if row.weights != prices[row.name].weights or any(nbytes(Spec.parse(o.spec), shape) != o.bytes for o in row.options):
                raise QLRError(f"the table's row {row.name} is of another matrix, target or version; measure this model anew")
        if missing := [name for name in prices.index if name not in self.table.index]:
            raise QLRError(f"the table has no row {missing[0]}; measure this model anew, or exclude that matrix")


def options(
    backbones: Sequence[str],
    ranks: Sequence[int],
    factors: Sequence[str],
    shape: tuple[int, int],
    nbytes: Bytes = Spec.nbytes,
    holds: Callable[[Spec, tuple[int, int]], bool] = lambda spec, shape: True,
) -> list[str]:
    """The specs that a matrix of `shape` may get: every backbone, with factors of every rank that it can have and every grid,
    as far as that saves bytes and the format holds it.

    Args:
        nbytes: (spec, shape) -> bytes in the format at hand; holds: whether it can hold that spec.
    """
    found = []
    for backbone in expand_backbones(backbones):
        sides = [f"+r{rank}@{grids}" for rank in ranks if 0 < rank < min(shape) for grids in factors]
        sides = sides if backbone.startswith("none") else ["", *sides]
        specs = [Spec.parse(backbone + side) for side in sides]
        found += [str(spec) for spec in specs if holds(spec, shape) and nbytes(spec, shape) < 2 * shape[0] * shape[1]]
    return list(dict.fromkeys(found))


def price(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, int]],
    specs: Callable[[tuple[int, int]], Sequence[str]],
    nbytes: Bytes = Spec.nbytes,
) -> OptionTable:
    """The table with its exact bytes and no damage yet: enough to tell whether a budget can be met, before anything is computed.

    Args:
        shapes: name -> (out, in) of the matrices to compress.
        specs: the options of a shape, e.g. `options` with a recipe's settings.
        nbytes: (spec, shape) -> bytes in the format at hand.

    Raises:
        QLRError: where a matrix has no option.
    """
    offered = {shape: specs(shape) for shape in dict.fromkeys(shapes.values())}
    for name, shape in shapes.items():
        if not offered[shape]:
            raise QLRError(f"none of the backbones fits {name} {shape}; exclude it (--exclude '{name}'), or offer other backbones")
    priced = {shape: tuple(Option(s, nbytes(Spec.parse(s), shape), 0.0) for s in listed) for shape, listed in offered.items()}
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
    solver: Callable[..., Mapping[tuple[str, str], Solution]] = solve_many,
) -> Sensitivity:
    """Measure every matrix a little, predict all of its options.

    Every matrix is solved as its probe, and once with factors (of many matrices a part); one matrix of each kind with all the
    offered factors; with unrotated backbones, once at every number of bits: these anchor the predictions. The model's KL is
    attributed to the probes' errors, and then damage(option) = KL(probe) · (predicted error(option) / error(probe))².

    Args:
        found: of the matrices to compress.
        reference: the original's log-probabilities on calibration text.
        table: the options, from `price`.
        config: of the final solves; search: of these (fewer state bits).
        method: one of `ATTRIBUTIONS`.
        solver: `solve_many`, or what calls it.
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
    probes = {name: probe(listed) for name, listed in offered.items()}
    problems = {key: found.problem(*key) for key in _anchors(offered, probes)}
    with progress.stage("probing", total=len(problems)) as stage:
        solved = solver(problems, seed=seed, config=search, on_done=lambda key, s: stage.advance(note=f"{key[0]} {s.summary()}"))
    errors = {key: final_error(solution) for key, solution in solved.items()}
    ratios = {}
    for (name, spec), error in errors.items():
        parsed, expected = Spec.parse(spec), predict(profiles[name], spec, search.state_bits)
        ratios[name, side_of(parsed)] = error / expected if expected > 0 else 1.0
    with progress.stage("sensitivity", total=len(offered)) as stage:
        changes = LazyMap(offered, lambda n: np.asarray(solved[n, probes[n]].value.dense()) - np.asarray(found.weights[n]))
        case = Case(model, changes, reference, found.hessians, found.outputs)
        attributed = attribute(method, case, seed=seed, on_done=lambda n: stage.advance(note=n))
    probed = {n: errors[n, probes[n]] for n in offered}
    coefficient = {n: attributed.kl[n] / probed[n] ** 2 if probed[n] > 0 else 0.0 for n in offered}
    correction = Correction(ratios, {n: kind_of(n) for n in offered})
    exact = errors if config == search else {}  # the solves that would be made again are measured, all others predicted

    def filled(name: str, option: Option, spec: Spec) -> Option:
        error = exact.get((name, option.spec))
        if error is None:
            # what factors alone reach needs no correction: no rounding of a backbone is in it
            factor = 1.0 if isinstance(spec.quantizer(), Nothing) else correction.factor(name, side_of(spec))
            error = min(factor * predict(profiles[name], spec, config.state_bits), 1.0)
        return replace(option, damage=coefficient[name] * error**2, measured=(name, option.spec) in exact)

    rows = tuple(
        replace(row, options=tuple(filled(row.name, o, spec) for o, spec in zip(row.options, offered[row.name], strict=True)))
        for row in table.rows
    )
    matrices = {n: noted(n, profiles[n], coefficient[n], probes[n], probed[n], attributed.kl[n]) for n in offered}
    notes = {"unit": "nats of KL a token", "attribution": method, "state_bits": config.state_bits, "matrices": matrices}
    return Sensitivity(replace(table, rows=rows, notes=notes))


def noted(name: str, found: Profile, coefficient: float, probed: str, error: float, kl: float) -> dict[str, Any]:
    """What a saved table says of a matrix."""

    def shares(values: np.ndarray, whole: float) -> list[float]:
        return [float(f"{v / whole:.4g}") for v in values[:NOTED]] if whole > 0 else []

    return {
        "layer": layer_of(name),
        "kind": kind_of(name),
        "shape": list(found.shape),
        "coefficient": coefficient,
        "probe": {"spec": probed, "error": error, "kl": kl},
        "spectrum": shares(found.explained, found.energy),
        "plain_spectrum": shares(found.captured, found.size),
    }


def probe(offered: Sequence[Spec]) -> str:
    """The spec that stands for all options of a matrix while KL is attributed."""
    if any(spec.quantizer().unit_scale or isinstance(spec.quantizer(), Nothing) for spec in offered):
        return PROBE
    bare = {str(spec): spec for spec in offered if not spec.rank}
    listed = sorted(bare, key=lambda text: abs(bare[text].quantizer().bits - PLAIN_BITS))
    nearest = [text for text in listed if bare[text].quantizer().bits == bare[listed[0]].quantizer().bits]
    return nearest[len(nearest) // 2]


def _anchors(offered: Mapping[str, Sequence[Spec]], probes: Mapping[str, str]) -> list[tuple[str, str]]:
    """(matrix, spec) to solve: the probe of every matrix; its middle rank with its coarsest factors, of so many matrices as are
    anchored; and of one matrix of each kind, of the middle layer, the least and the largest rank and the finest factors too.
    Backbones are those nearest to the probe's rate. Of backbones that are not rotated, whose outliers no theory foretells, one
    at every number of bits, and all of them of one matrix of each kind."""
    keys = list(probes.items())
    by_kind: dict[str, list[str]] = {}
    for name in sorted(offered, key=layer_of):
        by_kind.setdefault(kind_of(name), []).append(name)
    for names in by_kind.values():
        count = max(1, min(len(names), ANCHORED // len(by_kind)))
        spread = {names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)} | {names[len(names) // 2]}
        for name in names:
            keys += [(name, text) for text in _plain(offered[name], everything=name == names[len(names) // 2])]
        for name in (n for n in names if n in spread):
            ranked = sorted((s for s in offered[name] if s.rank), key=lambda s: _far(s, probes[name]))
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


def _plain(offered: Sequence[Spec], everything: bool) -> list[str]:
    """The rank-0 options that no rotation makes alike: all, or the middle one at every number of bits."""
    found: dict[tuple[str, float], list[str]] = {}
    for spec in offered:
        if not spec.rank and side_of(spec)[2]:
            found.setdefault((spec.backbone.split("-")[0], spec.quantizer().bits), []).append(str(spec))
    return [text for texts in found.values() for text in (texts if everything else texts[len(texts) // 2 :][:1])]


def _far(spec: Spec, probed: str) -> tuple[bool, float, bool]:
    grid, wanted = spec.quantizer(), Spec.parse(probed)
    return (
        grid.unit_scale != wanted.quantizer().unit_scale,
        abs(grid.bits - wanted.quantizer().bits),
        spec.backbone != wanted.backbone,
    )


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
