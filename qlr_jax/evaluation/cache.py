"""The key-value cache of a generation: arrays of one fixed size, so that two compilations (prompt, step) serve every length.

Slot s of the cache holds position s. Rows of a batch may differ in length: a shorter prompt is padded on its right, each row
counts its own positions, and what the padding wrote lies beyond the row's last position until a new token takes its slot.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlr_jax.models.llama import Llama


class Cache(NamedTuple):
    """Keys and values of every layer.

    Attributes:
        keys: (batch, kv heads, size, head_dim) a layer, rotated.
        values: (batch, kv heads, size, head_dim) a layer.
    """

    keys: tuple[Float[Array, "batch kv size d"], ...]
    values: tuple[Float[Array, "batch kv size d"], ...]

    @property
    def size(self) -> int:
        """How many positions fit."""
        return self.keys[0].shape[2]


def empty(model: Llama, batch: int, size: int) -> Cache:
    """A cache of zeros in the type of the model's activations: 2 · layers · batch · kv heads · size · head_dim values.

    Args:
        model: whose layers and heads it fits.
        batch: rows.
        size: positions.
    """
    config, dtype = model.config, model.model.norm.weight.get_value().dtype
    shape = (batch, config.num_key_value_heads, size, config.head_dim)
    layers = range(config.num_hidden_layers)
    return Cache(tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers))


def extend(
    model: Llama, cache: Cache, tokens: Int[Array, "batch time"], start: Int[Array, "batch"]
) -> tuple[Float[Array, "batch time n"], Cache]:
    """Run new tokens at positions start … start + time − 1 of each row.

    The caller sees to it that start + time is at most the cache's size: beyond it, slots would be overwritten.

    Args:
        model: packed or not.
        cache: of the positions before.
        tokens: (batch, time).
        start: (batch,), each row's first new position.

    Returns:
        The hidden states of the last block, (batch, time, n), and the cache with the new positions.
    """
    at = start[:, None] + jnp.arange(tokens.shape[1])
    cos, sin = model.rope(cache.size)
    rope = cos[at][:, None], sin[at][:, None]  # one angle a row and position, the same for all heads
    x, keys, values = model.embed(tokens), list(cache.keys), list(cache.values)
    for i, block in enumerate(model.model.layers):

        def cached(k: Array, v: Array, i: int = i) -> tuple[Array, Array, Array]:
            keys[i], values[i] = _put(keys[i], k, start), _put(values[i], v, start)
            return keys[i], values[i], at

        x = block(x, rope, cache=cached)
    return x, Cache(tuple(keys), tuple(values))


@partial(jax.jit, static_argnames="size")
def prefill(
    model: Llama, tokens: Int[Array, "batch time"], lengths: Int[Array, "batch"], *, size: int
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Run the prompts.

    Args:
        model: packed or not.
        tokens: (batch, time), padded on their right.
        lengths: (batch,), tokens of each row before the padding.
        size: positions of the cache.

    Returns:
        The logits after each row's last token, (batch, vocab), and the cache.
    """
    x, cache = extend(model, empty(model, tokens.shape[0], size), tokens, jnp.zeros_like(lengths))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return model.head(last)[:, 0], cache


def step(
    model: Llama, cache: Cache, tokens: Int[Array, "batch"], at: Int[Array, "batch"]
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Run one token of each row at its position. Not compiled here: loops compile it with theirs.

    Args:
        model: packed or not.
        cache: of the positions before.
        tokens: (batch,).
        at: (batch,), their positions.

    Returns:
        The logits after it, (batch, vocab), and the cache.
    """
    x, cache = extend(model, cache, tokens[:, None], at)
    return model.head(x)[:, 0], cache


def _put(old: Float[Array, "batch kv size d"], new: Float[Array, "batch kv time d"], start: Int[Array, "batch"]) -> Array:
    write = jax.vmap(lambda row, part, s: jax.lax.dynamic_update_slice(row, part, (0, s, 0)))
    return write(old, new.astype(old.dtype), start)
