"""What an error in a row of the embedding, or of the head, does to the model's output distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.calibration.gradients import BackwardPass
from qlr_jax.calibration.second_moment import second_moment
from qlr_jax.models.llama import Llama, RMSNorm
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
    sums = VocabularySums(model)
    run = BackwardPass(model, np.asarray(tokens, np.int32), batch, devices, lambda j: run.draws(j, seed))
    for _, j, _ in run.watched({i: {} for i in range(model.config.num_hidden_layers)}, "products", sums):
        if progress is not None and run.is_last(j):
            progress(1)
    return sums.metrics(np.bincount(np.ravel(tokens), minlength=model.config.vocab_size) if counts is None else counts)


class VocabularySums:
    """`vocabulary_metrics`, of a backward pass that is made for something else as well (`output_hessians`, beside)."""

    def __init__(self, model: Llama):
        size = model.config.hidden_size
        self._tied, self._scale = model.lm_head is None, model.model.embed_tokens.scale**2
        self._states, self._gradients = np.zeros((size, size)), np.zeros((size, size))
        self._chances, self._norm = np.zeros(model.config.vocab_size), model.model.norm
        self._run: BackwardPass | None = None

    def at_head(self, run: BackwardPass, x: Array, live: Array, spread: Array) -> None:
        self._run = run
        self._states += np.asarray(_normed_moment(run.placement.replicate(self._norm), x, live), np.float64)
        self._chances += np.asarray(spread, np.float64)

    def at_embedding(self, run: BackwardPass, g: Array) -> None:
        self._gradients += np.asarray(_moment(g), np.float64)

    def metrics(self, counts: np.ndarray) -> dict[str, RowMetric]:
        """What `vocabulary_metrics` returns, once the pass is done.

        Args:
            counts: how often each token comes, (vocabulary,).
        """
        assert self._run is not None, "a pass has been made"
        seen = self._run.sequences_left * self._run.batches[0].shape[1]
        embedding = RowMetric((self._scale * self._gradients / seen).astype(np.float32), counts / counts.sum())
        head = RowMetric((self._states / seen).astype(np.float32), self._chances / seen)
        return {EMBEDDING: _tied(embedding, head)} if self._tied else {EMBEDDING: embedding, HEAD: head}


def _tied(embedding: RowMetric, head: RowMetric) -> RowMetric:
    hessian = embedding.row_weights.sum() * embedding.hessian + head.row_weights.sum() * head.hessian
    traces = float(np.trace(embedding.hessian)), float(np.trace(head.hessian))
    whole = float(np.trace(hessian)) or 1.0
    weights = (embedding.row_weights * traces[0] + head.row_weights * traces[1]) / whole
    return RowMetric(hessian.astype(np.float32), weights)


@jax.jit
def _moment(g: Float[Array, "batch time n"]) -> Float[Array, "n n"]:
    return second_moment(g.astype(jnp.float32))


@jax.jit
def _normed_moment(norm: RMSNorm, x: Float[Array, "batch time n"], live: Float[Array, "batch"]) -> Float[Array, "n n"]:
    """Of the normed states of the sequences that are live."""
    return second_moment(norm(x).astype(jnp.float32) * live[:, None, None])
