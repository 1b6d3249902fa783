"""What is minimised: next-token loss, KL to the original model, and the original's likeliest tokens, kept in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The original's k likeliest tokens at every position of `tokens`, (rows, length, k): ids, and their log-probabilities.

    Bytes: 2 or 4 for an id and 2 for a log-probability, rows · length · k times.
    """

    tokens: Int[np.ndarray, "rows length"]
    ids: Int[np.ndarray, "rows length k"]
    logp: Float[np.ndarray, "rows length k"]


def teacher_logits(
    teacher: Llama, tokens: Int[np.ndarray, "rows length"], top: int, *, batch: int = 8, progress: Progress | None = None
) -> TeacherLogits:
    """Run the original once and keep its `top` likeliest tokens at every position.

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
            p, i = _top(teacher, jnp.asarray(rows), top)
            ids.append(np.asarray(i)[:live].astype(np.uint16 if small else np.int32))
            logp.append(np.asarray(p)[:live].astype(np.float16))
            stage.advance(live)
    return TeacherLogits(np.asarray(tokens), np.concatenate(ids), np.concatenate(logp))


@partial(jax.jit, static_argnames=("top",))
def _top(teacher: Llama, tokens: Array, top: int) -> tuple[Array, Array]:
    return jax.lax.top_k(jax.nn.log_softmax(teacher(tokens), axis=-1), top)


def text_loss(logp: Float[Array, "batch time vocab"], tokens: Int[Array, "batch time"]) -> Array:
    """− mean log q(next token), nats."""
    return -jnp.mean(jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1))


def kl_loss(logp: Float[Array, "batch time vocab"], teacher: Float[Array, "batch time vocab"]) -> Array:
    """mean Σ_v p_v (log p_v − log q_v), nats a token."""
    return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - logp), axis=-1))


def top_kl_loss(
    logp: Float[Array, "batch time vocab"], ids: Int[Array, "batch time k"], teacher: Float[Array, "batch time k"]
) -> Array:
    """KL over the k kept tokens and one outcome for all others: never more than the full KL, and equal to it at k = vocab.

    mean Σ_{v in top} p_v (log p_v − log q_v) + p_rest (log p_rest − log q_rest)
    """
    ids, teacher = ids.astype(jnp.int32), teacher.astype(jnp.float32)
    student = jnp.take_along_axis(logp, ids, axis=-1)
    kept = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    # rounded to float16 the kept probabilities may exceed 1 together
    p = jnp.maximum(1.0 - jnp.sum(jnp.exp(teacher), axis=-1), 1e-7)
    q = jnp.maximum(1.0 - jnp.sum(jnp.exp(student), axis=-1), 1e-7)
    rest = jnp.where(ids.shape[-1] < logp.shape[-1], p * (jnp.log(p) - jnp.log(q)), 0.0)
    return jnp.mean(kept + rest)


def states_loss(
    states: Sequence[Float[Array, "batch time n"]],
    teacher: Sequence[Float[Array, "batch time n"]],
    metrics: Sequence[Float[Array, "n n"]],
    product: Callable[[Array, Array], Array],
) -> Array:
    """Mean over blocks of ½ mean_t δᵀ G δ, δ what a block's hidden state differs by, G = E[g gᵀ] as the logits feel it there.

    Each is about the KL that would be left if all blocks above were the original's. KL itself feels δ by what one token's logits
    make of it, and its gradient is nearly all of that token's chance; the mean G is felt by all alike, so fewer tokens teach more.
    With second derivatives along blocks: BRECQ, arXiv 2102.05426, section 3.
    """
    parts = []
    for student, original, metric in zip(states, teacher, metrics, strict=True):
        apart = student.astype(jnp.float32) - original.astype(jnp.float32)
        parts.append(0.5 * jnp.mean(jnp.sum(apart * product(apart, metric), axis=-1)))
    return sum(parts) / len(parts)
