"""One forward and one backward pass, block by block: what any gradient through a model that barely fits is made of."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from qlr_jax.core.sharding import HERE, Placement
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Block, Llama, Rope

SPILLED = 2**26  # bytes of hidden states beyond which they lie in a file


def backward(
    model: Llama,
    batches: Sequence[np.ndarray],
    forward: Callable[[int, Block, Array, Rope], Array],
    head_gradient: Callable[[int, Array], Array | np.ndarray],
    pull_back: Callable[[int, int, Block, Array, Rope, Array], tuple[Array, Any]],
    first: int = 0,
    *,
    repair: Callable[[int, int, np.ndarray], np.ndarray] = lambda i, j, x: x,
    placement: Placement = HERE,
) -> Iterator[tuple[int, int, Any]]:
    """From the last block to block `first`, and there batch by batch: (block, batch, what `pull_back` returns beside the gradient).

    A block is asked for once on the way up and once on the way down, whatever the number of batches (`Llama.block`): one that lies
    on disk is read twice. Memory is one block, what it keeps for one batch (its forward pass is computed again where it is pulled
    back), and the hidden states at all block boundaries, which the gradients take the place of one after another; where these are
    many they lie in a temporary file, and memory grows neither with the blocks nor with the batches. Give functions that hold no
    layer number in what they compile, and one compilation serves all blocks.

    Args:
        model: whose blocks are gone through.
        batches: tokens (batch, time), all of one shape.
        forward: (i, block, x, rope) -> the hidden state that leaves block i.
        head_gradient: (batch's number, the hidden state that leaves the last block) -> the loss's gradient there.
        pull_back: (i, batch's number, block, x, rope, gradient at the block's output) -> (gradient at x, anything).
        first: the lowest block that is pulled back.
        repair: (i, batch's number, the hidden state that leaves block i) -> what goes on in its place.
        placement: where it runs; a batch has a multiple of its devices.

    Raises:
        QLRError: no room for the temporary file.
    """
    layers, rope = model.config.num_hidden_layers, placement.replicate(model.rope(batches[0].shape[1]))
    x = np.asarray(model.embed(batches[0]))
    with _StateStore((layers - first + 1, len(batches)), x.shape, x.dtype) as states:  # at [i − first]: what enters block i
        for j, tokens in enumerate(batches):
            states[0, j] = np.asarray(model.embed(tokens))
        for i in range(layers):
            block, at, to = placement.replicate(model.block(i)), max(i - first, 0), max(i + 1 - first, 0)
            for j in range(len(batches)):
                states[to, j] = repair(i, j, np.asarray(forward(i, block, placement.shard(states[at, j]), rope)))
        for j in range(len(batches)):
            states[layers - first, j] = np.asarray(head_gradient(j, placement.shard(states[layers - first, j])))
        for i in reversed(range(first, layers)):
            block, at = placement.replicate(model.block(i)), i - first
            for j in range(len(batches)):
                pulled, value = pull_back(i, j, block, placement.shard(states[at, j]), rope, placement.shard(states[at + 1, j]))
                states[at, j] = np.asarray(pulled)
                yield i, j, value


class _StateStore:
    """Arrays of one shape by (slot, batch): in memory, or where they are large in a temporary file that goes with it.

    The file is written and read, not mapped: of a mapped one what was touched counts as this process's memory, and a full disk
    would kill it.
    """

    def __init__(self, slots: tuple[int, int], shape: tuple[int, ...], dtype: Any):
        self._slots, self._shape, self._dtype = slots, shape, np.dtype(dtype)
        self._size = math.prod(shape) * self._dtype.itemsize
        self._arrays: dict[tuple[int, int], np.ndarray] = {}

    def __enter__(self) -> "_StateStore":
        large = math.prod(self._slots) * self._size > SPILLED
        self._file = tempfile.TemporaryFile(prefix="qlr-states-", buffering=0) if large else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def __setitem__(self, slot: tuple[int, int], array: np.ndarray) -> None:
        if self._file is None:
            self._arrays[slot] = array
            return
        left, at = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data, self._at(slot)
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, at)
                left, at = left[done:], at + done
        except OSError as error:
            raise QLRError(
                f"the hidden states of a backward pass, {math.prod(self._slots) * self._size / 1e9:.1f} GB, cannot be written to "
                f"{tempfile.gettempdir()} ({error.strerror}); free some of it, set TMPDIR, or take fewer tokens (output_tokens, "
                "measure_tokens)"
            ) from None

    def __getitem__(self, slot: tuple[int, int]) -> np.ndarray:
        if self._file is None:
            return self._arrays[slot]
        array = np.empty(self._shape, self._dtype)
        left, at = array.view(np.uint8).reshape(-1).data, self._at(slot)
        while left:
            done = os.preadv(self._file.fileno(), [left], at)
            left, at = left[done:], at + done
        return array

    def _at(self, slot: tuple[int, int]) -> int:
        return (slot[0] * self._slots[1] + slot[1]) * self._size
