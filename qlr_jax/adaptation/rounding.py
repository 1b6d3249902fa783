"""Trained factors back on their grids, one side after the other, so that training can go on about what is fixed.

R is rounded in the metric H of its inputs and L in R H Rᵀ, with feedback as in the solver (LPLR, arXiv 2310.11028). Fixing R,
training L on, fixing L, and training the scales on follows the order of QuIP#'s fine-tuning (arXiv 2402.04396, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from qlr_jax.adaptation.student import RELAXED, Site
from qlr_jax.core.factors import Factors, pack_factors
from qlr_jax.core.factors import round_left as left_on_grid
from qlr_jax.core.factors import round_right as right_on_grid
from qlr_jax.core.ldlq import column_block
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.metric import ldl, rotated_hessian
from qlr_jax.core.requantize import Regrid
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array

Rounded = dict[str, dict[str, Array]]
"""Name of a matrix -> `<side>.codes` and `<side>.scales.<i>` of its rounded factors, as their quantizers pack them."""

DAMPING = 0.01  # of H, as in the solver


def round_right(site: Site, values: Mapping[str, Array], hessian: np.ndarray) -> tuple[dict[str, Array], dict[str, Array]]:
    """R on its grid, in the metric H of its inputs; what its rows lose in size goes into the component scales.

    Returns:
        The arrays with R rounded, and its codes and scales.
    """
    quantizer, rank = site.spec.factor_quantizers(site.layout.state_bits)[1], site.rank
    factor = ldl(_metric(site, values, hessian)[None], DAMPING, column_block(quantizer))
    wanted = jnp.pad(values["right"], ((0, _padded(site) - rank), (0, 0)))[None]
    given = jnp.ones((1, _padded(site), 1)) if site.on_grid[1] else None
    found, codes, scales = right_on_grid(wanted, factor, quantizer.static(), quantizer.traced(), False, given)
    free = quantizer.unit_scale and not site.on_grid[1]
    size = jnp.sqrt(jnp.mean(jnp.square(values["right"]), axis=-1)) if free else jnp.ones((rank,))
    return {**values, "right": found[0, :rank], "component": values["component"] * size}, _codes("right", codes, scales)


def round_left(site: Site, values: Mapping[str, Array], hessian: np.ndarray) -> tuple[dict[str, Array], dict[str, Array]]:
    """L on its grid, in the metric R H Rᵀ of the rounded R; its components' sizes become the component scales.

    Returns:
        The arrays with L rounded, and its codes and scales.
    """
    (quantizer, of_right), rank = site.spec.factor_quantizers(site.layout.state_bits), site.rank
    right, more = values["right"], _padded(site) - site.rank
    metric = jnp.pad(right @ _metric(site, values, hessian) @ right.T, ((0, more), (0, more)))
    sizes = values["unit"] * values["component"]
    wanted = jnp.pad((values["left"] * sizes[:, None]).T, ((0, 0), (0, more)))
    given = jnp.pad(sizes, (0, more), constant_values=1.0)[None, None] if site.on_grid[0] else None
    mask = (jnp.arange(rank + more) < rank).astype(jnp.float32)
    own = not (quantizer.unit_scale or of_right.unit_scale)  # both grids have scales, so s is not stored
    found, component, codes, scales = left_on_grid(
        wanted[None], metric[None], mask, quantizer.static(), quantizer.traced(), own, False, False, given
    )
    component = component[0, :rank]
    unit = jnp.sqrt(jnp.mean(jnp.square(component)))
    new = {"left": (found[0, :, :rank] / component).T, "unit": jnp.full((rank,), unit), "component": component / unit}
    return {**values, **new}, _codes("left", codes, scales)


def shifts(site: Site, values: Mapping[str, Array], hessian: np.ndarray, rounded: Mapping[str, Array]) -> dict[str, Array]:
    """What rounding adds to L and R as they are now, 0 where a side is on its grid: `<side>.shift`, for factors to be added to.

    Held fixed over some steps it makes the loss that of rounded factors, and its gradient theirs: a straight-through estimator
    (arXiv 1308.3432) that need not round at every step.
    """
    plain = {k: v for k, v in values.items() if not k.endswith(".shift")}
    right = plain if "right.codes" in rounded else round_right(site, plain, hessian)[0]
    left = right if "left.codes" in rounded else round_left(site, right, hessian)[0]
    size = (right["component"] / plain["component"])[:, None]
    scale = (left["unit"] * left["component"] / (plain["unit"] * right["component"]))[:, None]
    # a fresh component is 0 at first, and its rounding 0 / 0
    live = jnp.any(plain["left"] != 0, axis=1, keepdims=True)
    found = jnp.where(live, left["left"] * scale, plain["left"])
    return {"right.shift": right["right"] * size - plain["right"], "left.shift": found - plain["left"]}


def behind(hessian: np.ndarray, relaxed: Array | None) -> np.ndarray:
    """H or G as it is felt behind signs that are real numbers, where there are such."""
    return hessian if relaxed is None else hessian * np.outer(relaxed, relaxed)


def _metric(site: Site, values: Mapping[str, Array], hessian: np.ndarray) -> Array:
    """H of what R is multiplied with, in the basis in which it is stored."""
    return rotated_hessian(behind(hessian, values.get("columns")), site.sides[1] if site.rotated else None)


def _padded(site: Site) -> int:
    """Components that a rank is rounded with: a few sizes, so that few shapes are compiled."""
    return bucket(site.rank, min(site.layout.shape))


ROUNDERS = {"right": round_right, "left": round_left}


def body_shift(values: Mapping[str, Array], regrid: Regrid, anew: bool) -> dict[str, Array]:
    """What rounding adds to a trained backbone B / g as it is now, to be held fixed over some steps as `shifts` are.

    Args:
        anew: all walks of a trellis are searched from the start; else each closes where it did at the rounding before, which takes
            half of the time.
    """
    found, codes = regrid.round(values["body"], None if anew else values.get("body.seams"))
    return {"body.shift": found - values["body"], **({} if (seams := regrid.seams(codes)) is None else {"body.seams": seams})}


def stored(
    matrix: QLRMatrix, site: Site, values: Mapping[str, Array], rounded: Mapping[str, Array], regrid: Regrid | None = None
) -> QLRMatrix:
    """The matrix as it is saved: Q's codes, byte for byte where it was not trained, new scales, and the rounded factors."""
    before = float(np.asarray(matrix.arrays["scale"])[0])
    arrays = {k: v for k, v in matrix.arrays.items() if k.startswith("backbone.")}
    if regrid is not None:
        arrays |= regrid.pack(regrid.round(values["body"])[1])
    arrays["scale"] = np.array([before * float(values["gain"])], np.float32)
    if site.groups:
        scales = np.asarray(matrix.arrays["backbone.scales"], np.float32) * np.asarray(values["groups"])
        arrays["backbone.scales"] = scales.astype(np.float16)
    if site.layout.signs:
        for name, relaxed, (sign, _) in zip(("output_signs", "input_signs"), RELAXED, site.sides, strict=True):
            arrays[name] = (sign * np.asarray(values[relaxed])).astype(np.float16)
    if not Spec.parse(site.layout.spec).rank:
        return QLRMatrix(arrays, site.layout)
    kept = {k: np.asarray(v) for k, v in matrix.arrays.items() if k.startswith(("left.", "right.", "component"))}
    if not rounded:
        # not trained, or only s: the component scales are all that may differ
        size = np.asarray(values["component"]) if site.rank else np.ones(0)
        return QLRMatrix({**arrays, **_rescaled(kept, size)}, site.layout)
    sides = [tuple(rounded[k] for k in sorted(rounded) if k.startswith(f"{side}.scales")) for side in ("left", "right")]
    factors = Factors(
        jnp.zeros(()),
        jnp.zeros(()),
        jnp.asarray(values["unit"] * values["component"]),
        rounded["left.codes"],
        rounded["right.codes"],
        *sides,
    )
    packed = pack_factors(factors, site.spec, site.layout.state_bits, before)
    if matrix.spec.rank > site.rank:  # the components that were left alone follow, byte for byte
        for name, array in packed.items():
            count = len(array) if name != "component_scale" else site.rank
            packed[name] = np.concatenate([array, kept[name][count:]])
    return QLRMatrix({**arrays, **packed}, site.layout)


def _rescaled(kept: dict[str, np.ndarray], size: np.ndarray) -> dict[str, np.ndarray]:
    """Factors as they were, the first components resized in s."""
    if "component_scale" in kept and len(size):
        new = kept["component_scale"].astype(np.float32)
        new[: len(size)] *= size
        kept["component_scale"] = new.astype(np.float16)
    return kept


def _codes(side: str, codes: Array, scales: Sequence[Array]) -> dict[str, Array]:
    return {f"{side}.codes": codes[0], **{f"{side}.scales.{j}": s[0] for j, s in enumerate(scales)}}
