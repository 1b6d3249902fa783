"""A literal peer of the solver: CALDERA by its pseudo-code, step by step, with full decompositions and its E8 search.

    from literal import literal
    approximation, relative_error = literal(weight, hessian, 16)

Written from algorithms 1 and 2 of arXiv 2405.18886, and of QuIP# (arXiv 2402.04396) for LDLQ in blocks of 8 and the codebook: not
from anybody's code. Q has 2 bits, L and R have 4 in two stages, each matrix one scale. It is what someone who knows JAX would
write first: every step is jitted and compiled once a shape, nothing is clever. `solver.py` beside it measures against it.

Where the pseudo-code leaves a choice:

* the low-rank first variant: (L, R) of W − Q before Q of W − L R, so the first fit sees all of W;
* the singular values are split evenly, L₀ = U √S; R₀ = √S Vᵀ C⁺ is then L₀⁺ A, which the first inner iteration forms anyway;
* 8 weights are rounded together along a row of Q and of R, and along a column of L, as the factors are stored;
* regressions and LDLQ see the damped H, as one regularizes H once and for all; iterates are judged in H itself.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax.core import hadamard
from qlr_jax.core.ldlq import feedback
from qlr_jax.core.quantizers.e8 import SCALES, SIZE, nearest_shifted, shifted_points

SEARCHES = ("exhaustive", "argmax", "structured")
VECTORS, CODEWORDS = 1024, 1024  # scored at a time: 4 MB of scores, which a cache holds
EXACT = partial(jnp.matmul, precision="highest")


# The E8 codebook, and rounding to it ---------------------------------------------------------------------------------------


def nearest(x: Array, search: str) -> Array:
    """Codes of the nearest of the 2^16 codewords, (vectors,), for vectors in rows: the largest x · c − |c|² / 2.

    "exhaustive" finds the place of the largest score as the place that equals the maximum: XLA's own argmax, in "argmax", is a
    loop without vector instructions on a CPU, and takes ten times as long. "structured" is the library's search.
    """
    if search == "structured":
        return nearest_shifted(x.T)
    book = shifted_points(jnp.arange(2**16)).reshape(-1, CODEWORDS, SIZE)
    place = jnp.arange(CODEWORDS, dtype=jnp.int32)[:, None]

    def among(vectors: Array) -> Array:
        def compare(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            codewords, first = part
            scores = EXACT(codewords, vectors.T) - jnp.sum(jnp.square(codewords), axis=1, keepdims=True) / 2
            score = jnp.max(scores, axis=0)
            if search == "argmax":
                found = jnp.argmax(scores, axis=0).astype(jnp.int32)
            else:
                found = jnp.max(jnp.where(scores == score, place, 0), axis=0)
            better = score > best[0]
            return (jnp.where(better, score, best[0]), jnp.where(better, first + found, best[1])), None

        start = (jnp.full(len(vectors), -jnp.inf), jnp.zeros(len(vectors), jnp.int32))
        firsts = jnp.arange(len(book), dtype=jnp.int32) * CODEWORDS
        return lax.scan(compare, start, (book, firsts))[0][1]

    count = len(x)
    chunk = min(count, VECTORS)
    x = jnp.pad(x, ((0, -count % chunk), (0, 0)))
    return lax.map(among, x.reshape(-1, chunk, SIZE)).reshape(-1)[:count]


def e8(x: Array, bits: int, search: str) -> Array:
    """The nearest points of a grid for unit variance, 8 neighbours in a row together; a second stage takes what is left over."""
    gain, inner = SCALES[bits]
    vectors = x.reshape(-1, SIZE) / gain
    points = shifted_points(nearest(vectors, search))
    if bits == 4:
        points = points + inner * shifted_points(nearest((vectors - points) / inner, search))
    return (points * gain).reshape(x.shape)


def rms(x: Array) -> Array:
    size = jnp.sqrt(jnp.mean(jnp.square(x)))
    return jnp.where(size > 0, size, 1.0)


# Algorithm 1 ---------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="blocks")
def rotated(weight: Array, hessian: Array, u: Array, v: Array, blocks: tuple[int, int]) -> tuple[Array, Array]:
    """W~ = U W Vᵀ and H~ = V H Vᵀ."""
    turned = hadamard.rotate(hadamard.rotate(weight, v, blocks[1]).T, u, blocks[0]).T
    return turned, hadamard.rotate_hessian(hessian, v, blocks[1])


@partial(jax.jit, static_argnames="blocks")
def unrotated(weight: Array, u: Array, v: Array, blocks: tuple[int, int]) -> Array:
    """Uᵀ W~ V."""
    return hadamard.unrotate(hadamard.unrotate(weight, v, blocks[1]).T, u, blocks[0]).T


@jax.jit
def damped(hessian: Array) -> Array:
    return hessian + 1e-2 * jnp.mean(jnp.diag(hessian)) * jnp.eye(len(hessian))


@jax.jit
def block_ldl(hessian: Array) -> Array:
    """F of H = (I + F) D (I + F)ᵀ in blocks of 8."""
    return feedback(hessian, SIZE)[0]


@partial(jax.jit, static_argnames="search")
def ldlq(weight: Array, factor: Array, search: str) -> Array:
    """Q: blocks of 8 columns from the last to the first, each rounded with what the later ones missed fed back through F."""
    scale = rms(weight)

    def step(error: Array, start: Array) -> tuple[Array, Array]:
        block = lax.dynamic_slice_in_dim(weight, start, SIZE, axis=1)
        target = block + EXACT(error, lax.dynamic_slice_in_dim(factor, start, SIZE, axis=1))
        rounded = e8(target / scale, 2, search) * scale
        return lax.dynamic_update_slice_in_dim(error, block - rounded, start, axis=1), rounded

    _, blocks = lax.scan(step, jnp.zeros_like(weight), jnp.arange(weight.shape[1] - SIZE, -1, -SIZE))
    return jnp.moveaxis(blocks[::-1], 0, 1).reshape(weight.shape)


@jax.jit
def loss(error: Array, hessian: Array) -> Array:
    """tr(E H Eᵀ)."""
    return jnp.sum(EXACT(error, hessian) * error)


# Algorithm 2 ---------------------------------------------------------------------------------------------------------------


@jax.jit
def decomposed(hessian: Array) -> tuple[Array, Array]:
    """C of H = C Cᵀ, in the place of the calibration data (H = Xᵀ X), and the projection H H⁺, both by eigendecomposition."""
    values, vectors = jnp.linalg.eigh(hessian)
    kept = values > 1e-7 * jnp.max(values)
    values = jnp.where(kept, values, 0.0)
    inverse = EXACT(vectors * jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0), vectors.T)
    return vectors * jnp.sqrt(values), EXACT(hessian, inverse)


@partial(jax.jit, static_argnames="rank")
def regression(target: Array, root: Array, rank: int) -> Array:
    """L₀ of the best rank-r L R for A in the metric C Cᵀ: U √S of the truncated SVD of A C."""
    left, values, _ = jnp.linalg.svd(EXACT(target, root), full_matrices=False)
    return left[:, :rank] * jnp.sqrt(values[:rank])


@partial(jax.jit, static_argnames="search")
def rounded_right(target: Array, left: Array, projection: Array, search: str) -> Array:
    """R = Q_R(L⁺ A H H⁺)."""
    right = EXACT(EXACT(jnp.linalg.pinv(left), target), projection)
    return e8(right / rms(right), 4, search) * rms(right)


@partial(jax.jit, static_argnames="search")
def rounded_left(target: Array, right: Array, hessian: Array, search: str) -> Array:
    """L = Q_L(A H Rᵀ (R H Rᵀ)⁻¹)."""
    weighted = EXACT(hessian, right.T)
    left = EXACT(EXACT(target, weighted), jnp.linalg.pinv(EXACT(right, weighted), hermitian=True))
    return e8(left.T / rms(left), 4, search).T * rms(left)


@jax.jit
def product_and_loss(target: Array, left: Array, right: Array, hessian: Array) -> tuple[Array, Array]:
    product = EXACT(left, right)
    return product, loss(product - target, hessian)


def lplr_factorize(
    target: Array, hessian: Array, root: Array, projection: Array, rank: int, inner: int, search: str
) -> tuple[Array, float]:
    """The best L R of `inner` iterations, and its tr((L R − A) H (L R − A)ᵀ)."""
    left = regression(target, root, rank)
    best, least = jnp.zeros_like(target), float("inf")
    for _ in range(inner):
        right = rounded_right(target, left, projection, search)
        left = rounded_left(target, right, hessian, search)
        product, error = product_and_loss(target, left, right, hessian)
        if float(error) < least:
            best, least = product, float(error)
    return best, least


# Together ------------------------------------------------------------------------------------------------------------------


def literal(
    weight: np.ndarray,
    hessian: np.ndarray,
    rank: int,
    *,
    outer: int = 15,
    inner: int = 10,
    seed: int = 0,
    search: str = "exhaustive",
    trail: list[float] | None = None,
) -> tuple[np.ndarray, float]:
    """CALDERA with E8 at 2 bits, and at 4 bits for the factors.

    Args:
        weight: W, (m, n), both multiples of 8.
        hessian: H = E[x xᵀ], (n, n).
        rank: of L R; at 0 one pass of LDLQ, as all iterations would be the same.
        outer, inner: iterations of algorithms 1 and 2.
        seed: of the rotation's signs.
        search: "exhaustive", "argmax" or "structured", see `nearest`.
        trail: if given, the relative error of each iterate is appended.

    Returns:
        The best iterate in the original basis, and its √(tr(E H Eᵀ) / tr(W H Wᵀ)) with the H given.

    Example:
        >>> import numpy as np
        >>> w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
        >>> approximation, error = literal(w, np.eye(64, dtype=np.float32), 0)
        >>> approximation.shape, round(error, 1)
        ((32, 64), 0.3)
    """
    if weight.shape[0] % SIZE or weight.shape[1] % SIZE:
        raise ValueError(f"a matrix of shape {weight.shape} does not divide into vectors of 8; pass multiples of 8")
    if search not in SEARCHES:
        raise ValueError(f"search={search!r} is not known; pass one of {', '.join(SEARCHES)}")
    (u, u_block), (v, v_block) = hadamard.rotations(weight.shape, seed, 0)
    blocks = (u_block, v_block)
    w, judge = rotated(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32), u, v, blocks)
    h = damped(judge)
    factor, energy = block_ldl(h), float(loss(w, judge))
    root, projection = decomposed(h) if rank else (None, None)
    q, best, least = jnp.zeros_like(w), jnp.zeros_like(w), float("inf")
    for _ in range(outer if rank else 1):
        product = lplr_factorize(w - q, h, root, projection, rank, inner, search)[0] if rank else jnp.zeros_like(w)
        q = ldlq(w - product, factor, search)
        error = float(loss(w - q - product, judge))
        if trail is not None:
            trail.append((error / energy) ** 0.5)
        if error < least:
            best, least = q + product, error
    return np.asarray(unrotated(best, u, v, blocks)), (least / energy) ** 0.5
