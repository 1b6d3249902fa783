"""Randomized Hadamard rotations of any size, by formula: nothing but a seed is stored."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.typing import Array

INPUT, OUTPUT = 0, 1  # salts: the two sides of a square matrix are rotated independently


def signs(seed: int, salt: int, size: int) -> np.ndarray:
    """±1 for each of `size` coordinates: the top bit of an integer hash of (seed, salt, index).

    A hash rather than a generator, so that JAX, numpy and PyTorch agree to the bit with nothing stored.

    Args:
        seed: of the matrix.
        salt: `INPUT` or `OUTPUT`.
        size: how many.

    Example:
        >>> signs(0, INPUT, 4).tolist() == signs(0, INPUT, 4).tolist()
        True
    """
    word = np.uint64((seed * 2 + salt) & 0xFFFFFFFF)
    x = (
        np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B1) + word * np.uint64(0x85EBCA6B) + np.uint64(0x27D4EB2F)
    ) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return np.where(x >> np.uint64(31), -1.0, 1.0).astype(np.float32)


def block_size(size: int, block: int) -> int:
    """The rotation block that is used for `size`: the whole of it where `block` is 0 or shares too little with it.

    Example:
        >>> block_size(768, 0), block_size(768, 128), block_size(101, 64)
        (768, 128, 101)
    """
    shared = math.gcd(size, block) if block else size
    return shared if shared >= 32 else size


def _hartley(q: int) -> np.ndarray:
    """cas(2π jk / q) / √q: symmetric, orthogonal, any q."""
    angle = 2 * np.pi * np.outer(np.arange(q), np.arange(q)) / q
    return ((np.cos(angle) + np.sin(angle)) / np.sqrt(q)).astype(np.float32)


def _sylvester(size: int) -> np.ndarray:
    """The Walsh-Hadamard matrix over √size, size a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix * size**-0.5).astype(np.float32)


def transform(x: Array, block: int) -> Array:
    """Multiply the last axis by K = I ⊗ (H_{2^k} ⊗ O_q), 2^k q = block, q odd; K is symmetric and K K = I.

    H is the Walsh-Hadamard matrix over 2^(k/2), O the Hartley matrix cas(2π ij / q) / √q, so every size has a dense,
    well mixing orthogonal matrix by formula. H is applied as H_64 ⊗ H_64 ⊗ …: a few products with small matrices compile in a tenth
    of the time of k passes of sums and differences, and run faster. An array of numpy's stays on the host.
    """
    return _transform(np.matmul, x, block) if isinstance(x, np.ndarray) else _compiled(x, block)


@partial(jax.jit, static_argnames=("block",))
def _compiled(x: Array, block: int) -> Array:
    return _transform(partial(jnp.matmul, precision="highest"), x, block)


def _transform(matmul: Callable[..., Any], x: Any, block: int) -> Any:
    odd = block // (block & -block)
    y, left = x.reshape(-1, block), block // odd  # rows of the power's bits, most significant first, then of the odd part
    parts = [_hartley(odd)] if odd > 1 else []
    while left > 1:
        size = min(left, 64)
        parts.append(_sylvester(size))
        left //= size
    for part in parts:  # on the last digits, which then become the first: after all of them each is in its place again
        y = matmul(y.reshape(len(y), -1, len(part)), part).swapaxes(-1, -2)
    return y.reshape(x.shape).astype(x.dtype)


def rotate(x: Array, sign: Array | np.ndarray, block: int) -> Array:
    """V x along the last axis, V = K diag(sign).

    Args:
        x: (..., n).
        sign: (n,), of `signs`.
        block: a divisor of n, of `block_size`.
    """
    return transform(x * sign, block)


def unrotate(x: Array, sign: Array | np.ndarray, block: int) -> Array:
    """Vᵀ x along the last axis: the inverse of `rotate`.

    Args:
        x: (..., n).
        sign, block: as for `rotate`.

    Example:
        >>> x, sign = jnp.arange(6.0), signs(0, INPUT, 6)
        >>> bool(jnp.allclose(unrotate(rotate(x, sign, 6), sign, 6), x, atol=1e-5))
        True
    """
    return transform(x, block) * sign


def rotate_hessian(hessian: Array, sign: Array | np.ndarray, block: int) -> Array:
    """V H Vᵀ, symmetric to the last bit.

    Args:
        hessian: H, (*b, n, n).
        sign, block: of V, as for `rotate`.
    """
    rotated = rotate(jnp.swapaxes(rotate(hessian, sign, block), -1, -2), sign, block)
    return (rotated + jnp.swapaxes(rotated, -1, -2)) / 2


def rotations(shape: tuple[int, int], seed: int, block: int) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
    """(signs, block) of U (outputs) and of V (inputs) for a matrix.

    Args:
        shape: (out, in).
        seed: of the signs.
        block: 0 for full-width rotations, or a power of two.
    """
    m, n = shape
    return (signs(seed, OUTPUT, m), block_size(m, block)), (signs(seed, INPUT, n), block_size(n, block))
