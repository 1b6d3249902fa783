"""One alternation: Q on what the factors leave, then the factors on what Q leaves, the better iterate kept.

    Q     ← LDLQ(W − L R)                                        `improve_backbone`
    L, R  ← rank-constrained regression of W − Q, rounded        `_fit`

All matrices of a problem go through it together; what is decided for each (which iterate is better, which has stopped) is a mask
over the batch. Every function that computes is compiled once for a shape; rates and seeds are data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.backbone import downdate_strength, downdated, round_backbone, scale_correction
from qlr_jax.core.factors import Factors, fit_factors, no_factors
from qlr_jax.core.ldlq import column_block, noise_gain, row_group
from qlr_jax.core.low_rank import start_basis
from qlr_jax.core.metric import ldl, outlier_channels, rotated_hessian
from qlr_jax.core.problem import MatrixProblem
from qlr_jax.core.sharding import placement_of, sharded
from qlr_jax.core.typing import Array

ONE_PROGRAM = 1024  # rows and columns, up to which a start is fitted by the program of the steps after it, with G = I as an operand


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Iterate:
    """One (Q, L, R) for every matrix, with its codes.

    Attributes:
        q: Q, (b, m, n).
        codes: of Q, as its quantizer packs them.
        scale: (b,), of a backbone of unit scale, else 1.
        scales: of a backbone that stores its own.
        factors: L and R.
        behind: those that Q was rounded behind.
        rest: W − L R, which the next Q is rounded on.
    """

    q: Array
    codes: Array
    scale: Array
    scales: tuple[Array, ...]
    factors: Factors
    behind: Factors
    rest: Array


@dataclass(frozen=True)
class State:
    """The current and the best iterate, and their errors √(tr(G E H Eᵀ)/tr(G W H Wᵀ)) per matrix.

    Attributes:
        now: the current iterate.
        basis: of the subspace iteration, kept warm; None at rank 0.
        error: of the current iterate, (b,).
        best: None before the first iterate.
        best_error: its error, (b,); infinite before the first.
        trail: errors of the last step's half-steps, for people.
    """

    now: Iterate
    basis: Array | None
    error: np.ndarray
    best: Iterate | None
    best_error: np.ndarray
    trail: tuple[np.ndarray, ...] = ()


def first_step(problem: MatrixProblem) -> State:
    """`init` and one `step`; in a race one from either start, of which each matrix goes on with the better.

    Factors of W itself leave least to Q; factors of what a rounded W lacks hold the outputs that weigh most in the loss. Which pays
    is a matter of the spectra of W and of G.

    Args:
        problem: of rank above 0.
    """
    start = problem.config.start
    if start != "race":
        return step(problem, init(problem, start))
    state = step(problem, init(problem, "weight"))
    if problem.output is None or problem.backbone.empty:
        return state
    other = step(problem, init(problem, "backbone"))
    better = other.best_error < state.best_error
    if not better.any():
        return state
    if better.all():
        return other
    assert state.basis is not None and other.basis is not None
    # one by one: iterates are all of one kind, and one program chooses among them
    now, best = _chosen(better, other.now, state.now), _chosen(better, other.best, state.best)
    basis = problem.placement.place(np.where(better[:, None, None], other.basis, state.basis))
    error, best_error = (np.where(better, *pair) for pair in ((other.error, state.error), (other.best_error, state.best_error)))
    trail = tuple(np.where(better, a, b) for a, b in zip(other.trail, state.trail, strict=True))
    return State(now, basis, error, best, best_error, trail)


def init(problem: MatrixProblem, start: str) -> State:
    """Before the first step: no backbone yet, and the factors of W in the metric that `start` names (zero for "backbone")."""
    b, _, n = problem.weight.shape
    none_yet = np.full(b, np.inf, np.float32)
    # numpy's: JAX would compile zeros for every shape
    arrays: Any = (np.zeros(problem.weight.shape, np.float32), np.zeros((b, 0), np.float32), np.ones(b, np.float32))
    none = no_factors(b)
    blank = jax.tree.map(problem.placement.place, Iterate(arrays[0], arrays[1], arrays[2], (), none, none, arrays[1]))
    now = replace(blank, rest=problem.weight)
    state = State(now, None, none_yet, None, none_yet)
    if not problem.spec.rank:
        return state
    basis, steps, config = _random_basis(problem), problem.config.subspace_steps, problem.config
    if problem.backbone.empty:  # the factors alone: an iterate already
        now, basis, error = _fit(problem, now, now.q, basis, steps)
        return _evaluated(replace(state, basis=basis), now, error)
    if start == "backbone":  # nothing is left to the factors of W − W: zeros, in the shapes of all others
        return replace(state, now=_fit(problem, now, problem.weight, basis, 1)[0], basis=basis)
    metric: Any = problem.metric.regular
    plain = config.factor_rounding == "plain"
    if start == "weight":  # what is left to Q then has the least size, and Q's error is a multiple of that
        metric, plain = np.eye(n, dtype=np.float32)[None], True
    elif start == "outliers":
        ranks = [spec.rank for spec in problem.specs[: len(problem.metric.original)]]
        metric = problem.placement.place(rotated_hessian(outlier_channels(problem.metric.original, ranks), problem.metric.rotation))
    now, basis, _ = _fit(problem, now, now.q, basis, steps, metric, plain)
    return replace(state, now=now, basis=basis)


def step(problem: MatrixProblem, state: State) -> State:
    """One alternation: Q on what the factors leave, then the factors on what Q leaves; each result evaluated."""
    trail: tuple[np.ndarray, ...] = ()
    if not problem.backbone.empty:
        state = improve_backbone(problem, state)
        trail = (state.error,)
    warm = problem.config.warm_start
    basis = state.basis if warm and state.basis is not None else _random_basis(problem)
    now, basis, error = _fit(problem, state.now, state.now.q, basis, 2 if warm else problem.config.subspace_steps)
    state = _evaluated(replace(state, basis=basis), now, error)
    return replace(state, trail=(*trail, state.error))


def last_step(problem: MatrixProblem, state: State) -> State:
    """The best iterate made once more, with more state bits: Q behind the factors that it was rounded behind, and factors of what
    it leaves.

    Args:
        problem: with a backbone and factors.
        state: of the same problem with a backbone of fewer state bits.
    """
    assert state.best is not None
    behind = state.best.behind
    # numpy's, once a solve: JAX would compile it for every rank
    rest = np.asarray(problem.weight) - np.matmul(np.asarray(behind.left), np.asarray(behind.right))
    again = replace(state.best, factors=behind, rest=problem.placement.place(rest))
    return step(problem, replace(state, now=again, best=None, best_error=np.full_like(state.best_error, np.inf)))


def _random_basis(problem: MatrixProblem) -> Array:
    """Where the subspace iteration starts from."""
    assert problem.mask is not None
    b, m, n = problem.weight.shape
    columns = min(problem.mask.shape[-1], m, n)
    return problem.placement.place(np.broadcast_to(start_basis(m, columns, 0), (b, m, columns)))


def improve_backbone(problem: MatrixProblem, state: State) -> State:
    """Q ← LDLQ(W − L R), in the metric H or its downdate, and in that of the outputs."""
    quantizer, factors, metric = problem.backbone, state.now.factors, problem.metric
    width = column_block(quantizer)
    tau = downdate_strength(problem.spec, problem.config)
    if tau:
        reduced = downdated(metric.hessian, factors.right, tau)
        factor = ldl(reduced, metric.damping, width=width)
        gain = np.asarray(noise_gain(factor))
    else:
        factor, gain = metric.factor(width), metric.noise_gain(width)
    rows, output, spread = None, problem.output, metric.spread(width)
    if output is not None:
        group = _row_group(problem)
        rows, gain = output.factor(group), (1 + gain) * (1 + output.noise_gain(group)) - 1
    count = len(problem.weight)
    each = [
        own.metric_qparams(row[None])
        for own, row in zip(problem.backbones, np.broadcast_to(spread, (count, spread.shape[1])), strict=True)
    ]
    given = tuple(np.concatenate(arrays) for arrays in zip(*each, strict=True))
    fitted = problem.config.backbone_scale == "fitted"
    correction = np.ones(count, np.float32)
    if fitted and quantizer.unit_scale:
        correction[:] = [scale_correction(*own) for own in zip(problem.backbones, np.broadcast_to(gain, count), strict=True)]
    q, codes, scale, scales, error = round_backbone(
        state.now.rest,
        metric.hessian,
        problem.energy,
        factor,
        problem.placement.place(correction),
        quantizer.traced(),
        problem.output_metric,
        rows,
        tuple(problem.placement.place(array) for array in given),
        static=quantizer.static(),
        refit=fitted,
    )
    return _evaluated(state, Iterate(q, codes, scale, scales, factors, factors, state.now.rest), error)


def _row_group(problem: MatrixProblem) -> int:
    """Rows that the backbone's grid rounds side by side."""
    height, (rows, _) = problem.backbone.tile[0], problem.layouts[0].shape
    return row_group(-(-rows // height) * height, height)


def _fit(
    problem: MatrixProblem, now: Iterate, q: Array, basis: Array, steps: int, metric: Array | None = None, plain: bool | None = None
) -> tuple[Iterate, Array, Array]:
    """`now` with factors of W − Q in H and G, or with their start in another metric; the new basis, and the error of Q + L R."""
    config, output = problem.config, problem.output
    given = (output.regular, output.root(_row_group(problem))) if output is not None else None
    if metric is not None:
        # the start, with operands of the shapes of all later calls: one program serves both, where products with I are cheap
        metric = problem.placement.place(np.broadcast_to(np.asarray(metric), problem.metric.regular.shape))
        given = given and (_identity_like(given) if max(problem.weight.shape[1:]) <= ONE_PROGRAM else None)
    left, right = problem.spec.factor_quantizers(config.state_bits)
    factors, basis, rest, error = fit_factors(
        problem.weight,
        q,
        problem.metric.regular if metric is None else metric,
        problem.metric.factor(column_block(right)),
        basis,
        problem.mask,
        (left.traced(), right.traced()),
        steps,
        (problem.metric.hessian, problem.energy, problem.output_metric),
        given,
        config.factor_rounding == "plain" if plain is None else plain,
        statics=(left.static(), right.static()),
        inner=config.inner,
        one_scale=config.factor_scales == "matrix",
    )
    return replace(now, factors=factors, rest=rest), basis, error


def _identity_like(output: tuple[Array, Array]) -> Any:
    """(I, I) in the shapes and where the arrays lie of (G, C)."""
    return tuple(placement_of(a).place(np.broadcast_to(np.eye(a.shape[-1], dtype=np.float32), a.shape)) for a in output)


def _evaluated(state: State, iterate: Iterate, error: Array) -> State:
    """The state with a new iterate, which is the best of the matrices whose error it lowers."""
    found = np.asarray(error)
    if state.best is None:
        return replace(state, now=iterate, error=found, best=iterate, best_error=found)
    better = found < state.best_error
    best = iterate if better.all() else _chosen(better, iterate, state.best) if better.any() else state.best
    return replace(state, now=iterate, error=found, best=best, best_error=np.minimum(found, state.best_error))


def keep_stopped(running: np.ndarray, new: State, old: State) -> State:
    """The new state, with what the old one had best for the matrices that have stopped.

    Args:
        running: (b,), which matrices still iterate.
        new, old: states after and before a step.
    """
    if running.all():
        return new
    best = _chosen(running, new.best, old.best)
    return replace(new, best=best, best_error=np.where(running, new.best_error, old.best_error))


def _chosen(better: np.ndarray, new: Any, old: Any) -> Any:
    """`new` for the matrices that are better, `old` for the others."""
    return _choose(placement_of(jax.tree.leaves(new)[0]).place(better), new, old)


@sharded
@jax.jit
def _choose(better: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


__all__ = ["Iterate", "State", "first_step", "improve_backbone", "init", "keep_stopped", "last_step", "step"]
