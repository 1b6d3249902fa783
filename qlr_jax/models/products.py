"""x Wᵀ in a forward pass: of a dense W, of one that is decoded as it is used, of a packed one from its codes."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.products import packed_matmul
from qlr_jax.models.attention import HIGHEST

Product = Callable[[Array, Any], Array]
"""(x (..., n), w (m, n)) -> x wᵀ (..., m) in float32."""


def exact_product(x: Float[Array, "*batch n"], w: Float[Array, "m n"]) -> Float[Array, "*batch m"]:
    """x wᵀ at the highest precision, accumulated in float32; what every linear layer uses by default."""
    return jnp.einsum("...n,mn->...m", x, w, precision=HIGHEST, preferred_element_type=jnp.float32)


def packed_product(x: Float[Array, "*batch n"], w: Any) -> Float[Array, "*batch m"]:
    """As `exact_product` to 2e-5, with a packed w from its codes (`core.products`): for generation, which is not differentiated."""
    return packed_matmul(x, w, exact=False) if isinstance(w, QLRMatrix) else exact_product(x, w)


def product_of(product: Product, x: Float[Array, "*batch n"], weight: Any) -> Float[Array, "*batch m"]:
    """x Wᵀ by `product`, which gets W decoded, in x's type, unless it is `packed_product`."""
    packed = product is packed_product and isinstance(weight, QLRMatrix)
    return product(x, weight if packed else dense(weight, x.dtype))


def unpacked(weight: Any) -> Any:
    """A weight as an array: what is packed or on disk (anything with `.dense()`) is decoded or read, an array stays as it is."""
    return weight.dense() if hasattr(weight, "dense") else weight


def dense(weight: Any, dtype: Any) -> Array:
    """`unpacked`, then cast to `dtype`."""
    return unpacked(weight).astype(dtype)
