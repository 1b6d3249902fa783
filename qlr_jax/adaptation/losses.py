"""What is minimised: next-token loss, KL to the original model, and hidden-state distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.core.typing import Array, Float, Int


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

    Args:
        logp: the student's log-probabilities (batch, time, vocab).
        ids: the teacher's likeliest tokens (batch, time, k).
        teacher: their log-probabilities (batch, time, k), nats.

    Returns:
        A scalar, nats a token.
    """
    ids, teacher = ids.astype(jnp.int32), teacher.astype(jnp.float32)
    student = jnp.take_along_axis(logp, ids, axis=-1)
    kept = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    # rounded to float16 the kept probabilities may exceed 1 together
    p = jnp.maximum(1.0 - jnp.sum(jnp.exp(teacher), axis=-1), 1e-7)
    q = jnp.maximum(1.0 - jnp.sum(jnp.exp(student), axis=-1), 1e-7)
    rest = jnp.where(ids.shape[-1] < logp.shape[-1], p * (jnp.log(p) - jnp.log(q)), 0.0)
    return jnp.mean(kept + rest)


def hidden_state_loss(
    states: Sequence[Float[Array, "batch time n"]],
    teacher: Sequence[Float[Array, "batch time n"]],
    metrics: Sequence[Float[Array, "n n"]],
    product: Callable[[Array, Array], Array],
) -> Array:
    """Hidden-state distillation: how far the states that leave the blocks are from the teacher's, weighted by the gradients there.

        mean over blocks of ½ mean_t δᵀ G δ,   δ the difference of the hidden states, G = E[g gᵀ] of the logits' gradients

    Each term approximates the KL that would remain if all blocks above were the original's. The gradient of KL itself rests on the
    one token at each position, which is noise for the most part; the mean G is the same for all, so fewer tokens teach more.

    Args:
        states: of the student, one a block, (batch, time, n).
        teacher: of the teacher, likewise.
        metrics: G (n, n) of each block.
        product: x wᵀ, as the forward pass multiplies.

    Returns:
        A scalar, nats a token.

    Source: with second derivatives along blocks: BRECQ, arXiv 2102.05426, section 3.
    """
    parts = []
    for student, original, metric in zip(states, teacher, metrics, strict=True):
        difference = student.astype(jnp.float32) - original.astype(jnp.float32)
        parts.append(0.5 * jnp.mean(jnp.sum(difference * product(difference, metric), axis=-1)))
    return sum(parts, start=jnp.zeros(())) / len(parts)


def objective(
    config: AdaptConfig, logits: Float[Array, "batch time vocab"], teacher: Array | None, part: tuple[Array, ...]
) -> Array:
    """The loss of one batch without hidden-state distillation: w · KL + (1 − w) · next token, nats a token.

    Args:
        config: which loss, and w.
        logits: the student's (batch, time, vocab).
        teacher: the logits of a teacher that runs beside the student; None: what `part` keeps of them, if anything.
        part: tokens (batch, time) and, where the teacher's logits are kept, their ids and log-probabilities (batch, time, k).
    """
    tokens, kept = part[0], part[1:]
    logp = jax.nn.log_softmax(logits, axis=-1)
    share = {"text": 0.0, "kl": 1.0, "mix": config.weight}[config.loss]
    total = jnp.zeros(())
    if share < 1:
        total = total + (1 - share) * text_loss(logp, tokens)
    if share > 0:
        if kept:
            kl = top_kl_loss(logp, *kept)
        else:
            assert teacher is not None  # prepare_sequences sees to it
            kl = kl_loss(logp, jax.nn.log_softmax(teacher, axis=-1))
        total = total + share * kl
    return total
