"""What an error in a row of the embedding, or of the head, does to the model's output distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.calibration.gradients import BackwardPass, sampled_labels
from qlr_jax.models.llama import HIGHEST, Llama, Top
from qlr_jax.models.names import EMBEDDING, HEAD


@dataclass(frozen=True)
class RowMetric:
    """The metric of a matrix of which single rows are read: an error E costs ½ Σ_i g_i e_i H e_iᵀ nats of KL a token.

    Attributes:
        hessian: H, (n, n).
        row_weights: g, (rows,).
    """

    hessian: np.ndarray
    row_weights: np.ndarray


# one piece: its inner functions add to the sums of one pass
def vocabulary_metrics(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    counts: np.ndarray | None = None,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    devices: int | None = None,
) -> dict[str, RowMetric]:
    """The metrics of the embedding and of the head, by name; of a tied pair the one of both.

        embedding   H = mean_t g gᵀ, g the gradient at the hidden state that enters the first block;  g_i = how often token i comes
        head        H = mean_t x xᵀ, x the normed state that leaves the last block;                   g_i = mean_t p_i (1 − p_i)
        tied        H = H_e + q H_h, q = Σ_i g_i of the head;    g_i = (g_i^e tr H_e + g_i^h tr H_h) / tr H

    The second order of the KL as for linear layers (`output_hessians`), with what couples two rows of the head, −p_i p_j, left out;
    for a tied pair the two metrics of a row, g_i^e H_e + g_i^h H_h, become one Kronecker product of the same trace. One forward and
    one backward pass, labels drawn from the model's own distribution.

    Args:
        model: the original.
        tokens: (sequences, time), at least two a sequence.
        counts: how often each token comes, (vocabulary,); None: in `tokens`.
        batch: sequences at a time.
        seed: of the labels.
        progress: called with the number of blocks that are newly done.
        devices: how many to use at most; None: all.

    Raises:
        QLRError: as `output_hessians`.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> found = vocabulary_metrics(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))
        >>> {name: (m.hessian.shape, m.row_weights.shape) for name, m in found.items()}
        {'model.embed_tokens': ((4, 4), (8,)), 'lm_head': ((4, 4), (8,))}
    """
    tokens, config = np.asarray(tokens, np.int32), model.config
    size, rows, key = config.hidden_size, config.vocab_size, jax.random.key(seed)
    states, gradients, chances = np.zeros((size, size)), np.zeros((size, size)), np.zeros(rows)

    def labels(j: int, top: Top, x: Array) -> np.ndarray:
        live = np.zeros(run.batch, np.float32)
        live[: run.live[j]] = ~run.lost[j][: run.live[j]]
        moments, spread = _head_moments(top, x, run.placement.shard(live))
        states[...] += np.asarray(moments, np.float64)
        chances[...] += np.asarray(spread, np.float64)
        return np.array(sampled_labels(top, x, key, run.placement.shard(run.starts[j] + np.arange(run.batch))))

    def on_pulled(j: int, g: Array) -> None:
        gradients[...] += np.asarray(_moments(g), np.float64)

    run = BackwardPass(model, tokens, batch, devices, labels)
    for _, j, _ in run.watched({i: {} for i in range(config.num_hidden_layers)}, "products", on_pulled):
        if progress is not None and run.is_last(j):
            progress(1)
    seen = run.sequences_left * tokens.shape[1]
    scale = model.model.embed_tokens.scale**2
    counts = np.bincount(tokens.reshape(-1), minlength=rows) if counts is None else counts
    embedding = RowMetric((scale * gradients / seen).astype(np.float32), counts / counts.sum())
    head = RowMetric((states / seen).astype(np.float32), chances / seen)
    return {EMBEDDING: _tied(embedding, head)} if model.lm_head is None else {EMBEDDING: embedding, HEAD: head}


def _tied(embedding: RowMetric, head: RowMetric) -> RowMetric:
    hessian = embedding.row_weights.sum() * embedding.hessian + head.row_weights.sum() * head.hessian
    traces = float(np.trace(embedding.hessian)), float(np.trace(head.hessian))
    whole = float(np.trace(hessian)) or 1.0
    weights = (embedding.row_weights * traces[0] + head.row_weights * traces[1]) / whole
    return RowMetric(hessian.astype(np.float32), weights)


@jax.jit
def _moments(g: Float[Array, "batch time n"]) -> Float[Array, "n n"]:
    """Σ g gᵀ."""
    rows = g.astype(jnp.float32).reshape(-1, g.shape[-1])
    return jnp.einsum("ti,tj->ij", rows, rows, precision=HIGHEST, preferred_element_type=jnp.float32)


@jax.jit
def _head_moments(top: Top, x: Float[Array, "batch time n"], live: Float[Array, "batch"]) -> tuple[Array, Array]:
    """Σ x xᵀ of the normed states and Σ p (1 − p), of the sequences that are live."""
    normed = top.norm(x) * live[:, None, None]
    p = jax.nn.softmax(top(x), axis=-1)
    return _moments(normed), jnp.einsum("b,btv->v", live, p * (1 - p))
