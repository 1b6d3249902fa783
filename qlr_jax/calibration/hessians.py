"""H = E[x xᵀ] of the inputs of linear layers, tokens weighted or all alike, one block of the model in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qlr_jax.calibration.finite import CalibrationResult, Tally, finite_rows, zeroed
from qlr_jax.calibration.second_moment import second_moment
from qlr_jax.core.sharding import sequence_placement
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Block, Llama, Rope, embedded
from qlr_jax.models.names import input_names, input_of, linear_names
from qlr_jax.models.sites import INPUTS

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

TokenWeights = Float[np.ndarray, "sequences time"]
"""How much every token counts; any scale."""


def hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = 8,
    weights: TokenWeights | Mapping[str, TokenWeights] | None = None,
    progress: Progress | None = None,
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
    devices: int | None = None,
) -> CalibrationResult:
    """Second moments (n, n) of the inputs of linear layers, keyed by input name ("model.layers.0.self_attn.qkv", ...).

        H = Σ_t w_t x_t x_tᵀ / Σ_t w_t      over all tokens t, w = 1 unless `weights` are given

    A sequence in which an activation is not finite has weight zero from that block on, and is named in what is returned
    (`CalibrationResult.left_out`); where it is more than a hundredth of the sequences, nothing is returned.

    The hidden states of all sequences are kept on the host at one block boundary; one compiled function serves all blocks.
    Accumulation is in float32. The sequences of a batch are shared out over the devices of this process, each of which holds the
    block, and the sums are added across them: the last bits of H then depend on how many there are, by less than 1e-6 √(H_ii H_jj)
    for some thousand tokens (measured).

    Args:
        model: the original.
        tokens: token ids.
        batch: sequences at a time, filled up to a multiple of the devices.
        weights: w of all inputs, (sequences, time); or a mapping from names of inputs or linear layers to the w of each: then
            one H is returned for every key, that of a linear layer over its own input.
        progress: called with (blocks done, blocks in all).
        keep: (key, H) -> what is returned in its place, e.g. the same on disk, called as soon as H is done.
        devices: how many of this process's devices to use at most; None: all.

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
    run, out = _ForwardPass(model, tokens, weights, batch, devices), dict[str, np.ndarray]()
    for i in range(model.config.num_hidden_layers):
        for name, h in run.through_block(i):
            out[name] = keep(name, h)
        if progress is not None:
            progress(i + 1, model.config.num_hidden_layers)
    # jit hands dictionaries back sorted by key
    return CalibrationResult({name: out[name] for name in weights}, run.tally.sequences, run.tally.left_out)


class _ForwardPass:
    """The hidden states of all sequences at one block boundary, and how much every token still counts.

    Attributes:
        tally: of what is left out.
    """

    def __init__(self, model: Llama, tokens: np.ndarray, weights: Mapping[str, TokenWeights], batch: int, devices: int | None):
        self._model, self._inputs = model, _inputs(model, weights)
        alike: dict[int, np.ndarray] = {}  # one array serves all inputs that were given the same
        shares = {
            name: _once(alike, given, lambda a, n=name: _shares(n, np.asarray(a, np.float32), tokens.shape))
            for name, given in weights.items()
        }
        # The last batch is filled up with rows of weight zero, so that every batch has the one compiled shape.
        self.tally, self._placement = Tally(len(tokens)), sequence_placement(len(tokens), devices)
        self._batch = -(-min(batch, len(tokens)) // self._placement.count) * self._placement.count
        fill = -len(tokens) % self._batch
        tokens = np.concatenate([tokens, np.repeat(tokens[-1:], fill, axis=0)])
        alike = {}
        self._shares = {name: _once(alike, share, lambda a: np.pad(a, ((0, fill), (0, 0)))) for name, share in shares.items()}
        self._starts = range(0, len(tokens), self._batch)
        embedding = self._placement.replicate(model.model.embed_tokens)
        self._rope = self._placement.replicate(model.rope(tokens.shape[1]))
        rows = (self._placement.shard(tokens[s : s + self._batch]) for s in self._starts)
        self._states = [np.asarray(embedded(embedding, part)) for part in rows]

    def through_block(self, i: int) -> Iterator[tuple[str, np.ndarray]]:
        """Put all sequences through block i: its H one by one, by name."""
        block, prefix = self._placement.replicate(self._model.block(i)), f"model.layers.{i}."
        # Names are local to the block from here on, so that every block has one structure.
        here = {name.removeprefix(prefix): x.removeprefix(prefix) for name, x in self._inputs.items() if name.startswith(prefix)}
        sums: dict[str, Array] = {}
        for j in range(len(self._states)):
            moments = self._through_batch(j, block, prefix, here)
            sums = added(sums, moments) if sums else moments
        self.tally.check()
        for name, h in sums.items():
            summed = np.asarray(h, np.float32)
            if self.tally.left_out:
                summed = summed / _left(prefix + name, self._shares[prefix + name])
            if not np.isfinite(summed).all():
                raise QLRError(
                    f"the sum over activations that enter {prefix}{here[name]} is not finite; "
                    "the checkpoint is damaged or its activations overflow this dtype (load it in float32)"
                )
            yield prefix + name, summed

    def _through_batch(self, j: int, block: Block, prefix: str, here: Mapping[str, str]) -> dict[str, Array]:
        """Advance the states of batch j, and what its tokens add to every H; sequences that are not finite are taken out first."""
        start = self._starts[j]

        def advance() -> tuple[Array, dict[str, Array], dict[str, Array]]:
            shares: dict[str, dict[str, Array]] = {x: {} for x in here.values()}
            for name, x in here.items():
                shares[x][name] = self._placement.shard(self._shares[prefix + name][start : start + self._batch])
            return _advance(block, self._placement.shard(self._states[j]), self._rope, shares)

        leaving, moments, finite = advance()
        bad = {name: ~np.asarray(rows) for name, rows in finite.items()}
        if any(rows.any() for rows in bad.values()):
            for name in INPUTS:  # in the order in which the forward pass meets them
                self.tally.add(bad[name], start, f"the activations that enter {prefix}{name}")
            lost = np.logical_or.reduce(list(bad.values()))
            self._states[j] = zeroed(lost, self._states[j])
            for share in self._shares.values():
                share[start : start + self._batch][lost] = 0
            leaving, moments, _ = advance()
        self._states[j] = np.asarray(leaving)
        return moments


def _left(name: str, w: np.ndarray) -> np.float32:
    """What of the weights is left, which were 1 in all."""
    left = w.sum(dtype=np.float64)
    if left <= 0:
        raise QLRError(f"no token with a weight is left for {name}: the sequences that have one are not finite; give other weights")
    return np.float32(left)


def _inputs(model: Llama, names: Iterable[str]) -> dict[str, str]:
    """For every name of an input or a linear layer, the name of the input."""
    known = {name: name for name in input_names(model.config)} | {name: input_of(name) for name in linear_names(model.config)}
    for name in names:
        if name not in known:
            raise QLRError(
                f"weights are given for {name!r}, which this model does not have; its names look like {next(iter(known))}"
            )
    return {name: known[name] for name in names}


def _once(made: dict[int, np.ndarray], given: Any, make: Callable[[Any], np.ndarray]) -> np.ndarray:
    if id(given) not in made:
        made[id(given)] = make(given)
    return made[id(given)]


def _check_tokens(model: Llama, tokens: np.ndarray) -> None:
    if tokens.ndim != 2 or not tokens.size:
        raise QLRError(f"tokens have shape {tokens.shape}; (sequences, time) is needed, neither of them 0")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise QLRError(
            f"token id {tokens.max() if tokens.min() >= 0 else tokens.min()} lies outside the vocabulary of "
            f"{model.config.vocab_size}; use the model's own tokenizer"
        )


@jax.jit
def added(sums: dict[str, Array], more: dict[str, Array]) -> dict[str, Array]:
    """Sums by name, from one program for all of them."""
    return jax.tree.map(jnp.add, sums, more)


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
