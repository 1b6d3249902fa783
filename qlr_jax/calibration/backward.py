"""One forward and one backward pass, block by block: what any gradient through a model that barely fits is made of."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qlr_jax.models.llama import Block, Llama

Rope = tuple[Array, Array]


def backward(
    model: Llama,
    tokens: np.ndarray,
    forward: Callable[[int, Block, Array, Rope], Array],
    head_gradient: Callable[[Array], Array],
    pull_back: Callable[[int, Block, Array, Rope, Array], tuple[Array, Any]],
    first: int = 0,
) -> Iterator[tuple[int, Any]]:
    """From the last block to block `first`: (its number, what `pull_back` found there).

    Memory is the hidden states at all block boundaries and what one block keeps: its forward pass is computed again where it is
    pulled back. Give functions that hold no layer number in what they compile, and one compilation serves all blocks.

    Args:
        tokens: (batch, time).
        forward: (i, block, x, rope) -> the hidden state that leaves block i.
        head_gradient: the hidden state that leaves the last block -> the loss's gradient there.
        pull_back: (i, block, x, rope, gradient at the block's output) -> (gradient at x, anything).
    """
    rope = model.rope(tokens.shape[1])
    states = [model.embed(jnp.asarray(tokens))]
    blocks = list(enumerate(model.model.layers))
    for i, block in blocks:
        states.append(forward(i, block, states[-1], rope))
    gradient = head_gradient(states.pop())
    for i, block in reversed(blocks[first:]):
        gradient, found = pull_back(i, block, states.pop(), rope, gradient)
        yield i, found
