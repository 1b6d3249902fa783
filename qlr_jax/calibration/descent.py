"""The backward pass that calibration makes: the end loss's gradients at the outputs of linear layers, gathered on the way down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from qlr_jax.calibration.backward import Batch, State, States, backward, batches_of, divided
from qlr_jax.calibration.finite import Info, checked, finite_on_host, finite_rows, left_out_of, zeroed
from qlr_jax.calibration.second_moment import second_moment
from qlr_jax.core.sharding import line
from qlr_jax.engine import Engine, TreeSum
from qlr_jax.models.forward import by_parts, through
from qlr_jax.models.llama import Block, Llama, RMSNorm, Rope, Top
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


TITLE = "calibrating: outputs"  # of the pieces of a pass for output Hessians
UNCOUNTED = -1  # the label of a position whose prediction does not count


@dataclass(frozen=True)
class Descent:
    """The work of a backward pass of −Σ log p(labels) (`backward.Work`); what is not finite on the way is left out.

    Attributes:
        watched: layer -> local name -> how many outputs it has.
        watch: what is made of the gradients there: "squares" of every token, or the sum of "products".
        seed: of labels that are drawn from the model's own distribution; None: they are the text's next tokens.
        ends: whether sums at the head and at the input of the first of those blocks are made as well (`EndSums`).
        devices: of its process, that a batch is shared out over.
    """

    watched: Mapping[int, Mapping[str, int]]
    watch: Literal["squares", "products"]
    seed: int | None
    ends: bool = False
    devices: int = 1

    def forward(self, i: int, block: Block, beside: None, rope: Rope, batch: Batch, state: State) -> State:
        x = np.asarray(through(block, line(self.devices).shard(state.x), rope))
        state = _without(~finite_on_host(x), batch, state, f"the hidden states that leave block model.layers.{i}")
        return replace(state, x=zeroed(state.lost, x))

    def head(self, top: Top, batch: Batch, beside: None, state: State) -> tuple[State, tuple[Info, Any]]:
        placement = line(self.devices)
        live = placement.shard((~state.lost & (np.arange(len(state.lost)) < batch.live)).astype(np.float32))
        x = placement.shard(state.x)
        gradient, finite, spread = _head_gradient(top, x, self._labels(batch), live, spread=self.ends)
        ends = (_normed_moment(top.norm, x, live), spread) if self.ends else None
        state = _without(~np.asarray(finite), batch, state, "the gradients that the head hands down")
        return replace(state, x=zeroed(state.lost, np.asarray(gradient))), (_info(batch, state), _float64(ends))

    def pull_back(
        self, i: int, block: Block, beside: None, rope: Rope, batch: Batch, state: State, gradient: State
    ) -> tuple[State, tuple[Info, dict[str, Array], Any]]:
        placement, probes = line(self.devices), self._probes(i, batch)

        def pull(lost: State) -> tuple[Array, dict[str, Array], dict[str, Array]]:
            x, g = (placement.shard(zeroed(lost.lost, own.x)) for own in (state, gradient))
            return _pull_back(block, x, rope, probes, g, watch=self.watch)

        known = gradient  # which knows of all that is left out by now
        pulled, received, finite = pull(known)
        bad = {name: ~np.asarray(rows) for name, rows in finite.items()}
        if any(rows.any() for rows in bad.values()):
            for name in reversed(BY_PATH):  # in the order in which the backward pass meets them
                if name in bad:
                    known = _without(bad[name], batch, known, f"the gradients at the output of model.layers.{i}.{name}")
            pulled, received, _ = pull(known)
        ends = None
        if self.ends and i == min(self.watched):
            known = _without(~np.asarray(finite_rows(pulled)), batch, known, f"the gradients that enter model.layers.{i}")
            ends = _float64(_moment(placement.shard(zeroed(known.lost, np.asarray(pulled)))))
        return replace(known, x=np.asarray(pulled)), (_info(batch, known), received, ends)

    def _labels(self, batch: Batch) -> Array:
        rows, placement = batch.tokens, line(self.devices)
        if self.seed is None:
            return placement.shard(np.concatenate([rows[:, 1:], np.full((len(rows), 1), UNCOUNTED, np.int32)], axis=1))
        # each sequence has a key of its own
        return _draws(np.int64(self.seed).astype(np.int32), placement.shard(batch.start + np.arange(len(rows))), time=rows.shape[1])

    def _probes(self, i: int, batch: Batch) -> dict[str, Any]:
        """What receives: of squares (batch, time), of products G (m, m) and ‖g‖² by sequence; one of each size serves all."""
        placement, names, (rows, time) = line(self.devices), self.watched.get(i, {}), batch.tokens.shape
        if self.watch == "squares":
            return dict.fromkeys(names, placement.shard(np.zeros((rows, time), np.float32)))
        each = placement.shard(np.zeros(rows, np.float32))
        zeros = {m: (placement.replicate(jax.device_put(np.zeros((m, m), np.float32))), each) for m in sorted(set(names.values()))}
        return {name: zeros[m] for name, m in names.items()}


class DescentRun:
    """A backward pass under way, from the last block to the first that is watched.

    Attributes:
        batches: of its sequences.
        checked: of every step so far, what stands for what is left out and how many sequences are left.
    """

    def __init__(
        self,
        model: Llama,
        tokens: np.ndarray,
        work: Descent,
        batch: int,
        devices: int | None,
        engine: Engine,
        title: str,
        states: States | None = None,
    ):
        placed, size = divided(len(tokens), batch, devices)
        self._model, self._work, self._engine, self._title = model, replace(work, devices=placed), engine, title
        self.batches, self._sequences, self._states = batches_of(tokens, size), len(tokens), states
        self.checked: list[Any] = []

    def steps(self, progress: Callable[[int], None] | None = None, ends: "EndSums | None" = None) -> Iterator[tuple[int, int, Any]]:
        """From the last block to the first, and there batch by batch: (block, batch, what stands for what its probes received).

        With the last batch of a block, `checked` has what is left out there.
        """
        engine, work, infos = self._engine, self._work, list[Any]()
        first, how = min(work.watched), {"states": self._states, "devices": work.devices, "engine": engine, "title": self._title}
        for i, j, value in backward(self._model, self.batches, work, first, **how):
            head = i == self._model.config.num_hidden_layers
            info, *received, at_end = engine.split(value, 2 if head else 3)
            infos.append(info)
            if ends is not None and (head or i == first):
                ends.add(engine, at_end, head)
            if self.is_last(j):
                self.checked.append(engine.submit(checked, infos, self._sequences, title=self._title))
                infos = []
            if not head:
                yield i, j, received[0]
            if self.is_last(j) and len(self.checked) > engine.ahead:
                self._settle(len(self.checked) - engine.ahead - 1, progress)
        for step in range(max(0, len(self.checked) - engine.ahead), len(self.checked)):
            self._settle(step, progress)
        if ends is not None:
            ends.checked = self.checked[-1]

    def is_last(self, j: int) -> bool:
        """Whether batch j is the last of a block."""
        return j + 1 == len(self.batches)

    def _settle(self, step: int, progress: Callable[[int], None] | None) -> None:
        """Wait for a step: 0 is the head, and 1 the last block."""
        self._engine.result(self.checked[step])
        if progress is not None and step:
            progress(1)

    @property
    def left_out(self) -> dict[int, str]:
        """As of `CalibrationResult`, once the pass is done."""
        return self._engine.result(self.checked[-1])[0].left_out


class EndSums:
    """What a backward pass has at its two ends, summed over all sequences that count, in float64: for embedding and head.

    Attributes:
        checked: as of `DescentRun`, at the end.
    """

    checked: Any

    def __init__(self) -> None:
        self._sums: dict[bool, TreeSum] = {}

    def add(self, engine: Engine, part: Any, head: bool) -> None:
        """Of one batch: at the head, or at the embedding."""
        self._sums.setdefault(head, TreeSum(engine, _plus, TITLE)).add(part)

    @property
    def head(self) -> Any:
        """What stands for Σ x xᵀ of the normed states that enter the head, and Σ p (1 − p), (vocab,)."""
        return self._sums[True].value

    @property
    def embedding(self) -> Any:
        """What stands for Σ g gᵀ of the gradients at what enters the first block."""
        return self._sums[False].value


def _plus(one: Any, other: Any) -> Any:
    return jax.tree.map(np.add, one, other)


def _float64(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _without(rows: Bool[np.ndarray, "batch"], batch: Batch, state: State, place: str) -> State:
    """The state of which these rows are left out too; its values stay."""
    new = rows & ~state.lost
    if not new.any():
        return state
    left_out = left_out_of(new, batch.start, batch.start + batch.live, place, state.left_out)
    return replace(state, lost=state.lost | new, left_out=left_out)


def _info(batch: Batch, state: State) -> Info:
    return state.left_out, [float((~state.lost[: batch.live]).sum())]


@jax.jit
def _moment(g: Float[Array, "batch time n"]) -> Float[Array, "n n"]:
    return second_moment(g.astype(jnp.float32))


@jax.jit
def _normed_moment(norm: RMSNorm, x: Float[Array, "batch time n"], live: Float[Array, "batch"]) -> Float[Array, "n n"]:
    """Of the normed states of the sequences that are live."""
    return second_moment(norm(x).astype(jnp.float32) * live[:, None, None])


@partial(jax.jit, static_argnames=("time",))
def _draws(seed: Int[Array, ""], rows: Int[Array, "batch"], *, time: int) -> Float[Array, "batch time"]:
    """A number in [0, 1) for every position."""
    key = jax.random.key(seed)
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
