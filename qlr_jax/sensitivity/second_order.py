"""The second order of the KL in the weights' errors, by forward-mode differentiation: every matrix, and every pair of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError
from qlr_jax.models import Llama

SKETCH = 4096  # vocabularies beyond are folded to so many columns, signs at random: inner products stay right on the mean
ROOM = 500_000_000  # bytes that the vectors of one batch of tokens may take


def second_order(
    model: Llama,
    errors: Mapping[str, np.ndarray],
    windows: np.ndarray,
    *,
    on_done: Callable[[str], None] | None = None,
) -> np.ndarray:
    """The Gram matrix of the errors in the Fisher metric of the output distribution, nats a token, (matrices, matrices).

        gram[i, j] = mean_t ½ v_i(t)ᵀ F_t v_j(t)      v_i = ∂ logits · ΔW_i,  F_t = diag(p_t) − p_t p_tᵀ

    KL(original ‖ all changed) ≈ Σ_ij gram[i, j] to second order; gram[i, i] is the part of matrix i alone. A derivative of the
    logits costs two forward passes a matrix; no backward pass.

    Args:
        errors: name -> ΔW (out, in).
        windows: token ids, (windows, time).
        on_done: called with a matrix's name whenever it is done for one batch of windows.
    """
    if any(hasattr(lin.weight.get_value(), "dense") for lin in model.linears().values()):
        raise QLRError("second order needs the whole model in memory, unpacked; give attribution: path, or streaming: false")
    names = list(errors)
    tangents = {name: jnp.asarray(errors[name], jnp.float32) for name in names}
    columns = min(model.config.vocab_size, SKETCH)
    batch = max(1, min(len(windows), ROOM // (4 * len(names) * windows.shape[1] * columns)))
    gram = np.zeros((len(names), len(names)))
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        live = len(rows)
        tokens = jnp.asarray(np.concatenate([rows, np.repeat(rows[-1:], batch - live, axis=0)]))
        vectors = []
        for name in names:
            chosen = {other: jnp.float32(other == name) for other in names}
            vectors.append(np.asarray(_felt(model, tokens, tangents, chosen, columns=columns))[:live].reshape(-1))
            if on_done is not None:
                on_done(name)
        stacked = np.stack(vectors)
        gram += (stacked @ stacked.T).astype(np.float64)
    return 0.5 * gram / windows.size


@partial(jax.jit, static_argnames=("columns",))
def _felt(model: Llama, tokens: Array, tangents: dict[str, Array], chosen: dict[str, Array], *, columns: int) -> Array:
    """√p (v − Σ p v) of the matrix at which `chosen` is 1, folded to `columns`: its square is vᵀFv."""
    weights = {name: model.linears()[name].weight.get_value() for name in tangents}

    def logits(values: dict[str, Array]) -> Array:
        copy: Llama = jax.tree.map(lambda leaf: leaf, model)
        linears = copy.linears()
        for name, value in values.items():
            linears[name].weight.set_value(value)
        return copy(tokens)

    # jit hands dictionaries over sorted by key, so a name's place travels with the name
    moved = {name: (chosen[name] * tangents[name]).astype(weights[name].dtype) for name in tangents}
    out, v = jax.jvp(logits, (weights,), (moved,))
    p = jax.nn.softmax(out, axis=-1)
    felt = jnp.sqrt(p) * (v - jnp.sum(p * v, axis=-1, keepdims=True))
    if felt.shape[-1] > columns:
        sign = jax.random.rademacher(jax.random.key(0), (felt.shape[-1],), felt.dtype)
        felt = jnp.pad(felt * sign, ((0, 0), (0, 0), (0, -felt.shape[-1] % columns)))
        felt = jnp.sum(felt.reshape(*felt.shape[:2], -1, columns), axis=-2)
    return felt
