"""A forward pass of many batches, block by block, each asked for once; and what lies above the blocks, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from qlr_jax.core.sharding import line
from qlr_jax.engine import HERE, Call, Engine
from qlr_jax.models.llama import Block, Embedding, Llama, Rope, Top, check_tokens, embedded, shallow_copy
from qlr_jax.models.names import is_linear


@dataclass(frozen=True)
class Parts:
    """A model as pieces are given it (`qlr_jax.engine`): block by block, each made where it is used.

    Attributes:
        model: packed, on disk or in memory.
        matrices: name -> what stands for a matrix, with `dense()`, that takes the place of the model's own.
    """

    model: Llama
    matrices: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Llama | Parts) -> Parts:
        return model if isinstance(model, Parts) else cls(model)

    def block(self, i: int) -> Call:
        """Block i."""
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): matrix for name, matrix in self.matrices.items() if name.startswith(prefix)}
        return Call(block_of, (self.model, i, 1, own), kept=True)

    def top(self) -> Call:
        """What lies above the blocks, its weights in memory."""
        own = self._vocabulary()  # another function, so that beside each other both are kept
        return Call(_replaced_top, (self.model, own), kept=True) if own else Call(_top_of, (self.model,), kept=True)

    def embedding(self) -> Call:
        """The embedding."""
        return Call(_embedding_of, (self.model, self._vocabulary()), kept=True)

    def rope(self, time: int) -> Call:
        """The angles of so many positions."""
        return Call(rope_of, (self.model, time), kept=True)

    def _vocabulary(self) -> dict[str, Any]:
        return {name: matrix for name, matrix in self.matrices.items() if not is_linear(name)}


def last_states(
    model: Llama | Parts, batches: Sequence[Int[np.ndarray, "batch time"]], *, engine: Engine = HERE, title: str = ""
) -> list[Any]:
    """The hidden states (batch, time, n) that leave the last block, batch by batch, on the host.

    The blocks are gone through once (`Llama.block`): one that lies on disk is read once, one that is packed is decoded once, and
    one compiled function serves all. Memory is one block, and the hidden states of all batches.

    Args:
        model: packed, on disk or in memory.
        batches: token ids, all of one shape.
        engine: where batches go through blocks.
        title: of the pieces.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> model = Llama(config, jax.random.key(0))
        >>> [x.shape for x in last_states(model, [np.zeros((2, 5), np.int32)] * 2)]
        [(2, 5, 16), (2, 5, 16)]
    """
    if not batches:
        return []
    parts = Parts.of(model)
    for tokens in batches:
        check_tokens(tokens, parts.model.config.vocab_size)
    embedding, rope = parts.embedding(), parts.rope(batches[0].shape[1])
    states = [engine.submit(entering, embedding, tokens, title=title) for tokens in batches]
    for i in range(parts.model.config.num_hidden_layers):
        block = parts.block(i)
        for j, x in enumerate(states):  # one by one: two sets of hidden states are never in memory
            states[j] = engine.submit(leaving, block, rope, x, title=title)
    engine.forget()
    return states


def entering(embedding: Embedding, tokens: np.ndarray) -> np.ndarray:
    """The hidden states that enter the first block, on the host."""
    return np.asarray(embedded(embedding, tokens))


def leaving(block: Block, rope: Rope, x: np.ndarray) -> np.ndarray:
    """Those that leave a block, on the host."""
    return np.asarray(through(block, jax.device_put(x), rope))


def block_of(model: Llama, i: int, devices: int = 1, matrices: Mapping[str, Any] | None = None) -> Block:
    """Block i of a model, all of its weights in memory, a copy on each of so many devices.

    Args:
        model: packed, on disk or in memory.
        i: from 0.
        devices: of this process.
        matrices: local name -> a matrix with `dense()` that takes the place of its own.
    """
    if not matrices:
        return line(devices).replicate(model.block(i))
    copy = shallow_copy(model)
    own = copy.model.layers[i].linears()
    for name, matrix in matrices.items():
        own[name].weight.set_value(_decoded(matrix, own[name].weight.get_value()))
    return line(devices).replicate(copy.block(i))


def _decoded(matrix: Any, before: Any) -> Array:
    return jax.device_put(np.asarray(matrix.dense()).astype(before.dtype))  # jnp.asarray would compile a program for every shape


def _with_vocabulary(model: Llama, matrices: Mapping[str, Any]) -> Llama:
    if not matrices:
        return model
    copy = shallow_copy(model)
    own = copy.matrices()
    for name, matrix in matrices.items():
        own[name].weight.set_value(_decoded(matrix, own[name].weight.get_value()))
    return copy


def _top_of(model: Llama) -> Top:
    return model.top().unpacked()


def _replaced_top(model: Llama, matrices: Mapping[str, Any]) -> Top:
    return _with_vocabulary(model, matrices).top().unpacked()


def _embedding_of(model: Llama, matrices: Mapping[str, Any]) -> Embedding:
    return _with_vocabulary(model, matrices).model.embed_tokens


def rope_of(model: Llama, time: int, devices: int = 1) -> Rope:
    """The angles of so many positions, a copy on each of so many devices."""
    return line(devices).replicate(model.rope(time))


TOGETHER = 4  # sequences of one pass: no slower than 8 on two cores, and every stage that has as many shares its programs
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
