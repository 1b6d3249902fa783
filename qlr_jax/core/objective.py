"""What is minimised: tr(E H Eᵀ), its relative form, and the damping that makes H invertible."""

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.sharding import product_by_rows
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError


def quadratic(
    error: Float[Array, "*b m n"], hessian: Float[Array, "*b n n"], output: Float[Array, "*b m m"] | None = None
) -> Float[Array, "*b"]:
    """tr(E H Eᵀ), or tr(G E H Eᵀ) with the metric G of the outputs, for each matrix of a batch.

    Args:
        error: E, (*b, m, n).
        hessian: H, (*b, n, n).
        output: G, (*b, m, m); None is the identity.

    Example:
        >>> float(quadratic(jnp.ones((2, 3)), jnp.eye(3), 2 * jnp.eye(2)))
        12.0
    """
    weighted = jnp.matmul(error, hessian, precision="highest")
    output_weighted = error if output is None else jnp.matmul(output, error, precision="highest")
    return jnp.sum(weighted * output_weighted, axis=(-2, -1))


def quadratic_by_rows(error: Array, hessian: Array, output: Array | None = None) -> Array:
    """`quadratic` inside a function that is `sharded`: products by rows, the sum over all rows at once, as on one device.

    Args:
        error, hessian, output: as for `quadratic`, of a batch.
    """
    weighted = product_by_rows(error, hessian)
    output_weighted = error if output is None else product_by_rows(output, error)
    return jnp.sum(weighted * output_weighted, axis=(-2, -1))


@jax.jit
def normalised(squared: Array, energy: Array) -> Array:
    """√(tr(G E H Eᵀ) / tr(G W H Wᵀ)), 0 where both are 0; infinite where a factorization failed, so that it is never kept."""
    squared = jnp.where(jnp.isnan(squared), jnp.inf, jnp.maximum(squared, 0.0))
    return jnp.sqrt(jnp.where(squared > 0, squared / jnp.where(energy > 0, energy, 1.0), 0.0))


@jax.jit
def relative_error(
    weight: Float[Array, "*b m n"],
    approximation: Float[Array, "*b m n"],
    hessian: Float[Array, "*b n n"],
    output: Float[Array, "*b m m"] | None = None,
) -> Float[Array, "*b"]:
    """√(tr(E H Eᵀ) / tr(W H Wᵀ)), E = W − Ŵ; 0 where both are 0. With G: √(tr(G E H Eᵀ) / tr(G W H Wᵀ)).

    Args:
        weight, approximation: W and Ŵ, (*b, m, n).
        hessian: H, (*b, n, n).
        output: G, (*b, m, m); None is the identity.

    Example:
        >>> w = jnp.eye(2); float(relative_error(w, 0.5 * w, jnp.eye(2)))
        0.5
    """
    num = jnp.maximum(quadratic(weight - approximation, hessian, output), 0.0)
    den = jnp.maximum(quadratic(weight, hessian, output), 0.0)
    return jnp.sqrt(jnp.where(num > 0, num / jnp.where(den > 0, den, 1.0), 0.0))


@jax.jit
def relative_errors(weight: Array, approximation: Array, hessian: Array, output: Array | None) -> tuple[Array, Array]:
    """(`relative_error` without G, that with G) of one matrix, from one program.

    Args:
        weight, approximation: W and Ŵ, (m, n).
        hessian, output: H and G; without G both errors are the same.
    """
    error, whole = weight - approximation, []
    for of in (error, weight):
        weighted = jnp.matmul(of, hessian, precision="highest")
        plain = jnp.sum(weighted * of)
        whole.append((plain, plain if output is None else jnp.sum(weighted * jnp.matmul(output, of, precision="highest"))))
    num, den = jnp.maximum(jnp.asarray(whole), 0.0)
    found = jnp.sqrt(jnp.where(num > 0, num / jnp.where(den > 0, den, 1.0), 0.0))
    return found[0], found[1]


def damped(hessian: Float[Array, "*b n n"], fraction: float) -> Float[Array, "*b n n"]:
    """H + fraction · mean(diag H) · I (the identity where H is zero): positive definite for any semi-definite H."""
    n = hessian.shape[-1]
    mean = jnp.trace(hessian, axis1=-2, axis2=-1) / n
    shift = jnp.where(mean > 0, fraction * mean, 1.0)
    return hessian + shift[..., None, None] * jnp.eye(n, dtype=hessian.dtype)


def checked_weight(weight: object) -> np.ndarray:
    """The weight as a finite float32 matrix, or QLRError saying what is wrong with it."""
    array = np.asarray(weight)
    if array.ndim != 2 or 0 in array.shape:
        raise QLRError(f"the weight has shape {array.shape}; pass a matrix (out, in) with at least one row and column")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0]
        raise QLRError(f"the weight holds {array[tuple(bad)]} at row {bad[0]}, column {bad[1]}; pass finite numbers")
    return array


def checked_hessian(hessian: object, size: int, side: str = "inputs") -> np.ndarray:
    """The Hessian as a finite, symmetric, positive semi-definite float32 (n, n), or QLRError saying what is wrong.

    Args:
        hessian: H, or None for the identity.
        size: n, the weight's inputs or (`side`) outputs.
        side: what the weight has `size` of, for messages.
    """
    if hessian is None:
        return np.eye(size, dtype=np.float32)
    array = np.asarray(hessian).astype(np.float32)
    if array.shape != (size, size):
        raise QLRError(f"the Hessian has shape {array.shape}; the weight has {size} {side}, so pass ({size}, {size})")
    if not np.isfinite(array).all():
        raise QLRError("the Hessian holds NaN or infinity; pass E[x xᵀ] of finite activations")
    scale = float(np.abs(array).max())
    asymmetry = float(np.abs(array - array.T).max())
    if asymmetry > 1e-4 * scale:
        raise QLRError(f"the Hessian is not symmetric (largest |H − Hᵀ| is {asymmetry:.3g}); pass (H + Hᵀ) / 2")
    array = (array + array.T) / 2
    # positive semi-definite up to float32 rounding: a Cholesky factor of a slightly shifted H must exist
    slack = max(1e-5 * scale, 1e-4 * float(np.trace(array)) / size, np.finfo(np.float32).tiny)
    try:
        np.linalg.cholesky(array.astype(np.float64) + slack * np.eye(size))
    except np.linalg.LinAlgError:
        raise QLRError("the Hessian is indefinite; pass E[x xᵀ], which is positive semi-definite") from None
    return array
