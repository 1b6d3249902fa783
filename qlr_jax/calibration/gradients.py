"""How sensitive the end loss is to each linear layer's output: squared gradients by token, and G = E[g gᵀ] by output."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from qlr_jax.calibration.backward import backward
from qlr_jax.calibration.finite import CalibrationResult, Tally, finite_on_host, finite_rows, zeroed
from qlr_jax.calibration.hessians import added
from qlr_jax.calibration.second_moment import second_moment
from qlr_jax.core.sharding import sequence_placement
from qlr_jax.errors import QLRError
from qlr_jax.models.forward import by_parts, through
from qlr_jax.models.llama import Block, Llama, Rope, Top
from qlr_jax.models.names import layer_of, linear_names, shape_of
from qlr_jax.models.sites import BY_PATH

# ---- watchers: y itself, and what the probe's "gradient" becomes, so that no gradient of a token is stored


@jax.custom_vjp
def _squares(y: Array, probe: Array) -> Array:
    """y itself; the gradient that arrives for `probe` (batch, time) is Σ_i (∂loss/∂y_i)² of every token."""
    return y


@jax.custom_vjp
def _products(y: Array, probe: tuple[Array, Array]) -> Array:
    """y itself; the gradients that arrive for `probe`, (m, m) and (batch,), are Σ g gᵀ over all tokens, g = ∂loss/∂y, and the
    Σ ‖g‖² of every sequence."""
    return y


def _untouched(y: Array, probe: Any) -> tuple[Array, None]:
    return y, None


def _squared(_: None, g: Array) -> tuple[Array, Array]:
    return g, jnp.sum(jnp.square(g.astype(jnp.float32)), axis=-1)


def _multiplied(_: None, g: Array) -> tuple[Array, tuple[Array, Array]]:
    exact = g.astype(jnp.float32)
    return g, (second_moment(exact), jnp.sum(jnp.square(exact), axis=(1, 2)))


_squares.defvjp(_untouched, _squared)
_products.defvjp(_untouched, _multiplied)


def squared_gradients(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = 4,
    progress: Callable[[int], None] | None = None,
    devices: int | None = None,
) -> CalibrationResult:
    """For every linear layer y = W x the squared gradient of the next-token loss at y, (sequences, time), token by token.

        s(layer)[q, t] = Σ_i ( ∂ nll_q / ∂ y[q, t, i] )²      nll_q summed over the tokens of sequence q

    A token counts through all predictions after it; the last of a sequence predicts nothing and has s = 0. One backward pass,
    block by block: a block's forward pass is computed again where it is pulled back, so that memory is the hidden states at all
    block boundaries and what one block and the head keep for `batch` sequences, and one compiled function serves all blocks.

    A sequence in which a hidden state or a gradient is not finite has s = 0 everywhere, and is named in what is returned
    (`CalibrationResult.left_out`).

    Args:
        model: the original.
        tokens: token ids; at least one sequence of two.
        batch: sequences at a time, filled up to a multiple of the devices, which they are shared out over.
        progress: called with the number of blocks that are newly done.
        devices: how many of this process's devices to use at most; None: all.

    Raises:
        QLRError: for tokens of another shape; where more than 1 % of the sequences would be left out, naming their block or layer.

    Source: GuidedQuant, arXiv 2505.07004, section 3.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> squares = squared_gradients(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))
        >>> squares["model.layers.0.mlp.down_proj"].shape, squares["model.layers.0.mlp.down_proj"][0, -1].item()
        ((1, 3), 0.0)
    """
    tokens = _checked(tokens)
    out = {name: np.empty(tokens.shape, np.float32) for name in linear_names(model.config)}

    def next_tokens(j: int) -> np.ndarray:
        rows = run.batches[j]
        return np.concatenate([rows[:, 1:], np.full((len(rows), 1), UNCOUNTED, np.int32)], axis=1)

    run = BackwardPass(model, tokens, batch, devices, next_tokens)
    probes = dict.fromkeys(BY_PATH, run.placement.shard(jnp.zeros((run.batch, tokens.shape[1]))))
    for i, j, received in run.watched(dict.fromkeys(range(model.config.num_hidden_layers), probes), "squares"):
        start, live = run.starts[j], run.live[j]
        for name, value in received.items():
            out[f"model.layers.{i}.{name}"][start : start + live] = np.asarray(value)[:live]
        if progress is not None and run.is_last(j):
            progress(1)
    for value in _finite(out).values():
        value[list(run.tally.left_out)] = 0
    return CalibrationResult(out, len(tokens), run.tally.left_out)


def output_hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    batch: int = 4,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
    devices: int | None = None,
    beside: "Ends | None" = None,
) -> CalibrationResult:
    """For every linear layer y = W x what an error in y does to the model's output distribution, (m, m), on the mean over tokens.

        G(layer) = mean_{q,t} g gᵀ      g = ∂ Σ_t' log p(z_t') / ∂ y[q, t],  labels z_t' drawn from the model's own p

    Then an error E in W alone costs KL(original ‖ changed) ≈ ½ tr(G E H Eᵀ) nats a token, H = E[x xᵀ]: the second-order expansion
    of the KL with its Fisher matrix, errors of different tokens taken to be independent and x of g (a Kronecker factorisation).
    One backward pass as in `squared_gradients`, of an (m, m) a layer of `names` (all where None). Labels are drawn sequence by
    sequence: neither the batch nor the number of devices changes them, and on several devices G is that of one up to the order
    in which sums are taken, by less than 2e-6 √(G_ii G_jj) for some thousand tokens (measured).

    A sequence in which a hidden state or a gradient is not finite is left out of G from that block of the backward pass on (of all,
    where it happens in the forward pass), and is named in what is returned (`CalibrationResult.left_out`).

    Args:
        model, tokens, batch, progress, devices: as of `squared_gradients`.
        names: linear layers; None: all.
        seed: of the labels.
        keep: (name, G) -> what is returned in its place, e.g. the same on disk, called as soon as G is done.
        beside: is handed what the same pass has at its two ends, for the metrics of embedding and head.

    Raises:
        QLRError: as `squared_gradients`.

    Source: Martens and Grosse, arXiv 1503.05671, section 3; for rounding: YAQA, arXiv 2505.22988, section 3 (sketch A).

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> output_hessians(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))["model.layers.0.mlp.up_proj"].shape
        (8, 8)
    """
    tokens, wanted = _checked(tokens), list(names if names is not None else linear_names(model.config))
    run = BackwardPass(model, tokens, batch, devices, lambda j: run.draws(j, seed))
    layers = _product_probes(run, wanted)
    if beside is not None:
        layers.setdefault(0, {})  # what enters the first block is asked for, whatever is compressed there
    out: dict[str, np.ndarray] = {}
    sums: dict[str, Array] = {}
    for i, j, received in run.watched(layers, "products", beside):
        sums = added(sums, received) if j else received
        if run.is_last(j):  # the block is done
            count = np.float32(run.sequences_left * tokens.shape[1])
            mean = {f"model.layers.{i}.{name}": np.asarray(total, np.float32) / count for name, total in sums.items()}
            out |= {name: keep(name, value) for name, value in _finite(mean).items()}
            if progress is not None:
                progress(1)
    return CalibrationResult({name: out[name] for name in wanted}, len(tokens), run.tally.left_out)


UNCOUNTED = -1  # the label of a position whose prediction does not count


def _checked(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise QLRError(f"tokens have shape {tokens.shape}; at least one sequence of two tokens is needed")
    return tokens


def _finite(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, value in sums.items():
        if not np.isfinite(value).all():
            raise QLRError(
                f"the sum over gradients at the output of {name} is not finite; load the model in float32 and check its weights"
            )
    return sums


class Ends(Protocol):
    """What takes, of a backward pass, what it has at its two ends: batch by batch, zero where a sequence is left out."""

    def at_head(self, run: "BackwardPass", x: Array, live: Array, spread: Array) -> None:
        """The hidden state that leaves the last block, (batch, time, n); which sequences count, (batch,); Σ p (1 − p), (vocab,)."""

    def at_embedding(self, run: "BackwardPass", g: Array) -> None:
        """The gradient at what enters the first block, (batch, time, n)."""


class BackwardPass:
    """One backward pass of −Σ log p(labels), batch by batch; what is not finite on the way is left out.

    Attributes:
        model: whose blocks are gone through.
        batches: tokens (batch, time); the last is filled up with repeats.
        starts, live: by batch, the first sequence, and how many are not repeats.
        lost: by batch, which rows are left out from here on.
        tally: of what is left out.
    """

    def __init__(
        self,
        model: Llama,
        tokens: np.ndarray,
        batch: int,
        devices: int | None,
        labels: Callable[[int], Array | np.ndarray],
    ):
        """`labels`: batch -> the labels, or, for labels from the model's own distribution, the draws (batch, time) in [0, 1)."""
        self.model, self._labels = model, labels
        self.tally, self.placement = Tally(len(tokens)), sequence_placement(len(tokens), devices)
        self.batch = -(-min(batch, len(tokens)) // self.placement.count) * self.placement.count
        self.starts = range(0, len(tokens), self.batch)
        self.batches = [
            np.pad(tokens[s : s + self.batch], ((0, max(0, s + self.batch - len(tokens))), (0, 0)), "edge") for s in self.starts
        ]
        self.live = [min(self.batch, len(tokens) - s) for s in self.starts]
        self.lost = [np.zeros(self.batch, bool) for _ in self.starts]

    def draws(self, j: int, seed: int) -> Float[Array, "batch time"]:
        """Of batch j; each sequence has a key of its own."""
        rows = self.placement.shard(self.starts[j] + np.arange(self.batch))
        return _draws(jax.random.key(seed), rows, time=self.batches[j].shape[1])

    @property
    def sequences_left(self) -> int:
        """How many are not left out."""
        return sum(int((~lost[:live]).sum()) for lost, live in zip(self.lost, self.live, strict=True))

    def is_last(self, j: int) -> bool:
        """Whether batch j is the last of a block."""
        return j == len(self.batches) - 1

    def watched(
        self, probes: dict[int, dict[str, Any]], watch: str, ends: Ends | None = None
    ) -> Iterator[tuple[int, int, dict[str, Array]]]:
        """From the last block to the first of those in `probes`: (layer, batch, what its probes received).

        Args:
            probes: layer -> local name -> what receives.
            watch: "squares" or "products".
            ends: is handed what the pass has at the head and, of the first of those blocks, at its input.
        """
        top = self.placement.replicate(self.model.top())

        def head_gradient(j: int, x: Array) -> np.ndarray:
            live = self.placement.shard((~self.lost[j] & (np.arange(self.batch) < self.live[j])).astype(np.float32))
            of = self.placement.shard(self._labels(j))
            gradient, finite, spread = _head_gradient(top, x, of, live, spread=ends is not None)
            if ends is not None:
                ends.at_head(self, x, live, spread)
            self._leave_out(j, ~np.asarray(finite), "the gradients that the head hands down")
            if self.is_last(j):
                self.tally.check()
            return zeroed(self.lost[j], np.asarray(gradient))

        def repair(i: int, j: int, x: np.ndarray) -> np.ndarray:
            self._leave_out(j, ~finite_on_host(x), f"the hidden states that leave block model.layers.{i}")
            if self.is_last(j):
                self.tally.check()
            return zeroed(self.lost[j], x)

        def pull_back(i: int, j: int, block: Block, x: Array, rope: Rope, g: Array) -> tuple[Array, dict[str, Array]]:
            def pull() -> tuple[Array, dict[str, Array], dict[str, Array]]:
                return _pull_back(block, self._finite_part(j, x), rope, probes.get(i, {}), self._finite_part(j, g), watch=watch)

            pulled, received, finite = pull()
            bad = {name: ~np.asarray(rows) for name, rows in finite.items()}
            if any(rows.any() for rows in bad.values()):
                for name in reversed(BY_PATH):  # in the order in which the backward pass meets them
                    if name in bad:
                        self._leave_out(j, bad[name], f"the gradients at the output of model.layers.{i}.{name}")
                pulled, received, _ = pull()
            if self.is_last(j):
                self.tally.check()
            if ends is not None and i == min(probes):
                self._leave_out(j, ~np.asarray(finite_rows(pulled)), f"the gradients that enter model.layers.{i}")
                ends.at_embedding(self, self._finite_part(j, pulled))
            return pulled, received

        return backward(
            self.model,
            self.batches,
            lambda i, block, x, rope: through(block, x, rope),
            head_gradient,
            pull_back,
            first=min(probes),
            repair=repair,
            placement=self.placement,
        )

    def _leave_out(self, j: int, rows: Bool[np.ndarray, "batch"], place: str) -> None:
        new = rows & ~self.lost[j]
        self.tally.add(new, self.starts[j], place)
        self.lost[j] |= new

    def _finite_part(self, j: int, x: Array) -> Array:
        """x (batch, ...) with zeros in the place of what is left out, so that nothing comes of it."""
        return self.placement.shard(zeroed(self.lost[j], np.asarray(x))) if self.lost[j].any() else x


def _product_probes(run: BackwardPass, names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Layer -> local name -> zeros of G (m, m) and of ‖g‖² by sequence; one of each size serves all blocks."""
    sizes = {name: shape_of(run.model.config, name)[0] for name in names}
    each = run.placement.shard(np.zeros(run.batch, np.float32))
    zeros = {m: (run.placement.replicate(np.zeros((m, m), np.float32)), each) for m in sorted(set(sizes.values()))}
    layers: dict[int, dict[str, Any]] = {}
    for name in names:
        i = layer_of(name)
        layers.setdefault(i, {})[name.removeprefix(f"model.layers.{i}.")] = zeros[sizes[name]]
    return layers


@partial(jax.jit, static_argnames=("time",))
def _draws(key: Array, rows: Int[Array, "batch"], *, time: int) -> Float[Array, "batch time"]:
    """A number in [0, 1) for every position."""
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (time,)))(rows)


@partial(jax.jit, static_argnames=("spread",))
def _head_gradient(
    top: Top, x: Float[Array, "batch time n"], labels: Shaped[Array, "batch time"], live: Float[Array, "batch"], *, spread: bool
) -> tuple[Array, Array, Array]:
    """∂ −Σ log p(label) / ∂x of the hidden state that leaves the last block, which rows of it are finite, and Σ p (1 − p) of every
    token where `spread`; labels are given, or drawn by numbers in [0, 1)."""

    def part(fresh: Array, x: Array, labels: Array) -> tuple[Array, Array]:
        logits, pull = jax.vjp(top, x)
        p = jax.nn.softmax(logits, axis=-1)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            labels = drawn(p, labels)
        counted = jnp.where(labels >= 0, live[:, None], 0.0)
        gradient = jnp.where(labels[..., None] == jnp.arange(p.shape[-1]), p - 1, p) * counted[..., None]
        return pull(gradient)[0], jnp.einsum("bt,btv->v", live[:, None] * fresh, p * (1 - p)) if spread else jnp.zeros(())

    gradient, sums = by_parts(part, x, labels)
    return gradient, finite_rows(gradient), sums


GROUP = 256  # tokens whose probabilities are added up first


def drawn(p: Float[Array, "*rest vocab"], draws: Float[Array, "*rest"]) -> Int[Array, "*rest"]:
    """A token from each distribution by its inverse distribution function at `draws`: the first at which Σ p exceeds it.

    Sums are taken in groups of tokens: the group is found first, then the token in it.
    """
    fill = -p.shape[-1] % GROUP
    groups = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, fill)]).reshape(*p.shape[:-1], -1, GROUP)
    below = jnp.cumsum(jnp.sum(groups, axis=-1), axis=-1)
    # of what all of it adds up to in float32, so that no draw lies beyond the last token
    wanted = draws[..., None] * below[..., -1:]
    group = jnp.minimum(jnp.sum(below <= wanted, axis=-1, keepdims=True), below.shape[-1] - 1)
    before = jnp.where(group > 0, jnp.take_along_axis(below, jnp.maximum(group - 1, 0), axis=-1), 0.0)
    inside = jnp.cumsum(jnp.take_along_axis(groups, group[..., None], axis=-2)[..., 0, :], axis=-1)
    at = jnp.sum(inside <= jnp.minimum(wanted - before, inside[..., -1:] * (1 - 2**-23)), axis=-1, keepdims=True)
    return jnp.minimum(group * GROUP + at, p.shape[-1] - 1)[..., 0].astype(jnp.int32)


@partial(jax.jit, static_argnames=("watch",))
def _pull_back(
    block: Block, x: Array, rope: Rope, probes: dict[str, Any], g: Array, *, watch: str
) -> tuple[Array, dict[str, Array], dict[str, Bool[Array, "batch"]]]:
    """From ∂loss/∂(the block's output): ∂loss/∂x, and of its linear layers what each probe receives, and which rows are finite."""
    see = {"squares": _squares, "products": _products}[watch]

    def watched(x: Array, probes: dict[str, Any]) -> Array:
        return block(x, rope, adjust=lambda name, y: see(y, probes[name]) if name in probes else y)

    pulled, received = jax.vjp(watched, x, probes)[1](g)
    sums = {name: value[1] if watch == "products" else jnp.sum(value, axis=-1) for name, value in received.items()}
    if watch == "products":
        received = {name: value[0] for name, value in received.items()}
    return pulled, received, {name: jnp.isfinite(value) for name, value in sums.items()}
