"""Rank-constrained regression: the best L R for A in the metric H, without an inverse or a large decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qlr_jax.core.typing import Array, Float

BUCKETS = (16, 32, 64, 128, 256)


def bucket(rank: int, limit: int) -> int:
    """Columns that a rank is computed with: the next of 16, 32, 64, 128, 256, then multiples of 256; at most `limit`.

    Example:
        >>> bucket(20, 4096), bucket(300, 4096), bucket(8, 10)
        (32, 512, 10)
    """
    fitting = [b for b in BUCKETS if b >= rank]
    return min(fitting[0] if fitting else -(-rank // 256) * 256, limit)


def start_basis(rows: int, columns: int, seed: int) -> np.ndarray:
    """A random orthonormal matrix to start the iteration from.

    Args:
        rows, columns: its shape, columns at most rows.
        seed: what it is drawn from.
    """
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))
    return basis.astype(np.float32)


def _mm(*parts: Array) -> Array:
    out = parts[0]
    for part in parts[1:]:
        out = jnp.matmul(out, part, precision="highest")
    return out


@jax.jit
def top_subspace(
    matrix: Float[Array, "*b m n"], hessian: Float[Array, "*b n n"], basis: Float[Array, "*b m k"], steps: int | Array
) -> tuple[Float[Array, "*b m k"], Float[Array, "*b k"]]:
    """Leading eigenvectors of A H Aᵀ, largest first, and their eigenvalues, by subspace iteration from `basis`.

    U_rU_rᵀA with the first r of them minimises tr((A − X) H (A − X)ᵀ) over rank-r X (rank-constrained regression; Halko,
    Martinsson, Tropp, arXiv 0909.4061, for the iteration). Columns beyond the rank are oversampling.

    Args:
        matrix: A, (*b, m, n).
        hessian: H, (*b, n, n).
        basis: orthonormal, (*b, m, k).
        steps: of the power iteration.

    Returns:
        eigenvectors (*b, m, k), eigenvalues (*b, k).

    Example:
        >>> vectors, values = top_subspace(jnp.diag(jnp.array([1.0, 3.0])), jnp.eye(2), jnp.eye(2), 2)
        >>> [round(float(v), 4) for v in values]
        [9.0, 1.0]
    """

    def power(_: Array, basis: Array) -> Array:
        grown = _mm(matrix, _mm(hessian, _mm(jnp.swapaxes(matrix, -1, -2), basis)))
        # equal scale keeps QR out of the underflow range; a zero matrix gives the identity's columns
        size = jnp.max(jnp.abs(grown), axis=(-2, -1), keepdims=True)
        return jnp.linalg.qr(grown / jnp.where(size > 0, size, 1.0))[0]

    basis = lax.fori_loop(0, steps, power, basis)
    right = _mm(jnp.swapaxes(basis, -1, -2), matrix)
    gram = _mm(right, hessian, jnp.swapaxes(right, -1, -2))
    value, vector = jnp.linalg.eigh((gram + jnp.swapaxes(gram, -1, -2)) / 2)
    return _mm(basis, vector[..., ::-1]), jnp.maximum(value[..., ::-1], 0.0)


@jax.jit
def refit_left(
    matrix: Float[Array, "*b m n"], right: Float[Array, "*b k n"], hessian: Float[Array, "*b n n"], mask: Float[Array, "*b k"]
) -> tuple[Float[Array, "*b m k"], Float[Array, "*b k k"]]:
    """L = A H Rᵀ (R H Rᵀ)⁻¹ on the masked components, and their metric R H Rᵀ (the identity elsewhere).

    Args:
        matrix: A, (*b, m, n).
        right: R, (*b, k, n).
        hessian: H, (*b, n, n).
        mask: (*b, k), 1 for the components that exist; or (k,), for all matrices.

    Returns:
        L (*b, m, k), R H Rᵀ (*b, k, k).

    Source: LPLR, arXiv 2310.11028, in the metric H.
    """
    weighted = _mm(right, hessian)
    metric = _mm(weighted, jnp.swapaxes(right, -1, -2))
    return _solve(metric, _mm(weighted, jnp.swapaxes(matrix, -1, -2)), mask)


@jax.jit
def refit_right(
    matrix: Float[Array, "*b m n"],
    left: Float[Array, "*b m k"],
    mask: Float[Array, "*b k"],
    output: Float[Array, "*b m m"] | None = None,
) -> tuple[Float[Array, "*b n k"], Float[Array, "*b k k"]]:
    """Rᵀ of R = (LᵀGL)⁻¹ LᵀG A on the masked components, and their metric LᵀGL (the identity elsewhere).

    Args:
        matrix: A, (*b, m, n).
        left: L, (*b, m, k).
        mask: (*b, k), 1 for the components that exist; or (k,), for all matrices.
        output: G, (*b, m, m); None is the identity.

    Returns:
        Rᵀ (*b, n, k), LᵀGL (*b, k, k).

    Source: LPLR, arXiv 2310.11028, in the metric G.
    """
    transposed = jnp.swapaxes(left if output is None else _mm(output, left), -1, -2)
    return _solve(_mm(transposed, left), _mm(transposed, matrix), mask)


def _solve(metric: Array, rhs: Array, mask: Array) -> tuple[Array, Array]:
    """(M⁻¹ B)ᵀ, with M made safe: unused components decoupled, and a ridge far below what quantization costs."""
    both = mask[..., :, None] * mask[..., None, :]
    metric = (metric + jnp.swapaxes(metric, -1, -2)) / 2 * both
    mean = jnp.trace(metric, axis1=-2, axis2=-1)[..., None] / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
    mean = jnp.where(mean > 0, mean, 1.0)
    metric = metric + (mask * 1e-5 * mean + (1.0 - mask) * mean)[..., None, :] * jnp.eye(mask.shape[-1])
    factor = jnp.linalg.cholesky(metric)
    solved = jax.scipy.linalg.cho_solve((factor, True), rhs * mask[..., :, None])
    return jnp.swapaxes(solved, -1, -2), metric
