"""Perplexity, and the divergence of a compressed model from its original, batch by batch."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A compressed model beside its original; KL in nats a token, over all positions of all windows."""

    perplexity_original: float
    perplexity: float
    kl: float
    kl_p99: float
    agreement: float
    """Share of positions where both models think the same token the likeliest."""
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the compressed model over that of the original."""
        return self.perplexity / self.perplexity_original


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original's log-probabilities over `windows`, stored once so that many candidates can be measured against them."""

    windows: Int[np.ndarray, "windows length"]
    logp: Float[np.ndarray, "windows length vocab"]
    perplexity: float
    batch: int


def perplexity(model: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8) -> float:
    """exp of the mean over windows of the mean negative log-likelihood of each window's tokens after its first."""
    parts = [np.asarray(_nll(_logp(model, jnp.asarray(rows)), jnp.asarray(rows)))[:live] for rows, live in batches(windows, batch)]
    return _perplexity(np.concatenate(parts))


def reference(
    original: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8, max_bytes: int = 1_000_000_000
) -> Reference:
    """Run the original once and keep its log-probabilities: float32 if they fit into `max_bytes`, else float16.

    Raises QLRError if not even float16 fits, naming how many windows would. Float16 adds an error of about 1e-4 nats.
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
    for rows, live in batches(windows, batch):
        logp = _logp(original, jnp.asarray(rows))
        nll.append(np.asarray(_nll(logp, jnp.asarray(rows)))[:live])
        stored[done : done + live] = np.asarray(logp)[:live]
        done += live
    return Reference(windows, stored, _perplexity(np.concatenate(nll)), batch)


def divergence(candidate: Llama, reference: Reference) -> Comparison:
    """Measure a candidate against stored log-probabilities: one forward pass of the candidate, none of the original."""
    done = 0

    def originals() -> Iterator[Array]:
        nonlocal done
        for rows, live in batches(reference.windows, reference.batch):
            part = reference.logp[done : done + live]
            done += live
            logp = jnp.asarray(np.concatenate([part, np.repeat(part[-1:], len(rows) - live, axis=0)]), jnp.float32)
            # Rounded to float16 the probabilities no longer add up to 1.
            yield jax.nn.log_softmax(logp, axis=-1) if part.dtype == np.float16 else logp

    return _compare(candidate, originals(), reference.windows, reference.batch)


def compare(original: Llama, compressed: Llama, windows: Int[np.ndarray, "windows length"], batch: int = 8) -> Comparison:
    """Perplexity of both models, KL(original ‖ compressed) per token and top-1 agreement, one batch of logits at a time.

    KL_t = Σ_v p_t[v] (log p_t[v] − log q_t[v]),  p the original's distribution after position t, q the compressed model's.

    Models of one structure share a compilation. Packed weights are decoded anew in every batch; give
    `compressed.densified()` where memory allows. Numbers come as they are: a model with NaN logits has NaN everywhere.
    """
    if original.config.vocab_size != compressed.config.vocab_size:
        raise QLRError(
            f"the models' vocabularies differ ({original.config.vocab_size} and {compressed.config.vocab_size} tokens); "
            "give a compressed model of this original"
        )
    originals = (_logp(original, jnp.asarray(rows)) for rows, _ in batches(windows, batch))
    return _compare(compressed, originals, windows, batch)


def _compare(candidate: Llama, originals: Iterator[Array], windows: np.ndarray, batch: int) -> Comparison:
    kl, agree, nll, nll_original = [], [], [], []
    for (rows, live), p in zip(batches(windows, batch), originals, strict=True):
        tokens = jnp.asarray(rows)
        q = _logp(candidate, tokens)
        found = _differences(p, q)
        kl.append(np.asarray(found[0])[:live])
        agree.append(np.asarray(found[1])[:live])
        nll_original.append(np.asarray(_nll(p, tokens))[:live])
        nll.append(np.asarray(_nll(q, tokens))[:live])
    flat = np.concatenate(kl).ravel().astype(np.float64)
    return Comparison(
        perplexity_original=_perplexity(np.concatenate(nll_original)),
        perplexity=_perplexity(np.concatenate(nll)),
        kl=float(flat.mean()),
        kl_p99=float(np.quantile(flat, 0.99)),
        agreement=float(np.concatenate(agree).mean()),
        tokens=flat.size,
    )


def _perplexity(nll: Float[np.ndarray, "windows time"]) -> float:
    # All windows are equally long, so the mean over windows of means is the mean over all.
    with np.errstate(over="ignore"):
        return float(np.exp(nll.astype(np.float64).mean()))


@jax.jit
def _logp(model: Llama, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
    return jax.nn.log_softmax(model(tokens), axis=-1)


@jax.jit
def _nll(logp: Float[Array, "batch time vocab"], tokens: Int[Array, "batch time"]) -> Float[Array, "batch time-1"]:
    return -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


@jax.jit
def _differences(
    p: Float[Array, "batch time vocab"], q: Float[Array, "batch time vocab"]
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return kl, (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)
