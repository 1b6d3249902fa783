"""The alternation: W ≈ g · Uᵀ (Q + L R) V, Q and L R improved in turn, the best pair kept.

After Q ← LDLQ(W − L R) and (L, R) ← rank-constrained regression of W − Q, both rounded, the error tr(E H Eᵀ) is judged
after each half-step; the alternation stops when it no longer falls. The decomposition and its alternation are CALDERA's
(arXiv 2405.18886, algorithms 1 and 2); trellis backbones and factors rounded with feedback in their own metrics are ours.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.alternation import Candidate, Problem, first_step, improve_backbone, init, only, step
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.bounds import ldl_diagonal, nearest_bound
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.factors import pack_factors
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.metric import Metric
from qlr_jax.core.objective import checked_hessian, checked_weight, relative_error
from qlr_jax.core.quantizers import Integer, Nothing
from qlr_jax.core.sharding import mesh_for
from qlr_jax.core.spec import Spec


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
            `felt_error`, the same in G as well, √(tr(G E H Eᵀ)/tr(G W H Wᵀ)); `history`, what was minimised after every half-step;
            `iterations`; `bound`: what the relative error cannot exceed (`bounds.nearest_bound`), for integer backbones without
            factors and without G, None elsewhere.
    """

    value: QLRMatrix
    verdict: Verdict
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits per weight, as stored."""
        rows, cols = self.value.shape
        return 8 * self.value.nbytes / (rows * cols)

    def told(self) -> str:
        """Spec, bits and error in a few words."""
        return f"{self.value.spec}: {self.bits:.4g} bits, error {self.stats['relative_error']:.4f}"


def solve(
    weight: Any,
    hessian: Any,
    spec: str | Spec,
    *,
    output_hessian: Any = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> Solution:
    """Compress one matrix: minimise tr(G E H Eᵀ), E = W − g · Uᵀ (Q + L R) V, with Q, L, R on their grids.

    Args:
        weight: W, (out, in).
        hessian: H = E[x xᵀ], (in, in); None means the identity.
        spec: how to store it, e.g. `trellis-2+r32@trellis-4`.
        output_hessian: G, (out, out), e.g. the mean of g gᵀ over gradients g of the end loss at the outputs; None means the
            identity: all outputs matter alike.
        seed: of the rotation's signs.
        preset: None, the default method; "paper", CALDERA as published, for specs such as `e8-2+r64@e8-4`.
        **options: fields of `SolverConfig`, e.g. state_bits=10, iterations=8; over a preset's own.

    Raises:
        QLRError: non-finite input, a Hessian that is not symmetric positive semi-definite, a rank too large, an unknown
            spec, option or preset.

    Source: CALDERA, arXiv 2405.18886; QTIP, arXiv 2406.11235; for G: YAQA, arXiv 2505.22988.

    Example:
        >>> import numpy as np
        >>> w = np.random.default_rng(0).standard_normal((32, 48))
        >>> solution = solve(w, None, "int-4g16")
        >>> bool(solution.stats["relative_error"] < 0.1), solution.verdict.name
        (True, 'SINGLE_PASS')
    """
    weight = checked_weight(weight)
    config = SolverConfig.make(options, preset)
    matrix = checked_hessian(hessian, weight.shape[1])
    output = None if output_hessian is None else checked_hessian(output_hessian, weight.shape[0], "outputs")[None]
    return solve_batch(weight[None], matrix[None], spec, outputs=output, seed=seed, config=config)[0]


@one_blas_thread()
def solve_batch(
    weights: np.ndarray,
    hessians: np.ndarray | Metric,
    spec: str | Spec,
    *,
    outputs: np.ndarray | None = None,
    seed: int = 0,
    config: SolverConfig | None = None,
    groups: Sequence[int] | None = None,
    devices: int | None = None,
) -> list[Solution]:
    """`solve` for matrices of one shape and spec, (b, m, n), computed together; inputs already checked.

    The matrices are shared out over the devices of this process, and the rows of each where devices are left over; results are
    those of one device, for batches up to near ties (`core.devices`).

    Args:
        hessians: one each (b, n, n), one for all (1, n, n), or a `Metric` made before of either.
        outputs: G of each (b, m, m) or for all (1, m, m); None: the identity.
        groups: how many matrices after each other stop iterating together, e.g. (2, 2) of four; None: all of them.
        devices: how many to use at most; None: all.
    """
    config, spec = config or SolverConfig(), Spec.parse(spec)
    spec.nbytes(weights.shape[1:])  # refuses a rank too large
    metric = hessians if isinstance(hessians, Metric) else Metric.make(hessians, seed, config, spec.rotated)
    output = None if outputs is None else Metric.make(outputs, seed, config, spec.rotated, hadamard.OUTPUT)
    mesh = mesh_for(*weights.shape[:2], devices)
    problem = Problem.make(weights, metric, output, spec, seed, config, mesh)
    del metric, output  # on a mesh the problem has its own
    if spec.rank == 0:
        state = improve_backbone(problem, init(problem, config.start))
        return _finish(problem, state.best, [[state.error]] * len(weights), [True] * len(weights))
    state = first_step(problem)
    members = np.repeat(np.arange(len(groups or [0])), groups or len(weights))
    members = np.append(members, np.full(len(state.error) - len(members), members[-1]))  # a mesh is filled up with the last one
    histories = [[*state.trail] for _ in members]
    running, converged = np.ones(len(members), bool), np.zeros(len(members), bool)
    for _ in range(config.iterations - 1):
        before = state
        state = only(running, step(problem, before), before)
        for i in np.flatnonzero(running):
            histories[i] += state.trail
        gained = 1.0 - state.best_error / np.maximum(before.best_error, 1e-30)
        # factors that hold what Q leaves worse than Q's own result will not help the next Q either
        hopeless = state.error > 1.2 * state.best_error
        settled = (gained < config.tolerance) | hopeless
        converged = np.where(running, [settled[members == group].all() for group in members], converged)
        if config.tolerance > 0:
            running = ~converged
        if not running.any():
            break
    best = state.best
    state = before = None  # decoding needs the room
    return _finish(problem, best, histories, converged)


def _finish(
    problem: Problem, found: Candidate, histories: Sequence[Sequence[np.ndarray]], converged: Sequence[bool]
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
            stats["felt_error"] = float(relative_error(*pair, problem.metric.of(i), problem.output.of(i)))
        solutions.append(Solution(value, _verdict(problem, i, trail, bool(converged[i])), stats))
    return solutions


def _bound(problem: Problem, best: Candidate, i: int) -> float | None:
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


def _verdict(problem: Problem, i: int, history: Sequence[float], converged: bool) -> Verdict:
    if not problem.original[i].any():
        return Verdict.ZERO_WEIGHT
    if problem.spec.rank == 0:
        return Verdict.SINGLE_PASS
    return Verdict.CONVERGED if converged else Verdict.ITERATION_LIMIT
