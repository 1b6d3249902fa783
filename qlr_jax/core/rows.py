"""Matrices whose rows are read one by one, such as an embedding: each row rounded by itself, a slab of rows at a time.

    minimise  Σ_i g_i e_i H e_iᵀ,   e_i = w_i − ŵ_i,   i the rows

With a diagonal G the rows do not depend on each other: LDLQ in H is what there is to do, G weighs only the error that is reported,
and memory is that of a slab, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.backbone import scale_correction
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.ldlq import column_block, ldlq, pad_to_tiles
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.metric import Metric
from qlr_jax.core.problem import plain_unit
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.solution import Solution, Verdict
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError

SLAB_WEIGHTS = 2**22  # that are rounded at a time
NO_BOUND = "rows that have weights of their own carry no bound"
HALF_RANGE = float(np.finfo(np.float16).max)


# one piece: a slab is solved with what is made once for all of them, and its arrays are joined
def solve_rows(
    weight: np.ndarray,
    hessian: np.ndarray,
    spec: str | Spec,
    *,
    row_weights: np.ndarray | None = None,
    seed: int = 0,
    config: SolverConfig | None = None,
) -> Solution:
    """Compress a matrix of which single rows are read; inputs already checked.

        W ≈ diag(g) Q V  (`/rows`),  or Q unrotated, each row of Q rounded with feedback in H

    Args:
        weight: W, (m, n), float32, or anything that `numpy.asarray` reads.
        hessian: H, (n, n).
        spec: of rank 0, its outputs not rotated.
        row_weights: the diagonal of G, (m,); None: all rows count alike.
        seed: of the rotation's signs.
        config: settings; None: the defaults.

    Returns:
        The compressed matrix; stats["weighted_error"] where row weights were given.

    Raises:
        QLRError: a spec with factors or with rotated outputs; scales beyond float16.

    Source: LDLQ, QuIP, arXiv 2307.13304, section 3.

    Example:
        >>> w = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
        >>> solution = solve_rows(w, np.eye(64, dtype=np.float32), "int-4g32")
        >>> bool(solution.stats["relative_error"] < 0.1)
        True
    """
    config, spec = config or SolverConfig(), Spec.parse(spec)
    if spec.rank or spec.rotated:
        raise QLRError(
            f"{spec}: single rows cannot be read from it; pass a spec without factors and rotated outputs, e.g. int-4g32"
        )
    weight = np.asarray(weight, np.float32)
    (m, n), quantizer = weight.shape, spec.quantizer(config.state_bits, weight.shape)
    layout = Layout(str(spec), (m, n), seed, config.rotation_block, config.state_bits)
    metric = Metric.make(hessian[None], seed, config, spec.by_rows)
    width = column_block(quantizer)
    factor = metric.factor(width)
    correction = np.ones(1, np.float32)
    if quantizer.unit_scale and config.backbone_scale == "fitted":
        correction[:] = scale_correction(quantizer, metric.noise_gain(width).item())
    unit = _unit(weight, quantizer) if spec.has_scale else 1.0

    parts: list[dict[str, np.ndarray]] = []
    error, energy = np.empty(m), np.empty(m)
    for rows, slab in _slabs(weight / np.float32(unit), quantizer.tile[0]):
        codes, scales, own, squares = _round_slab(
            slab, factor, metric.hessian, correction, quantizer.traced(), metric.rotation and metric.rotation[0],
            static=quantizer.static(), block=metric.rotation[1] if metric.rotation else 0, refit=config.backbone_scale == "fitted",
        )  # fmt: skip
        part = quantizer.pack(np.asarray(codes), scales)
        if spec.by_rows:
            part["row_scales"] = np.asarray(own)
        parts.append(part)
        error[rows], energy[rows] = (np.asarray(s, np.float64)[: rows.stop - rows.start] for s in squares)

    arrays: dict[str, Any] = {}
    lengths = {key: shape[0] for key, (shape, _) in quantizer.stored(m, n).items()} | {"row_scales": m}
    for key in parts[0]:
        name = key if key == "row_scales" else f"backbone.{key}"
        arrays[name] = np.concatenate([part[key] for part in parts])[: lengths[key]]
    if spec.has_scale:
        arrays["scale"] = np.array([unit * float(correction[0])], np.float32)
    if spec.by_rows and not np.isfinite(arrays["row_scales"]).all():
        raise QLRError(f"a row of the matrix is larger than {HALF_RANGE:g}, the largest float16; pass int-8g32 or bf16 for it")
    stats = {"relative_error": _relative(error, energy), "iterations": 1, "bound": None, "bound_note": NO_BOUND}
    if row_weights is not None:
        stats["weighted_error"] = _relative(error * row_weights, energy * row_weights)
    stats["history"] = [stats.get("weighted_error", stats["relative_error"])]
    return Solution(QLRMatrix(arrays, layout), Verdict.SINGLE_PASS if weight.any() else Verdict.ZERO_WEIGHT, stats)


def row_energies(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """w_i H w_iᵀ of every row, (m,), float64.

    Args:
        weight: W, (m, n).
        hessian: H, (n, n).
    """
    weight = np.asarray(weight, np.float32)
    step = max(SLAB_WEIGHTS // weight.shape[1], 1)
    parts = (weight[at : at + step] for at in range(0, len(weight), step))
    return np.concatenate([np.einsum("ij,ij->i", part @ hessian, part, dtype=np.float64) for part in parts])


def _unit(weight: np.ndarray, quantizer: Quantizer) -> float:
    """g: the grid's scale of the whole, where it has one."""
    if quantizer.unit_scale:
        return float(quantizer.unit_of(jnp.asarray(weight), False).squeeze()) or 1.0
    size = np.sqrt(np.mean(np.square(weight), dtype=np.float64))
    return float(plain_unit(size)) if size else 1.0


def _slabs(weight: np.ndarray, height: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(which rows, those rows), whole tiles of one shape each: the last is filled up with zeros."""
    m, n = weight.shape
    step = min(max(SLAB_WEIGHTS // n // height, 1), -(-m // height)) * height
    for start in range(0, m, step):
        part = weight[start : start + step]
        yield slice(start, start + len(part)), np.pad(part, [(0, step - len(part)), (0, 0)])


@partial(jax.jit, static_argnames=("static", "block", "refit"))
def _round_slab(
    weight: Array,
    factor: Array,
    hessian: Array,
    correction: Array,
    traced: Traced,
    sign: Array | None,
    *,
    static: Quantizer,
    block: int,
    refit: bool,
) -> tuple[Array, QParams, Array, tuple[Array, ...]]:
    """Codes, the grid's own scales, scales of rows, and of every row e H eᵀ and w H wᵀ."""
    m, n = weight.shape
    w = weight if sign is None else hadamard.rotate(weight, sign, block)
    size = jnp.ones((m, 1))
    if sign is not None:
        size = jnp.sqrt(jnp.mean(jnp.square(w), axis=-1, keepdims=True))
        w = w / jnp.where(size > 0, size, 1.0)
    qparams = static.fit_qparams(w[None], False, correction[:, None, None] if static.unit_scale else None)
    padded = pad_to_tiles(w[None], *static.tile)
    q, codes = ldlq(padded, factor, static.broadcast_qparams(qparams, n), traced, static)
    q = q[0, :m, :n]
    scales = tuple(s[0] for s in qparams[1 if static.unit_scale else 0 :])
    if sign is not None:
        fitted = jnp.ones((m, 1))
        if refit:  # the best multiple of each row in H
            of_q = jnp.matmul(q, hessian[0], precision="highest")
            own = jnp.sum(of_q * q, axis=-1, keepdims=True)
            fitted = jnp.where(own > 0, jnp.sum(of_q * w, axis=-1, keepdims=True) / jnp.where(own > 0, own, 1.0), 1.0)
        # q has the unit scale in it, which its codes have not
        stored = (size * fitted * correction).astype(jnp.float16)
        q, w = q * (stored.astype(jnp.float32) / correction), w * size
        size = stored
    squares = tuple(jnp.sum(jnp.matmul(x, hessian[0], precision="highest") * x, axis=-1) for x in (w - q, w))
    return codes[0], scales, size[:, 0], squares


def _relative(error: np.ndarray, energy: np.ndarray) -> float:
    whole, missed = float(energy.sum()), max(float(error.sum()), 0.0)
    return (missed / whole) ** 0.5 if missed > 0 and whole > 0 else 0.0


__all__ = ["row_energies", "solve_rows"]
