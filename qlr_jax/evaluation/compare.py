"""Perplexity, and the divergence of a compressed model from its original, batch by batch."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.forward import logits
from qlr_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A compressed model beside its original, over all positions of all windows.

    Attributes:
        perplexity_original, perplexity: of each model.
        kl, kl_p99: KL(original ‖ compressed), nats a token: mean, and the 99th percentile.
        agreement: share of positions where both models have the same likeliest token.
        tokens: how many positions.
    """

    perplexity_original: float
    perplexity: float
    kl: float
    kl_p99: float
    agreement: float
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the compressed model over that of the original."""
        return self.perplexity / self.perplexity_original


@dataclasses.dataclass(frozen=True)
class Positions:
    """A comparison at every position of every window; `Comparison` and the intervals follow from it.

    Attributes:
        windows: the tokens, (windows, length).
        kl: (windows, length), KL(original ‖ compressed) of the distributions after each token, nats.
        nll_original, nll: (windows, length − 1), negative log-likelihoods of each window's tokens after its first, nats.
        top_original, top: (windows, length), each model's likeliest token after each token.
    """

    windows: Int[np.ndarray, "windows length"]
    kl: Float[np.ndarray, "windows length"]
    nll_original: Float[np.ndarray, "windows length-1"]
    nll: Float[np.ndarray, "windows length-1"]
    top_original: Int[np.ndarray, "windows length"]
    top: Int[np.ndarray, "windows length"]

    @property
    def same(self) -> Float[np.ndarray, "windows length"]:
        """1 where both models have the same likeliest token, else 0."""
        return (self.top_original == self.top).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original's log-probabilities, stored once so that many candidates can be measured against them.

    Attributes:
        windows: the tokens, (windows, length).
        logp: (windows, length, vocab), nats; float32 or float16.
        perplexity: of the original.
        batch: windows of one pass.
    """

    windows: Int[np.ndarray, "windows length"]
    logp: Float[np.ndarray, "windows length vocab"]
    perplexity: float
    batch: int


def perplexity(model: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8) -> float:
    """exp of the mean over windows of the mean negative log-likelihood of each window's tokens after its first.

    Args:
        model: any of this library.
        windows: tokens, (windows, length).
        batch: windows of one pass.
    """
    parts = [np.asarray(_nll(p, jnp.asarray(rows)))[:live] for (rows, live), p in _log_probabilities(model, windows, batch)]
    return _perplexity(np.concatenate(parts))


def reference(
    original: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8, max_bytes: int = 1_000_000_000
) -> Reference:
    """Run the original once and keep its log-probabilities: float32 if they fit into `max_bytes`, else float16.

    Float16 adds an error of about 1e-4 nats.

    Args:
        original: the model.
        windows: tokens, (windows, length).
        batch: windows of one pass.
        max_bytes: for the log-probabilities.

    Raises:
        QLRError: not even float16 fits, with how many windows would.
    """
    values = windows.size * original.config.vocab_size
    if 2 * values > max_bytes:
        fit = max_bytes // (2 * windows.shape[1] * original.config.vocab_size)
        raise QLRError(
            f"log-probabilities of {len(windows)} windows take {2 * values} bytes, more than {max_bytes}; "
            f"give at most {fit} windows, a larger max_bytes, or use compare()"
        )
    stored = np.empty((*windows.shape, original.config.vocab_size), np.float32 if 4 * values <= max_bytes else np.float16)
    nll, done = [], 0
    for (rows, live), logp in _log_probabilities(original, windows, batch):
        nll.append(np.asarray(_nll(logp, jnp.asarray(rows)))[:live])
        stored[done : done + live] = np.asarray(logp)[:live]
        done += live
    return Reference(windows, stored, _perplexity(np.concatenate(nll)), batch)


def divergence(candidate: Llama, reference: Reference) -> Comparison:
    """Measure a candidate against stored log-probabilities: one forward pass of the candidate, none of the original.

    Args:
        candidate: the compressed model.
        reference: of its original.
    """

    def originals() -> Iterator[Array]:
        for part, _ in batches(reference.logp, reference.batch):
            logp = jnp.asarray(part, jnp.float32)
            # Rounded to float16 the probabilities no longer add up to 1.
            yield jax.nn.log_softmax(logp, axis=-1) if part.dtype == np.float16 else logp

    return summary(_positions(candidate, originals(), reference.windows, reference.batch))


def compare(original: Llama, compressed: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8) -> Comparison:
    """Perplexity of both models, KL(original ‖ compressed) per token and top-1 agreement, one batch of logits at a time.

        KL_t = Σ_v p_t[v] (log p_t[v] − log q_t[v]),  p the original's distribution after position t, q the compressed model's

    Both models run block by block (`models.forward`): a block is read or decoded once. Numbers come as they are: a model with NaN
    logits has NaN everywhere.

    Args:
        original, compressed: of one vocabulary.
        windows: tokens, (windows, length).
        batch: windows of one pass.

    Raises:
        QLRError: the vocabularies differ.
    """
    return summary(positions(original, compressed, windows, batch))


def positions(original: Llama, compressed: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8) -> Positions:
    """As `compare`, position by position: for intervals and for the worst token. Five values a token are kept.

    Args:
        original, compressed, windows, batch: as for `compare`.

    Raises:
        QLRError: the vocabularies differ.
    """
    if original.config.vocab_size != compressed.config.vocab_size:
        raise QLRError(
            f"the models' vocabularies differ ({original.config.vocab_size} and {compressed.config.vocab_size} tokens); "
            "give a compressed model of this original"
        )
    originals = (p for _, p in _log_probabilities(original, windows, batch))
    return _positions(compressed, originals, windows, batch)


def summary(measured: Positions) -> Comparison:
    """The figures of a comparison, over all positions of all windows."""
    flat = measured.kl.ravel().astype(np.float64)
    return Comparison(
        perplexity_original=_perplexity(measured.nll_original),
        perplexity=_perplexity(measured.nll),
        kl=float(flat.mean()),
        kl_p99=float(np.quantile(flat, 0.99)),
        agreement=float(measured.same.mean()),
        tokens=flat.size,
    )


def _positions(candidate: Llama, originals: Iterator[Array], windows: np.ndarray, batch: int) -> Positions:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("kl", "nll_original", "nll", "top_original", "top")}
    for ((rows, live), q), p in zip(_log_probabilities(candidate, windows, batch), originals, strict=True):
        tokens = jnp.asarray(rows)
        kl, top_original, top = _differences(p, q)
        here = {"kl": kl, "nll_original": _nll(p, tokens), "nll": _nll(q, tokens), "top_original": top_original, "top": top}
        for name, value in here.items():
            parts[name].append(np.asarray(value)[:live])
    return Positions(windows, **{name: np.concatenate(arrays) for name, arrays in parts.items()})


def _perplexity(nll: Float[np.ndarray, "windows time"]) -> float:
    # All windows are equally long, so the mean over windows of means is the mean over all.
    with np.errstate(over="ignore"):
        return float(np.exp(nll.astype(np.float64).mean()))


def _log_probabilities(model: Llama, windows: np.ndarray, batch: int) -> Iterator[tuple[tuple[np.ndarray, int], Array]]:
    """((rows, how many are not repeats), log-probabilities (batch, time, vocab)) of every batch."""
    rows = list(batches(windows, batch))
    return zip(rows, map(_normalised, logits(model, [tokens for tokens, _ in rows])), strict=True)


@jax.jit
def _normalised(x: Float[Array, "batch time vocab"]) -> Float[Array, "batch time vocab"]:
    return jax.nn.log_softmax(x, axis=-1)


@jax.jit
def _nll(logp: Float[Array, "batch time vocab"], tokens: Int[Array, "batch time"]) -> Float[Array, "batch time-1"]:
    return -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


@jax.jit
def _differences(
    p: Float[Array, "batch time vocab"], q: Float[Array, "batch time vocab"]
) -> tuple[Float[Array, "batch time"], Int[Array, "batch time"], Int[Array, "batch time"]]:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.argmax(p, axis=-1), jnp.argmax(q, axis=-1)
