"""The half-step that finds Q: LDLQ of what the factors leave, in the metric H or its downdate, and in that of the outputs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.ldlq import ldlq, ldlq_rows, pad_to_tiles, variance_gain
from qlr_jax.core.objective import normalised, quadratic_by_rows
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.sharding import by_rows, product_by_rows, sharded
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array

SCALE_POWER = 0.75  # power of the variance_gain; ½ matches the variance, ¾ measured mostly better (by up to 4 %) at 1 to 2 bits


def scale_correction(backbone: Quantizer, gain: float) -> float:
    """Factor on a unit grid's scale: feedback makes what is rounded larger than W, by up to a fifth at one bit.

    Args:
        backbone: the quantizer of Q.
        gain: φ, the feedback's noise gain.
    """
    # 1.15 times the rate-distortion limit is what a trellis reaches, near enough for a scale
    return float(variance_gain(1.15 * 4.0**-backbone.bits, gain) ** SCALE_POWER)


def downdate_strength(spec: Spec, config: SolverConfig) -> float:
    """τ: how far Q may lean on the factors. It pays only as far as they can hold what Q leaves to them.

    Measured on the bundled model's matrices: with 8 bits 0.9 takes 5 % off the error; with 4 bits 0 to 0.25 change nothing and 0.9
    adds 3 to 7 %; 1 adds 20 to 40 %.

    Args:
        spec: of the matrix; the strength follows the coarser of its factors.
        config: whose `downdate` overrides that.
    """
    if spec.rank == 0:
        return 0.0
    if config.downdate is not None:
        return config.downdate
    bits = min(q.bits for q in spec.factor_quantizers())
    return 0.9 * min(max((bits - 4) / 4, 0.0), 1.0)


@partial(sharded, factors=True)
@jax.jit
def downdated(hessian: Array, right: Array, strength: float) -> Array:
    """H − τ H Rᵀ (R H Rᵀ)⁻¹ R H: at τ = 1, the loss of Q's error that remains once L is refitted with R fixed.

    Args:
        hessian: H, (b, n, n) or (1, n, n).
        right: R, (b, r, n).
        strength: τ, in [0, 1].

    Returns:
        (b, n, n).

    Source: CALDERA, arXiv 2405.18886, its Hessian update at τ = 1; the strength is ours.
    """
    weighted = jnp.matmul(right, hessian, precision="highest")
    metric = jnp.matmul(weighted, jnp.swapaxes(right, -1, -2), precision="highest")
    mean = jnp.trace(metric, axis1=-2, axis2=-1)[..., None, None] / metric.shape[-1]
    metric = metric + 1e-6 * jnp.where(mean > 0, mean, 1.0) * jnp.eye(metric.shape[-1])
    inner = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(metric), True), weighted)
    taken = jnp.matmul(jnp.swapaxes(weighted, -1, -2), inner, precision="highest")
    return hessian - strength * (taken + jnp.swapaxes(taken, -1, -2)) / 2


@sharded
@partial(jax.jit, static_argnames=("static", "refit"))
def round_backbone(
    residual: Array,
    hessian: Array,
    energy: Array,
    factor: Array,
    correction: Array,
    traced: Traced,
    output: Array | None = None,
    rows: Array | None = None,
    given: QParams = (),
    *,
    static: Quantizer,
    refit: bool,
) -> tuple[Array, Array, Array, QParams, Array]:
    """Q for W − L R: values, codes, scale, the grid's own scales, relative error.

    Where several devices hold a matrix, each rounds its share of rows (with G, of the row groups that are under way) and multiplies
    it with H.

    Args:
        residual: W − L R, (b, m, n).
        hessian: H, that the error is evaluated in, (b, n, n) or (1, n, n).
        energy: tr(G W H Wᵀ), (b,).
        factor: F of H or of its downdate, at the quantizer's column block.
        correction: (b,), of a unit grid's scale (`scale_correction`).
        traced, static: the quantizer.
        output, rows: G and its feedback factor, of a group of rows at a time (`ldlq_rows`); None: the identity.
        given: the qparams that the metric decides (`Quantizer.metric_qparams`).
        refit: fit a unit grid's scale to the result.
    """
    m, n = residual.shape[-2:]
    # scales of a grid's own are of rows or parts of them; that of a unit grid is of the matrix
    scales = (
        static.fit_qparams(residual, per_row=False)
        if static.unit_scale
        else by_rows(lambda w: static.fit_qparams(w, per_row=False), (residual,))
    )
    if static.unit_scale:
        scales = (scales[0] * correction[:, None, None], *scales[1:])
    if given:
        scales = (*scales[: len(scales) - len(given)], *given)
    padded, qparams = pad_to_tiles(residual, *static.tile), static.broadcast_qparams(scales, n)
    if rows is None:
        q, codes = by_rows(lambda w, *g: ldlq(w, factor, g, traced, static), (padded, *qparams), static.tile[0])
    else:
        q, codes = ldlq_rows(padded, factor, rows, qparams, traced, static)
    q, scale = q[:, :m, :n], jnp.ones(q.shape[:1])
    if static.unit_scale:
        scale, scales = scales[0][:, 0, 0], scales[1:]
        if refit:  # one scale for all of Q costs nothing to refit: the best multiple of Q in the metric
            weighted = product_by_rows(q, hessian)
            weighted = weighted if output is None else product_by_rows(output, weighted)
            own = jnp.sum(weighted * q, axis=(-2, -1))
            best = jnp.where(own > 0, jnp.sum(weighted * residual, axis=(-2, -1)) / jnp.where(own > 0, own, 1.0), 1.0)
            q, scale = q * best[:, None, None], scale * best
    return q, codes, scale, scales, normalised(quadratic_by_rows(residual - q, hessian, output), energy)


__all__ = ["downdate_strength", "downdated", "round_backbone", "scale_correction"]
