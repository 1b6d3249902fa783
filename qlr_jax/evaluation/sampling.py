"""Logits -> the next token: the likeliest, or a draw from what temperature, top-k and top-p leave of the distribution."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever the others say.
        top_k: only so many of the likeliest tokens may be drawn; 0 for all.
        top_p: only the likeliest tokens whose probabilities first reach this sum may be drawn (nucleus sampling, Holtzman et
            al., arXiv 1904.09751); 1 for all. It applies to the distribution after temperature and top-k.

    Raises:
        QLRError: a value out of its range.

    Example:
        >>> Sampling(temperature=-1)
        Traceback (most recent call last):
            ...
        qlr_jax.errors.QLRError: temperature is -1; give 0 for the likeliest token, or a number above it
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise QLRError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a number above it")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise QLRError(f"top_k is {self.top_k}; give a whole number of tokens, 0 for all")
        if not 0 < self.top_p <= 1:
            raise QLRError(f"top_p is {self.top_p}; give a share above 0, at most 1 (1 for all tokens)")

    def traced(self) -> tuple[Array, Array, Array]:
        """The settings as arrays, so that one compilation serves them all."""
        return jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p)


def truncated(logits: Float[Array, "batch vocab"], temperature: Array, top_k: Array, top_p: Array) -> Float[Array, "batch vocab"]:
    """Logits over the temperature, −inf where top-k or top-p leave a token out; the likeliest is always left in.

    Example:
        >>> p = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
        >>> jnp.isfinite(truncated(p, *Sampling(1.0, top_k=3, top_p=0.8).traced())).tolist()
        [[True, True, False, False]]
    """
    scaled = logits / temperature
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    # What is before a token, not with it: the token that crosses top_p is the last one in. 1 is all, whatever rounding says.
    ranked = jnp.where((top_p >= 1) | (jnp.cumsum(p, axis=-1) - p < top_p), ranked, -jnp.inf)
    return jnp.put_along_axis(scaled, order, ranked, axis=-1, inplace=False)


def choose(logits: Float[Array, "batch vocab"], key: Array, temperature: Array, top_k: Array, top_p: Array) -> Int[Array, "batch"]:
    """The next token of each row. Sorting the vocabulary is left out where the temperature is 0."""

    def drawn() -> Array:
        return jax.random.categorical(key, truncated(logits, temperature, top_k, top_p), axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
