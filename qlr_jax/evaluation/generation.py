"""Text from a model: a cached prompt, then tokens by a compiled loop, a few at a time, so that they can be shown as they come."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.cache import Cache, prefill, step
from qlr_jax.evaluation.sampling import GenerationSettings, choose, resolved
from qlr_jax.models.llama import Llama
from qlr_jax.models.vocabulary import check_tokens

SMALLEST_BUCKET = 32  # tokens; prompts and caches are as long as the next power of two from here
CHUNK = 8  # tokens that a compiled loop makes before the host looks at them; one number, so that it compiles once


def bucket(length: int, most: int | None = None) -> int:
    """The length that `length` tokens are padded to: the next power of two, 32 at least, `most` at most.

    Example:
        >>> bucket(5), bucket(33), bucket(90, most=100)
        (32, 64, 100)
    """
    size = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return size if most is None else max(length, min(size, most))


def stream(
    model: Llama,
    tokens: Sequence[Sequence[int]] | Int[np.ndarray, "batch time"],
    settings: GenerationSettings | None = None,
    *,
    stop: Iterable[int] | None = None,
    chunk: int = CHUNK,
    **options: Any,
) -> Iterator[Int[np.ndarray, "batch chunk"]]:
    """As `generate`, the new tokens as they come: one column, then at most `chunk` at a time; ends once every row has stopped.

    Args:
        model, tokens, settings, stop, options: as for `generate`.
        chunk: tokens that a compiled loop makes before they are handed on.

    Returns:
        Parts (batch, at most chunk), which put side by side are what `generate` returns.

    Raises:
        QLRError: as `generate`, before the first part; a chunk below 1.
    """
    settings = resolved(settings, options)
    rows = _prompts(model, tokens, settings.max_new_tokens)
    if chunk < 1:
        raise QLRError(f"chunk is {chunk}; give at least 1 token")
    return _stream(model.for_generation(), rows, settings, _stop_tokens(model, stop), chunk)


def generate(
    model: Llama,
    tokens: Sequence[Sequence[int]] | Int[np.ndarray, "batch time"],
    settings: GenerationSettings | None = None,
    *,
    stop: Iterable[int] | None = None,
    **options: Any,
) -> Int[np.ndarray, "batch new"]:
    """Continue each row of `tokens`.

        x_{t+1} ~ p(· | x_1 … x_t), or the likeliest token where the temperature is 0

    Keys and values are cached, in arrays of a fixed size: prompts of one power of two share a compilation, and so do all
    settings of the sampling. Packed weights are multiplied by as they are where C++ does it (`core.products`), else decoded once.

    Args:
        model: what `qlr.load` or `load_model` gave.
        tokens: prompts, (batch, time) or a list of lists that may differ in length; BOS has to be put before by the caller.
        settings: how many tokens, and how they are sampled; the defaults of `GenerationSettings` where not given.
        stop: token ids that end a row; the model's end-of-text tokens where not given, none where empty.
        options: single fields of `GenerationSettings` (max_new_tokens, temperature, top_k, top_p, seed); they win.

    Returns:
        The new tokens; a row that has stopped is filled up with the token that it stopped with.

    Raises:
        QLRError: an empty prompt, a token that the vocabulary lacks, more positions than the model was trained for, or a
            setting of the sampling out of its range.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> generate(Llama(config, jax.random.key(0)), [[1, 5], [1, 6, 7]], max_new_tokens=3, stop=()).shape
        (2, 3)
    """
    return np.concatenate(list(stream(model, tokens, settings, stop=stop, **options)), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What the next step needs: the token before it, its position, whether the row has stopped, the key of the draws."""

    cache: Cache
    token: Int[Array, "batch"]
    at: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    key: Array


def _stream(model: Llama, rows: list[list[int]], settings: GenerationSettings, stops: Array, chunk: int) -> Iterator[np.ndarray]:
    longest, new, sampling = max(map(len, rows)), settings.max_new_tokens, settings.traced()
    # Steps come in whole chunks: the last may run past what was asked, into slots that must be there.
    size, time = bucket(longest + 1 + -(-(new - 1) // chunk) * chunk), bucket(longest)
    padded = np.stack([np.pad(np.asarray(row, np.int32), (0, time - len(row))) for row in rows])
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    key, first = jax.random.split(jax.random.key(settings.seed))
    logits, cache = prefill(model, jnp.asarray(padded), lengths, size=size)
    token, done = _first(logits, first, stops, *sampling)
    yield np.asarray(token)[:, None]
    state, made = _State(cache, token, lengths, done, key), 1
    while made < new and not bool(np.asarray(state.done).all()):
        state, (tokens, live) = _steps(model, state, stops, *sampling, count=chunk)
        columns = np.any(np.asarray(live), axis=0)[: new - made]  # none after that in which the last row stopped
        yield np.asarray(tokens)[:, : len(columns)][:, columns]
        made += chunk


@jax.jit
def _first(logits: Array, key: Array, stops: Array, temperature: Array, top_k: Array, top_p: Array) -> tuple[Array, Array]:
    token = choose(logits, key, temperature, top_k, top_p)
    return token, jnp.isin(token, stops)


@partial(jax.jit, static_argnames="count", donate_argnames="state")
def _steps(
    model: Llama, state: _State, stops: Array, temperature: Array, top_k: Array, top_p: Array, *, count: int
) -> tuple[_State, tuple[Int[Array, "batch count"], Bool[Array, "batch count"]]]:
    """`count` more tokens of each row, and in which of them the row was still running."""

    def one(state: _State, _: None) -> tuple[_State, tuple[Array, Array]]:
        key, now = jax.random.split(state.key)
        logits, cache = step(model, state.cache, state.token, state.at)
        # A row that has stopped repeats its stop token, so that it stays stopped.
        token = jnp.where(state.done, state.token, choose(logits, now, temperature, top_k, top_p))
        after = _State(cache, token, state.at + 1, state.done | jnp.isin(token, stops), key)
        return after, (token, ~state.done)

    state, (tokens, live) = jax.lax.scan(one, state, length=count)
    return state, (tokens.T, live.T)


def _prompts(model: Llama, tokens: Any, new: int) -> list[list[int]]:
    rows = [[int(token) for token in row] for row in tokens]
    if not rows or not all(rows):
        raise QLRError("a prompt is empty; give each row at least one token, such as BOS")
    check_tokens([token for row in rows for token in row], model.config.vocab_size)
    most = model.config.max_position_embeddings
    longest = max(map(len, rows))
    if longest + new > most:
        raise QLRError(
            f"a prompt of {longest} tokens and {new} new ones need {longest + new} positions, and the model has {most}; "
            f"give a shorter prompt or max_new_tokens of at most {max(most - longest, 0)}"
        )
    return rows


def _stop_tokens(model: Llama, stop: Iterable[int] | None) -> Array:
    stops = model.config.eos_ids if stop is None else stop
    return jnp.asarray([*stops] or [-1], jnp.int32)  # no token is -1
