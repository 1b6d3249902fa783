"""Trained factors and backbones back on their grids; factors side by side, so that the rest can be trained about what is fixed.

R is quantized in the metric H of its inputs and L in R H Rᵀ, with feedback as in the solver (LPLR, arXiv 2310.11028). Fixing R,
training L on, fixing L, and training the scales on follows the order of QuIP#'s fine-tuning (arXiv 2402.04396, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from qlr_jax.adaptation.student import StudentMatrix
from qlr_jax.core.factors import round_left, round_right
from qlr_jax.core.ldlq import column_block
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.metric import ldl, rotated_hessian
from qlr_jax.core.requantize import Requantizer
from qlr_jax.core.typing import Array

QuantizedFactors = dict[str, dict[str, Array]]
"""Name of a matrix -> `<side>.codes` and `<side>.scales.<i>` of its quantized factors, as their quantizers pack them."""

DAMPING = 0.01  # of H, as in the solver
FACTORED = ("left", "right", "unit", "component")  # arrays of a matrix's factors among its parameters


def quantize_right(
    matrix: StudentMatrix, values: Mapping[str, Array], hessian: np.ndarray
) -> tuple[dict[str, Array], dict[str, Array]]:
    """R on its grid, in the metric H of its inputs; what its rows lose in size goes into the component scales.

    Args:
        matrix: its description.
        values: its parameters.
        hessian: H (n, n) of its inputs.

    Returns:
        The parameters with R quantized, and its codes and scales.
    """
    quantizer, rank = matrix.spec.factor_quantizers(matrix.layout.state_bits)[1], matrix.rank
    factor = ldl(_metric(matrix, values, hessian)[None], DAMPING, column_block(quantizer))
    rows = np.asarray(values["right"])
    wanted = np.pad(rows, ((0, _padded(matrix) - rank), (0, 0)))[None]
    given = np.ones((1, _padded(matrix), 1), np.float32) if matrix.on_grid[1] else None
    right, codes, scales = _round_right(wanted, factor, quantizer.static(), quantizer.traced(), False, given)
    free = quantizer.unit_scale and not matrix.on_grid[1]
    size = np.sqrt(np.mean(np.square(rows), axis=-1)) if free else np.ones(rank, np.float32)
    new = {"right": np.asarray(right)[0, :rank], "component": np.asarray(values["component"]) * size}
    return {**values, **new}, _codes("right", codes, scales)


@np.errstate(divide="ignore", invalid="ignore")  # an added component is 0 at first
def quantize_left(
    matrix: StudentMatrix, values: Mapping[str, Array], hessian: np.ndarray
) -> tuple[dict[str, Array], dict[str, Array]]:
    """L on its grid, in the metric R H Rᵀ of the quantized R; its components' sizes become the component scales.

    Args:
        matrix: its description.
        values: its parameters, R quantized.
        hessian: H (n, n) of its inputs.

    Returns:
        The parameters with L quantized, and its codes and scales.
    """
    (quantizer, of_right), rank = matrix.spec.factor_quantizers(matrix.layout.state_bits), matrix.rank
    more = _padded(matrix) - rank
    metric = np.pad(_projected(values["right"], _metric(matrix, values, hessian)), ((0, more), (0, more)))
    sizes = np.asarray(values["unit"]) * np.asarray(values["component"])
    wanted = np.pad((np.asarray(values["left"]) * sizes[:, None]).T, ((0, 0), (0, more)))
    given = np.pad(sizes, (0, more), constant_values=1.0)[None, None] if matrix.on_grid[0] else None
    mask = (np.arange(rank + more) < rank).astype(np.float32)
    own = not (quantizer.unit_scale or of_right.unit_scale)  # both grids have scales, so s is not stored
    left, component, codes, scales = _round_left(
        wanted[None], metric[None], mask, quantizer.static(), quantizer.traced(), own, False, False, given
    )
    component = np.asarray(component)[0, :rank]
    unit = np.sqrt(np.mean(np.square(component)))
    new = {"left": (np.asarray(left)[0, :, :rank] / component).T, "unit": np.full(rank, unit), "component": component / unit}
    return {**values, **new}, _codes("left", codes, scales)


QUANTIZE_SIDE = {"right": quantize_right, "left": quantize_left}


@np.errstate(divide="ignore", invalid="ignore")
def factor_shifts(
    matrix: StudentMatrix, values: Mapping[str, Array], hessian: np.ndarray, quantized: Mapping[str, Any]
) -> dict[str, Array]:
    """What quantization adds to L and R as they are now, `<side>.shift`; 0 where a side is on its grid.

    Fixed over some steps, it makes the loss that of the quantized factors, and its gradient theirs: a straight-through estimator
    that need not quantize at every step.

    Args:
        matrix: its description.
        values: its parameters.
        hessian: H (n, n) of its inputs.
        quantized: codes of the sides that are on their grids already.

    Source: straight-through estimator: Bengio et al., arXiv 1308.3432.
    """
    plain: dict[str, Any] = {k: np.asarray(v) if k in FACTORED else v for k, v in values.items() if not k.endswith(".shift")}
    right: Any = plain if "right.codes" in quantized else quantize_right(matrix, plain, hessian)[0]
    left = right if "left.codes" in quantized else quantize_left(matrix, right, hessian)[0]
    size = (right["component"] / plain["component"])[:, None]
    scale = (left["unit"] * left["component"] / (plain["unit"] * right["component"]))[:, None]
    # an added component is 0 at first, and its quantization 0 / 0
    live = np.any(plain["left"] != 0, axis=1, keepdims=True)
    target = np.where(live, left["left"] * scale, plain["left"])
    return {"right.shift": right["right"] * size - plain["right"], "left.shift": target - plain["left"]}


def backbone_shift(values: Mapping[str, Array], requantizer: Requantizer, from_scratch: bool) -> dict[str, Array]:
    """What quantization adds to a trained backbone B / g as it is now, to be fixed over some steps as `factor_shifts` are.

    Args:
        values: parameters of its matrix.
        requantizer: its grid and metrics.
        from_scratch: search all sequences of a trellis with free tail-biting states; else each keeps the state that it had at the
            quantization before, which takes half of the time.
    """
    states: Any = None if from_scratch else values.get("body.seams")
    quantized, codes = requantizer.round(values["body"], states)
    shift: dict[str, Any] = {"body.shift": quantized - values["body"]}
    if (warm := requantizer.warm_start(codes)) is not None:
        shift["body.seams"] = warm
    return shift


def metric_behind_signs(metric: np.ndarray, signs: Array | None) -> np.ndarray:
    """H or G of what lies behind trained signs: diag(signs) H diag(signs); as it is where there are none."""
    return metric if signs is None else metric * np.outer(np.asarray(signs), np.asarray(signs))


def _metric(matrix: StudentMatrix, values: Mapping[str, Array], hessian: np.ndarray) -> Array:
    """H of what R is multiplied with, in the basis in which it is stored."""
    return rotated_hessian(metric_behind_signs(hessian, values.get("columns")), matrix.rotations[1] if matrix.rotated else None)


def _padded(matrix: StudentMatrix) -> int:
    """Components that a rank is quantized with: a few sizes, so that few shapes are compiled."""
    return bucket(matrix.rank, min(matrix.layout.shape))


def _codes(side: str, codes: Array, scales: Sequence[Array]) -> dict[str, Array]:
    return {f"{side}.codes": np.asarray(codes)[0], **{f"{side}.scales.{j}": np.asarray(s)[0] for j, s in enumerate(scales)}}


@jax.jit
def _projected(right: Array, metric: Array) -> Array:
    """R H Rᵀ."""
    return right @ metric @ right.T


# one program for each padded rank and grid; what is small beside it is the host's, and compiles nothing
_round_right = partial(jax.jit, static_argnames=("static", "one_scale"))(round_right)
_round_left = partial(jax.jit, static_argnames=("static", "own_scales", "plain", "one_scale"))(round_left)
