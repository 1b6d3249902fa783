"""H = E[x xᵀ] of the inputs of linear layers, tokens weighted or all alike, one block of the model in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qlr_jax.calibration.backward import State, States, divided
from qlr_jax.calibration.finite import CalibrationResult, Info, Tally, checked, finite_rows, left_out_of, zeroed
from qlr_jax.calibration.second_moment import added, second_moment
from qlr_jax.core.sharding import line
from qlr_jax.engine import HERE, Call, Engine, TreeSum
from qlr_jax.errors import QLRError
from qlr_jax.models.forward import TOGETHER, block_of, rope_of
from qlr_jax.models.llama import Block, Llama, Rope, embedded
from qlr_jax.models.names import input_names, input_of, linear_names
from qlr_jax.models.sites import INPUTS

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

TokenWeights = Float[np.ndarray, "sequences time"]
"""How much every token counts; any scale."""

TITLE = "calibrating: inputs"  # of its pieces


# one pass, in one piece: what is handed on from block to block is seen at once
def hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = TOGETHER,
    weights: TokenWeights | Mapping[str, TokenWeights] | None = None,
    progress: Progress | None = None,
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
    devices: int | None = None,
    entering: States | None = None,
    engine: Engine = HERE,
) -> CalibrationResult:
    """Second moments (n, n) of the inputs of linear layers, keyed by input name ("model.layers.0.self_attn.qkv", ...).

        H = Σ_t w_t x_t x_tᵀ / Σ_t w_t      over all tokens t, w = 1 unless `weights` are given

    A sequence in which an activation is not finite has weight zero from that block on, and is named in what is returned
    (`CalibrationResult.left_out`); where it is more than a hundredth of the sequences, nothing is returned.

    The hidden states of all sequences are kept on the host at one block boundary; one compiled function serves all blocks.
    Accumulation is in float32, in one order (`engine.TreeSum`). The sequences of a batch are shared out over the devices of this
    process, each of which holds the block, and the sums are added across them: the last bits of H then depend on how many there
    are, by less than 1e-6 √(H_ii H_jj) for some thousand tokens (measured).

    Args:
        model: the original.
        tokens: token ids.
        batch: sequences at a time, filled up to a multiple of the devices.
        weights: w of all inputs, (sequences, time); or a mapping from names of inputs or linear layers to the w of each: then
            one H is returned for every key, that of a linear layer over its own input.
        progress: called with (blocks done, blocks in all).
        keep: (key, H) -> what is returned in its place, e.g. the same on disk, called as soon as H is done.
        devices: how many of this process's devices to use at most; None: all.
        entering: where what enters every block is left, for a backward pass of the same sequences (`output_hessians`, states).
        engine: where batches go through blocks.

    Raises:
        QLRError: activations that are not finite in more than 1 % of the sequences, naming their input; weights of another shape,
            negative or all zero, or for a name that the model does not have; token ids outside the vocabulary.

    Source: CALDERA, section 2; H of QuIP#, section 2.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model, tokens = Llama(config, jax.random.key(0)), np.array([[1, 5, 3]])
        >>> {name: h.shape for name, h in hessians(model, tokens, weights={"model.layers.0.mlp.up_proj": tokens}).items()}
        {'model.layers.0.mlp.up_proj': (4, 4)}
    """
    tokens = np.asarray(tokens)
    _check_tokens(model, tokens)
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(input_names(model.config), np.ones(tokens.shape, np.float32) if weights is None else weights)
    inputs = _inputs(model, weights)
    shares, which = _distinct_shares(weights, tokens.shape)
    (placed, size), layers = divided(len(tokens), batch, devices), model.config.num_hidden_layers
    rope = Call(rope_of, (model, tokens.shape[1], placed), kept=True)
    states = [engine.submit(_enter, model, part, placed, title=TITLE) for part in _batches(tokens, shares, size)]
    _leave(entering, 0, states, engine)
    out, infos, begun = dict[str, Any](), list[Any](), list[Any]()
    for i in range(layers):
        block, prefix = Call(block_of, (model, i, placed), kept=True), f"model.layers.{i}."
        # names are local to the block, so that every block has one structure
        here = {n.removeprefix(prefix): (x.removeprefix(prefix), which[n]) for n, x in inputs.items() if n.startswith(prefix)}
        sums, infos = TreeSum(engine, added, TITLE), []
        for j, state in enumerate(states):
            passed = engine.submit(_through_block, block, rope, prefix, here, placed, state, title=TITLE)
            states[j], moments, info = engine.split(passed, 3)
            sums.add(moments)
            infos.append(info)
        _leave(entering, i + 1, states, engine)
        begun.append(engine.submit(checked, infos, len(tokens), title=TITLE))
        total = sums.value
        for name, (x, share) in here.items():
            h = engine.submit(_mean, total, begun[-1], name, share, prefix + x, title=TITLE)
            out[prefix + name] = keep(prefix + name, h)
        if progress is not None and i >= engine.ahead:
            engine.result(begun[i - engine.ahead])
            progress(i - engine.ahead + 1, layers)
    tally, _ = engine.result(begun[-1])
    if progress is not None:
        for done in range(max(0, layers - engine.ahead), layers):
            progress(done + 1, layers)
    engine.forget()
    # jit hands dictionaries back sorted by key
    return CalibrationResult({name: out[name] for name in weights}, len(tokens), tally.left_out)


@dataclass(frozen=True)
class _Batch:
    """The sequences of one batch, the last repeated where it is filled up, and how much every token of them still counts.

    Attributes:
        states: tokens (batch, time), then the hidden states (batch, time, n) at one block boundary.
        shares: of every distinct weighting, (batch, time); 0 where a sequence is left out or a repeat.
        start: the number of the first sequence; live: how many are not repeats.
        left_out: as of `CalibrationResult`.
    """

    states: np.ndarray
    shares: tuple[np.ndarray, ...]
    start: int
    live: int
    left_out: Mapping[int, str] = field(default_factory=dict)


def _batches(tokens: np.ndarray, shares: Sequence[np.ndarray], size: int) -> Iterator[_Batch]:
    """All of one shape: repeats that fill the last one up have weight zero."""
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        fill = (0, size - len(part)), (0, 0)
        own = tuple(np.pad(share[start : start + size], fill) for share in shares)
        yield _Batch(np.pad(part, fill, "edge"), own, start, len(part))


def _enter(model: Llama, batch: _Batch, devices: int) -> _Batch:
    embedding = line(devices).replicate(model.model.embed_tokens)
    return replace(batch, states=np.asarray(embedded(embedding, line(devices).shard(batch.states))))


def _leave(entering: States | None, i: int, states: Sequence[Any], engine: Engine) -> None:
    """What enters block i, for a pass to come."""
    if entering is not None:
        for j, state in enumerate(states):
            entering[i, j] = engine.submit(_as_state, state, title=TITLE)


def _as_state(batch: _Batch) -> State:
    return State(batch.states, np.zeros(len(batch.states), bool))


def _through_block(
    block: Block, rope: Rope, prefix: str, here: Mapping[str, tuple[str, int]], devices: int, batch: _Batch
) -> tuple[_Batch, dict[str, Array], Info]:
    """The batch behind the block, what its tokens add to every H, and what is left out of it with the shares that are left.

    Sequences that are not finite are taken out first.
    """

    def advance(batch: _Batch) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        placement, shares = line(devices), dict[str, dict[str, Array]]()
        placed = [placement.shard(share) for share in batch.shares]
        for name, (x, share) in here.items():
            shares.setdefault(x, {})[name] = placed[share]
        return _advance(block, placement.shard(batch.states), rope, shares)

    leaving, moments, finite = advance(batch)
    bad = {name: ~np.asarray(rows) for name, rows in finite.items()}
    if any(rows.any() for rows in bad.values()):
        left_out, end = batch.left_out, batch.start + batch.live
        for name in INPUTS:  # in the order in which the forward pass meets them
            left_out = left_out_of(bad[name], batch.start, end, f"the activations that enter {prefix}{name}", left_out)
        lost = np.logical_or.reduce(list(bad.values()))
        shares = tuple(zeroed(lost, share) for share in batch.shares)
        batch = replace(batch, states=zeroed(lost, batch.states), shares=shares, left_out=left_out)
        leaving, moments, _ = advance(batch)
    left = [float(share.sum(dtype=np.float64)) for share in batch.shares]
    return replace(batch, states=np.asarray(leaving)), moments, (batch.left_out, left)


def _mean(sums: Mapping[str, Array], known: tuple[Tally, list[float]], name: str, share: int, place: str) -> np.ndarray:
    """H from the sum, whose weights were 1 in all before sequences were left out."""
    (tally, left), summed = known, np.asarray(sums[name], np.float32)
    if tally.left_out:
        if left[share] <= 0:
            raise QLRError(
                f"no token with a weight is left for {place}: the sequences that have one are not finite; give other weights"
            )
        summed = summed / np.float32(left[share])
    if not np.isfinite(summed).all():
        raise QLRError(
            f"the sum over activations that enter {place} is not finite; "
            "the checkpoint is damaged or its activations overflow this dtype (load it in float32)"
        )
    return summed


def _distinct_shares(weights: Mapping[str, TokenWeights], shape: tuple[int, ...]) -> tuple[list[np.ndarray], dict[str, int]]:
    """w / Σ w of every distinct weighting, and which of them each name has."""
    found: dict[int, int] = {}
    shares, which = list[np.ndarray](), dict[str, int]()
    for name, given in weights.items():
        if id(given) not in found:
            found[id(given)] = len(shares)
            shares.append(_shares(name, np.asarray(given, np.float32), shape))
        which[name] = found[id(given)]
    return shares, which


def _inputs(model: Llama, names: Iterable[str]) -> dict[str, str]:
    """For every name of an input or a linear layer, the name of the input."""
    known = {name: name for name in input_names(model.config)} | {name: input_of(name) for name in linear_names(model.config)}
    for name in names:
        if name not in known:
            raise QLRError(
                f"weights are given for {name!r}, which this model does not have; its names look like {next(iter(known))}"
            )
    return {name: known[name] for name in names}


def _check_tokens(model: Llama, tokens: np.ndarray) -> None:
    if tokens.ndim != 2 or not tokens.size:
        raise QLRError(f"tokens have shape {tokens.shape}; (sequences, time) is needed, neither of them 0")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise QLRError(
            f"token id {tokens.max() if tokens.min() >= 0 else tokens.min()} lies outside the vocabulary of "
            f"{model.config.vocab_size}; use the model's own tokenizer"
        )


def _shares(name: str, w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """w / Σ w, checked."""
    if w.shape != shape:
        raise QLRError(f"the token weights of {name} have shape {w.shape}, tokens {shape}; they must agree")
    if not np.isfinite(w).all() or w.min() < 0 or w.max() <= 0:
        raise QLRError(f"the token weights of {name} must be finite, at least 0, and not all 0")
    return w / w.sum(dtype=np.float64).astype(np.float32)


@jax.jit
def _advance(
    block: Block, x: Array, rope: Rope, shares: dict[str, dict[str, Array]]
) -> tuple[Array, dict[str, Array], dict[str, Bool[Array, "batch"]]]:
    """The block's output, Σ w x xᵀ for every w in shares[input], by its key, and which rows of every input are finite; names are
    local."""
    moments: dict[str, Array] = {}
    finite: dict[str, Array] = {}

    def tap(name: str, value: Array) -> None:
        finite[name] = finite_rows(value)
        rows = value.astype(jnp.float32).reshape(-1, value.shape[-1])
        for key, w in shares.get(name, {}).items():
            # √w on both sides keeps the sum exactly symmetric and positive semidefinite.
            moments[key] = second_moment(rows * jnp.sqrt(w).reshape(-1, 1))

    return block(x, rope, tap=tap), moments, finite
