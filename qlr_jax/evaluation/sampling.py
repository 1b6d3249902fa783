"""Logits -> the next token: the likeliest, or a draw from what temperature, top-k and top-p leave of the distribution."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How long a generated text may get, and how each next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever the others say.
        top_k: only so many of the likeliest tokens may be drawn; 0 for all.
        top_p: only the likeliest tokens whose probabilities first reach this sum may be drawn; 1 for all. It applies to the
            distribution after temperature and top-k.
        max_new_tokens: at most so many a row.
        seed: of the draws; the same seed and batch give the same tokens.

    Raises:
        QLRError: a value out of its range.

    Source: nucleus sampling (top-p): Holtzman et al., arXiv 1904.09751.

    Example:
        >>> GenerationSettings(temperature=-1)
        Traceback (most recent call last):
            ...
        qlr_jax.errors.QLRError: temperature is -1; give 0 for the likeliest token, or a number above it
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QLRError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise QLRError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a number above it")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise QLRError(f"top_k is {self.top_k}; give a whole number of tokens, 0 for all")
        if not 0 < self.top_p <= 1:
            raise QLRError(f"top_p is {self.top_p}; give a share above 0, at most 1 (1 for all tokens)")

    def traced(self) -> tuple[Array, Array, Array]:
        """Temperature, top-k and top-p as arrays, so that one compilation serves them all."""
        return jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p)


def resolved(settings: GenerationSettings | None, options: Mapping[str, Any]) -> GenerationSettings:
    """The settings of one generation: those given, else the defaults, with single options in their place.

    Args:
        settings: all of them, or None.
        options: fields of `GenerationSettings` by name; they win over `settings`.

    Raises:
        QLRError: a value out of its range.
        TypeError: an option that is no field.

    Example:
        >>> resolved(None, {"top_k": 5}).top_k, resolved(GenerationSettings(seed=3), {}).seed
        (5, 3)
    """
    return dataclasses.replace(settings or GenerationSettings(), **options)


def truncated(logits: Float[Array, "batch vocab"], temperature: Array, top_k: Array, top_p: Array) -> Float[Array, "batch vocab"]:
    """Logits over the temperature, −inf where top-k or top-p leave a token out; the likeliest is always left in.

    Args:
        logits: (batch, vocab).
        temperature, top_k, top_p: scalars, as `GenerationSettings.traced` gives them; the temperature is above 0.

    Returns:
        (batch, vocab).

    Example:
        >>> p = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
        >>> jnp.isfinite(truncated(p, *GenerationSettings(1.0, top_k=3, top_p=0.8).traced())).tolist()
        [[True, True, False, False]]
    """
    scaled = logits / temperature
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    # The sum before a token, not with it: the token that crosses top_p is the last one kept. 1 keeps all, whatever rounding gives.
    ranked = jnp.where((top_p >= 1) | (jnp.cumsum(p, axis=-1) - p < top_p), ranked, -jnp.inf)
    return jnp.put_along_axis(scaled, order, ranked, axis=-1, inplace=False)


def choose(logits: Float[Array, "batch vocab"], key: Array, temperature: Array, top_k: Array, top_p: Array) -> Int[Array, "batch"]:
    """The next token of each row. Sorting the vocabulary is left out where the temperature is 0.

    Args:
        logits: (batch, vocab).
        key: of the draw.
        temperature, top_k, top_p: scalars, as `GenerationSettings.traced` gives them.

    Returns:
        Token ids (batch,), int32.
    """

    def drawn() -> Array:
        return jax.random.categorical(key, truncated(logits, temperature, top_k, top_p), axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
