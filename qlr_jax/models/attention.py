"""Causal attention of query heads that share key-value heads, a part of the queries at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST

PART, PARTS = 128, 8  # queries of a part at least, and parts at most: every part is compiled for itself


def causal_attention(
    q: Float[Array, "batch heads time d"],
    k: Float[Array, "batch kv time d"],
    v: Float[Array, "batch kv time d"],
    window: int | None = None,
) -> Float[Array, "batch heads time d"]:
    """softmax(q kᵀ / √d) v over the positions that each query sees; in float32.

    Position t sees positions s with 0 <= t − s, and t − s < window where there is a window. Queries are taken in parts, each with
    the keys that any of them sees: of many positions that is little more than half of the work and of the memory.

    Args:
        q: rotated; the heads that share a key-value head lie side by side.
        k, v: keys, rotated, and values of the same positions.
        window: of the family; None: no limit.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
        >>> out = causal_attention(x, x, x)
        >>> bool(jnp.allclose(out[:, :, 0], x[:, :, 0])), out.shape
        (True, (1, 2, 3, 4))
    """
    time = q.shape[2]
    part, done = max(PART, -(-time // PARTS)), []
    for start in range(0, time, part):
        stop = min(start + part, time)
        first = 0 if window is None else max(0, start - window + 1)
        at = jnp.arange(start - first, stop - first)
        done.append(attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], at, window))
    return done[0] if len(done) == 1 else jnp.concatenate(done, axis=2)


def attend(
    q: Float[Array, "batch heads time d"],
    k: Float[Array, "batch kv keys d"],
    v: Float[Array, "batch kv keys d"],
    at: Int[Array, "*batch time"],
    window: int | None = None,
) -> Float[Array, "batch heads time d"]:
    """`causal_attention` of queries at given positions, key s being at position s.

    Args:
        q, k, v, window: as of `causal_attention`.
        at: positions of the queries, the same for all rows or (batch, time); each sees one key at least.
    """
    batch, heads, time, d = q.shape
    group = heads // k.shape[1]
    # The query heads of one key-value head are stacked along time: one plain batched product serves the group.
    q = q.reshape(batch, k.shape[1], group * time, d)
    scores = jnp.einsum("bktd,bksd->bkts", q, k, precision=HIGHEST, preferred_element_type=jnp.float32)
    back = at[..., :, None] - jnp.arange(k.shape[2])
    seen = jnp.tile(back >= 0 if window is None else (back >= 0) & (back < window), (group, 1))
    scores = jnp.where(seen if at.ndim == 1 else seen[:, None], scores / math.sqrt(d), -jnp.inf)
    # Divided by their sum after the product: an array of (time, d) and not of (time, keys), and so for its gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bkts,bksd->bktd", weights.astype(v.dtype), v, precision=HIGHEST, preferred_element_type=jnp.float32)
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).reshape(batch, heads, time, d)
