"""What a solve hands back: the compressed matrix, how it ended, and its errors and bound."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from qlr_jax.core.alternation import Candidate
from qlr_jax.core.bounds import ldl_diagonal, nearest_bound
from qlr_jax.core.factors import pack_factors
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.objective import relative_error
from qlr_jax.core.problem import MatrixProblem
from qlr_jax.core.quantizers import Integer, Nothing


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
        stats: `relative_error` √(tr(E H Eᵀ)/tr(W H Wᵀ)) of `value.dense()` with the H given, undamped; where G was given,
            `weighted_error`, the same in G as well, √(tr(G E H Eᵀ)/tr(G W H Wᵀ)); `history`, what was minimised after every
            half-step; `iterations`; `bound`: what the relative error cannot exceed (`bounds.nearest_bound`), for integer
            backbones without factors and without G, None elsewhere.
    """

    value: QLRMatrix
    verdict: Verdict
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits per weight, as stored."""
        rows, cols = self.value.shape
        return 8 * self.value.nbytes / (rows * cols)

    def summary(self) -> str:
        """Spec, bits and error in a few words."""
        return f"{self.value.spec}: {self.bits:.4g} bits, error {self.stats['relative_error']:.4f}"


def finish(
    problem: MatrixProblem, found: Candidate, histories: Sequence[Sequence[np.ndarray]], converged: Sequence[bool]
) -> list[Solution]:
    spec, backbone, solutions = problem.spec, problem.backbone, []
    best = jax.tree.map(np.asarray, found)
    for i in range(len(problem.original)):  # the weights on a mesh are filled up
        inner, original = float(best.scale[i]), problem.original[i]
        if inner == 0 and original.any():  # the factors leave nothing to Q; g is theirs too and must not erase them
            inner = 2.0**-12
        arrays = {f"backbone.{k}": v for k, v in backbone.pack(best.codes[i], tuple(s[i] for s in best.scales)).items()}
        if spec.has_scale:
            arrays["scale"] = np.array([inner * problem.unit[i]], np.float32)
        if spec.rank:
            arrays |= pack_factors(best.factors.of(i), spec, problem.config.state_bits, inner)
        value = QLRMatrix(arrays, problem.layout)
        peak = np.exp2(np.round(np.log2(np.abs(original).max() or np.float32(1))))  # as for H: exact, and in range
        pair = original / peak, value.dense() / peak
        error = float(relative_error(*pair, problem.metric.of(i)))
        trail = [float(h[i]) for h in histories[i]]
        judged = 2 if spec.rank and not isinstance(backbone, Nothing) else 1  # errors recorded in one iteration
        stats = {"relative_error": error, "history": trail, "iterations": len(trail) // judged, "bound": _bound(problem, best, i)}
        if problem.output is not None:
            stats["weighted_error"] = float(relative_error(*pair, problem.metric.of(i), problem.output.of(i)))
        solutions.append(Solution(value, _verdict(problem, i, trail, bool(converged[i])), stats))
    return solutions


def _bound(problem: MatrixProblem, best: Candidate, i: int) -> float | None:
    """What LDLQ with nearest rounding cannot exceed, relative: the assumptions hold for scalar grids, and no factors."""
    energy = float(problem.energy[i])
    if (
        not isinstance(problem.backbone, Integer)
        or problem.spec.rank
        or energy <= 0
        or problem.metric.damping == 0
        or problem.output
    ):
        return None
    place = min(i, len(problem.metric.original) - 1)
    metric = np.asarray(problem.metric.regular[place], np.float64)
    error = np.asarray(problem.weight[i], np.float64) - best.q[i]
    rounding = error + error @ np.asarray(problem.metric.factor(1)[place], np.float64)  # what each rounding missed its target by
    steps = np.asarray(problem.backbone.broadcast_qparams(tuple(s[i] for s in best.scales), error.shape[1])[0], np.float64)
    overshoot = np.maximum(np.abs(rounding) - steps / 2, 0.0)
    return float(np.sqrt(nearest_bound(steps, ldl_diagonal(metric), overshoot=overshoot) / energy))


def _verdict(problem: MatrixProblem, i: int, history: Sequence[float], converged: bool) -> Verdict:
    if not problem.original[i].any():
        return Verdict.ZERO_WEIGHT
    if problem.spec.rank == 0:
        return Verdict.SINGLE_PASS
    return Verdict.CONVERGED if converged else Verdict.ITERATION_LIMIT
