"""One alternation: Q on what the factors leave, then the factors on what Q leaves, the better candidate kept.

Every function that computes is compiled once for a shape; rates and seeds are data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.factors import Factors, fit_factors, no_factors
from qlr_jax.core.ldlq import column_block, echo, feedback, inflation, ldlq, pad_metric, pad_to_tiles
from qlr_jax.core.low_rank import bucket, start_basis
from qlr_jax.core.matrix import Layout
from qlr_jax.core.objective import damped, quadratic
from qlr_jax.core.quantizers import Nothing, Quantizer
from qlr_jax.core.quantizers.base import Grid
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array


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
    energy: Array  # (b,): tr(W H Wᵀ)
    backbone: Quantizer
    factor: Array | None  # of LDLQ for the backbone, where H is not downdated
    stretch: np.ndarray | None  # (b,): of the backbone's scale, for that factor
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
        scaled, rotations = np.asarray(weights / size[:, None, None], np.float32), ((np.ones(m), m), (np.ones(n), n))
        if spec.rotated:
            rotations = hadamard.sides((m, n), seed, config.rotation_block)
        (u, ub), (v, vb) = rotations
        weight, hessian, energy = _prepare(scaled, hessians, u, v, (ub, vb) if spec.rotated else None)
        factor = stretch = right_factor = mask = None
        if not isinstance(backbone, Nothing) and downdate_strength(spec, config) == 0:
            factor = _ldl(hessian, config.damping, column_block(backbone))
            stretch = _stretch(backbone, factor)
        if spec.rank:
            width = column_block(spec.factor_quantizers(config.state_bits)[1])
            same = factor is not None and width == column_block(backbone)
            right_factor = factor if same else _ldl(hessian, config.damping, width)
            columns = -(-bucket(spec.rank, min(m, n)) // 8) * 8
            mask = (np.arange(columns) < spec.rank).astype(np.float32)
        return cls(
            spec, layout, config, weights, hessians, size, weight, hessian, energy, backbone, factor, stretch, right_factor, mask
        )


@partial(jax.jit, static_argnames=("blocks",))
def _prepare(weight: Array, hessian: Array, u: Array, v: Array, blocks: tuple[int, int] | None) -> tuple[Array, Array, Array]:
    if blocks is not None:
        weight = hadamard.rotate(weight, v, blocks[1])
        weight = jnp.swapaxes(hadamard.rotate(jnp.swapaxes(weight, -1, -2), u, blocks[0]), -1, -2)
        hessian = hadamard.rotate_hessian(hessian, v, blocks[1])
    return weight, hessian, quadratic(weight, hessian)


@partial(jax.jit, static_argnames=("width",))
def _ldl(hessian: Array, damping: float, width: int) -> Array:
    return feedback(pad_metric(damped(hessian, damping), width), width)[0]


STRETCH = 0.75  # power of the inflation; ½ matches the variance, ¾ measured mostly better (by up to 4 %) at 1 to 2 bits


def _stretch(backbone: Quantizer, factor: Array) -> np.ndarray:
    """Feedback makes what is rounded larger than W: a unit grid must reach further, by up to a fifth at one bit."""
    if not backbone.unit:
        return np.ones(factor.shape[0], np.float32)
    # 1.15 times the rate-distortion limit is what a trellis reaches, near enough for a scale
    return (inflation(1.15 * 4.0**-backbone.bits, np.asarray(echo(factor))) ** STRETCH).astype(np.float32)


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
    """The current and the best candidate, and their errors √(tr(E H Eᵀ)/tr(W H Wᵀ)) per matrix.

    Attributes:
        basis: of the subspace iteration, kept warm.
        best: None before the first candidate.
        trail: errors of the last step's half-steps, for people.
    """

    now: Candidate
    basis: Array | None
    error: np.ndarray
    best: Candidate | None
    best_error: np.ndarray
    trail: tuple[np.ndarray, ...] = ()


def init(problem: Problem) -> State:
    """Before the first step: no backbone yet; the factors fitted to W itself (low rank first)."""
    b, m, n = problem.weight.shape
    none_yet = np.full(b, np.inf, np.float32)
    now = Candidate(jnp.zeros_like(problem.weight), jnp.zeros((b, 0)), jnp.ones((b,)), (), no_factors(b))
    state = State(now, None, none_yet, None, none_yet)
    if not problem.spec.rank:
        return state
    columns = min(len(problem.mask), m, n)
    start = np.broadcast_to(start_basis(m, columns, 0), (b, m, columns))
    factors, basis, error = _fit(problem, now.q, jnp.asarray(start), problem.config.subspace_steps)
    now, state = replace(now, factors=factors), replace(state, basis=basis)
    if isinstance(problem.backbone, Nothing):  # the factors alone: a candidate already
        return _judge(state, now, error)
    return replace(state, now=now)


def step(problem: Problem, state: State) -> State:
    """One alternation: Q on what the factors leave, then the factors on what Q leaves; each result judged."""
    trail: tuple[np.ndarray, ...] = ()
    if not isinstance(problem.backbone, Nothing):
        state = improve_backbone(problem, state)
        trail = (state.error,)
    factors, basis, error = _fit(problem, state.now.q, state.basis, 2)
    state = _judge(replace(state, basis=basis), replace(state.now, factors=factors), error)
    return replace(state, trail=(*trail, state.error))


def improve_backbone(problem: Problem, state: State) -> State:
    """Q ← LDLQ(W − L R), in the metric H or its downdate."""
    quantizer, factors = problem.backbone, state.now.factors
    factor, stretch, known = problem.factor, problem.stretch, factors.product() if problem.spec.rank else None
    if factor is None:
        tau = downdate_strength(problem.spec, problem.config)
        factor = _ldl(downdated(problem.hessian, factors.right, tau), problem.config.damping, column_block(quantizer))
        stretch = _stretch(quantizer, factor)
    q, codes, scale, scales, error = _round_backbone(
        problem.weight, known, problem.hessian, problem.energy, factor, stretch, quantizer.data(), family=quantizer.family()
    )
    return _judge(state, Candidate(q, codes, scale, scales, factors), error)


@partial(jax.jit, static_argnames=("family",))
def _round_backbone(
    weight: Array,
    known: Array | None,
    hessian: Array,
    energy: Array,
    factor: Array,
    stretch: Array,
    data: Grid,
    *,
    family: Quantizer,
) -> tuple[Array, Array, Array, Grid, Array]:
    """Q for W − `known` (nothing known: None): values, codes, scale, the grid's own scales, relative error."""
    m, n = weight.shape[-2:]
    left_over = weight if known is None else weight - known
    scales = family.fit(left_over, per_row=False)
    if family.unit:
        scales = (scales[0] * stretch[:, None, None],)
    q, codes = ldlq(pad_to_tiles(left_over, *family.tile), factor, family.grid(scales, n), data, family)
    q, scale = q[:, :m, :n], jnp.ones(q.shape[:1])
    if family.unit:
        # one scale for all of Q costs nothing to refit: the best multiple of Q in the metric
        weighted = jnp.matmul(q, hessian, precision="highest")
        own = jnp.sum(weighted * q, axis=(-2, -1))
        best = jnp.where(own > 0, jnp.sum(weighted * left_over, axis=(-2, -1)) / jnp.where(own > 0, own, 1.0), 1.0)
        q, scale, scales = q * best[:, None, None], scales[0][:, 0, 0] * best, ()
    return q, codes, scale, scales, _relative(quadratic(left_over - q, hessian), energy)


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


def _fit(problem: Problem, q: Array, basis: Array | None, steps: int) -> tuple[Factors, Array, Array]:
    left, right = problem.spec.factor_quantizers(problem.config.state_bits)
    factors, basis, left_over = fit_factors(
        problem.weight,
        q,
        problem.hessian,
        problem.right_factor,
        basis,
        problem.mask,
        (left.data(), right.data()),
        steps,
        families=(left.family(), right.family()),
        inner=problem.config.inner,
    )
    return factors, basis, _relative(left_over, problem.energy)


@jax.jit
def _relative(left_over: Array, energy: Array) -> Array:
    """√(tr(E H Eᵀ) / tr(W H Wᵀ)), 0 where both are 0; infinite where a factorization failed, so that it is never kept."""
    left_over = jnp.where(jnp.isnan(left_over), jnp.inf, jnp.maximum(left_over, 0.0))
    return jnp.sqrt(jnp.where(left_over > 0, left_over / jnp.where(energy > 0, energy, 1.0), 0.0))


def _judge(state: State, candidate: Candidate, error: Array) -> State:
    found = np.asarray(error)
    if state.best is None:
        return replace(state, now=candidate, error=found, best=candidate, best_error=found)
    best = _choose(found < state.best_error, candidate, state.best)
    return replace(state, now=candidate, error=found, best=best, best_error=np.minimum(found, state.best_error))


@jax.jit
def _choose(better: Array, new: Candidate, old: Candidate) -> Candidate:
    return jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


__all__ = ["Candidate", "Problem", "State", "downdate_strength", "downdated", "improve_backbone", "init", "step"]
