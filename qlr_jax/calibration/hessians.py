"""H = E[x xᵀ] for every distinct input of linear layers, one block of the model in memory at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError
from qlr_jax.models.llama import HIGHEST, Block, Llama
from qlr_jax.models.names import input_names

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""


def hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = 8,
    weights: Float[np.ndarray, "sequences time"] | None = None,
    progress: Progress | None = None,
) -> dict[str, Float[np.ndarray, "n n"]]:
    """Second moments of the inputs of all linear layers, keyed by input name ("model.layers.0.self_attn.qkv", ...).

        H = Σ_t w_t x_t x_tᵀ / Σ_t w_t      over all tokens t, w = 1 unless `weights` are given

    The hidden states of all sequences are kept on the host at one block boundary; one compiled function serves all blocks.
    Accumulation is in float32. Raises QLRError naming the block where an activation is not finite, for weights of another
    shape, negative or all zero, and for token ids outside the vocabulary. (CALDERA section 2, H of QuIP# section 2.)
    """
    tokens = np.asarray(tokens)
    w = np.ones(tokens.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    _check(model, tokens, w)
    batch, count = min(batch, len(tokens)), len(tokens)
    # The last batch is filled up with rows of weight zero, so that every batch has the one compiled shape.
    fill = -count % batch
    tokens = np.concatenate([tokens, np.repeat(tokens[-1:], fill, axis=0)])
    w = np.concatenate([w, np.zeros((fill, w.shape[1]), np.float32)])
    rope, total = model.rope(tokens.shape[1]), float(w.sum(dtype=np.float64))
    starts = range(0, len(tokens), batch)
    states = [np.asarray(_embed(model.model.embed_tokens, jnp.asarray(tokens[s : s + batch]))) for s in starts]
    out: dict[str, np.ndarray] = {}
    for i, block in enumerate(model.model.layers):
        sums: dict[str, Array] | None = None
        for j, s in enumerate(starts):
            x, found = _advance(block, jnp.asarray(states[j]), rope, jnp.asarray(w[s : s + batch] / total))
            states[j] = np.asarray(x)
            sums = found if sums is None else {name: sums[name] + h for name, h in found.items()}
        assert sums is not None
        for name, h in sums.items():
            matrix = np.asarray(h, np.float32)
            if not np.isfinite(matrix).all():
                raise QLRError(
                    f"activations that enter model.layers.{i}.{name} are not finite; "
                    "the checkpoint is damaged or its activations overflow this dtype (load it in float32)"
                )
            out[f"model.layers.{i}.{name}"] = matrix
        if progress is not None:
            progress(i + 1, len(model.model.layers))
    return {name: out[name] for name in input_names(model.config)}  # jit hands dictionaries back sorted by key


def _check(model: Llama, tokens: np.ndarray, w: np.ndarray) -> None:
    if tokens.ndim != 2 or not tokens.size:
        raise QLRError(f"tokens have shape {tokens.shape}; (sequences, time) is needed, neither of them 0")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise QLRError(
            f"token id {tokens.max() if tokens.min() >= 0 else tokens.min()} lies outside the vocabulary of "
            f"{model.config.vocab_size}; use the model's own tokenizer"
        )
    if w.shape != tokens.shape:
        raise QLRError(f"weights have shape {w.shape}, tokens {tokens.shape}; they must agree")
    if not np.isfinite(w).all() or w.min() < 0 or w.max() <= 0:
        raise QLRError("token weights must be finite, at least 0, and not all 0")


@jax.jit
def _embed(embedding: Any, tokens: Array) -> Array:
    return embedding(tokens)


@jax.jit
def _advance(block: Block, x: Array, rope: tuple[Array, Array], w: Array) -> tuple[Array, dict[str, Array]]:
    """The block's output and Σ w x xᵀ of each of its inputs, by local name."""
    found: dict[str, Array] = {}

    def tap(name: str, value: Array) -> None:
        rows = value.astype(jnp.float32).reshape(-1, value.shape[-1])
        # √w on both sides keeps the sum exactly symmetric and positive semidefinite.
        rows = rows * jnp.sqrt(w).reshape(-1, 1)
        found[name] = jnp.einsum("ti,tj->ij", rows, rows, precision=HIGHEST, preferred_element_type=jnp.float32)

    return block(x, rope, tap=tap), found
