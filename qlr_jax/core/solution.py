"""What a solve hands back: the compressed matrix, how it ended, its errors, and a bound on them."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from qlr_jax.core.alternation import Iterate
from qlr_jax.core.bounds import covering_bound
from qlr_jax.core.factors import pack_factors
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.objective import relative_errors
from qlr_jax.core.problem import MatrixProblem


class Verdict(enum.Enum):
    """How a solve ended; `str(verdict)` says what that means and what to do about it."""

    SINGLE_PASS = "one pass of LDLQ: with rank 0 there is nothing to alternate with"
    CONVERGED = "the error stopped falling; the best iterate was kept"
    ITERATION_LIMIT = "the error was still falling at the last iteration; pass more `iterations` for a little more"
    ZERO_WEIGHT = "the weight is zero, and so is its approximation; check that the checkpoint is trained"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Solution:
    """What `solve` returns.

    Attributes:
        value: the compressed matrix.
        verdict: how it ended.
        stats: by name:
            `relative_error`    √(tr(E H Eᵀ) / tr(W H Wᵀ)) of `value.dense()` with the H given, undamped
            `weighted_error`    where G was given: √(tr(G E H Eᵀ) / tr(G W H Wᵀ))
            `history`           what was minimised, after every half-step
            `iterations`        how many were run
            `bound`             what `relative_error` cannot exceed (`bounds.covering_bound`): for codes with a covering radius
                                (integers, normal-float, E8), with and without factors; else None
            `bound_note`        why there is no bound; None where there is one
    """

    value: QLRMatrix
    verdict: Verdict
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits per weight, as stored."""
        return self.value.bits

    def summary(self) -> str:
        """Spec, bits and error in a few words."""
        return f"{self.value.spec}: {self.bits:.4g} bits, error {self.stats['relative_error']:.4f}"

    told = summary  # another name of it, for callers outside of this library


def finish(
    problem: MatrixProblem,
    iterate: Iterate,
    histories: Sequence[Sequence[np.ndarray]],
    converged: Sequence[bool] | np.ndarray,
    wanted: Sequence[int] | None = None,
) -> list[Solution]:
    """The solutions of a problem, packed and evaluated as they are stored.

    Args:
        problem: of b matrices.
        iterate: the best that was found for each.
        histories: by matrix, the errors (b,) after every half-step that it took part in.
        converged: by matrix, whether it stopped by itself.
        wanted: the matrices to make solutions of; None: all.
    """
    solutions = []
    best = jax.tree.map(np.asarray, iterate)
    half_steps = 2 if problem.spec.rank and not problem.backbone.empty else 1  # errors recorded in one iteration
    for i in range(len(problem.original)) if wanted is None else wanted:  # the weights on several devices are filled up
        value, original = _packed(problem, best, i), problem.original[i]
        peak = np.exp2(np.round(np.log2(np.abs(original).max() or np.float32(1))))  # as for H: exact, and in range
        errors = relative_errors(
            original / peak, value.dense() / peak, problem.metric.of(i), None if problem.output is None else problem.output.of(i)
        )
        stats: dict[str, Any] = {"relative_error": float(errors[0])}
        history = [float(errors[i]) for errors in histories[i]]
        stats |= {"history": history, "iterations": len(history) // half_steps}
        stats["bound"], stats["bound_note"] = _bound(problem, best, value, i)
        if problem.output is not None:
            stats["weighted_error"] = float(errors[1])
        solutions.append(Solution(value, _verdict(problem, i, bool(converged[i])), stats))
    return solutions


def _packed(problem: MatrixProblem, best: Iterate, i: int) -> QLRMatrix:
    """One matrix of the batch as it is stored."""
    spec, inner = problem.specs[i], float(best.scale[i])
    if inner == 0 and problem.original[i].any():  # the factors leave nothing to Q; g is theirs too and must not erase them
        inner = 2.0**-12
    scales = tuple(s[i] for s in best.scales)
    arrays: dict[str, Any] = {f"backbone.{k}": v for k, v in problem.backbones[i].pack(np.asarray(best.codes[i]), scales).items()}
    if spec.has_scale:
        arrays["scale"] = np.array([inner * problem.unit[i]], np.float32)
    if spec.rank:
        arrays |= pack_factors(best.factors.of(i), spec, problem.config.state_bits, inner)
    return QLRMatrix(arrays, problem.layouts[i])


def _bound(problem: MatrixProblem, best: Iterate, value: QLRMatrix, i: int) -> tuple[float | None, str | None]:
    """(bound on the relative error, None), or (None, why there is none)."""
    backbone, energy, metric = problem.backbones[i], float(np.asarray(problem.energy)[i]), problem.metric
    n, width, at = problem.layouts[i].shape[1], backbone.tile[1], min(i, len(metric.original) - 1)
    own = tuple(s[i] for s in best.scales)
    radius = backbone.covering_radius((best.scale[i].reshape(1, 1), *own) if backbone.unit_scale else own, n)
    if backbone.empty:
        return None, "no backbone is rounded"
    if radius is None:
        return None, f"{backbone.name} has no covering radius"
    if problem.output is not None:
        return None, "errors are weighted by outputs"
    if metric.damping == 0:
        return None, "H is not damped"
    if energy <= 0:
        return None, "the weight is zero"
    error = np.asarray(problem.weight[i], np.float64)
    if problem.spec.rank or backbone.unit_scale:  # as it is stored: scales of components are rounded, too
        stored = np.asarray(value.backbone(), np.float64)
        if problem.spec.rank:
            left, right = value.factors()
            stored = stored + np.asarray(left, np.float64) @ np.asarray(right, np.float64)
        error = error - stored / problem.unit[i]
    else:
        error = error - best.q[i]
    rounding = error + error @ np.asarray(metric.factor(width), np.float64)[at][:n, :n]  # what each rounding missed its target by
    squared = covering_bound(rounding, np.asarray(radius), metric.block_norms(at, width), width)
    return float(np.sqrt(squared / energy)), None


def _verdict(problem: MatrixProblem, i: int, converged: bool) -> Verdict:
    if not problem.original[i].any():
        return Verdict.ZERO_WEIGHT
    if problem.spec.rank == 0:
        return Verdict.SINGLE_PASS
    return Verdict.CONVERGED if converged else Verdict.ITERATION_LIMIT
