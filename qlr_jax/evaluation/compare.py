"""Perplexity, and the divergence of a compressed model from its original, batch by batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from qlr_jax.engine import HERE, Call, Engine, Here
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.forward import TOGETHER, Parts, by_parts, last_states
from qlr_jax.models.llama import Llama, Top

TITLE = "evaluating"  # of its pieces


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
        logp: (windows, length, vocab), nats; float32 or float16. Elsewhere what stands for it, batch by batch.
        perplexity: of the original.
        batch: windows of one pass.
    """

    windows: Int[np.ndarray, "windows length"]
    logp: Any
    perplexity: float
    batch: int

    def part(self, start: int, end: int) -> Any:
        """What stands for the log-probabilities of some windows, (end − start, length, vocab)."""
        if isinstance(self.logp, np.ndarray):
            return self.logp[start:end]
        first, last = start // self.batch, -(-end // self.batch)
        return Call(_rows, (list(self.logp[first:last]), start - first * self.batch, end - first * self.batch))


@dataclasses.dataclass(frozen=True)
class LastStates:
    """What the last block of a model puts out on some windows: of it and of the model's head all of its figures are made.

    Attributes:
        windows: the tokens, (windows, length).
        top: what stands for final norm and head.
        states: what stands for (batch, length, n), batch by batch; the last is filled up.
        vocabulary: how many tokens the model knows.
        batch: windows of one of them.
    """

    windows: Int[np.ndarray, "windows length"]
    top: Any
    states: Sequence[Any]
    vocabulary: int
    batch: int

    def batches(self) -> Iterator[tuple[Any, Int[np.ndarray, "live length"]]]:
        """(states, the windows of them that are no repeats)."""
        for j, x in enumerate(self.states):
            yield x, self.windows[j * self.batch : (j + 1) * self.batch]


def run_windows(
    model: Llama | Parts, windows: Int[np.ndarray, "windows length"], batch: int = TOGETHER, *, engine: Engine = HERE
) -> LastStates:
    """Run a model, to compare others with it again and again (`compare`). Memory is one hidden state a token.

    Args:
        model: any of this library.
        windows: tokens, (windows, length).
        batch: windows of one pass.
        engine: where they go through the model.
    """
    rows = [tokens for tokens, _ in batches(windows, batch)]
    parts = Parts.of(model)
    states = last_states(parts, rows, engine=engine, title=TITLE)
    return LastStates(windows, parts.top(), states, parts.model.config.vocab_size, min(batch, len(windows)))


def perplexity(model: Llama, windows: Int[np.ndarray, "windows length"], batch: int = TOGETHER) -> float:
    """exp of the mean over windows of the mean negative log-likelihood of each window's tokens after its first.

    Args:
        model: any of this library.
        windows: tokens, (windows, length).
        batch: windows of one pass.
    """
    states = run_windows(model, windows, batch)
    return _perplexity(np.concatenate([HERE.submit(_nlls, states.top, x, rows) for x, rows in states.batches()]))


def reference(
    original: Llama,
    windows: Int[np.ndarray, "windows length"],
    batch: int = TOGETHER,
    max_bytes: int = 1_000_000_000,
    *,
    engine: Engine = HERE,
) -> Reference:
    """Run the original once and keep its log-probabilities: float32 if they fit into `max_bytes`, else float16.

    Float16 adds an error of about 1e-4 nats.

    Args:
        original: the model.
        windows: tokens, (windows, length).
        batch: windows of one pass.
        max_bytes: for the log-probabilities.
        engine: where it is run, and where they stay.

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
    dtype = np.dtype(np.float32 if 4 * values <= max_bytes else np.float16)
    states = run_windows(original, windows, batch, engine=engine)
    stored = np.empty((*windows.shape, original.config.vocab_size), dtype) if isinstance(engine, Here) else None
    logp, nll = [], []
    for j, (x, rows) in enumerate(states.batches()):
        own, of_text = engine.split(engine.submit(_stored, states.top, x, rows, dtype.name, title=TITLE), 2)
        nll.append(of_text)
        if stored is None:
            logp.append(own)
        else:
            stored[j * states.batch : j * states.batch + len(rows)] = own
    engine.forget()
    perplexity = _perplexity(np.concatenate([engine.result(part) for part in nll])[:, :-1])
    return Reference(windows, logp if stored is None else stored, perplexity, states.batch)


def divergence(candidate: Llama | Parts, reference: Reference, *, engine: Engine = HERE) -> Comparison:
    """Measure a candidate against stored log-probabilities: one forward pass of the candidate, none of the original.

    Args:
        candidate: the compressed model.
        reference: of its original.
        engine: where it is run: where the reference was.
    """
    starts = range(0, len(reference.windows), reference.batch)
    originals = (reference.part(start, min(start + reference.batch, len(reference.windows))) for start in starts)
    return summary(_positions(candidate, None, originals, reference.windows, reference.batch, engine))


def compare(
    original: Llama | LastStates,
    compressed: Llama | Parts,
    windows: Int[np.ndarray, "windows length"],
    batch: int = TOGETHER,
    *,
    engine: Engine = HERE,
) -> Comparison:
    """Perplexity of both models, KL(original ‖ compressed) per token and top-1 agreement, the logits of some positions at a time.

        KL_t = Σ_v p_t[v] (log p_t[v] − log q_t[v]),  p the original's distribution after position t, q the compressed model's

    Both models run block by block (`models.forward`): a block is read or decoded once. Numbers come as they are: a model with NaN
    logits has NaN everywhere.

    Args:
        original, compressed: of one vocabulary; where many are compared with one original, `run_windows` once and give that.
        windows: tokens, (windows, length).
        batch: windows of one pass.
        engine: where they are run: where the original was.

    Raises:
        QLRError: the vocabularies differ, or the original was run on other windows.
    """
    return summary(positions(original, compressed, windows, batch, engine=engine))


def positions(
    original: Llama | LastStates,
    compressed: Llama | Parts,
    windows: Int[np.ndarray, "windows length"],
    batch: int = TOGETHER,
    *,
    engine: Engine = HERE,
) -> Positions:
    """As `compare`, position by position: for intervals and for the worst token. Five values a token are kept.

    Args:
        original, compressed, windows, batch, engine: as for `compare`.

    Raises:
        QLRError: as `compare`.
    """
    own = original.vocabulary if isinstance(original, LastStates) else original.config.vocab_size
    vocabularies = own, Parts.of(compressed).model.config.vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise QLRError(
            f"the models' vocabularies differ ({vocabularies[0]} and {vocabularies[1]} tokens); "
            "give a compressed model of this original"
        )
    states = original if isinstance(original, LastStates) else run_windows(original, windows, batch, engine=engine)
    if not np.array_equal(states.windows, windows):
        raise QLRError(
            f"the original was run on other windows, of shape {states.windows.shape}; run it on these, of {windows.shape}"
        )
    return _positions(compressed, states.top, iter(states.states), windows, states.batch, engine)


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


def _positions(
    candidate: Llama | Parts, top: Any, originals: Iterator[Any], windows: np.ndarray, batch: int, engine: Engine
) -> Positions:
    """Against originals batch by batch: last hidden states below `top`, or log-probabilities where that is None."""
    states = run_windows(candidate, windows, batch, engine=engine)
    parts = [
        engine.submit(_compared, top, p, states.top, q, rows, title=TITLE)
        for p, (q, rows) in zip(originals, states.batches(), strict=True)
    ]
    engine.forget()
    found = [engine.result(part) for part in parts]
    whole = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return Positions(windows, **{name: value[:, :-1] if name.startswith("nll") else value for name, value in whole.items()})


def _compared(top: Top | None, p: np.ndarray, top_of_other: Top, q: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Window by window: one at a time is copied to where it is compared."""
    found: dict[str, list[np.ndarray]] = {}
    for own, other, after in zip(p, q, _following(rows), strict=False):  # what fills a batch up is not looked at
        for name, value in _differences(top, jax.device_put(own[None]), top_of_other, jax.device_put(other[None]), after).items():
            found.setdefault(name, []).append(np.asarray(value))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _stored(top: Top, x: np.ndarray, rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities of a batch's windows, and what the text's own tokens lack of 1."""
    logp, nll = np.empty((*rows.shape, 0), dtype), []
    for i, after in enumerate(_following(rows)):
        own, of_text = (np.asarray(a) for a in _log_probabilities(top, jax.device_put(x[i : i + 1]), after))
        if not i:
            logp = np.empty((*rows.shape, own.shape[-1]), dtype)
        logp[i] = own[0]
        nll.append(of_text)
    return logp, np.concatenate(nll)


def _nlls(top: Top, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    parts = [np.asarray(_nll(top, jax.device_put(own[None]), after)) for own, after in zip(x, _following(rows), strict=False)]
    return np.concatenate(parts)[:, :-1]


def _rows(parts: Sequence[np.ndarray], start: int, end: int) -> np.ndarray:
    return (parts[0] if len(parts) == 1 else np.concatenate(parts))[start:end]


def _following(windows: np.ndarray) -> list[Array]:
    """The token after every position, window by window; at the last, which has none, any."""
    return [jax.device_put(row[None]) for row in np.roll(np.asarray(windows, np.int32), -1, axis=1)]


def _perplexity(nll: Float[np.ndarray, "windows time"]) -> float:
    # All windows are equally long, so the mean over windows of means is the mean over all.
    with np.errstate(over="ignore"):
        return float(np.exp(nll.astype(np.float64).mean()))


@jax.jit
def _nll(top: Top, x: Float[Array, "1 time n"], after: Int[Array, "1 time"]) -> Float[Array, "1 time"]:
    return by_parts(lambda _, x, after: (_at(_normalised(top(x)), after), ()), x, after)[0]


@jax.jit
def _log_probabilities(top: Top, x: Float[Array, "1 time n"], after: Int[Array, "1 time"]) -> tuple[Array, Array]:
    """All of them, (1, time, vocab), and what the text's own tokens lack of 1, (1, time)."""

    def part(_: Array, x: Array, after: Array) -> tuple[tuple[Array, Array], tuple[()]]:
        logp = _normalised(top(x))
        return (logp, _at(logp, after)), ()

    return by_parts(part, x, after)[0]


@jax.jit
def _differences(
    of_original: Top | None,
    p: Shaped[Array, "1 time _"],
    of_candidate: Top,
    q: Float[Array, "1 time n"],
    after: Int[Array, "1 time"],
) -> dict[str, Shaped[Array, "1 time"]]:
    """What `Positions` holds, by name."""

    def part(_: Array, p: Array, q: Array, after: Array) -> tuple[dict[str, Array], tuple[()]]:
        p = _normalised(p.astype(jnp.float32) if of_original is None else of_original(p))
        q = _normalised(of_candidate(q))
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return {"kl": kl, "nll_original": _at(p, after), "nll": _at(q, after), "top_original": _top(p), "top": _top(q)}, ()

    return by_parts(part, p, q, after)[0]


def _normalised(x: Float[Array, "*rest vocab"]) -> Float[Array, "*rest vocab"]:
    return jax.nn.log_softmax(x, axis=-1)


def _at(logp: Float[Array, "*rest vocab"], tokens: Int[Array, "*rest"]) -> Float[Array, "*rest"]:
    return -jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def _top(logp: Float[Array, "*rest vocab"]) -> Int[Array, "*rest"]:
    """argmax, as the least place of the largest: XLA makes one loop without branches of it on a CPU, a quarter of argmax's time."""
    largest = (logp == jnp.max(logp, axis=-1, keepdims=True)) | jnp.isnan(logp)
    places = jnp.arange(logp.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(largest, places, logp.shape[-1]), axis=-1)
