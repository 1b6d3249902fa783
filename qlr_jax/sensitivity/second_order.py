"""The second order of the KL in the weights' errors, by forward-mode differentiation, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.lazy import handle
from qlr_jax.core.typing import Array
from qlr_jax.engine import HERE, Engine
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models import Llama
from qlr_jax.models.llama import shallow_copy

TITLE = "sensitivity"  # of its pieces
SKETCH = 4096  # vocabularies beyond are folded to so many columns, signs at random: inner products stay right on the mean
BATCH_BYTES = 500_000_000  # that the vectors of all matrices may take for one batch of windows


def second_order(
    model: Llama,
    errors: Mapping[str, np.ndarray],
    windows: np.ndarray,
    *,
    on_done: Callable[[str], None] | None = None,
    engine: Engine = HERE,
) -> dict[str, float]:
    """The part of the KL that each error causes alone, to second order, nats a token.

        kl_i = mean_t ½ v_i(t)ᵀ F_t v_i(t)      v_i = ∂ logits · ΔW_i,  F_t = diag(p_t) − p_t p_tᵀ

    A derivative of the logits costs two forward passes a matrix; no backward pass.

    Args:
        model: the original, all of it in memory and unpacked.
        errors: name -> ΔW (out, in).
        windows: token ids, (windows, time).
        on_done: called with a matrix's name whenever it is done for one batch of windows.
        engine: where the batches go through the model.

    Raises:
        QLRError: a model that is packed or on disk.
    """
    total = dict.fromkeys(errors, 0.0)
    given = {name: handle(errors, name) for name in errors}
    for part in [engine.submit(_squares, model, given, *rows, title=TITLE) for rows in _batches(model, errors, windows)]:
        for name, value in engine.result(part).items():
            total[name] += value
            if on_done is not None:
                on_done(name)
    return {name: 0.5 * value / windows.size for name, value in total.items()}


def _squares(model: Llama, errors: Mapping[str, np.ndarray], rows: np.ndarray, live: int) -> dict[str, float]:
    return {name: float(np.sum(np.square(v), dtype=np.float64)) for name, v in _logit_changes(model, errors, rows, live)}


def logit_changes(model: Llama, errors: Mapping[str, np.ndarray], windows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """For one batch of windows after another, and there matrix by matrix: √F_t v_i(t) of all its tokens in one vector.

    Inner products of such vectors, summed over the batches, are v_iᵀ F v_j.

    Args:
        model: the original, all of it in memory and unpacked.
        errors: name -> ΔW (out, in).
        windows: token ids, (windows, time).

    Raises:
        QLRError: a model that is packed or on disk.
    """
    for rows, live in _batches(model, errors, windows):
        yield from _logit_changes(model, errors, rows, live)


def _batches(model: Llama, errors: Mapping[str, Any], windows: np.ndarray) -> list[tuple[np.ndarray, int]]:
    if any(hasattr(lin.weight.get_value(), "dense") for lin in model.linears().values()):
        raise QLRError("second order needs the whole model in memory, unpacked; give attribution: path, or streaming: false")
    columns = min(model.config.vocab_size, SKETCH)
    batch = max(1, min(len(windows), BATCH_BYTES // (4 * len(errors) * windows.shape[1] * columns)))
    return list(batches(windows, batch))


def _logit_changes(model: Llama, errors: Mapping[str, np.ndarray], rows: np.ndarray, live: int) -> Iterator[tuple[str, np.ndarray]]:
    tangents = {name: jnp.asarray(np.asarray(error), jnp.float32) for name, error in errors.items()}
    columns = min(model.config.vocab_size, SKETCH)
    for name in tangents:
        chosen = {other: jnp.float32(other == name) for other in tangents}
        vectors = _fisher_weighted(model, jnp.asarray(rows), tangents, chosen, columns=columns)
        yield name, np.asarray(vectors)[:live].reshape(-1)


@partial(jax.jit, static_argnames=("columns",))
def _fisher_weighted(model: Llama, tokens: Array, tangents: dict[str, Array], chosen: dict[str, Array], *, columns: int) -> Array:
    """√p (v − Σ p v) of the matrix at which `chosen` is 1, folded to `columns`: its square is vᵀFv."""
    weights = {name: model.linears()[name].weight.get_value() for name in tangents}

    def logits(values: dict[str, Array]) -> Array:
        copy = shallow_copy(model)
        linears = copy.linears()
        for name, value in values.items():
            linears[name].weight.set_value(value)
        return copy(tokens)

    # jit hands dictionaries over sorted by key, so a name's place travels with the name
    moved = {name: (chosen[name] * tangents[name]).astype(weights[name].dtype) for name in tangents}
    out, v = jax.jvp(logits, (weights,), (moved,))
    p = jax.nn.softmax(out, axis=-1)
    weighted = jnp.sqrt(p) * (v - jnp.sum(p * v, axis=-1, keepdims=True))
    if weighted.shape[-1] > columns:
        sign = jax.random.rademacher(jax.random.key(0), (weighted.shape[-1],), weighted.dtype)
        weighted = jnp.pad(weighted * sign, ((0, 0), (0, 0), (0, -weighted.shape[-1] % columns)))
        weighted = jnp.sum(weighted.reshape(*weighted.shape[:2], -1, columns), axis=-2)
    return weighted
