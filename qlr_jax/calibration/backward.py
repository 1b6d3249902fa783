"""One forward and one backward pass, block by block: what any gradient through a model that barely fits is made of."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qlr_jax.models.llama import Block, Llama

Rope = tuple[Array, Array]
SPILLED = 2**30  # bytes of hidden states beyond which they lie in a file


def backward(
    model: Llama,
    batches: Sequence[np.ndarray],
    forward: Callable[[int, Block, Array, Rope], Array],
    head_gradient: Callable[[int, Array], Array],
    pull_back: Callable[[int, int, Block, Array, Rope, Array], tuple[Array, Any]],
    first: int = 0,
) -> Iterator[tuple[int, int, Any]]:
    """From the last block to block `first`, and there batch by batch: (block, batch, what `pull_back` found there).

    A block is asked for once on the way up and once on the way down, whatever the number of batches (`Llama.block`): one that lies
    on disk is read twice. Memory is one block, what it keeps for one batch (its forward pass is computed again where it is pulled
    back), and the hidden states at all block boundaries, which lie in a temporary file where they are many. Give functions that
    hold no layer number in what they compile, and one compilation serves all blocks.

    Args:
        batches: tokens (batch, time), all of one shape.
        forward: (i, block, x, rope) -> the hidden state that leaves block i.
        head_gradient: (batch's number, the hidden state that leaves the last block) -> the loss's gradient there.
        pull_back: (i, batch's number, block, x, rope, gradient at the block's output) -> (gradient at x, anything).
    """
    layers, rope = model.config.num_hidden_layers, model.rope(batches[0].shape[1])
    now = [np.asarray(model.embed(jnp.asarray(tokens))) for tokens in batches]
    with _room((layers - first, len(batches), *now[0].shape), now[0].dtype) as entered:  # what enters each block
        for i in range(layers):
            block = model.block(i)
            for j, x in enumerate(now):
                if i >= first:
                    entered[i - first, j] = x
                now[j] = np.asarray(forward(i, block, jnp.asarray(x), rope))
        gradients = [np.asarray(head_gradient(j, jnp.asarray(x))) for j, x in enumerate(now)]
        for i in reversed(range(first, layers)):
            block = model.block(i)
            for j, gradient in enumerate(gradients):
                x = jnp.asarray(np.asarray(entered[i - first, j]))
                pulled, found = pull_back(i, j, block, x, rope, jnp.asarray(gradient))
                gradients[j] = np.asarray(pulled)
                yield i, j, found


class _room:
    """An array for hidden states, in a temporary file where it is large; the file goes with it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self._shape, self._dtype = shape, np.dtype(dtype)

    def __enter__(self) -> np.ndarray:
        if int(np.prod(self._shape)) * self._dtype.itemsize <= SPILLED:
            self._file = None
            return np.empty(self._shape, self._dtype)
        self._file = tempfile.NamedTemporaryFile(prefix="qlr-states-")
        return np.memmap(self._file, self._dtype, "w+", shape=self._shape)

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
