"""What an error in a row of the embedding, or of the head, does to the model's output distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from qlr_jax.calibration.descent import Descent, DescentRun, EndSums
from qlr_jax.engine import HERE, Engine
from qlr_jax.models.forward import TOGETHER
from qlr_jax.models.llama import Llama
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
    batch: int = TOGETHER,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    devices: int | None = None,
    engine: Engine = HERE,
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
        engine: where batches go through blocks.

    Raises:
        QLRError: as `output_hessians`.

    Example:
        >>> import jax
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> found = vocabulary_metrics(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))
        >>> {name: (m.hessian.shape, m.row_weights.shape) for name, m in found.items()}
        {'model.embed_tokens': ((4, 4), (8,)), 'lm_head': ((4, 4), (8,))}
    """
    sums, tokens = EndSums(), np.asarray(tokens, np.int32)
    work = Descent({i: {} for i in range(model.config.num_hidden_layers)}, "products", seed, ends=True)
    for _ in DescentRun(model, tokens, work, batch, devices, engine, "calibrating: vocabulary").steps(progress, sums):
        pass
    counts = np.bincount(np.ravel(tokens), minlength=model.config.vocab_size) if counts is None else counts
    return row_metrics(model, sums, counts, tokens.shape[1], engine)


def row_metrics(model: Llama, sums: EndSums, counts: np.ndarray, time: int, engine: Engine = HERE) -> dict[str, RowMetric]:
    """`vocabulary_metrics`, of a backward pass that was made for something else as well (`output_hessians`, ends).

    Args:
        model: the original.
        sums: of the pass.
        counts: how often each token comes, (vocabulary,).
        time: tokens of a sequence.
        engine: where the pass was made.
    """
    seen = engine.result(sums.checked)[1][0] * time
    (moment, spread), gradients = engine.result(sums.head), engine.result(sums.embedding)
    scale = model.model.embed_tokens.scale**2
    embedding = RowMetric((scale * gradients / seen).astype(np.float32), counts / counts.sum())
    head = RowMetric((moment / seen).astype(np.float32), spread / seen)
    return {EMBEDDING: _tied(embedding, head)} if model.lm_head is None else {EMBEDDING: embedding, HEAD: head}


def _tied(embedding: RowMetric, head: RowMetric) -> RowMetric:
    hessian = embedding.row_weights.sum() * embedding.hessian + head.row_weights.sum() * head.hessian
    traces = float(np.trace(embedding.hessian)), float(np.trace(head.hessian))
    whole = float(np.trace(hessian)) or 1.0
    weights = (embedding.row_weights * traces[0] + head.row_weights * traces[1]) / whole
    return RowMetric(hessian.astype(np.float32), weights)
