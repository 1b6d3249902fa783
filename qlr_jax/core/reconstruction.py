"""Low-rank error reconstruction: factors for a backbone that somebody else has made, W ≈ Q + L R with Q given.

E = W − Q is compressed as L R alone (a solve with backbone `none`), and Q is stored beside it in bf16:

    minimise tr(G (E − L R) H (E − L R)ᵀ)

The best L R before rounding are the leading components of C_Gᵀ E C_H (LoftQ, arXiv 2310.08659, has G = H = I; QERA,
arXiv 2410.06040, has G = I).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.objective import checked_hessian, checked_weight, relative_error
from qlr_jax.core.solution import Solution, Verdict
from qlr_jax.core.solver import solve
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError


def reconstruct_error(
    backbone: Any, weight: Any, hessian: Any, spec: str | Spec, *, output_hessian: Any = None, seed: int = 0, **options: Any
) -> Solution:
    """Low-rank error reconstruction: fit L R to what a given backbone leaves of a matrix, Q as it is; `qlr.correct`.

        minimise tr(G E H Eᵀ),  E = W − Q − L R

    Args:
        backbone: Q, (out, in), decoded; kept in bf16.
        weight: W, (out, in), what Q approximates.
        hessian: H, (in, in); None means the identity.
        spec: `bf16+r<rank>@<factors>`, e.g. `bf16+r16@int-8`.
        output_hessian, seed, **options: as for `solve`.

    Raises:
        QLRError: another backbone in the spec, shapes that differ, and what `solve` raises.

    Example:
        >>> w = np.random.default_rng(0).standard_normal((32, 48), np.float32)
        >>> found = reconstruct_error(np.round(w), w, None, "bf16+r16@bf16")
        >>> bool(found.stats["relative_error"] < 0.21), str(found.value.spec)
        (True, 'bf16+r16@bf16')
    """
    weight = checked_weight(weight)
    backbone, metric = checked_backbone(backbone, weight.shape), checked_hessian(hessian, weight.shape[1])
    output = None if output_hessian is None else checked_hessian(output_hessian, weight.shape[0], "outputs")
    text = factors_only(spec)
    factors = solve(weight - backbone, metric, text, output_hessian=output, seed=seed, **options) if text else None
    return with_backbone(backbone, factors, weight, metric, output)


def checked_backbone(backbone: object, shape: tuple[int, int]) -> np.ndarray:
    """Q as bf16 holds it, float32 (out, in); QLRError where it has another shape or is not finite."""
    array = np.asarray(backbone)
    if array.shape != shape:
        raise QLRError(f"the backbone has shape {array.shape}; the weight has {shape}, so pass that")
    backbone = array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    if not np.isfinite(backbone).all():
        raise QLRError("the backbone holds NaN or infinity; pass finite numbers")
    return backbone


def factors_only(spec: Spec | str) -> str:
    """The spec of the factors by themselves: `none+r16@int-8` for `bf16+r16@int-8`; "" where there is no rank."""
    spec = Spec.parse(spec)
    if spec.backbone != "bf16" or spec.rotated:
        raise QLRError(f"{spec}: a given backbone is kept in bf16; pass bf16+r<rank>@<factors>, e.g. bf16+r16@int-8")
    return str(replace(spec, backbone="none")) if spec.rank else ""


def with_backbone(
    backbone: np.ndarray,
    factors: Solution | None,
    weight: np.ndarray,
    hessian: np.ndarray,
    output: np.ndarray | None = None,
) -> Solution:
    """Q and the factors that were solved for W − Q, as one matrix; its errors are those of W.

    Args:
        backbone: of `checked_backbone`.
        factors: of a solve of W − Q with `factors_only(spec)`; None for rank 0.
        weight: W, (out, in).
        hessian: H, (in, in).
        output: G, (out, out); None is the identity.
    """
    weight, backbone = np.asarray(weight), np.asarray(backbone)
    if factors is None:
        arrays, layout = {}, Layout("bf16", weight.shape)
        unit, verdict, steps = np.float32(1), Verdict.SINGLE_PASS, 0
    else:
        arrays, layout = dict(factors.value.arrays), factors.value.layout
        layout = replace(layout, spec=str(replace(Spec.parse(layout.spec), backbone="bf16")))
        # g scales Q as well as L R; it is a power of two, so that Q / g is exact
        unit, verdict, steps = np.asarray(arrays["scale"])[0], factors.verdict, factors.stats["iterations"]
    arrays["backbone.codes"] = jnp.asarray((backbone / unit).astype(ml_dtypes.bfloat16))
    value = QLRMatrix(arrays, layout)
    found = np.asarray(value.dense())
    stats = {"relative_error": float(relative_error(weight[None], found[None], hessian[None])[0]), "iterations": steps}
    stats |= {"history": [stats["relative_error"]], "bound": None, "bound_note": "the backbone is given"}
    if output is not None:
        stats["weighted_error"] = float(relative_error(weight[None], found[None], hessian[None], output[None])[0])
    return Solution(value, verdict, stats)


correct = reconstruct_error
"""The public name: `qlr.correct`."""
