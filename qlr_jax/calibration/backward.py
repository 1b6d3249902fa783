"""One forward and one backward pass, block by block: what any gradient through a model that barely fits is made of."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qlr_jax.core.sharding import line, sequence_placement
from qlr_jax.engine import HERE, Call, Engine, Here
from qlr_jax.errors import QLRError
from qlr_jax.models.forward import TOGETHER, block_of, rope_of
from qlr_jax.models.llama import Block, Embedding, Llama, Rope, Top, check_tokens, embedded

SPILLED = 2**26  # bytes of hidden states beyond which they lie in a file


@dataclass(frozen=True)
class Batch:
    """Sequences that go through together.

    Attributes:
        tokens: (batch, time); the last sequence is repeated where the batch is filled up.
        start: the number of the first; live: how many are not repeats.
    """

    tokens: np.ndarray
    start: int
    live: int


def batches_of(tokens: np.ndarray, size: int) -> list[Batch]:
    """All sequences, in batches of one shape."""
    starts = range(0, len(tokens), size)
    parts = [tokens[start : start + size] for start in starts]
    filled = [np.pad(part, ((0, size - len(part)), (0, 0)), "edge") for part in parts]
    return [Batch(rows, start, len(part)) for rows, start, part in zip(filled, starts, parts, strict=True)]


@dataclass(frozen=True)
class State:
    """Of one batch at one block boundary: its hidden states, or the loss's gradient there.

    Attributes:
        x: (batch, time, n), on the host.
        lost: which rows are left out from here on, (batch,).
        left_out: the number of each such sequence -> where it was first not finite.
    """

    x: np.ndarray
    lost: np.ndarray
    left_out: dict[int, str] = field(default_factory=dict)


class Work(Protocol):
    """What a pass does at each place. Its functions are pieces (`qlr_jax.engine`), so they hold nothing that cannot travel.

    Functions that are compiled should hold no layer number: then one compilation serves all blocks.
    """

    def forward(self, i: int, block: Block, beside: Any, rope: Rope, batch: Batch, state: State) -> State:
        """What leaves block i."""
        ...

    def head(self, top: Top, batch: Batch, beside: Any, state: State) -> tuple[State, Any]:
        """The loss's gradient at what leaves the last block, and anything."""
        ...

    def pull_back(
        self, i: int, block: Block, beside: Any, rope: Rope, batch: Batch, state: State, gradient: State
    ) -> tuple[State, Any]:
        """The gradient at what enters block i, from that at what leaves it; and anything."""
        ...


def divided(sequences: int, batch: int, devices: int | None = None) -> tuple[int, int]:
    """(devices, sequences of a batch) of a pass over so many sequences: at most `devices` of this process's, which divide a batch.

    Example:
        >>> divided(10, 4, 1), divided(3, 4, 1)
        ((1, 4), (1, 3))
    """
    placed = sequence_placement(sequences, devices).count
    return placed, -(-min(batch, sequences) // placed) * placed


def forward_states(
    model: Llama, sequences: int, *, batch: int = TOGETHER, devices: int | None = None, engine: Engine = HERE
) -> "States":
    """Room for what enters every block, of every batch of so many sequences: one pass leaves it there, and another begins with it.

    Where it is large it lies in a temporary file; to be used as a context, which that file goes with.

    Args:
        model, batch, devices, engine: of both passes (`hessians`, `output_hessians`).
        sequences: that go through the model.
    """
    return _room(model.config.num_hidden_layers + 1, -(-sequences // divided(sequences, batch, devices)[1]), engine)


def _room(slots: int, batches: int, engine: Engine) -> "States":
    return _StateStore(slots, batches) if isinstance(engine, Here) else _AnyStates()


# the two ways through the model belong together
def backward(
    model: Llama,
    batches: Sequence[Batch],
    work: Work,
    first: int = 0,
    *,
    beside: Callable[[int], Any] = lambda i: None,
    at_head: Sequence[Any] | None = None,
    ends: tuple[Any, Any] | None = None,
    states: "States | None" = None,
    devices: int = 1,
    engine: Engine = HERE,
    title: str = "",
) -> Iterator[tuple[int, int, Any]]:
    """From the head to block `first`, and there batch by batch: (block, batch, what the piece returns beside the gradient).

    The head counts as a block after the last. A block is asked for once on the way up and once on the way down, whatever the number
    of batches (`Llama.block`): one that lies on disk is read twice. Memory is one block, what it keeps for one batch (its forward
    pass is computed again where it is pulled back), and the hidden states at all block boundaries, which the gradients take the
    place of one after another; where these are many they lie in a temporary file, and memory grows neither with the blocks nor with
    the batches.

    Args:
        model: whose blocks are gone through.
        batches: all of one shape.
        work: what is done at each place.
        first: the lowest block that is pulled back.
        beside: what pieces of block i are given beside the block.
        at_head: by batch, what the head is given beside the state.
        ends: what stands for the embedding, and for what lies above the blocks, in place of the model's.
        states: what enters every block, of every batch, where a pass before has left that (`forward_states`): there is no way up
            then, and gradients take their places; None: it is computed.
        devices: of this process, that a batch is shared out over; a batch has a multiple of them.
        engine: where the pieces run.
        title: of the pieces.

    Raises:
        QLRError: no room for the temporary file.
    """
    layers = model.config.num_hidden_layers
    rope = Call(rope_of, (model, batches[0].tokens.shape[1], devices), kept=True)
    embedding, top = ends or (Call(_embedding_of, (model,), kept=True), Call(_top_of, (model, devices), kept=True))
    for batch in batches:
        check_tokens(batch.tokens, model.config.vocab_size)
    with _room(layers - first + 1, len(batches), engine) if states is None else states as here:
        below = first if states is None else 0  # at [i − below]: what enters block i
        if states is None:
            for j, batch in enumerate(batches):
                here[0, j] = engine.submit(_enter, embedding, batch, title=title)
            for i in range(layers):
                block, near = Call(block_of, (model, i, devices), kept=True), beside(i)
                at, to = max(i - first, 0), max(i + 1 - first, 0)
                for j, batch in enumerate(batches):
                    here[to, j] = engine.submit(work.forward, i, block, near, rope, batch, here[at, j], title=title)
        for j, batch in enumerate(batches):
            given = None if at_head is None else at_head[j]
            found = engine.submit(work.head, top, batch, given, here[layers - below, j], title=title)
            here[layers - below, j], value = engine.split(found, 2)
            yield layers, j, value
        for i in reversed(range(first, layers)):
            block, near, at = Call(block_of, (model, i, devices), kept=True), beside(i), i - below
            for j, batch in enumerate(batches):
                given = block, near, rope, batch, here[at, j], here[at + 1, j]
                here[at, j], value = engine.split(engine.submit(work.pull_back, i, *given, title=title), 2)
                yield i, j, value
        engine.forget()


def _enter(embedding: Embedding, batch: Batch) -> State:
    return State(np.asarray(embedded(embedding, batch.tokens)), np.zeros(len(batch.tokens), bool))


def _embedding_of(model: Llama) -> Embedding:
    return model.model.embed_tokens


def _top_of(model: Llama, devices: int) -> Top:
    return line(devices).replicate(model.top())


class _AnyStates(dict[tuple[int, int], Any]):
    """What stands for states elsewhere."""

    def __enter__(self) -> "_AnyStates":
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()


class _StateStore:
    """States of one shape by (slot, batch): in memory, or where they are large in a temporary file that goes with it.

    The file is written and read, not mapped: of a mapped one what was touched counts as this process's memory, and a full disk
    would kill it.
    """

    def __init__(self, slots: int, batches: int):
        self._slots, self._batches, self._file = slots, batches, None
        self._states: dict[tuple[int, int], State] = {}
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.float32)

    def __enter__(self) -> "_StateStore":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _size(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize

    def __setitem__(self, slot: tuple[int, int], state: State) -> None:
        if not self._states:
            self._shape, self._dtype = state.x.shape, state.x.dtype
            if self._slots * self._batches * self._size > SPILLED:
                self._file = tempfile.TemporaryFile(prefix="qlr-states-", buffering=0)  # noqa: SIM115  closed at the exit
        if self._file is None:
            self._states[slot] = state
            return
        self._states[slot] = State(np.empty(0), state.lost, state.left_out)
        left, at = np.ascontiguousarray(state.x).view(np.uint8).reshape(-1).data, self._at(slot)
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, at)
                left, at = left[done:], at + done
        except OSError as error:
            raise QLRError(
                f"the hidden states of a backward pass, {self._slots * self._batches * self._size / 1e9:.1f} GB, cannot be written "
                f"to {tempfile.gettempdir()} ({error.strerror}); free some of it, set TMPDIR, or take fewer tokens (output_tokens, "
                "measure_tokens)"
            ) from None

    def __getitem__(self, slot: tuple[int, int]) -> State:
        state = self._states[slot]
        if self._file is None:
            return state
        array = np.empty(self._shape, self._dtype)
        left, at = array.view(np.uint8).reshape(-1).data, self._at(slot)
        while left:
            done = os.preadv(self._file.fileno(), [left], at)
            left, at = left[done:], at + done
        return State(array, state.lost, state.left_out)

    def _at(self, slot: tuple[int, int]) -> int:
        return (slot[0] * self._batches + slot[1]) * self._size


States = _StateStore | _AnyStates
"""By (block, batch) what enters a block, or what stands for it; after the last block, what leaves it."""
