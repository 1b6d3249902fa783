"""The training itself: one compiled step with accumulation over passes, sharded over devices, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.losses import TeacherLogits, kl_loss, states_loss, text_loss, top_kl_loss
from qlr_jax.adaptation.student import PRODUCTS, Student, Values, forward, teaching
from qlr_jax.calibration import evenly_spaced
from qlr_jax.core.sharding import batch_placement
from qlr_jax.core.typing import Array, Bool, Float
from qlr_jax.models.llama import Llama

KINDS: Mapping[str, str] = {  # what of a matrix or norm belongs to what `train` names
    "left": "factors",
    "right": "factors",
    "norm": "norms",
    "gain": "scales",
    "component": "scales",
    "groups": "scales",
    "rows": "signs",
    "columns": "signs",
    "table": "embeddings",
    "body": "backbone",
}
Teacher = Llama | TeacherLogits | None
RARE = 1.0  # how much of the mean second moment is added to that of an embedding's row


@dataclass(frozen=True)
class Text:
    """Sequences (rows, length) and what the teacher says about them: its kept logits, itself, or nothing."""

    tokens: np.ndarray
    teacher: Teacher

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        kept = (self.teacher.ids, self.teacher.logp) if isinstance(self.teacher, TeacherLogits) else ()
        return tuple(a[index] for a in (self.tokens, *kept))

    def part(self, count: int) -> Text:
        """`count` sequences, at least one, in equal distances."""
        index = evenly_spaced(len(self.tokens), count)
        kept = self.teacher
        if isinstance(kept, TeacherLogits):
            kept = TeacherLogits(kept.tokens[index], kept.ids[index], kept.logp[index])
        return Text(self.tokens[index], kept)


def order(seed: int, step: int, count: int, rows: int) -> np.ndarray:
    """Which of `rows` sequences step `step` takes: every epoch all of them in a new order; a function of its arguments alone.

    Example:
        >>> sorted(np.concatenate([order(0, s, 2, 6) for s in range(3)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(step * count, (step + 1) * count)
    epochs = {e: np.random.default_rng([seed, e]).permutation(rows) for e in set((places // rows).tolist())}
    return np.array([epochs[p // rows][p % rows] for p in places.tolist()])


def split(values: Values, trained: set[tuple[str, str]]) -> tuple[Values, Values]:
    """(what is trained, what is not) of one tree."""

    def part(wanted: bool) -> Values:
        found = {n: {k: v for k, v in own.items() if ((n, k) in trained) == wanted} for n, own in values.items()}
        return {n: own for n, own in found.items() if own}

    return part(True), part(False)


def joined(a: Values, b: Values) -> Values:
    """Both trees as one."""
    return {name: {**a.get(name, {}), **b.get(name, {})} for name in {**a, **b}}


def rates(config: AdaptConfig, trained: Values, names: set[tuple[str, str]], step: int, steps: int) -> Values:
    """The rate of every array in one of `steps` steps: a linear rise and a cosine fall, 0 only for what is not in `names`."""
    rise = min(max(1, round(config.warmup * steps)), steps)
    share = float(optax.warmup_cosine_decay_schedule(0.0, 1.0, rise, steps + 1)(step + 1))
    peak = dict.fromkeys(("norms", "scales", "signs"), config.vector_rate)
    peak |= {"factors": config.learning_rate, "embeddings": config.embedding_rate, "backbone": config.backbone_rate}
    return {n: {k: np.float32(share * peak[KINDS[k]] if (n, k) in names else 0.0) for k in own} for n, own in trained.items()}


def objective(config: AdaptConfig, scores: Array, said: Array | None, part: tuple[Array, ...]) -> Array:
    """The loss of one batch: w · KL + (1 − w) · next token, from the student's logits (batch, time, vocab) and the teacher's.

    Args:
        said: the logits of a teacher that runs beside the student; None: what `part` keeps of them after the tokens, if anything.
    """
    tokens, kept = part[0], part[1:]
    logp = jax.nn.log_softmax(scores, axis=-1)
    share = {"text": 0.0, "kl": 1.0, "mix": config.weight}[config.loss]
    total = jnp.zeros(())
    if share < 1:
        total = total + (1 - share) * text_loss(logp, tokens)
    if share > 0:
        kl = top_kl_loss(logp, *kept) if kept else kl_loss(logp, jax.nn.log_softmax(said, axis=-1))
        total = total + share * kl
    return total


def mean_over(text: Text, batch: int, loss: Callable[[tuple[Array, ...]], Any]) -> float:
    """The mean over all sequences of a text."""
    total, batch = 0.0, min(batch, len(text.tokens))
    whole = len(text.tokens) // batch * batch
    # what is left over goes one by one, so that two shapes are compiled whatever the number of rows
    parts = [np.arange(s, s + batch) for s in range(0, whole, batch)] + [np.array([i]) for i in range(whole, len(text.tokens))]
    for index in parts:
        total += len(index) * float(loss(tuple(map(jnp.asarray, text.batch(index)))))
    return total / len(text.tokens)


def _said(teacher: Llama | None, part: tuple[Array, ...]) -> Array | None:
    """The logits of a teacher that is at hand."""
    return None if teacher is None else teacher(part[0])


@partial(jax.jit, static_argnums=0)  # compiled once for the model before and after
def _loss(config: AdaptConfig, model: Llama, teacher: Llama | None, part: tuple[Array, ...]) -> Array:
    return objective(config, model(part[0]), _said(teacher, part), part)


def mean_loss(model: Llama, text: Text, config: AdaptConfig) -> float:
    """The loss of a model as it is stored."""
    resident = text.teacher if isinstance(text.teacher, Llama) else None
    model = model.densified()
    return mean_over(text, config.batch, lambda part: _loss(config, model, resident, part))


def weight_gradients(model: Llama, text: Text, config: AdaptConfig) -> dict[str, np.ndarray]:
    """∂loss/∂W (m, n) of every linear layer, mean over the text."""
    model = model.densified()
    resident = text.teacher if isinstance(text.teacher, Llama) else None

    def loss(weights: dict[str, Array], model: Llama, teacher: Llama | None, part: tuple[Array, ...]) -> Array:
        copy: Llama = jax.tree.map(lambda leaf: leaf, model)
        for name, linear in copy.linears().items():
            linear.weight.set_value(weights[name])
        return objective(config, copy(part[0]), _said(teacher, part), part)

    gradient = jax.jit(jax.grad(loss))
    weights = {name: linear.weight.get_value() for name, linear in model.linears().items()}
    sums: dict[str, np.ndarray] = {name: np.zeros(w.shape, np.float32) for name, w in weights.items()}
    for i in range(len(text.tokens)):  # sequence by sequence: of the least memory
        part = tuple(map(jnp.asarray, text.batch(np.array([i]))))
        for name, g in gradient(weights, model, resident, part).items():
            sums[name] += np.asarray(g) / len(text.tokens)
    return sums


def seen_tokens(text: Text, vocab: int) -> Bool[np.ndarray, "vocab"]:
    """Which tokens the text holds, or its teacher's kept logits: the rows of all others stay, since nothing is known of them.

    Example:
        >>> seen_tokens(Text(np.array([[1, 3]]), None), 5).tolist()
        [False, True, False, True, False]
    """
    seen = np.zeros(vocab, bool)
    seen[text.tokens] = True
    if isinstance(text.teacher, TeacherLogits):
        for ids in text.teacher.ids:  # all at once would be copied to indices of 8 bytes
            seen[ids] = True
    return seen


def _of_tables(values: Values, change: Callable[[str, Array], Array]) -> Values:
    """The tree with `change` made to its embeddings."""
    return {n: {k: change(n, v) if k == "table" else v for k, v in own.items()} for n, own in values.items()}


def _trust(second: Float[Array, "vocab n"]) -> Float[Array, "vocab 1"]:
    """How far Adam's step is gone along in every row of an embedding: less where gradients were small against the others'.

    Adam makes steps of one size of any gradient, so that a row seen twice would move as far on noise as the commonest on evidence.
    """
    row = jnp.mean(second, axis=1, keepdims=True)
    return jnp.sqrt(row / jnp.maximum(row + RARE * jnp.mean(row), 1e-30))


@dataclass(frozen=True)
class Trainer:
    """Compiled functions of a training, the same for all its phases.

    Attributes:
        init: values -> trained, fixed, the optimizer's state.
        step: trained, fixed, state, rates, numbers of sequences -> trained, state, loss (without the states'). Where the rate is 0
            nothing moves, and the gradient is left out of the norm that is clipped.
        judge: trained, fixed, text -> loss.
    """

    init: Callable[[Values], tuple[Values, Values, Any]]
    step: Callable[[Values, Values, Any, Values, np.ndarray], tuple[Values, Any, float]]
    judge: Callable[[Values, Values, Text], float]


def trainer(
    student: Student,
    frame: Llama,
    names: set[tuple[str, str]],
    text: Text,
    config: AdaptConfig,
    metrics: Sequence[Array] = (),
) -> Trainer:
    """The functions that train `names`, (matrix or norm, array), on a text: Adam with clipping, batches divided over devices.

    Args:
        metrics: G (n, n) of the hidden state that leaves each block, where states are compared with a teacher's at hand.
    """
    placement, product = batch_placement(config.batch, config.devices), PRODUCTS[config.compute]
    adam = optax.chain(optax.clip_by_global_norm(config.clip), optax.scale_by_adam(b1=0.9, b2=0.99))
    resident = text.teacher if isinstance(text.teacher, Llama) else None
    frame, resident, metrics = placement.replicate((frame, resident, tuple(metrics)))
    seen = seen_tokens(text, frame.config.vocab_size)[:, None]

    def losses(
        trained: Values,
        fixed: Values,
        frame: Llama,
        teacher: Llama | None,
        metrics: tuple[Array, ...],
        part: tuple[Array, ...],
    ) -> tuple[Array, Array]:
        """What is minimised, and of it the loss without the states'."""
        states, scores = forward(student, frame, joined(trained, fixed), part[0], product, config.remat)
        taught, said = (None, None) if teacher is None else teaching(teacher, part[0], product)
        found = objective(config, scores, said, part)
        return found + config.states * states_loss(states, taught, metrics, product) if metrics else found, found

    @jax.jit
    def update(
        trained: Values,
        fixed: Values,
        state: Any,
        rates: Values,
        frame: Llama,
        teacher: Llama | None,
        metrics: tuple[Array, ...],
        parts: tuple[Array, ...],
    ) -> tuple[Values, Any, Array]:
        def add(sums: Any, part: tuple[Array, ...]) -> tuple[Any, None]:
            (_, found), gradient = jax.value_and_grad(losses, has_aux=True)(trained, fixed, frame, teacher, metrics, part)
            return jax.tree.map(jnp.add, sums, (found, gradient)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        sums, _ = jax.lax.scan(add, zero, parts)
        value, gradient = jax.tree.map(lambda a: a / config.accumulate, sums)
        gradient = jax.tree.map(lambda g, rate: g * (rate > 0), gradient, rates)
        gradient = _of_tables(gradient, lambda n, g: g * seen)
        changes, state = adam.update(gradient, state)
        changes = _of_tables(changes, lambda n, change: change * _trust(state[1].nu[n]["table"]))
        return jax.tree.map(lambda p, rate, change: p - rate * change, trained, rates, changes), state, value

    evaluate = jax.jit(lambda trained, fixed, frame, teacher, part: losses(trained, fixed, frame, teacher, (), part)[1])

    def step(trained: Values, fixed: Values, state: Any, rates: Values, index: np.ndarray) -> tuple[Values, Any, float]:
        shape = (config.accumulate, config.batch)
        parts = placement.shard(tuple(a.reshape(*shape, *a.shape[1:]) for a in text.batch(index)), axis=1)
        trained, state, value = update(trained, fixed, state, rates, frame, resident, metrics, parts)
        return trained, state, float(value)

    def judge(trained: Values, fixed: Values, on: Text) -> float:
        return mean_over(on, config.batch, lambda part: evaluate(trained, fixed, frame, resident, part))

    def init(values: Values) -> tuple[Values, Values, Any]:
        trained, fixed = split(values, names)
        # placed as the step returns them, or the second step would be compiled anew
        return placement.replicate((trained, fixed, adam.init(trained)))

    return Trainer(init, step, judge)
