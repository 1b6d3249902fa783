"""One alternation: Q on what the factors leave, then the factors on what Q leaves, the better candidate kept.

Every function that computes is compiled once for a shape; rates and seeds are data. Where a problem lies on a mesh of devices
(`devices`), each of them runs it for its own matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qlr_jax.core import hadamard
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.factors import Factors, fit_factors, no_factors
from qlr_jax.core.ldlq import column_block, echo, inflation, ldlq, ldlq_rows, pad_to_tiles, row_group
from qlr_jax.core.low_rank import bucket, start_basis
from qlr_jax.core.matrix import Layout
from qlr_jax.core.metric import Metric, ldl, outlier_channels, turned
from qlr_jax.core.objective import quadratic
from qlr_jax.core.placed import PlacedMetric
from qlr_jax.core.quantizers import Nothing, Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.sharding import by_rows, mesh_of, place, rows_shared, spread
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array

SMALLEST_PLAIN = 2.0**-10  # root mean square of the weights, above which float16 holds the scales of integers well as they are


@dataclass(frozen=True)
class Problem:
    """What does not change during the alternation, in the rotated basis and in units of `unit`."""

    spec: Spec
    layout: Layout
    config: SolverConfig
    original: np.ndarray
    unit: np.ndarray  # (b,): the weight's size
    metric: Metric
    output: Metric | None  # G of the outputs; None is the identity
    weight: Array
    energy: Array  # (b,): tr(G W H Wᵀ)
    backbone: Quantizer
    mask: Array | None

    @classmethod
    def make(
        cls,
        weights: np.ndarray,
        metric: Metric,
        output: Metric | None,
        spec: Spec,
        seed: int,
        config: SolverConfig,
        mesh: Mesh | None = None,
    ) -> Problem:
        m, n = weights.shape[1:]
        layout = Layout(str(spec), (m, n), seed, config.rotation_block, config.state_bits)
        backbone = spec.quantizer(config.state_bits, (m, n))
        size = np.sqrt(np.einsum("bij,bij->b", weights, weights, dtype=np.float64) / (m * n))
        size = np.where(size > 0, size, 1.0)
        if not backbone.unit_scale:
            # A power of two leaves scales exact for formats that store no g, and 1 does in all of float16's range, where it can be.
            power = np.where((size > SMALLEST_PLAIN) & (size < 1 / SMALLEST_PLAIN), 1.0, 2.0 ** np.round(np.log2(size)))
            size = power if spec.has_scale else np.ones_like(size)
        if mesh is not None:
            metric, output = PlacedMetric.of_metric(metric, mesh), output and PlacedMetric.of_metric(output, mesh)
        weight = place(jnp.asarray(weights / size.astype(np.float32)[:, None, None]), mesh)
        if metric.sides is not None:
            (u, u_block), (v, v_block) = hadamard.sides((m, n), seed, config.rotation_block)
            weight = spread(_rotated)(weight, u, v, blocks=(u_block, v_block))
        mask = None
        if spec.rank:
            columns = -(-bucket(spec.rank, min(m, n)) // 8) * 8
            mask = (np.arange(columns) < spec.rank).astype(np.float32)
        energy = spread(_energy)(weight, metric.hessian, output and output.hessian, shares=rows_shared(weight))
        return cls(spec, layout, config, weights, size, metric, output, weight, energy, backbone, mask)

    @property
    def felt(self) -> Array | None:
        """G in the rotated basis: with H, what results are judged in."""
        return self.output and self.output.hessian

    def place(self, array: Any) -> Any:
        """One entry a matrix, where the matrices lie."""
        return place(array, mesh_of(self.weight))


@partial(jax.jit, static_argnames=("blocks",))
def _rotated(weight: Array, u: Array, v: Array, blocks: tuple[int, int]) -> Array:
    """U W Vᵀ."""
    weight = hadamard.rotate(weight, v, blocks[1])
    return jnp.swapaxes(hadamard.rotate(jnp.swapaxes(weight, -1, -2), u, blocks[0]), -1, -2)


@partial(jax.jit, static_argnames=("shares",))
def _energy(weight: Array, hessian: Array, output: Array | None = None, *, shares: int = 1) -> Array:
    """tr(G W H Wᵀ)."""
    return _quadratic(weight, hessian, output, shares)


STRETCH = 0.75  # power of the inflation; ½ matches the variance, ¾ measured mostly better (by up to 4 %) at 1 to 2 bits


def _stretch(backbone: Quantizer, echoed: np.ndarray) -> np.ndarray:
    """Feedback makes what is rounded larger than W: a unit grid must reach further, by up to a fifth at one bit."""
    # 1.15 times the rate-distortion limit is what a trellis reaches, near enough for a scale
    return (inflation(1.15 * 4.0**-backbone.bits, echoed) ** STRETCH).astype(np.float32)


def downdate_strength(spec: Spec, config: SolverConfig) -> float:
    """τ: how far Q may lean on the factors. It pays only as far as they can hold what Q leaves to them.

    Measured on the bundled model's matrices: with 8 bits 0.9 takes 5 % off the error; with 4 bits 0 to 0.25 change nothing and 0.9
    adds 3 to 7 %; 1 adds 20 to 40 %.
    """
    if spec.rank == 0:
        return 0.0
    if config.downdate is not None:
        return config.downdate
    bits = min(q.bits for q in spec.factor_quantizers())
    return 0.9 * min(max((bits - 4) / 4, 0.0), 1.0)


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
    """The current and the best candidate, and their errors √(tr(G E H Eᵀ)/tr(G W H Wᵀ)) per matrix.

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


def first_step(problem: Problem) -> State:
    """`init` and one `step`; in a race that from either start, each matrix going on with the better.

    Factors of W itself leave least to Q; factors of what a rounded W lacks hold the outputs that the loss feels most. Which pays
    is a matter of the spectra of W and of G.
    """
    start = problem.config.start
    if start != "race":
        return step(problem, init(problem, start))
    state = step(problem, init(problem, "weight"))
    if problem.output is None or isinstance(problem.backbone, Nothing):
        return state
    other = step(problem, init(problem, "backbone"))
    better = other.best_error < state.best_error
    if not better.any():
        return state
    basis, now, best = _chosen(better, (other.basis, other.now, other.best), (state.basis, state.now, state.best))
    error, best_error = (np.where(better, *pair) for pair in ((other.error, state.error), (other.best_error, state.best_error)))
    trail = tuple(np.where(better, a, b) for a, b in zip(other.trail, state.trail, strict=True))
    return State(now, basis, error, best, best_error, trail)


def init(problem: Problem, start: str) -> State:
    """Before the first step: no backbone yet, and the factors of W in the metric that `start` names (zero for "backbone")."""
    b, _, n = problem.weight.shape
    none_yet = np.full(b, np.inf, np.float32)
    blank = Candidate(jnp.zeros_like(problem.weight), jnp.zeros((b, 0)), jnp.ones((b,)), (), no_factors(b))
    now = jax.tree.map(problem.place, blank)
    state = State(now, None, none_yet, None, none_yet)
    if not problem.spec.rank:
        return state
    basis, steps, config = _start(problem), problem.config.subspace_steps, problem.config
    if isinstance(problem.backbone, Nothing):  # the factors alone: a candidate already
        factors, basis, error = _fit(problem, now.q, basis, steps)
        return _judge(replace(state, basis=basis), replace(now, factors=factors), error)
    if start == "backbone":  # nothing is left to the factors of W − W: zeros, in the shapes of all others
        factors, _, _ = _fit(problem, problem.weight, basis, 1)
        return replace(state, now=replace(now, factors=factors), basis=basis)
    metric, plain = problem.metric.regular, config.factor_rounding == "plain"
    if start == "weight":  # what is left to Q then has the least size, and Q's error is a multiple of that
        metric, plain = jnp.eye(n)[None], True
    elif start == "outliers":
        metric = problem.place(turned(outlier_channels(problem.metric.original, problem.spec.rank), problem.metric.sides))
    factors, basis, _ = _fit(problem, now.q, basis, steps, metric, plain)
    return replace(state, now=replace(now, factors=factors), basis=basis)


def step(problem: Problem, state: State) -> State:
    """One alternation: Q on what the factors leave, then the factors on what Q leaves; each result judged."""
    trail: tuple[np.ndarray, ...] = ()
    if not isinstance(problem.backbone, Nothing):
        state = improve_backbone(problem, state)
        trail = (state.error,)
    warm = problem.config.warm_start
    basis = state.basis if warm else _start(problem)
    factors, basis, error = _fit(problem, state.now.q, basis, 2 if warm else problem.config.subspace_steps)
    state = _judge(replace(state, basis=basis), replace(state.now, factors=factors), error)
    return replace(state, trail=(*trail, state.error))


def _start(problem: Problem) -> Array:
    """A random basis for the subspace iteration."""
    b, m, n = problem.weight.shape
    columns = min(len(problem.mask), m, n)
    return problem.place(jnp.asarray(np.broadcast_to(start_basis(m, columns, 0), (b, m, columns))))


def improve_backbone(problem: Problem, state: State) -> State:
    """Q ← LDLQ(W − L R), in the metric H or its downdate, and in that of the outputs."""
    quantizer, factors, metric = problem.backbone, state.now.factors, problem.metric
    width, known = column_block(quantizer), spread(Factors.product)(factors) if problem.spec.rank else None
    tau = downdate_strength(problem.spec, problem.config)
    if tau:
        reduced = spread(downdated, factors=True)(metric.hessian, factors.right, tau)
        factor = spread(ldl, factors=True)(reduced, metric.damping, width=width)
        echoed = np.asarray(spread(echo, factors=True)(factor))
    else:
        factor, echoed = metric.factor(width), metric.echo(width)
    rows, output = None, problem.output
    if output is not None:
        group = row_group(-(-problem.layout.shape[0] // quantizer.tile[0]) * quantizer.tile[0], quantizer.tile[0])
        rows, echoed = output.factor(group), (1 + echoed) * (1 + output.echo(group)) - 1
    fitted = problem.config.backbone_scale == "fitted"
    stretch = _stretch(quantizer, echoed) if fitted and quantizer.unit_scale else np.ones(len(echoed), np.float32)
    q, codes, scale, scales, error = spread(_round_backbone)(
        problem.weight,
        known,
        metric.hessian,
        problem.energy,
        factor,
        problem.place(stretch),
        quantizer.traced(),
        problem.felt,
        rows,
        static=quantizer.static(),
        refit=fitted,
        shares=rows_shared(problem.weight),
    )
    return _judge(state, Candidate(q, codes, scale, scales, factors), error)


@partial(jax.jit, static_argnames=("static", "refit", "shares"))
def _round_backbone(
    weight: Array,
    known: Array | None,
    hessian: Array,
    energy: Array,
    factor: Array,
    stretch: Array,
    traced: Traced,
    output: Array | None = None,
    rows: Array | None = None,
    *,
    static: Quantizer,
    refit: bool,
    shares: int = 1,
) -> tuple[Array, Array, Array, QParams, Array]:
    """Q for W − `known` (nothing known: None): values, codes, scale, the grid's own scales, relative error.

    `output` and `rows` are G and its feedback factor: of a rectangle of rows at a time (`ldlq_rows`). `shares` devices hold each
    matrix: each rounds its share of rows (with G, of the row groups that are under way) and multiplies it with H.
    """
    m, n = weight.shape[-2:]
    left_over = weight if known is None else weight - known
    # scales of a grid's own are of rows or parts of them; that of a unit grid is of the matrix
    scales = by_rows(lambda w: static.fit_qparams(w, per_row=False), (left_over,), 1 if static.unit_scale else shares)
    if static.unit_scale:
        scales = (scales[0] * stretch[:, None, None],)
    padded, qparams = pad_to_tiles(left_over, *static.tile), static.broadcast_qparams(scales, n)
    if rows is None:
        q, codes = by_rows(lambda w, *g: ldlq(w, factor, g, traced, static), (padded, *qparams), shares, static.tile[0])
    else:
        q, codes = ldlq_rows(padded, factor, rows, qparams, traced, static, shares)
    q, scale = q[:, :m, :n], jnp.ones(q.shape[:1])
    if static.unit_scale:
        scale, scales = scales[0][:, 0, 0], ()
        if refit:  # one scale for all of Q costs nothing to refit: the best multiple of Q in the metric
            weighted = _times(q, hessian, shares)
            weighted = weighted if output is None else _times(output, weighted, shares)
            own = jnp.sum(weighted * q, axis=(-2, -1))
            best = jnp.where(own > 0, jnp.sum(weighted * left_over, axis=(-2, -1)) / jnp.where(own > 0, own, 1.0), 1.0)
            q, scale = q * best[:, None, None], scale * best
    return q, codes, scale, scales, _relative(_quadratic(left_over - q, hessian, output, shares), energy)


def _times(left: Array, right: Array, shares: int) -> Array:
    return by_rows(lambda rows: jnp.matmul(rows, right, precision="highest"), (left,), shares)


def _quadratic(error: Array, hessian: Array, output: Array | None, shares: int) -> Array:
    """`quadratic`, its products shared out by rows; the sum is taken over all rows at once, as on one device."""
    if shares == 1:
        return quadratic(error, hessian, output)
    felt = error if output is None else _times(output, error, shares)
    return jnp.sum(_times(error, hessian, shares) * felt, axis=(-2, -1))


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


def _fit(
    problem: Problem, q: Array, basis: Array, steps: int, metric: Array | None = None, plain: bool | None = None
) -> tuple[Factors, Array, Array]:
    """Factors of W − Q in H and G, or their start in another metric."""
    config = problem.config
    left, right = problem.spec.factor_quantizers(config.state_bits)
    factors, basis = spread(fit_factors, factors=True)(
        problem.weight,
        q,
        problem.metric.regular if metric is None else metric,
        problem.metric.factor(column_block(right)),
        basis,
        problem.mask,
        (left.traced(), right.traced()),
        steps,
        (problem.output.regular, problem.output.root()) if problem.output is not None and metric is None else None,
        statics=(left.static(), right.static()),
        inner=config.inner,
        plain=config.factor_rounding == "plain" if plain is None else plain,
        one_scale=config.factor_scales == "matrix",
    )
    judged = (problem.weight, q, factors, problem.metric.hessian, problem.energy, problem.felt)
    return factors, basis, spread(_error)(*judged, shares=rows_shared(problem.weight))


@partial(jax.jit, static_argnames=("shares",))
def _error(
    weight: Array, q: Array, factors: Factors, hessian: Array, energy: Array, output: Array | None = None, *, shares: int = 1
) -> Array:
    return _relative(_quadratic(weight - q - factors.product(), hessian, output, shares), energy)


@jax.jit
def _relative(left_over: Array, energy: Array) -> Array:
    """√(tr(G E H Eᵀ) / tr(G W H Wᵀ)), 0 where both are 0; infinite where a factorization failed, so that it is never kept."""
    left_over = jnp.where(jnp.isnan(left_over), jnp.inf, jnp.maximum(left_over, 0.0))
    return jnp.sqrt(jnp.where(left_over > 0, left_over / jnp.where(energy > 0, energy, 1.0), 0.0))


def _judge(state: State, candidate: Candidate, error: Array) -> State:
    found = np.asarray(error)
    if state.best is None:
        return replace(state, now=candidate, error=found, best=candidate, best_error=found)
    better = found < state.best_error
    best = candidate if better.all() else _chosen(better, candidate, state.best) if better.any() else state.best
    return replace(state, now=candidate, error=found, best=best, best_error=np.minimum(found, state.best_error))


def only(running: np.ndarray, new: State, old: State) -> State:
    """The new state, with what the old one had best for the matrices that have stopped."""
    if running.all():
        return new
    best = _chosen(running, new.best, old.best)
    return replace(new, best=best, best_error=np.where(running, new.best_error, old.best_error))


def _chosen(better: np.ndarray, new: Any, old: Any) -> Any:
    """`new` for the matrices that are better, `old` for the others."""
    return spread(_choose)(place(better, mesh_of(jax.tree.leaves(new)[0])), new, old)


@jax.jit
def _choose(better: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


__all__ = [
    "Candidate",
    "Problem",
    "State",
    "downdate_strength",
    "downdated",
    "first_step",
    "improve_backbone",
    "init",
    "only",
    "step",
]
