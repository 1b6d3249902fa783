"""x wᵀ as a training multiplies: in float32, or in bfloat16 with sums in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qlr_jax.core.typing import Array, Float
from qlr_jax.models.products import exact_product


def _einsum(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@jax.custom_vjp
def bf16_product(x: Float[Array, "*batch n"], w: Float[Array, "m n"]) -> Float[Array, "*batch m"]:
    """x wᵀ, multiplied in bfloat16 and added in float32; its two gradients likewise."""
    return _einsum("...n,mn->...m", x, w)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    dtypes = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)  # half the memory of what the backward pass needs
    return bf16_product(x, w), (x, w, *dtypes)


def _backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    x, w, of_x, of_w = saved
    g = g.astype(jnp.bfloat16)
    # XLA's product over the first axes of both takes 2.5 times one over the last and the first on a CPU, so gᵀ is written out
    transposed = jax.lax.optimization_barrier(g.reshape(-1, g.shape[-1]).T)
    of_weight = _einsum("mt,tn->mn", transposed, x.reshape(-1, x.shape[-1]))
    return _einsum("...m,mn->...n", g, w).astype(of_x.dtype), of_weight.astype(of_w.dtype)


bf16_product.defvjp(_forward, _backward)
PRODUCTS: Mapping[str, Callable[..., Array]] = {"float32": exact_product, "bf16": bf16_product}
"""By the name of `AdaptConfig.compute`."""
