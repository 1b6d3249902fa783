"""Log-likelihoods of given continuations, for many requests of many lengths with few compilations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qlr_jax.engine import HERE, Engine
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.generation import bucket
from qlr_jax.evaluation.windows import batches, fitting_batch
from qlr_jax.models.llama import Llama
from qlr_jax.models.vocabulary import check_tokens


class Score(NamedTuple):
    """The score of one continuation.

    Attributes:
        logp: Σ_t log p(token t | all before), nats.
        greedy: whether each token is the likeliest in its place.
    """

    logp: float
    greedy: bool


# one piece: what is handed out, and what is settled, share the requests that wait
def scores(
    model: Llama,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    batch: int = 8,
    on_done: Callable[[int], None] | None = None,
    engine: Engine = HERE,
) -> list[Score]:
    """The score of each (context, continuation), as lm_eval defines it: the model reads both but for the last token.

        logp = Σ_{t=c}^{c+k−1} log p(x_t | x_0 … x_{t−1}),   c tokens of context, k of continuation

    Rows are padded on their right to the next power of two and run in batches of one size, longest first: one compilation for
    each power of two that occurs. Equal requests run once.

    Args:
        model: packed or not.
        requests: (context, continuation), token ids; at least one each.
        max_length: tokens that the model reads at most (its max_position_embeddings where not given); of a longer request
            the first tokens are cut off.
        batch: rows of a batch, at most; fewer where their logits would take more than 1 GB.
        on_done: called with how many more requests are done.
        engine: where the batches go through the model.

    Raises:
        QLRError: an empty part, a continuation that is longer than `max_length`, or a token that the vocabulary lacks.
    """
    most = max_length or model.config.max_position_embeddings
    waiting: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not len(context) or not 1 <= len(continuation) <= most:
            raise QLRError(
                f"a request has {len(context)} tokens of context and {len(continuation)} of continuation; "
                f"give at least one of each, and a continuation of at most {most}"
            )
        whole = tuple([*context, *continuation][-(most + 1) :])
        waiting.setdefault((whole, len(continuation)), []).append(i)
    check_tokens([token for whole, _ in waiting for token in whole], model.config.vocab_size)
    by_bucket: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for whole, count in sorted(waiting, key=lambda key: (-len(key[0]), key)):
        by_bucket.setdefault(bucket(len(whole) - 1, most), []).append((whole, count))

    results: list[Score] = [Score(0.0, False)] * len(requests)
    asked: list[tuple[list[tuple[tuple[int, ...], int]], Any]] = []

    def settle() -> None:
        """The batches that are handed out."""
        for number, (logp, greedy) in engine.results({number: found for number, (_, found) in enumerate(asked)}):
            for key, value, same in zip(asked[number][0], logp, greedy, strict=True):
                for i in waiting[key]:
                    results[i] = Score(float(value), bool(same))
                if on_done is not None:
                    on_done(len(waiting[key]))
        asked.clear()

    for length, keys in by_bucket.items():
        rows = np.zeros((len(keys), length + 1), np.int32)
        counts = np.zeros(len(keys), np.int32)
        for at, (whole, count) in enumerate(keys):
            rows[at, : len(whole)], counts[at] = whole, count
        ends = np.asarray([len(whole) for whole, _ in keys], np.int32)
        size = fitting_batch(model.config.vocab_size, length, batch)
        done = 0
        for part, live in batches(np.concatenate([rows, ends[:, None], counts[:, None]], axis=1), size):
            asked.append((keys[done : done + live], engine.submit(_scored_rows, model, part, live, title="scoring")))
            if not engine.ahead:
                settle()
            done += live
    settle()
    return results


def _scored_rows(model: Llama, part: np.ndarray, live: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a batch: log-likelihoods, and whether greedy decoding gives the same. A row is tokens, its end, and how many count."""
    logp, greedy = _scored(model, *map(jnp.asarray, (part[:, :-2], part[:, -2], part[:, -1])))
    return np.asarray(logp)[:live], np.asarray(greedy)[:live]


@jax.jit
def _scored(
    model: Llama, rows: Int[Array, "batch time+1"], ends: Int[Array, "batch"], counts: Int[Array, "batch"]
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    logits, targets = model(rows[:, :-1]), rows[:, 1:]
    at = jnp.arange(1, rows.shape[1])  # where a target stands in its row
    counted = (at >= (ends - counts)[:, None]) & (at < ends[:, None])
    logp = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(counted, logp, 0.0).sum(axis=1), ((jnp.argmax(logits, axis=-1) == targets) | ~counted).all(axis=1)
