"""The original's likeliest tokens at every position, computed once and kept in its place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.typing import Array, Float, Int
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.llama import Llama
from qlr_jax.progress import Progress, silent


@dataclass(frozen=True)
class TeacherLogits:
    """The original's k likeliest tokens at every position of `tokens`.

    Bytes: 2 or 4 for an id and 2 for a log-probability, rows · length · k times.

    Attributes:
        tokens: (rows, length) of the text.
        ids: (rows, length, k) of the likeliest tokens after each position.
        logp: (rows, length, k), their log-probabilities, nats.
    """

    tokens: Int[np.ndarray, "rows length"]
    ids: Int[np.ndarray, "rows length k"]
    logp: Float[np.ndarray, "rows length k"]


def teacher_logits(
    teacher: Llama, tokens: Int[np.ndarray, "rows length"], top: int, *, batch: int = 8, progress: Progress | None = None
) -> TeacherLogits:
    """Run the original once and keep its `top` likeliest tokens at every position.

    Args:
        teacher: the original model.
        tokens: (rows, length) of the text.
        top: how many tokens of a position; at most the vocabulary.
        batch: rows of one pass.
        progress: where it is shown; nowhere if not given.

    Raises:
        QLRError: `top` is below 1.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> teacher_logits(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]), 2).ids.shape
        (1, 3, 2)
    """
    if top < 1:
        raise QLRError(f"top {top} keeps nothing of the teacher; pass at least 1")
    top, small = min(top, teacher.config.vocab_size), teacher.config.vocab_size <= 2**16
    ids, logp = [], []
    with (progress or silent()).stage("teacher", total=len(tokens)) as stage:
        for rows, live in batches(tokens, batch):
            p, i = _likeliest(teacher, jnp.asarray(rows), top)
            ids.append(np.asarray(i)[:live].astype(np.uint16 if small else np.int32))
            logp.append(np.asarray(p)[:live].astype(np.float16))
            stage.advance(live)
    return TeacherLogits(np.asarray(tokens), np.concatenate(ids), np.concatenate(logp))


@partial(jax.jit, static_argnames=("top",))
def _likeliest(teacher: Llama, tokens: Array, top: int) -> tuple[Array, Array]:
    return jax.lax.top_k(jax.nn.log_softmax(teacher(tokens), axis=-1), top)
