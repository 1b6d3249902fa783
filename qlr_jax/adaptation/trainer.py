"""The compiled functions of a training: one optimizer step with accumulation over passes, divided over devices, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.losses import hidden_state_loss, objective
from qlr_jax.adaptation.measure import mean_over
from qlr_jax.adaptation.products import PRODUCTS
from qlr_jax.adaptation.sequences import Sequences
from qlr_jax.adaptation.student import ParameterTree, Student
from qlr_jax.adaptation.student_forward import student_forward, teacher_forward
from qlr_jax.core.sharding import batch_placement
from qlr_jax.core.typing import Array, Float
from qlr_jax.models.llama import Llama

PARAMETER_GROUPS: Mapping[str, str] = {  # name of an array among the parameters -> the name in TRAINABLE that it belongs to
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
RARE = 1.0  # how much of the mean second moment is added to that of an embedding's row

Parameter = tuple[str, str]
"""(name of a matrix, norm or embedding, name of its array)."""
Rates = dict[str, dict[str, np.float32]]


def split_parameters(values: ParameterTree, trained: set[Parameter]) -> tuple[ParameterTree, ParameterTree]:
    """(what is trained, what is not) of one tree."""

    def part(wanted: bool) -> ParameterTree:
        tree = {n: {k: v for k, v in own.items() if ((n, k) in trained) == wanted} for n, own in values.items()}
        return {n: own for n, own in tree.items() if own}

    return part(True), part(False)


def merge_parameters(a: ParameterTree, b: ParameterTree) -> ParameterTree:
    """Both trees as one; where both have an array, that of `b`."""
    return {name: {**a.get(name, {}), **b.get(name, {})} for name in {**a, **b}}


def learning_rates(config: AdaptConfig, trained: ParameterTree, names: set[Parameter], step: int, steps: int) -> Rates:
    """The rate of every array in one step: a linear rise and a cosine fall, 0 only for what is not in `names`.

    Args:
        config: peaks and the share of the rise.
        trained: the tree of what is trained in any phase.
        names: what is trained in this phase.
        step: of the phase, counted from 0.
        steps: of the phase.
    """
    rise = min(max(1, round(config.warmup * steps)), steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, rise, steps + 1)
    share = float(np.asarray(schedule(step + 1)))
    peak = dict.fromkeys(("norms", "scales", "signs"), config.vector_rate)
    peak |= {"factors": config.learning_rate, "embeddings": config.embedding_rate, "backbone": config.backbone_rate}
    return {
        n: {k: np.float32(share * peak[PARAMETER_GROUPS[k]] if (n, k) in names else 0.0) for k in own} for n, own in trained.items()
    }


@dataclass(frozen=True)
class Trainer:
    """Compiled functions of a training, the same for all its phases.

    Attributes:
        init: parameters -> trained, fixed, the optimizer's state.
        step: trained, fixed, state, rates, numbers of sequences -> trained, state, loss (without hidden-state distillation). Where
            the rate is 0 nothing moves, and the gradient is left out of the norm that is clipped.
        evaluate: trained, fixed, text -> loss.
    """

    init: Callable[[ParameterTree], tuple[ParameterTree, ParameterTree, Any]]
    step: Callable[[ParameterTree, ParameterTree, Any, Rates, np.ndarray], tuple[ParameterTree, Any, float]]
    evaluate: Callable[[ParameterTree, ParameterTree, Sequences], float]


def make_trainer(
    student: Student,
    frame: Llama,
    names: set[Parameter],
    sequences: Sequences,
    config: AdaptConfig,
    metrics: Sequence[Float[Array, "n n"]] = (),
) -> Trainer:
    """The functions that train `names` on a text: Adam with clipping, batches divided over devices.

    Args:
        student, frame: as `take_apart` gives them.
        names: (matrix, norm or embedding, array) of all that is trained.
        sequences: the text.
        config: loss, rates, batch.
        metrics: G (n, n) of the hidden state that leaves each block, where states are distilled from a resident teacher.
    """
    placement = batch_placement(config.batch, config.devices)
    adam = optax.chain(optax.clip_by_global_norm(config.clip), optax.scale_by_adam(b1=0.9, b2=0.99))
    frame, teacher, states = placement.replicate((frame, sequences.resident_teacher, tuple(metrics)))
    losses = _losses(student, config)
    update = _update(losses, adam, sequences.seen_tokens(frame.config.vocab_size)[:, None], config.accumulate)
    validation = jax.jit(lambda trained, fixed, frame, teacher, part: losses(trained, fixed, frame, teacher, (), part)[1])

    def step(
        trained: ParameterTree, fixed: ParameterTree, state: Any, rates: Rates, index: np.ndarray
    ) -> tuple[ParameterTree, Any, float]:
        shape = (config.accumulate, config.batch)
        parts = placement.shard(tuple(a.reshape(*shape, *a.shape[1:]) for a in sequences.batch(index)), axis=1)
        trained, state, value = update(trained, fixed, state, rates, frame, teacher, states, parts)
        return trained, state, float(value)

    def evaluate(trained: ParameterTree, fixed: ParameterTree, on: Sequences) -> float:
        return mean_over(on, config.batch, lambda part: validation(trained, fixed, frame, teacher, part))

    def init(values: ParameterTree) -> tuple[ParameterTree, ParameterTree, Any]:
        trained, fixed = split_parameters(values, names)
        # placed as the step returns them, or the second step would be compiled again
        return placement.replicate((trained, fixed, adam.init(trained)))

    return Trainer(init, step, evaluate)


Losses = Callable[[ParameterTree, ParameterTree, Llama, Llama | None, tuple[Array, ...], tuple[Array, ...]], tuple[Array, Array]]
"""(trained, fixed, frame, teacher, metrics of the states, part) -> what is minimised, and of it the loss without distillation."""


def _losses(student: Student, config: AdaptConfig) -> Losses:
    product = PRODUCTS[config.compute]

    def losses(
        trained: ParameterTree,
        fixed: ParameterTree,
        frame: Llama,
        teacher: Llama | None,
        metrics: tuple[Array, ...],
        part: tuple[Array, ...],
    ) -> tuple[Array, Array]:
        states, logits = student_forward(student, frame, merge_parameters(trained, fixed), part[0], product, config.remat)
        targets, target_logits = ([], None) if teacher is None else teacher_forward(teacher, part[0], product)
        loss = objective(config, logits, target_logits, part)
        return loss + config.states * hidden_state_loss(states, targets, metrics, product) if metrics else loss, loss

    return losses


def _update(losses: Losses, adam: optax.GradientTransformation, seen: np.ndarray, accumulate: int) -> Callable[..., Any]:
    """The compiled step: gradients added up over passes, then Adam; embeddings of unseen tokens stay."""

    @jax.jit
    def update(
        trained: ParameterTree,
        fixed: ParameterTree,
        state: Any,
        rates: Rates,
        frame: Llama,
        teacher: Llama | None,
        metrics: tuple[Array, ...],
        parts: tuple[Array, ...],
    ) -> tuple[ParameterTree, Any, Array]:
        def add(sums: Any, part: tuple[Array, ...]) -> tuple[Any, None]:
            (_, loss), gradient = jax.value_and_grad(losses, has_aux=True)(trained, fixed, frame, teacher, metrics, part)
            return jax.tree.map(jnp.add, sums, (loss, gradient)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        sums, _ = jax.lax.scan(add, zero, parts)
        value, gradient = jax.tree.map(lambda a: a / accumulate, sums)
        gradient = jax.tree.map(lambda g, rate: g * (rate > 0), gradient, rates)
        gradient = _on_embeddings(gradient, lambda n, g: g * seen)
        changes, state = adam.update(gradient, state)
        changes = _on_embeddings(changes, lambda n, change: change * row_trust(state[1].nu[n]["table"]))
        return jax.tree.map(lambda p, rate, change: p - rate * change, trained, rates, changes), state, value

    return update


def _on_embeddings(values: Any, change: Callable[[str, Array], Array]) -> ParameterTree:
    """The tree with `change` made to its embeddings."""
    return {n: {k: change(n, v) if k == "table" else v for k, v in own.items()} for n, own in values.items()}


def row_trust(second: Float[Array, "vocab n"]) -> Float[Array, "vocab 1"]:
    """How much of Adam's step every row of an embedding makes: less where gradients were small against the others'.

    Adam makes steps of one size of any gradient, so that a row seen twice would move as far on noise as the commonest on evidence.
    """
    row = jnp.mean(second, axis=1, keepdims=True)
    return jnp.sqrt(row / jnp.maximum(row + RARE * jnp.mean(row), 1e-30))
