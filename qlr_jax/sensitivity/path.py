"""Shares of the KL that all errors cause together, collected along the path from the original to the compressed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.calibration.backward import Batch, State, backward, batches_of
from qlr_jax.core.lazy import handle
from qlr_jax.core.typing import Array
from qlr_jax.engine import HERE, Call, Engine
from qlr_jax.evaluation import Reference
from qlr_jax.models import EMBEDDING, HEAD, Llama, is_linear, layer_of
from qlr_jax.models.forward import TOGETHER, block_of, by_parts, through
from qlr_jax.models.llama import Block, Embedding, Rope, Top, shallow_copy
from qlr_jax.models.products import exact_product
from qlr_jax.models.sites import BY_PATH

TITLE = "sensitivity"  # of its pieces
NODES = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)  # Gauss-Legendre on [0, 1]: exact for a KL of up to fourth order in the step


def path_shares(
    model: Llama,
    errors: Mapping[str, Any],
    reference: Reference,
    *,
    batch: int = TOGETHER,
    on_done: Callable[[int], None] | None = None,
    engine: Engine = HERE,
) -> dict[str, float]:
    """Aumann-Shapley shares of KL(original ‖ all changed), nats a token; they add up to it.

        share_i = ∫₀¹ ⟨∂KL/∂W_i (W + t ΔW), ΔW_i⟩ dt, by two nodes

    Interactions are in it, halved between those who interact, at the errors given: a share can be negative, of a matrix whose
    error undoes a part of what the others' do here. A forward and a backward pass of the model a
    node, block by block (`calibration.backward`), which says what memory it takes.

    Args:
        model: the original.
        errors: name -> ΔW (out, in), of all matrices that change together, embedding and head among them.
        reference: the original's log-probabilities.
        batch: windows in one backward pass.
        on_done: called with the number of windows that are newly done.
        engine: where they go through blocks: where the reference was made.

    Source: Aumann and Shapley, Values of Non-Atomic Games (1974); for bits of layers: arXiv 2607.12266.
    """
    windows, layers = reference.windows, model.config.num_hidden_layers
    batches = batches_of(windows, min(batch, len(windows)))
    names: dict[int, dict[str, Any]] = {i: {} for i in range(layers)}
    for name in filter(is_linear, errors):
        i = layer_of(name)
        names[i][name.removeprefix(f"model.layers.{i}.")] = handle(errors, name)
    vocabulary = {name: handle(errors, name) for name in errors if not is_linear(name)}
    head = EMBEDDING if model.lm_head is None else HEAD
    of_head = Call(_head_error, (vocabulary[head],), kept=True) if head in vocabulary else None
    at_head = [(reference.part(b.start, b.start + b.live), of_head) for b in batches]
    found: list[tuple[int, int, Any]] = []
    for node in NODES:
        work, ends = _Path(model.model.embed_tokens.scale), None
        if vocabulary:
            moved = model, vocabulary, node
            ends = Call(_moved_embedding, moved, kept=True), Call(_moved_top, moved, kept=True)
        last = node == NODES[-1]

        def beside(i: int, node: float = node) -> Call:
            block = Call(block_of, (model, i, 1), kept=True)  # as `backward` asks for it: made once
            return Call(_on_the_path, (block, names[i], vocabulary.get(EMBEDDING) if not i else None, node), kept=True)

        for i, j, shares in backward(model, batches, work, beside=beside, at_head=at_head, ends=ends, engine=engine, title=TITLE):
            found.append((i, j, shares))
            if on_done is not None and last and i == 0:
                on_done(batches[j].live)
    total = dict.fromkeys(errors, 0.0)
    for i, _, shares in found:
        for name, share in engine.result(shares).items():
            whole = name if name == EMBEDDING else head if i == layers else f"model.layers.{i}.{name}"
            if whole in total:
                total[whole] += share / len(NODES)
    return {name: share / windows.size for name, share in total.items()}


@dataclass(frozen=True)
class _Path:
    """The work of a backward pass of ΣKL at one node (`calibration.backward.Work`); beside a block lies what `_on_the_path` makes.

    Attributes:
        scale: of the embedding.
    """

    scale: float

    def forward(self, i: int, block: Block, beside: Any, rope: Rope, batch: Batch, state: State) -> State:
        return replace(state, x=np.asarray(through(beside[0], jax.device_put(state.x), rope)))

    def head(self, top: Top, batch: Batch, beside: tuple[Any, Any], state: State) -> tuple[State, dict[str, float]]:
        logp, error = beside
        rows, live = len(batch.tokens), (np.arange(len(batch.tokens)) < batch.live).astype(np.float32)
        logp = np.pad(logp, [(0, rows - len(logp)), (0, 0), (0, 0)]).astype(np.float32)
        pulled, share = _head_gradient(top, error, jax.device_put(state.x), logp, live)
        return replace(state, x=np.asarray(pulled)), {"head": float(share)}

    def pull_back(
        self, i: int, block: Block, beside: Any, rope: Rope, batch: Batch, state: State, gradient: State
    ) -> tuple[State, dict[str, float]]:
        (moved, errors, embedding), (x, g) = beside, jax.device_put((state.x, gradient.x))
        pulled, found = _pull_back(moved, errors, x, rope, g)
        shares = {name: float(share) for name, share in found.items()}
        if embedding is not None:
            shares[EMBEDDING] = float(jnp.vdot(pulled, embedding[batch.tokens] * self.scale))
        return replace(gradient, x=np.asarray(pulled)), shares


def _on_the_path(
    block: Block, errors: Mapping[str, Any], embedding: Any, at: float
) -> tuple[Block, dict[str, Array], Array | None]:
    """The block with `at` · ΔW added to its matrices, their ΔW by local name, and that of the embedding."""
    placed = {name: jax.device_put(np.asarray(error, np.float32)) for name, error in errors.items()}
    return _moved(block, placed, at), placed, None if embedding is None else jax.device_put(np.asarray(embedding, np.float32))


def _head_error(error: Any) -> Array:
    return jax.device_put(np.asarray(error, np.float32))


def _moved_embedding(model: Llama, errors: Mapping[str, Any], at: float) -> Embedding:
    return _with_vocabulary(model, errors, at).model.embed_tokens


def _moved_top(model: Llama, errors: Mapping[str, Any], at: float) -> Top:
    return _with_vocabulary(model, errors, at).top()


def _with_vocabulary(model: Llama, errors: Mapping[str, Any], at: float) -> Llama:
    """The model with `at` · ΔW added to its embedding and its head."""
    copy = shallow_copy(model)
    for name, error in errors.items():
        weight = copy.matrices()[name].weight
        value = weight.get_value()
        weight.set_value((value + at * jax.device_put(np.asarray(error, np.float32))).astype(value.dtype))
    return copy


@jax.jit
def _moved(block: Block, errors: dict[str, Array], at: Array | float) -> Block:
    """The block with `at` · ΔW added to its matrices; names are local."""
    copy = shallow_copy(block)
    linears = copy.linears()
    for name, error in errors.items():
        weight = linears[name].weight
        value = weight.get_value()
        weight.set_value((value + at * error).astype(value.dtype))
    return copy


@jax.jit
def _head_gradient(top: Top, error: Array | None, x: Array, logp: Array, live: Array) -> tuple[Array, Array]:
    """∂ Σ KL / ∂x of the hidden state that leaves the last block, and ⟨∂ΣKL/∂W, ΔW⟩ of the head."""

    def part(fresh: Array, x: Array, logp: Array) -> tuple[Array, Array]:
        logits, pull = jax.vjp(top, x)
        p = jnp.exp(logp)
        slope = live[:, None, None] * (jnp.sum(p, axis=-1, keepdims=True) * jax.nn.softmax(logits, axis=-1) - p)
        if error is None:
            return pull(slope)[0], jnp.zeros(())
        return pull(slope)[0], jnp.vdot(fresh[:, None] * slope, exact_product(top.norm(x), error))

    return by_parts(part, x, logp)


@jax.jit
def _pull_back(block: Block, errors: dict[str, Array], x: Array, rope: Rope, g: Array) -> tuple[Array, dict[str, Array]]:
    """∂ΣKL/∂x, and ⟨∂ΣKL/∂W_i, ΔW_i⟩ = Σ_t ⟨∂ΣKL/∂y_t, ΔW_i x_t⟩ of every matrix: no gradient of a matrix is made."""

    def stepped(x: Array, steps: dict[str, Array]) -> Array:
        """The block's output where every matrix goes a step of its own further."""
        inputs: dict[str, Array] = {}

        def tap(name: str, value: Array) -> None:
            inputs[name] = jax.lax.stop_gradient(value)  # steps are 0: of x they change nothing

        def adjust(name: str, y: Array) -> Array:
            if name not in errors:
                return y
            return y + (steps[name] * exact_product(inputs[BY_PATH[name].input], errors[name])).astype(y.dtype)

        return block(x, rope, tap=tap, adjust=adjust)

    return jax.vjp(stepped, x, {name: jnp.zeros(()) for name in errors})[1](g)
