"""Shares of the KL that all errors cause together, collected along the path from the original to the compressed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.calibration.backward import backward
from qlr_jax.core.typing import Array
from qlr_jax.evaluation import Reference
from qlr_jax.models import EMBEDDING, HEAD, Llama, is_linear, layer_of
from qlr_jax.models.forward import by_parts
from qlr_jax.models.llama import Block, Rope, Top, shallow_copy
from qlr_jax.models.products import exact_product

NODES = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)  # Gauss-Legendre on [0, 1]: exact for a KL of up to fourth order in the step


# one piece: its inner functions add to the shares of one pass
def path_shares(
    model: Llama,
    errors: Mapping[str, np.ndarray],
    reference: Reference,
    *,
    batch: int = 4,
    on_done: Callable[[int], None] | None = None,
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

    Source: Aumann and Shapley, Values of Non-Atomic Games (1974); for bits of layers: arXiv 2607.12266.
    """
    names: dict[int, list[str]] = {i: [] for i in range(model.config.num_hidden_layers)}
    for name in filter(is_linear, errors):
        names[layer_of(name)].append(name)
    total, windows = dict.fromkeys(errors, 0.0), reference.windows
    batch = min(batch, len(windows))
    starts = range(0, len(windows), batch)
    batches = [np.pad(rows := windows[s : s + batch], [(0, batch - len(rows)), (0, 0)]) for s in starts]
    vocabulary = {name: jax.device_put(np.asarray(errors[name], np.float32)) for name in errors if not is_linear(name)}
    head = EMBEDDING if model.lm_head is None else HEAD

    @lru_cache(maxsize=1)  # of one block at a time: errors may have to be read
    def of_block(i: int) -> dict[str, Array]:
        return {n.removeprefix(f"model.layers.{i}."): jax.device_put(np.asarray(errors[n], np.float32)) for n in names[i]}

    def live(j: int) -> np.ndarray:
        return np.arange(batch) < min(batch, len(windows) - starts[j])

    def gradient(j: int, x: Array, top: Top) -> Array:
        logp = np.pad(part := reference.logp[starts[j] : starts[j] + batch], [(0, batch - len(part)), (0, 0), (0, 0)])
        pulled, share = _head_gradient(top, vocabulary.get(head), x, logp.astype(np.float32), live(j).astype(np.float32))
        if head in vocabulary:
            total[head] += float(share) / len(NODES)
        return pulled

    def pull_back(i: int, j: int, block: Block, at: float, x: Array, rope: Rope, g: Array) -> tuple[Array, dict[str, Array]]:
        pulled, shares = _pull_back(block, of_block(i), at, x, rope, g)
        if i == 0 and EMBEDDING in vocabulary:
            moved = vocabulary[EMBEDDING][batches[j]] * model.model.embed_tokens.scale
            total[EMBEDDING] += float(jnp.vdot(pulled, moved)) / len(NODES)
        return pulled, shares

    for last, node in zip((False, True), NODES, strict=True):
        there = _with_vocabulary(model, vocabulary, node)
        top = there.top()
        for i, j, shares in backward(
            there,
            batches,
            lambda i, block, x, rope, at=node: _forward(block, of_block(i), at, x, rope),
            lambda j, x, top=top: gradient(j, x, top),
            lambda i, j, block, x, rope, g, at=node: pull_back(i, j, block, at, x, rope, g),
        ):
            for name, share in shares.items():
                total[f"model.layers.{i}.{name}"] += float(share) / len(NODES)
            if on_done is not None and last and i == 0:
                on_done(int(live(j).sum()))
    return {name: share / windows.size for name, share in total.items()}


def _with_vocabulary(model: Llama, errors: Mapping[str, Array], at: float) -> Llama:
    """The model with `at` · ΔW added to its embedding and its head; itself where they do not change."""
    if not errors:
        return model
    copy = shallow_copy(model)
    for name, error in errors.items():
        weight = copy.matrices()[name].weight
        value = weight.get_value()
        weight.set_value((value + at * error).astype(value.dtype))
    return copy


def _moved(block: Block, errors: Mapping[str, Array], steps: Mapping[str, Array]) -> Block:
    """The block with `steps` · ΔW added to its matrices; names are local."""
    copy = shallow_copy(block)
    linears = copy.linears()
    for name, error in errors.items():
        weight = linears[name].weight
        value = weight.get_value()
        weight.set_value((value + steps[name] * error).astype(value.dtype))
    return copy


@jax.jit
def _forward(block: Block, errors: dict[str, Array], at: Array, x: Array, rope: Rope) -> Array:
    return _moved(block, errors, dict.fromkeys(errors, at))(x, rope)


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
def _pull_back(block: Block, errors: dict[str, Array], at: Array, x: Array, rope: Rope, g: Array) -> tuple[Array, dict[str, Array]]:
    """∂ΣKL/∂x, and ⟨∂ΣKL/∂W_i, ΔW_i⟩: the derivative in a step length of every matrix's own."""
    steps = {name: jnp.asarray(at, jnp.float32) for name in errors}
    return jax.vjp(lambda x, steps: _moved(block, errors, steps)(x, rope), x, steps)[1](g)
