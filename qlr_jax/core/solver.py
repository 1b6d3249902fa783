"""The alternation: W ≈ g · Uᵀ (Q + L R) V, Q and L R improved in turn, the best pair kept.

After Q ← LDLQ(W − L R) and (L, R) ← rank-constrained regression of W − Q, both rounded, the error tr(E H Eᵀ) is judged
after each half-step; the alternation stops when it no longer falls. The decomposition and its alternation are CALDERA's
(arXiv 2405.18886, algorithms 1 and 2); trellis backbones and factors rounded with feedback in their own metrics are ours.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.factors import Factors, fit_factors, no_factors, pack_factors
from qlr_jax.core.ldlq import column_block, feedback, ldlq, pad_metric, pad_to_tiles
from qlr_jax.core.low_rank import bucket, start_basis
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.objective import checked_hessian, checked_weight, damped, quadratic, relative_error
from qlr_jax.core.quantizers import Nothing, Quantizer
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError


class Verdict(enum.Enum):
    """How a solve ended; `str(verdict)` says what that means and what to do about it."""

    SINGLE_PASS = "one pass of LDLQ: with rank 0 there is nothing to alternate with"
    CONVERGED = "the error stopped falling; the best iterate was kept"
    ITERATION_LIMIT = "the error was still falling at the last iteration; pass more `iterations` for a little more"
    ZERO_WEIGHT = "the weight is zero, and so is its approximation; check that the checkpoint is trained"
    FACTORS_UNUSED = (
        "the factors lowered the error by less than 1 %; at these bytes rank 0 with more backbone bits is likely better"
    )

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class SolverConfig:
    """Settings of the alternation.

    Attributes:
        iterations: outer alternations at most (Q, then the factors).
        inner: alternations between L and R inside one fit of the factors.
        subspace_steps: power steps of the subspace iteration, first fit; later fits start warm and take two.
        damping: fraction of H's mean diagonal added before it is factored.
        downdate: τ of H − τ H Rᵀ(R H Rᵀ)⁻¹R H, the metric in which Q is rounded; None: 0.9 for factors of 8 bits and more, else 0.
        tolerance: stop when an iteration improves the error by less than this fraction.
        state_bits: of trellis codes, 6 to 16: time grows as 2^state_bits.
        rotation_block: 0 for full-width rotations, or a power of two for block-diagonal ones.
    """

    iterations: int = 4
    inner: int = 2
    subspace_steps: int = 4
    damping: float = 1e-2
    downdate: float | None = None
    tolerance: float = 3e-3
    state_bits: int = 12
    rotation_block: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "inner", "subspace_steps"):
            if getattr(self, name) < 1:
                raise QLRError(f"{name}={getattr(self, name)} does nothing; pass at least 1")
        if self.downdate is not None and not 0 <= self.downdate <= 1:
            raise QLRError(f"downdate={self.downdate} is outside [0, 1]; pass a strength from 0 to 1, or None")

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> SolverConfig:
        """From keyword options; an unknown one is refused by name."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise QLRError(f"{name!r} is not a solver option; pass one of {', '.join(sorted(known))}")
        return cls(**options)


@dataclass(frozen=True)
class Solution:
    """What `solve` returns.

    Attributes:
        value: the compressed matrix.
        verdict: how it ended.
        stats: `relative_error` √(tr(E H Eᵀ)/tr(W H Wᵀ)) of `value.dense()` with the H given, undamped; `history`, the same
            after every half-step; `iterations`.
    """

    value: QLRMatrix
    verdict: Verdict
    stats: Mapping[str, Any] = field(default_factory=dict)


def solve(weight: Any, hessian: Any, spec: str | Spec, *, seed: int = 0, preset: str | None = None, **options: Any) -> Solution:
    """Compress one matrix: minimise tr(E H Eᵀ), E = W − g · Uᵀ (Q + L R) V, with Q, L, R on their grids.

    Args:
        weight: W, (out, in).
        hessian: H = E[x xᵀ], (in, in); None means the identity.
        spec: how to store it, e.g. `trellis-2+r32@trellis-4`.
        seed: of the rotation's signs.
        preset: None, the default method.
        **options: fields of `SolverConfig`, e.g. state_bits=10, iterations=8.

    Raises:
        QLRError: non-finite input, a Hessian that is not symmetric positive semi-definite, a rank too large, an unknown
            spec, option or preset.

    Source: CALDERA, arXiv 2405.18886; QTIP, arXiv 2406.11235.

    Example:
        >>> import numpy as np
        >>> w = np.random.default_rng(0).standard_normal((32, 48))
        >>> solution = solve(w, None, "int-4g16")
        >>> bool(solution.stats["relative_error"] < 0.1), solution.verdict.name
        (True, 'SINGLE_PASS')
    """
    weight = checked_weight(weight)
    if preset is not None:
        raise QLRError(f"preset {preset!r} is not known; leave it out for the default method")
    matrix = checked_hessian(hessian, weight.shape[1])
    return solve_batch(weight[None], matrix[None], spec, seed=seed, config=SolverConfig.make(options))[0]


def solve_batch(
    weights: np.ndarray, hessians: np.ndarray, spec: str | Spec, *, seed: int = 0, config: SolverConfig | None = None
) -> list[Solution]:
    """`solve` for matrices of one shape and spec, (b, m, n) with (b, n, n), computed together; inputs already checked."""
    config, spec = config or SolverConfig(), Spec.parse(spec)
    spec.nbytes(weights.shape[1:])  # refuses a rank too large
    problem = Problem.make(weights, hessians, spec, seed, config)
    state = init(problem)
    history = [state.error]
    if spec.rank == 0:
        state = improve_backbone(problem, state)
        return _finish(problem, state, [np.asarray(state.error)], converged=True)
    history, converged = [], False
    for _ in range(config.iterations):
        before = state.best_error
        state = step(problem, state)
        history += [np.asarray(e) for e in state.trail]
        gained = 1.0 - np.asarray(state.best_error) / np.maximum(np.asarray(before), 1e-30)
        # factors that hold what Q leaves worse than Q's own result will not help the next Q either
        hopeless = np.asarray(state.error) > 1.2 * np.asarray(state.best_error)
        converged = bool(np.all((gained < config.tolerance) | hopeless))
        if converged:
            break
    return _finish(problem, state, history, converged)


@dataclass(frozen=True)
class Problem:
    """What does not change during the alternation, in the rotated basis and in units of `unit`."""

    spec: Spec
    layout: Layout
    config: SolverConfig
    original: np.ndarray
    original_hessian: np.ndarray
    unit: np.ndarray  # (b,): the weight's size
    weight: Array
    hessian: Array
    energy: Array  # tr(W H Wᵀ)
    backbone: Quantizer
    factor: Array | None  # of LDLQ for the backbone, where H is not downdated
    right_factor: Array | None  # of LDLQ for R
    mask: Array | None

    @classmethod
    def make(cls, weights: np.ndarray, hessians: np.ndarray, spec: Spec, seed: int, config: SolverConfig) -> Problem:
        m, n = weights.shape[1:]
        # errors are relative: a power of two taken out of H changes no digit, and keeps float32 in range
        peak = np.abs(hessians).max(axis=(1, 2))
        hessians = np.asarray(hessians / np.exp2(np.round(np.log2(np.where(peak > 0, peak, 1.0))))[:, None, None], np.float32)
        layout = Layout(str(spec), (m, n), seed, config.rotation_block, config.state_bits)
        backbone = spec.quantizer(config.state_bits)
        size = np.sqrt(np.mean(np.square(weights, dtype=np.float64), axis=(1, 2)))
        size = np.where(size > 0, size, 1.0)
        if not backbone.unit:  # a power of two leaves scales exact for formats that store no g
            size = 2.0 ** np.round(np.log2(size)) if spec.has_scale else np.ones_like(size)
        weight, hessian = jnp.asarray(weights / size[:, None, None], jnp.float32), jnp.asarray(hessians, jnp.float32)
        if spec.rotated:
            weight, hessian = _rotated(weight, hessian, seed, config.rotation_block)
        energy = quadratic(weight, hessian)
        tau = downdate_strength(spec, config)
        factor = None
        if not isinstance(backbone, Nothing) and tau == 0:
            factor = _ldl(hessian, config.damping, column_block(backbone))
        right_factor = mask = None
        if spec.rank:
            right = spec.factor_quantizers(config.state_bits)[1]
            right_factor = _ldl(hessian, config.damping, column_block(right))
            columns = -(-bucket(spec.rank, min(m, n)) // 8) * 8
            mask = (jnp.arange(columns) < spec.rank).astype(jnp.float32)
        return cls(spec, layout, config, weights, hessians, size, weight, hessian, energy, backbone, factor, right_factor, mask)


def _ldl(hessian: Array, damping: float, width: int) -> Array:
    return feedback(pad_metric(damped(hessian, damping), width), width)[0]


def _rotated(weight: Array, hessian: Array, seed: int, block: int) -> tuple[Array, Array]:
    m, n = weight.shape[-2:]
    u, v = hadamard.signs(seed, hadamard.OUTPUT, m), hadamard.signs(seed, hadamard.INPUT, n)
    ub, vb = hadamard.block_size(m, block), hadamard.block_size(n, block)
    weight = hadamard.rotate(weight, v, vb)
    weight = jnp.swapaxes(hadamard.rotate(jnp.swapaxes(weight, -1, -2), u, ub), -1, -2)
    return weight, hadamard.rotate_hessian(hessian, v, vb)


def downdate_strength(spec: Spec, config: SolverConfig) -> float:
    """τ: how far Q may lean on the factors. It pays only as far as they can hold what Q leaves to them."""
    if spec.rank == 0:
        return 0.0
    if config.downdate is not None:
        return config.downdate
    return 0.9 if min(q.bits for q in spec.factor_quantizers()) >= 8 else 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidate:
    """One (Q, L, R) with its codes."""

    q: Array
    codes: Array
    scale: Array  # (b,) of a unit backbone, else 1
    scales: tuple[Array, ...]  # of a backbone that stores its own
    factors: Factors


@dataclass(frozen=True)
class State:
    """The current and the best candidate, and their errors √(tr(E H Eᵀ)/tr(W H Wᵀ)) per matrix."""

    now: Candidate
    basis: Array | None  # of the subspace iteration, kept warm
    error: Array
    best: Candidate
    best_error: Array
    trail: tuple[Array, ...] = ()


def init(problem: Problem) -> State:
    """Before the first step: no backbone yet; the factors fitted to W itself (low rank first)."""
    b, m, n = problem.weight.shape
    q = jnp.zeros_like(problem.weight)
    factors, basis = no_factors(b), None
    if problem.spec.rank:
        start = np.broadcast_to(start_basis(m, min(len(problem.mask), m, n), 0), (b, m, min(len(problem.mask), m, n)))
        factors, basis = _fit(problem, q, jnp.asarray(start), problem.config.subspace_steps)
    scale = jnp.ones((b,))
    now = Candidate(q, jnp.zeros((b,)), scale, (), factors)
    nothing = jnp.full((b,), jnp.inf)
    state = State(now, basis, nothing, now, nothing)
    if isinstance(problem.backbone, Nothing):  # the factors alone: a candidate already
        error = _error(problem, now)
        state = replace(state, error=error, best_error=error)
    return state


def step(problem: Problem, state: State) -> State:
    """One alternation: Q on what the factors leave, then the factors on what Q leaves; each result judged."""
    trail: tuple[Array, ...] = ()
    if not isinstance(problem.backbone, Nothing):
        state = improve_backbone(problem, state)
        trail = (state.error,)
    factors, basis = _fit(problem, state.now.q, state.basis, 2)
    state = _judge(problem, replace(state, basis=basis), replace(state.now, factors=factors))
    return replace(state, trail=(*trail, state.error))


def improve_backbone(problem: Problem, state: State) -> State:
    """Q ← LDLQ(W − L R)."""
    quantizer, (_, m, n) = problem.backbone, problem.weight.shape
    width = column_block(quantizer)
    left_over = problem.weight - state.now.factors.product() if problem.spec.rank else problem.weight
    factor = problem.factor
    if factor is None:
        tau = downdate_strength(problem.spec, problem.config)
        factor = _ldl(downdated(problem.hessian, state.now.factors.right, tau), problem.config.damping, width)
    scales = quantizer.fit(left_over, per_row=False)
    padded = pad_to_tiles(left_over, *quantizer.tile)
    q, codes = ldlq(padded, factor, quantizer.grid(scales, n), quantizer.data(), quantizer.family())
    q, scale = q[:, :m, :n], jnp.ones(q.shape[:1])
    if quantizer.unit:
        # one scale for all of Q costs nothing to refit: the best multiple of Q in the metric
        weighted = jnp.matmul(q, problem.hessian, precision="highest")
        own = jnp.sum(weighted * q, axis=(-2, -1))
        best = jnp.where(own > 0, jnp.sum(weighted * left_over, axis=(-2, -1)) / jnp.where(own > 0, own, 1.0), 1.0)
        q, scale, scales = q * best[:, None, None], scales[0][:, 0, 0] * best, ()
    return _judge(problem, state, Candidate(q, codes, scale, scales, state.now.factors))


@jax.jit
def downdated(hessian: Array, right: Array, strength: float) -> Array:
    """H − τ H Rᵀ (R H Rᵀ)⁻¹ R H: at τ = 1, the loss of Q's error that remains once L is refitted with R fixed."""
    weighted = jnp.matmul(right, hessian, precision="highest")
    metric = jnp.matmul(weighted, jnp.swapaxes(right, -1, -2), precision="highest")
    mean = jnp.trace(metric, axis1=-2, axis2=-1)[..., None, None] / metric.shape[-1]
    metric = metric + 1e-6 * jnp.where(mean > 0, mean, 1.0) * jnp.eye(metric.shape[-1])
    inner = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(metric), True), weighted)
    taken = jnp.matmul(jnp.swapaxes(weighted, -1, -2), inner, precision="highest")
    return hessian - strength * (taken + jnp.swapaxes(taken, -1, -2)) / 2


def _fit(problem: Problem, q: Array, basis: Array | None, steps: int) -> tuple[Factors, Array]:
    left, right = problem.spec.factor_quantizers(problem.config.state_bits)
    return fit_factors(
        problem.weight - q, problem.hessian, problem.right_factor, basis, problem.mask, (left.data(), right.data()),
        families=(left.family(), right.family()), steps=steps, inner=problem.config.inner,
    )  # fmt: skip


def _error(problem: Problem, candidate: Candidate) -> Array:
    total = candidate.q + candidate.factors.product() if problem.spec.rank else candidate.q
    return relative_error(problem.weight, total, problem.hessian)


def _judge(problem: Problem, state: State, candidate: Candidate) -> State:
    error = _error(problem, candidate)
    if not np.isfinite(np.asarray(state.best_error)).any():  # the first: shapes of codes are known from here on
        return replace(state, now=candidate, error=error, best=candidate, best_error=error)
    better = error < state.best_error

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    best = jax.tree.map(choose, candidate, state.best)
    return replace(state, now=candidate, error=error, best=best, best_error=jnp.minimum(error, state.best_error))


def _finish(problem: Problem, state: State, history: Sequence[np.ndarray], converged: bool) -> list[Solution]:
    spec, backbone, solutions = problem.spec, problem.backbone, []
    best = jax.tree.map(np.asarray, state.best)
    for i in range(problem.weight.shape[0]):
        inner, original = float(best.scale[i]), problem.original[i]
        if inner == 0 and original.any():  # the factors leave nothing to Q; g is theirs too and must not erase them
            inner = 2.0**-12
        arrays = {f"backbone.{k}": v for k, v in backbone.pack(best.codes[i], tuple(s[i] for s in best.scales)).items()}
        if spec.has_scale:
            arrays["scale"] = np.array([inner * problem.unit[i]], np.float32)
        if spec.rank:
            arrays |= pack_factors(best.factors.of(i), spec, problem.config.state_bits, inner)
        value = QLRMatrix({k: jnp.asarray(v) for k, v in arrays.items()}, problem.layout)
        peak = np.abs(original).max() or np.float32(1)
        error = float(relative_error(original / peak, value.dense() / peak, problem.original_hessian[i]))
        trail = [float(h[i]) for h in history]
        judged = 2 if spec.rank and not isinstance(backbone, Nothing) else 1  # errors recorded in one iteration
        stats = {"relative_error": error, "history": trail, "iterations": len(trail) // judged}
        solutions.append(Solution(value, _verdict(problem, i, trail, converged), stats))
    return solutions


def _verdict(problem: Problem, i: int, history: Sequence[float], converged: bool) -> Verdict:
    if not problem.original[i].any():
        return Verdict.ZERO_WEIGHT
    if problem.spec.rank == 0:
        return Verdict.SINGLE_PASS
    return Verdict.CONVERGED if converged else Verdict.ITERATION_LIMIT
