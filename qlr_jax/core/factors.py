"""Low-rank factors on their grids: the inner alternation, each factor rounded with feedback in its own metric."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from qlr_jax.core.ldlq import column_block, feedback, ldlq, pad_metric, pad_to_tiles
from qlr_jax.core.low_rank import refit_left, refit_right, top_subspace
from qlr_jax.core.objective import normalised, quadratic, quadratic_by_rows
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.sharding import sharded
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """L diag(s) and R as values and codes, for a batch; components beyond the rank are zero in `left`."""

    left: Array  # (b, m, k), component scales included
    right: Array  # (b, k, n), unit rows where R's grid has no scale of its own
    component: Array  # (b, k)
    left_codes: Array
    right_codes: Array
    left_scales: QParams
    right_scales: QParams

    def product(self) -> Array:
        """L diag(s) R, (b, m, n)."""
        return jnp.matmul(self.left, self.right, precision="highest")

    def of(self, i: int) -> Factors:
        """The factors of one matrix of the batch."""
        return jax.tree.map(lambda a: a[i], self)


def no_factors(count: int) -> Factors:
    """Rank 0: nothing stored, nothing added."""
    empty: Any = np.zeros((count, 0), np.float32)
    return Factors(empty, empty, empty, empty, empty, (), ())


# one piece: two nested loops over one set of fixed arguments
@partial(sharded, factors=True)
@partial(jax.jit, static_argnames=("statics", "inner", "one_scale"))
def fit_factors(
    weight: Array,
    backbone: Array,
    hessian: Array,
    right_feedback: Array,
    basis: Array,
    mask: Array,
    traced: tuple[Traced, Traced],
    steps: int,
    evaluated_in: tuple[Array, Array, Array | None],
    output: tuple[Array, Array] | None = None,
    plain: Array | bool = False,
    *,
    statics: tuple[Quantizer, Quantizer],
    inner: int,
    one_scale: bool = False,
) -> tuple[Factors, Array, Array, Array]:
    """Rounded factors of A = W − Q: minimise tr(G (A − L R) H (A − L R)ᵀ), L and R on their grids, the best pair kept.

    Start from the rank-constrained optimum (`top_subspace` of CᵀA for G = C Cᵀ), then in turn R ← (LᵀGL)⁻¹LᵀG A, rounded in the
    metric H, and L ← A H Rᵀ (R H Rᵀ)⁻¹, rounded in the metric R H Rᵀ (LPLR, arXiv 2310.11028; the feedback and G are ours).

    Args:
        weight, backbone: W and Q, (b, m, n).
        hessian: H, damped, (b, n, n) or (1, n, n).
        right_feedback: F of H at R's column block.
        basis: (b, m, k') to start the subspace iteration from.
        mask: (b, k), 1 for the components that exist: one compilation serves a bucket of ranks.
        steps: of the subspace iteration.
        traced, statics: of the quantizers of L and R.
        evaluated_in: H, tr(G W H Wᵀ) and G, undamped, in which the error of Q + L R is evaluated.
        output: (G, C), damped, the metric of the outputs; None is the identity.
        plain: round without feedback; traced, so that both ways are one program.
        inner: rounds.
        one_scale: one scale for all components, where a grid has none of its own.

    Returns:
        The factors, the basis for a warm start, W − L R, and √(tr(G E H Eᵀ) / tr(G W H Wᵀ)) of E = W − Q − L R, (b,).
    """
    target, k, columns = weight - backbone, mask.shape[-1], mask[..., None, :]
    left_static, right_static = statics
    metric, root = output or (None, None)
    output_weighted = target if root is None else jnp.matmul(jnp.swapaxes(root, -1, -2), target, precision="highest")
    basis, _ = top_subspace(output_weighted, hessian, basis, steps)
    leading = basis if root is None else solve_triangular(jnp.swapaxes(root, -1, -2), basis, lower=False)
    start = jnp.pad(leading, ((0, 0), (0, 0), (0, max(0, k - basis.shape[-1]))))[..., :k] * columns
    own_scales = not (left_static.unit_scale or right_static.unit_scale)
    right_feedback = jnp.where(plain, 0.0, right_feedback)

    def pair(left: Array) -> tuple[Factors, Array]:
        wanted, _ = refit_right(target, left, mask, metric)
        wanted = jnp.swapaxes(wanted, -1, -2)
        right, right_codes, right_scales = round_right(wanted, right_feedback, right_static, traced[1], one_scale)
        right = right * mask[..., :, None]
        # one factorization after the other: two batches of them side by side wait for each other for ever in XLA's thread pool on
        # a CPU (jaxlib 0.10.2: 16 matrices of 64 components)
        wanted, own = lax.optimization_barrier(refit_left(target, right, hessian, mask))
        ideal = wanted * columns
        left, component, left_codes, left_scales = round_left(
            ideal, own, mask, left_static, traced[0], own_scales, plain, one_scale
        )
        new = Factors(left, right, component, left_codes, right_codes, left_scales, right_scales)
        # the loss less tr(G A H Aᵀ), by Pythagoras about the best L: cheaper by far than the loss itself
        return new, quadratic(left - ideal, own, metric) - quadratic(ideal, own, metric)

    def again(state: tuple[Array, Factors, Array], _: None) -> tuple[tuple[Array, Factors, Array], None]:
        left, best, least = state
        new, error = pair(left)
        better = error < least
        best = jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, best)
        return (new.left, best, jnp.where(better, error, least)), None

    # the first round runs inside the scan too: one compilation of the roundings, whatever `inner` is
    shapes = jax.eval_shape(pair, start)[0]
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (_, best, _), _ = lax.scan(again, (start, blank, jnp.full(target.shape[:1], jnp.inf)), None, length=inner)
    rest = weight - best.product()
    own, energy, outputs = evaluated_in
    return best, basis, rest, normalised(quadratic_by_rows(rest - backbone, own, outputs), energy)


def round_right(
    wanted: Array, factor: Array, static: Quantizer, traced: Traced, one_scale: bool, size: Array | None = None
) -> tuple[Array, Array, QParams]:
    """R on its grid: values (unit rows where the grid has no scale: L takes it up), codes, own scales.

    Args:
        wanted: R before rounding, (b, k, n).
        factor: F of H, at the quantizer's column block, (b, n', n') with n' whole tiles.
        static, traced: the quantizer.
        one_scale: one scale for all rows, where the grid has none of its own.
        size: (b, k, 1) of the rows, for a grid that has no scale; None: their root mean square.
    """
    cols = wanted.shape[-1]
    scales = static.fit_qparams(wanted, per_row=True, unit=size)
    if static.unit_scale and one_scale:
        scales = static.fit_qparams(wanted, per_row=True, unit=_common(scales[0], -2))
    padded = pad_to_tiles(wanted, 1, static.tile[1])
    values, codes = ldlq(padded, factor, static.broadcast_qparams(scales, cols), traced, static)
    values = values[..., :cols]
    if not static.unit_scale:
        return values, codes, scales
    size = scales[0]
    return values / jnp.where(size > 0, size, 1.0), codes, scales[1:]


def _common(sizes: Array, axis: int) -> Array:
    """One size for all components: the root mean square over those that are there (one beyond the rank is zero)."""
    there = jnp.sum((sizes > 0).astype(sizes.dtype), axis=axis, keepdims=True)
    common = jnp.sqrt(jnp.sum(jnp.square(sizes), axis=axis, keepdims=True) / jnp.maximum(there, 1.0))
    return jnp.broadcast_to(common, sizes.shape)


def round_left(
    wanted: Array,
    metric: Array,
    mask: Array,
    static: Quantizer,
    traced: Traced,
    own_scales: bool,
    plain: Array | bool,
    one_scale: bool,
    size: Array | None = None,
) -> tuple[Array, Array, Array, QParams]:
    """L on its grid, rounded by components in the metric R H Rᵀ: values, component scales, codes, own scales.

    Args:
        wanted: L before rounding, (b, m, k).
        metric: R H Rᵀ, (b, k, k).
        mask: (b, k) or (k,), 1 for the components that exist.
        static, traced: the quantizer of Lᵀ.
        own_scales: whether the grids of both factors have scales of their own: then components need none.
        plain: round without feedback.
        one_scale: one scale for all components.
        size: (b, 1, k), the component scales; None: the components' root mean squares, or 1 where both grids have scales.
    """
    m, k = wanted.shape[-2:]
    width = column_block(static, transposed=True)
    # a ridge as for H: the smallest components must not drive the feedback
    mean = jnp.trace(metric, axis1=-2, axis2=-1)[..., None, None] / k
    factor = jnp.where(plain, 0.0, feedback(pad_metric(metric + 1e-4 * mean * jnp.eye(k), width), width)[0])
    if size is None:
        size = (
            jnp.ones((*wanted.shape[:-2], 1, k)) if own_scales else jnp.sqrt(jnp.mean(jnp.square(wanted), axis=-2, keepdims=True))
        )
        size = _common(size, -1) if one_scale and not own_scales else size
    size = jnp.where(size > 0, size, 1.0)
    scaled = wanted / size
    unit = jnp.ones((1, 1, 1)) if static.unit_scale else None
    scales = static.fit_qparams(jnp.swapaxes(scaled, -1, -2), per_row=True, unit=unit)
    qparams = tuple(jnp.swapaxes(g, -1, -2) for g in static.broadcast_qparams(scales, m))
    padded = pad_to_tiles(scaled, static.tile[1], 1)
    # F is for L itself: for components in units of their size it turns into diag(size) F diag(size)⁻¹
    scaled_feedback = factor * jnp.swapaxes(size, -1, -2) / size
    values, codes = ldlq(padded, scaled_feedback, qparams, traced, static, transposed=True)
    return values[..., :m, :] * size * mask[..., None, :], size[..., 0, :], codes, scales[1:] if static.unit_scale else scales


def pack_factors(factors: Factors, spec: Spec, state_bits: int, backbone_scale: float) -> dict[str, np.ndarray]:
    """The stored arrays of one matrix's factors, by name, with g taken out of L.

    Args:
        factors: of one matrix (`Factors.of`).
        spec: how it is stored.
        state_bits: of trellis codes.
        backbone_scale: g, in the solver's units.
    """
    left, right = spec.factor_quantizers(state_bits)
    rank = spec.rank
    component = np.asarray(factors.component)[:rank] / (backbone_scale or 1.0)  # 0: all is zero

    def rows(codes: Array, quantizer: Quantizer) -> np.ndarray:
        height = quantizer.tile[0]
        return np.asarray(codes)[: -(-rank // height)]

    arrays: dict[str, np.ndarray] = {}
    left_scales: tuple[Any, ...] = tuple(np.asarray(s)[:rank] for s in factors.left_scales)
    left_codes = rows(factors.left_codes, left)
    if spec.component_scales:
        arrays["component_scale"] = component.astype(np.float16)
    elif left_scales:  # the component's size goes into its own scales
        left_scales = (left_scales[0] * component[:, None], *left_scales[1:])
    else:  # bf16: into the values
        left_codes = (left_codes.astype(np.float32) * component[:, None]).astype(left_codes.dtype)
    arrays |= {f"left.{k}": v for k, v in left.pack(left_codes, left_scales).items()}
    right_scales: tuple[Any, ...] = tuple(np.asarray(s)[:rank] for s in factors.right_scales)
    return arrays | {f"right.{k}": v for k, v in right.pack(rows(factors.right_codes, right), right_scales).items()}
