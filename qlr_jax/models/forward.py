"""A forward pass of many batches, block by block: every block is asked for once, whatever the number of batches."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.models.llama import Block, Llama, Rope, Top


def logits(model: Llama, batches: Sequence[Int[np.ndarray, "batch time"]]) -> Iterator[Float[Array, "batch time vocab"]]:
    """The logits of every batch, one batch's at a time.

    The blocks are gone through once (`Llama.block`): one that lies on disk is read once, one that is packed is decoded once, and
    one compiled function serves all. Memory is one block, and the hidden states of all batches on the host.

    Args:
        model: packed, on disk or in memory.
        batches: token ids, all of one shape.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> model = Llama(config, jax.random.key(0))
        >>> [x.shape for x in logits(model, [np.zeros((2, 5), np.int32)] * 2)]
        [(2, 5, 64), (2, 5, 64)]
    """
    if not batches:
        return iter(())
    rope, top = model.rope(batches[0].shape[1]), model.top()
    states = [np.asarray(model.embed(jnp.asarray(tokens))) for tokens in batches]
    for i in range(model.config.num_hidden_layers):
        block = model.block(i)
        for j, x in enumerate(states):  # one by one: two sets of hidden states are never in memory
            states[j] = np.asarray(through(block, jnp.asarray(x), rope))
    return (headed(top, jnp.asarray(x)) for x in states)


@jax.jit
def through(block: Block, x: Float[Array, "batch time n"], rope: Rope) -> Float[Array, "batch time n"]:
    """The hidden state that leaves a block.

    Args:
        block: one of the model's, all of its weights in memory.
        x: the hidden state that enters it.
        rope: (cos, sin) of the positions.
    """
    return block(x, rope)


@jax.jit
def headed(top: Top, x: Float[Array, "batch time n"]) -> Float[Array, "batch time vocab"]:
    """Logits of the last block's hidden state."""
    return top(x)
