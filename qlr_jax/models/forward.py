"""A forward pass of many batches, block by block, each asked for once; and what lies above the blocks, part by part."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from qlr_jax.models.llama import Block, Llama, Rope


def last_states(model: Llama, batches: Sequence[Int[np.ndarray, "batch time"]]) -> list[Float[np.ndarray, "batch time n"]]:
    """The hidden states that leave the last block, batch by batch, on the host.

    The blocks are gone through once (`Llama.block`): one that lies on disk is read once, one that is packed is decoded once, and
    one compiled function serves all. Memory is one block, and the hidden states of all batches.

    Args:
        model: packed, on disk or in memory.
        batches: token ids, all of one shape.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> model = Llama(config, jax.random.key(0))
        >>> [x.shape for x in last_states(model, [np.zeros((2, 5), np.int32)] * 2)]
        [(2, 5, 16), (2, 5, 16)]
    """
    if not batches:
        return []
    rope = model.rope(batches[0].shape[1])
    states = [np.asarray(model.embed(tokens)) for tokens in batches]
    for i in range(model.config.num_hidden_layers):
        block = model.block(i)
        for j, x in enumerate(states):  # one by one: two sets of hidden states are never in memory
            states[j] = np.asarray(through(block, jax.device_put(x), rope))
    return states


AT_ONCE = 64  # positions whose logits are in memory: a product large enough for all cores, arrays small enough for their caches


def by_parts(f: Callable[..., tuple[Any, Any]], *arrays: Shaped[Array, "batch time *rest"]) -> tuple[Any, Any]:
    """f on a part of the positions at a time, so that what it makes of them need not be in memory for all: logits, above all.

    Args:
        f: (fresh, *parts of the arrays) -> (arrays (batch, part, ...), sums over positions). `fresh`, (part,), is 1 where a
            position comes for the first time, and 0 where it is repeated since the last part is as long as the others.
        arrays: of the same batch and positions.

    Returns:
        The arrays (batch, time, ...), and the sums.

    Example:
        >>> def doubled(fresh, x):
        ...     return 2 * x, jnp.sum(fresh * x)
        >>> out, total = by_parts(doubled, jnp.ones((128, 5)))
        >>> out.shape, float(total)
        ((128, 5), 640.0)
    """
    batch, time = arrays[0].shape[:2]
    part = min(time, max(1, AT_ONCE // batch))
    if part == time:
        return f(jnp.ones(time), *arrays)

    def at(i: Array) -> tuple[Array, tuple[Any, Any]]:
        start = jnp.minimum(i * part, time - part)
        fresh = (start + jnp.arange(part) >= i * part).astype(jnp.float32)
        return start, f(fresh, *(jax.lax.dynamic_slice_in_dim(a, start, part, axis=1) for a in arrays))

    def step(i: Array, done: tuple[Any, Any]) -> tuple[Any, Any]:
        start, (values, sums) = at(i)
        put = lambda whole, value: jax.lax.dynamic_update_slice_in_dim(whole, value, start, axis=1)  # noqa: E731
        return jax.tree.map(put, done[0], values), jax.tree.map(jnp.add, done[1], sums)

    values, sums = jax.eval_shape(lambda: at(jnp.int32(0))[1])
    whole = jax.tree.map(lambda a: jnp.zeros((batch, time, *a.shape[2:]), a.dtype), values)
    return jax.lax.fori_loop(0, -(-time // part), step, (whole, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)))


@jax.jit
def through(block: Block, x: Float[Array, "batch time n"], rope: Rope) -> Float[Array, "batch time n"]:
    """The hidden state that leaves a block.

    Args:
        block: one of the model's, all of its weights in memory.
        x: the hidden state that enters it.
        rope: (cos, sin) of the positions.
    """
    return block(x, rope)
