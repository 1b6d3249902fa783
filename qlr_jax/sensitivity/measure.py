"""Model and statistics -> allocators.OptionTable with the predicted damage of every option of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from allocators import Option, OptionTable, Row
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.lazy import handle
from qlr_jax.core.solver import Solution
from qlr_jax.core.spec import Spec
from qlr_jax.engine import HERE, Call, Engine
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama, is_linear, kind_of, layer_of
from qlr_jax.progress import Progress
from qlr_jax.sensitivity.anchors import anchors, linear_offers, probe
from qlr_jax.sensitivity.attribution import Case, attribute
from qlr_jax.sensitivity.correction import Correction, correction_key
from qlr_jax.sensitivity.offers import Bytes
from qlr_jax.sensitivity.predict import Profile, predict, profile
from qlr_jax.sensitivity.statistics import Statistics, final_error
from qlr_jax.sensitivity.vocabulary import row_errors, vocabulary_probe

NOTED_COMPONENTS = 64  # of every spectrum, that a saved table carries


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
                raise QLRError(f"the table has a row {row.name}, which is not to be compressed here; measure this model again")
            shape = tuple(self.table.notes["matrices"][row.name]["shape"])
            if row.weights != prices[row.name].weights or any(nbytes(Spec.parse(o.spec), shape) != o.bytes for o in row.options):
                raise QLRError(f"the table's row {row.name} is of another matrix, target or version; measure this model again")
        if missing := [name for name in prices.index if name not in self.table.index]:
            raise QLRError(f"the table has no row {missing[0]}; measure this model again, or exclude that matrix")


# one piece: what is solved, attributed and predicted share the same names and errors
def measure(
    model: Llama,
    statistics: Statistics,
    reference: Reference,
    table: OptionTable,
    *,
    config: SolverConfig,
    search: SolverConfig,
    seed: int,
    method: str,
    progress: Progress,
    solver: Callable[..., Mapping[tuple[str, str], Solution]] = solve_many,
    engine: Engine = HERE,
) -> Sensitivity:
    """Measure every matrix a little, predict all of its options.

    Every matrix is solved as its probe, and once with factors (of many matrices a part); one matrix of each kind with all the
    offered factors; with unrotated backbones, once at every number of bits: these anchor the predictions. The model's KL is
    attributed to the probes' errors, and then damage(option) = KL(probe) · (predicted error(option) / error(probe))².

    Args:
        model: the original.
        statistics: of the matrices to compress.
        reference: the original's log-probabilities on calibration text.
        table: the options, from `price`.
        config: of the final solves; search: of these (fewer state bits).
        seed: of rotations, and of noise where the method draws it.
        method: one of `ATTRIBUTIONS`.
        progress: where stages go.
        solver: `solve_many`, or what calls it.
        engine: where all else runs.
    """
    offered = linear_offers(table)
    vocabulary = {row.name: [Spec.parse(option.spec) for option in row.options] for row in table.rows if row.name not in offered}
    largest = max((spec.rank for listed in offered.values() for spec in listed), default=0)
    weights = {name: statistics.weight(name) for name in offered}
    profiles = measured_profiles(weights, statistics, largest, config=config, seed=seed, progress=progress, engine=engine)
    probes = {name: probe(listed) for name, listed in offered.items()}
    keys = anchors(offered, probes)
    probes |= {name: vocabulary_probe(listed) for name, listed in vocabulary.items()}
    problems = {key: statistics.problem(*key) for key in (*keys, *((name, probes[name]) for name in vocabulary))}
    with progress.stage("probing", total=len(problems)) as stage:
        solved = solver(problems, seed=seed, config=search, on_done=lambda key, s: stage.advance(note=f"{key[0]} {s.summary()}"))
    errors = {key: final_error(solution) for key, solution in solved.items()}
    correction = _correction({key: errors[key] for key in keys}, profiles, search.state_bits)
    asked = {
        name: engine.submit(row_errors, *_row_problem(statistics, name), listed, config, search, seed, title="probing")
        for name, listed in vocabulary.items()
    }
    of_rows = dict(engine.results(asked))
    offered |= vocabulary
    with progress.stage("sensitivity", total=len(offered)) as stage:
        changes = {n: Call(_change, (handle(solved, (n, probes[n])), statistics.weight(n))) for n in offered}
        case = Case(model, changes, reference, statistics.hessians, statistics.outputs)
        attributed = attribute(method, case, seed=seed, on_done=lambda n: stage.advance(note=n), engine=engine)
    probed = {n: errors[n, probes[n]] for n in offered}
    coefficient = {n: attributed.kl[n] / probed[n] ** 2 if probed[n] > 0 else 0.0 for n in offered}
    exact = errors if config == search else {}  # the solves that would be made again are measured, all others predicted

    def with_damage(name: str, option: Option, spec: Spec) -> Option:
        error = exact.get((name, option.spec), of_rows.get(name, {}).get(option.spec))
        if error is None:
            # what factors alone reach needs no correction: no rounding of a backbone is in it
            factor = 1.0 if spec.quantizer().empty else correction.factor(name, correction_key(spec))
            error = min(factor * predict(profiles[name], spec, config.state_bits), 1.0)
        return replace(option, damage=coefficient[name] * error**2, measured=(name, option.spec) in exact)

    rows = tuple(
        replace(row, options=tuple(with_damage(row.name, o, spec) for o, spec in zip(row.options, offered[row.name], strict=True)))
        for row in table.rows
    )
    matrices = {
        n: matrix_note(n, statistics.weights[n].shape, profiles.get(n), coefficient[n], probes[n], probed[n], attributed.kl[n])
        for n in offered
    }
    return measured_table(table, rows, matrices, method, config.state_bits)


def _change(solution: Solution, weight: Any) -> np.ndarray:
    """ΔW of a solve."""
    return np.asarray(solution.value.dense()) - np.asarray(weight)


def _row_problem(statistics: Statistics, name: str) -> tuple[Any, ...]:
    return statistics.weight(name), statistics.hessians[name], statistics.outputs[name]


def measured_profiles(
    matrices: Mapping[str, Any],
    statistics: Statistics,
    max_rank: int,
    *,
    config: SolverConfig,
    seed: int,
    progress: Progress,
    engine: Engine = HERE,
) -> dict[str, Profile]:
    """The profile of every matrix.

    Args:
        matrices: name -> what stands for what is approximated: W, or what a given backbone leaves of it.
        statistics: H and G of each.
        max_rank: the largest rank that is offered.
        config: of the final solves.
        seed: of rotations.
        progress: where the stage goes.
        engine: where each is made.
    """
    profiles: dict[str, Profile] = {}
    settings = max_rank, seed, config.rotation_block, config.damping
    metrics = statistics.hessians, statistics.outputs
    with progress.stage("spectra", total=len(matrices)) as stage:
        asked = {
            name: engine.submit(_profile, matrices[name], metrics[0][name], metrics[1].get(name), *settings, title="spectra")
            for name in matrices
        }
        for name, found in engine.results(asked):
            profiles[name] = found
            stage.advance(note=name)
    return {name: profiles[name] for name in matrices}


def _profile(
    matrix: Any, hessian: np.ndarray, output: np.ndarray | None, max_rank: int, seed: int, block: int, damping: float
) -> Profile:
    return profile(np.asarray(matrix), hessian, max_rank, output=output, seed=seed, block=block, damping=damping)


def _correction(errors: Mapping[tuple[str, str], float], profiles: Mapping[str, Profile], state_bits: int) -> Correction:
    """How the errors that solves came out at compare with their predictions."""
    ratios = {}
    for (name, spec), error in errors.items():
        expected = predict(profiles[name], spec, state_bits)
        ratios[name, correction_key(Spec.parse(spec))] = error / expected if expected > 0 else 1.0
    return Correction(ratios, {n: kind_of(n) for n in profiles})


def measured_table(
    table: OptionTable, rows: tuple[Row, ...], matrices: Mapping[str, Any], method: str, state_bits: int
) -> Sensitivity:
    """The table with its damage, and notes on where it comes from.

    Args:
        table: as it was priced.
        rows: the same, with damage.
        matrices: name -> its `matrix_note`.
        method: of attribution.
        state_bits: of the trellis that the final solves have.
    """
    notes = {"unit": "nats of KL a token", "attribution": method, "state_bits": state_bits, "matrices": matrices}
    return Sensitivity(replace(table, rows=rows, notes=notes))


def matrix_note(
    name: str, shape: tuple[int, ...], profile: Profile | None, coefficient: float, probed: str, error: float, kl: float
) -> dict[str, Any]:
    """What a saved table says of a matrix.

    Args:
        name: of the matrix.
        shape: (out, in).
        profile: its spectra; None of embedding and head, which get no factors.
        coefficient: KL per unit of squared relative error, nats a token.
        probed: the spec that KL was attributed for.
        error: the relative error of that solve.
        kl: what was attributed to it, nats a token.
    """

    def shares(values: np.ndarray, whole: float) -> list[float]:
        return [float(f"{v / whole:.4g}") for v in values[:NOTED_COMPONENTS]] if whole > 0 else []

    return {
        "layer": layer_of(name) if is_linear(name) else None,
        "kind": kind_of(name),
        "shape": list(shape),
        "coefficient": coefficient,
        "probe": {"spec": probed, "error": error, "kl": kl},
        "spectrum": shares(profile.explained, profile.energy) if profile else [],
        "plain_spectrum": shares(profile.captured, profile.size) if profile else [],
    }


def prediction_quality(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How good predictions were: median, 10th and 90th percentile of solved over predicted, and how many pairs there are.

    Args:
        pairs: (predicted, solved) relative errors.

    Example:
        >>> prediction_quality([(0.2, 0.2), (0.1, 0.11)])["count"]
        2
    """
    ratios = [solved / predicted for predicted, solved in pairs if predicted > 0]
    if not ratios:
        return {}
    low, high = np.quantile(ratios, [0.1, 0.9])
    return {"median": float(median(ratios)), "p10": float(low), "p90": float(high), "count": len(ratios)}
