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
from qlr_jax.models import Llama, layer_of
from qlr_jax.models.llama import Block, Rope, Top, shallow_copy

NODES = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)  # Gauss-Legendre on [0, 1]: exact for a KL of up to fourth order in the step


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

    Interactions are in it, halved between those who interact, at the errors given. A forward and a backward pass of the model a
    node, block by block (`calibration.backward`), which says what memory it takes.

    Args:
        model: the original.
        errors: name -> ΔW (out, in), of all matrices that change together.
        reference: the original's log-probabilities.
        batch: windows in one backward pass.
        on_done: called with the number of windows that are newly done.

    Source: Aumann and Shapley, Values of Non-Atomic Games (1974); for bits of layers: arXiv 2607.12266.
    """
    names: dict[int, list[str]] = {i: [] for i in range(model.config.num_hidden_layers)}
    for name in errors:
        names[layer_of(name)].append(name)
    total, windows, top = dict.fromkeys(errors, 0.0), reference.windows, model.top()
    batch = min(batch, len(windows))
    starts = range(0, len(windows), batch)
    batches = [np.pad(rows := windows[s : s + batch], [(0, batch - len(rows)), (0, 0)]) for s in starts]

    @lru_cache(maxsize=1)  # of one block at a time: errors may have to be read
    def of_block(i: int) -> dict[str, Array]:
        return {n.removeprefix(f"model.layers.{i}."): jnp.asarray(np.asarray(errors[n]), jnp.float32) for n in names[i]}

    def gradient(j: int, x: Array) -> Array:
        part = reference.logp[starts[j] : starts[j] + batch]
        logp = jnp.asarray(np.pad(part, [(0, batch - len(part)), (0, 0), (0, 0)]), jnp.float32)
        return _head_gradient(top, x, logp, jnp.asarray(np.arange(batch) < len(part), jnp.float32))

    for last, node in zip((False, True), NODES, strict=True):
        for i, j, shares in backward(
            model,
            batches,
            lambda i, block, x, rope, at=node: _forward(block, of_block(i), at, x, rope),
            gradient,
            lambda i, j, block, x, rope, g, at=node: _pull_back(block, of_block(i), at, x, rope, g),
        ):
            for name, share in shares.items():
                total[f"model.layers.{i}.{name}"] += float(share) / len(NODES)
            if on_done is not None and last and i == 0:
                on_done(min(batch, len(windows) - starts[j]))
    return {name: max(share, 0.0) / windows.size for name, share in total.items()}


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
def _head_gradient(top: Top, x: Array, logp: Array, live: Array) -> Array:
    """∂ Σ KL / ∂x of the hidden state that leaves the last block."""

    def divergence(x: Array) -> Array:
        q = jax.nn.log_softmax(top(x), axis=-1)
        return jnp.sum(live[:, None, None] * jnp.exp(logp) * (logp - q))

    return jax.grad(divergence)(x)


@jax.jit
def _pull_back(block: Block, errors: dict[str, Array], at: Array, x: Array, rope: Rope, g: Array) -> tuple[Array, dict[str, Array]]:
    """∂ΣKL/∂x, and ⟨∂ΣKL/∂W_i, ΔW_i⟩: the derivative in a step length of every matrix's own."""
    steps = {name: jnp.asarray(at, jnp.float32) for name in errors}
    return jax.vjp(lambda x, steps: _moved(block, errors, steps)(x, rope), x, steps)[1](g)
