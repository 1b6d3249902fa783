"""The relative error of every option of a matrix, predicted from its spectrum and the rate curve of the grid.

Rounding with feedback leaves tr(E H Eᵀ) ≈ D · ‖X‖² / (1 − φ D) · tr(D_H) / n: D the grid's mean squared error on a unit
Gaussian, X what is rounded, φ what the feedback adds to it (`core.ldlq.echo`), D_H the diagonal of the LDLᵀ factor of H (QuIP,
arXiv 2307.13304, theorem 1, after a rotation that spreads X evenly). With factors X = W − L̂ R̂, so rank pays through the
singular values of W, and coarse factors take a part of that back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.ldlq import echo, feedback, inflation, pad_metric
from qlr_jax.core.low_rank import bucket, start_basis, top_subspace
from qlr_jax.core.objective import damped, quadratic
from qlr_jax.core.quantizers import Nothing, Quantizer, Trellis
from qlr_jax.core.quantizers.trellis import gaussian_error
from qlr_jax.core.spec import Spec


@dataclass(frozen=True)
class Profile:
    """What a prediction needs to know of a matrix.

    Attributes:
        shape: (out, in).
        energy: tr(W H Wᵀ).
        size: ‖W‖².
        captured: the leading squared singular values of W, (k,): what each component takes from `size`.
        explained: the leading eigenvalues of W H Wᵀ, (k,): what each component takes from `energy`.
        noise: tr(D_H) / n of the damped, rotated H.
        echo: φ of its feedback.
    """

    shape: tuple[int, int]
    energy: float
    size: float
    captured: np.ndarray
    explained: np.ndarray
    noise: float
    echo: float


def profile(
    weight: np.ndarray, hessian: np.ndarray, max_rank: int, *, seed: int = 0, block: int = 0, damping: float = 1e-2
) -> Profile:
    """Measure a matrix: one subspace iteration, one Cholesky factor."""
    m, n = weight.shape
    w, h = jnp.asarray(weight, jnp.float32)[None], jnp.asarray(hessian, jnp.float32)[None]
    columns = min(bucket(max(max_rank, 1), min(m, n)), m, n)
    start = jnp.asarray(start_basis(m, columns, 0))[None]
    _, values = top_subspace(w, h, start, 3)
    _, captured = top_subspace(w, jnp.eye(n)[None], start, 3)
    turned = hadamard.rotate_hessian(h, hadamard.signs(seed, hadamard.INPUT, n), hadamard.block_size(n, block))
    width = Spec.parse("trellis-2").quantizer(shape=(m, n)).tile[1]
    factor, trace = feedback(pad_metric(damped(turned, damping), width), width)
    # a block's D is spread over its columns; padding added an identity of the mean diagonal
    padding = (-n % width) * float(jnp.trace(damped(h, damping)[0])) / n
    return Profile(
        (m, n),
        max(float(quadratic(w, h)[0]), 0.0),
        float(np.sum(np.square(weight, dtype=np.float64))),
        np.asarray(captured[0], np.float64),
        np.asarray(values[0], np.float64),
        max(float(trace[0]) - padding, 0.0) / n,
        float(echo(factor)[0]),
    )


def predict(profile: Profile, spec: Spec | str, state_bits: int = 12) -> float:
    """√(tr(E H Eᵀ) / tr(W H Wᵀ)) that a solve with `spec` should reach; `calibrate` corrects it by solves that were made."""
    spec = Spec.parse(spec)
    if profile.energy <= 0:
        return 0.0
    gone = lost = 0.0
    if spec.rank:
        left, right = spec.factor_quantizers(state_bits)
        coarse = grid_error(left, state_bits) + grid_error(right, state_bits)
        if isinstance(spec.quantizer(), Nothing):
            explained = float(profile.explained[: spec.rank].sum())
            return math.sqrt(max(profile.energy - (1 - coarse) * explained, 0.0) / profile.energy)
        gone = float(profile.captured[: spec.rank].sum())
        lost = coarse * gone
    left_over = max(profile.size - gone, 1e-3 * profile.size) + lost
    error = grid_error(spec.quantizer(state_bits), state_bits)
    return math.sqrt(error * float(inflation(error, profile.echo)) * left_over * profile.noise / profile.energy)


def grid_error(quantizer: Quantizer, state_bits: int) -> float:
    """Mean squared error of a grid on a unit Gaussian; trellis rates between quarters are interpolated in the logarithm."""
    if isinstance(quantizer, Trellis):
        quarter = quantizer.rate * 4
        low, high = Fraction(math.floor(quarter), 4), Fraction(math.ceil(quarter), 4)
        if low == high:
            return gaussian_error(low, state_bits)
        part = float((quantizer.rate - low) / (high - low))
        return gaussian_error(low, state_bits) ** (1 - part) * gaussian_error(high, state_bits) ** part
    return _measured(quantizer)


@lru_cache
def _measured(quantizer: Quantizer) -> float:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256), np.float32))
    values, _ = quantizer.round_block(x, quantizer.grid(quantizer.fit(x, per_row=True), 256), quantizer.data(), False)
    return float(jnp.mean(jnp.square(x - values)))


@dataclass(frozen=True)
class Correction:
    """How far solves came out from their predictions: a factor a matrix, and one a (kind of matrix, rank).

    Both are ratios of relative errors, solved over predicted.
    """

    by_matrix: Mapping[str, float]
    by_rank: Mapping[tuple[str, int], float]

    def factor(self, name: str, kind: str, rank: int) -> float:
        """What a prediction for matrix `name` at `rank` is multiplied by; the nearest measured rank stands in for others."""
        ranks = [r for k, r in self.by_rank if k == kind]
        near = min(ranks, key=lambda r: abs(math.log((r + 1) / (rank + 1))), default=None) if rank else None
        return self.by_matrix.get(name, 1.0) * (self.by_rank[kind, near] if near is not None else 1.0)
