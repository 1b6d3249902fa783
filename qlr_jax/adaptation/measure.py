"""Loss and weight gradients of a whole model, as it is stored, over a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.losses import objective
from qlr_jax.adaptation.sequences import Sequences
from qlr_jax.core.typing import Array
from qlr_jax.models.llama import Llama, shallow_copy


def mean_over(sequences: Sequences, batch: int, loss: Callable[[tuple[Array, ...]], Any]) -> float:
    """The mean of a loss over all sequences of a text.

    Args:
        sequences: the text.
        batch: sequences of one pass, at most.
        loss: of what `Sequences.batch` gives, a scalar.
    """
    total, batch = 0.0, min(batch, len(sequences.tokens))
    whole = len(sequences.tokens) // batch * batch
    # what is left over goes one by one, so that two shapes are compiled whatever the number of rows
    parts = [np.arange(s, s + batch) for s in range(0, whole, batch)]
    parts += [np.array([i]) for i in range(whole, len(sequences.tokens))]
    for index in parts:
        total += len(index) * float(loss(tuple(map(jnp.asarray, sequences.batch(index)))))
    return total / len(sequences.tokens)


def mean_loss(model: Llama, sequences: Sequences, config: AdaptConfig) -> float:
    """The loss of a model as it is stored, nats a token.

    Args:
        model: packed or not.
        sequences: the text.
        config: which loss, and how many sequences a pass takes.
    """
    model, teacher, of = model.densified(), sequences.resident_teacher, AdaptConfig(loss=config.loss, weight=config.weight)
    return mean_over(sequences, config.batch, lambda part: _loss(of, model, teacher, part))


@partial(jax.jit, static_argnums=0)  # compiled once for the model before and after, whatever else is set
def _loss(config: AdaptConfig, model: Llama, teacher: Llama | None, part: tuple[Array, ...]) -> Array:
    return objective(config, model(part[0]), _teacher_logits(teacher, part), part)


def weight_gradients(model: Llama, sequences: Sequences, config: AdaptConfig) -> dict[str, np.ndarray]:
    """∂loss/∂W (m, n) of every linear layer, mean over the text.

    Args:
        model: packed or not.
        sequences: the text.
        config: which loss.
    """
    model, teacher = model.densified(), sequences.resident_teacher

    def loss(weights: dict[str, Array], model: Llama, teacher: Llama | None, part: tuple[Array, ...]) -> Array:
        copy = shallow_copy(model)
        for name, linear in copy.linears().items():
            linear.weight.set_value(weights[name])
        return objective(config, copy(part[0]), _teacher_logits(teacher, part), part)

    gradient = jax.jit(jax.grad(loss))
    weights = {name: linear.weight.get_value() for name, linear in model.linears().items()}
    sums: dict[str, np.ndarray] = {name: np.zeros(w.shape, np.float32) for name, w in weights.items()}
    for i in range(len(sequences.tokens)):  # sequence by sequence: of the least memory
        part = tuple(map(jnp.asarray, sequences.batch(np.array([i]))))
        for name, g in gradient(weights, model, teacher, part).items():
            sums[name] += np.asarray(g) / len(sequences.tokens)
    return sums


def _teacher_logits(teacher: Llama | None, part: tuple[Array, ...]) -> Array | None:
    return None if teacher is None else teacher(part[0])
