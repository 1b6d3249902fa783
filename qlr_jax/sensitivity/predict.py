"""The relative error of every option of a matrix, predicted from its spectra and the rate curve of the grid.

Rounding with feedback leaves tr(G E H Eᵀ) ≈ D · ‖X‖² / (1 − φ D) · tr(D_H) / n · tr(D_G) / m: D the grid's mean squared error on
a unit Gaussian, X what is rounded, φ the noise gain of the feedback (`core.ldlq`), D_H and D_G the diagonals of the LDLᵀ
factors of H and G (QuIP, arXiv 2307.13304, theorem 1, after a rotation that spreads X evenly; G = I where there is none). Rank
pays in one of two ways: with factors of W itself X = W − L̂ R̂ is smaller by the singular values of W, or with factors of what Q
leaves the error is smaller by the eigenvalues of D_G. Coarse factors take a part of either back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qlr_jax.core import hadamard
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.ldlq import row_group, variance_gain
from qlr_jax.core.low_rank import bucket, start_basis, top_subspace
from qlr_jax.core.metric import Metric
from qlr_jax.core.objective import damped, quadratic
from qlr_jax.core.quantizers import DEFAULT_STATE_BITS, Quantizer, parse_quantizer
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array


@dataclass(frozen=True)
class Profile:
    """What a prediction needs to know of a matrix.

    Attributes:
        shape: (out, in).
        energy: tr(G W H Wᵀ).
        size: ‖W‖².
        captured: the leading squared singular values of W, (k,): what each component takes from `size`.
        explained: the leading eigenvalues of Cᵀ W H Wᵀ C, G = C Cᵀ, (k,): what each component takes from `energy`.
        absorbed: the leading eigenvalues of D_G over its trace, (k,): what each component takes from Q's error.
        noise: tr(D_H) / n · tr(D_G) / m of the damped, rotated H and G.
        noise_gain: φ of their feedback.
        spread: tr(D_k) of H's blocks, one a column of a trellis's tiles (`Quantizer.relative_gain`).
    """

    shape: tuple[int, int]
    energy: float
    size: float
    captured: np.ndarray
    explained: np.ndarray
    absorbed: np.ndarray
    noise: float
    noise_gain: float
    spread: np.ndarray
    _gains: dict[tuple[str, int], float] = field(default_factory=dict, repr=False)

    def gain_of(self, spec: Spec, state_bits: int) -> float:
        """What a backbone's rates take off its error here (`Quantizer.relative_gain`); the same for all ranks."""
        key = spec.backbone, state_bits
        if key not in self._gains:
            self._gains[key] = spec.quantizer(state_bits, self.shape).relative_gain(self.spread)
        return self._gains[key]


def profile(
    weight: np.ndarray,
    hessian: np.ndarray,
    max_rank: int,
    *,
    output: np.ndarray | None = None,
    seed: int = 0,
    block: int = 0,
    damping: float = 1e-2,
) -> Profile:
    """Measure a matrix: two subspace iterations, a Cholesky factor of H, and two of G where it is given.

    Args:
        weight: W (m, n).
        hessian: H (n, n).
        max_rank: how many components the spectra have at least, as far as W has them.
        output: G (m, m); None: the identity.
        seed: of the rotations.
        block: of the rotations; 0: full width.
        damping: added to the diagonals of H and G, as a share of their mean.
    """
    weight = np.asarray(weight)
    m, n = weight.shape
    w, h = (np.asarray(a, np.float32)[None] for a in (weight, hessian))
    g = None if output is None else np.asarray(output, np.float32)[None]
    columns = min(bucket(max(max_rank, 1), min(m, n)), m, n)
    start = start_basis(m, columns, 0)[None]
    values, captured, energy = _spectra(*jax.device_put((w, h, g)), start, damping)
    height, width = Spec.parse("trellis-2").quantizer(shape=(m, n)).tile
    config = SolverConfig(rotation_block=block, damping=damping)
    # the metrics as a solve makes them, by its programs
    inputs = Metric.make(h, seed, config, True)
    noise, gain, spread = _feedback_noise(inputs, width)
    absorbed = np.full(columns, 1 / m)
    if g is not None:
        group = row_group(-(-m // height) * height, height)
        outputs = Metric.make(g, seed, config, True, hadamard.OUTPUT)
        noise_out, gain_out, _ = _feedback_noise(outputs, group)
        noise, gain = noise * noise_out, (1 + gain) * (1 + gain_out) - 1
        absorbed = _absorbed(np.asarray(outputs.root(group))[0], group)[:columns]
    return Profile(
        (m, n),
        max(float(np.asarray(energy)[0]), 0.0),
        float(np.sum(np.square(weight, dtype=np.float64))),
        np.asarray(captured, np.float64)[0],
        np.asarray(values, np.float64)[0],
        absorbed,
        noise,
        gain,
        spread,
    )


@jax.jit
def _spectra(w: Array, h: Array, g: Array | None, start: Array, damping: float) -> tuple[Array, Array, Array]:
    """Leading eigenvalues of A H Aᵀ, A = Cᵀ W for G = C Cᵀ, damped, and of W Wᵀ; tr(G W H Wᵀ)."""
    weighted = w if g is None else jnp.swapaxes(jnp.linalg.cholesky(damped(g, damping)), -1, -2) @ w
    _, values = top_subspace(weighted, h, start, 3)
    # one factorization after the other: side by side they can wait for each other for ever (`core.factors`)
    w, values = lax.optimization_barrier((w, values))
    _, captured = top_subspace(w, jnp.eye(w.shape[-1])[None], start, 3)
    return values, captured, quadratic(w, h, g)


def _feedback_noise(metric: Metric, width: int) -> tuple[float, float, np.ndarray]:
    """tr(D) / n and φ of one metric's feedback at `width` columns a block, and tr(D_k) of the blocks."""
    n = metric.original.shape[-1]
    traces = metric.spread(width)[0] * metric.unit[0]
    # padding added an identity of the mean diagonal
    padding = (-n % width) * float(np.trace(np.asarray(metric.regular)[0])) * metric.unit[0] / n
    return max(float(traces.sum()) - padding, 0.0) / n, float(metric.noise_gain(width)[0]), traces


def _absorbed(lower: np.ndarray, group: int) -> np.ndarray:
    """Eigenvalues of D_G over their sum, largest first: those of its blocks."""
    host = np.asarray(lower, np.float64)
    parts = [np.linalg.svd(host[i : i + group, i : i + group], compute_uv=False) ** 2 for i in range(0, len(host), group)]
    values = np.sort(np.concatenate(parts))[::-1]
    return values / values.sum()


def predict(profile: Profile, spec: Spec | str, state_bits: int = DEFAULT_STATE_BITS) -> float:
    """The relative error √(tr(G E H Eᵀ) / tr(G W H Wᵀ)) that a solve should reach; `correction` refines it by solves.

    Args:
        profile: of the matrix.
        spec: what it is solved with.
        state_bits: of a trellis.
    """
    spec = Spec.parse(spec)
    if profile.energy <= 0:
        return 0.0
    left_over = profile.size
    if spec.rank:
        coarse = _factor_error(spec.left, spec.right, spec.rank, state_bits)
        if spec.quantizer().empty:
            explained = float(profile.explained[: spec.rank].sum())
            return math.sqrt(max(profile.energy - (1 - coarse) * explained, 0.0) / profile.energy)
        gone = float(profile.captured[: spec.rank].sum())
        of_weight = max(profile.size - gone, 1e-3 * profile.size) + coarse * gone
        of_error = profile.size * (1 - (1 - coarse) * float(profile.absorbed[: spec.rank].sum()))
        left_over = min(of_weight, of_error)
    error = _backbone_error(spec.backbone, state_bits)
    error *= profile.gain_of(spec, state_bits)
    return math.sqrt(error * float(variance_gain(error, profile.noise_gain)) * left_over * profile.noise / profile.energy)


@lru_cache(maxsize=4096)
def _backbone_error(backbone: str, state_bits: int) -> float:
    return grid_error(parse_quantizer(backbone), state_bits)


@lru_cache(maxsize=4096)
def _factor_error(left: str, right: str, rank: int, state_bits: int) -> float:
    """Of both factors together."""
    return sum(parse_quantizer(grid).for_factor(rank, state_bits).gaussian_error() for grid in (left, right))


def grid_error(quantizer: Quantizer, state_bits: int = DEFAULT_STATE_BITS) -> float:
    """Mean squared error of a grid on a unit Gaussian, a trellis with so many state bits."""
    return quantizer.with_settings(state_bits=state_bits).gaussian_error()
