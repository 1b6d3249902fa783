"""How much each matrix's error matters to the model's output: one matrix changed at a time, KL measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qlr_jax.core.lazy import handle
from qlr_jax.engine import HERE, Engine, Here
from qlr_jax.evaluation import Reference, divergence
from qlr_jax.models import Llama
from qlr_jax.models.llama import shallow_copy
from qlr_jax.models.products import unpacked

TITLE = "sensitivity"  # of its pieces


def knockout(
    model: Llama,
    errors: Mapping[str, Any],
    reference: Reference,
    on_done: Callable[[str], None] | None = None,
    *,
    engine: Engine = HERE,
) -> dict[str, float]:
    """KL(original ‖ model with one matrix changed by its ΔW), nats a token, for each error; the model is left as it was.

    Args:
        model: the original.
        errors: name -> ΔW (out, in).
        reference: the original's log-probabilities.
        on_done: called with each matrix's name.
        engine: where each is measured.
    """
    logp = reference.part(0, len(reference.windows))
    known = reference.windows, logp, reference.perplexity, reference.batch
    asked = {name: engine.submit(_alone, model, name, handle(errors, name), *known, title=TITLE) for name in errors}
    kl: dict[str, float] = {}
    for name, value in engine.results(asked):
        kl[name] = value
        if on_done is not None:
            on_done(name)
    return {name: kl[name] for name in errors}


def _alone(
    model: Llama, name: str, error: np.ndarray, windows: np.ndarray, logp: np.ndarray, perplexity: float, batch: int
) -> float:
    copy = shallow_copy(model)
    weight = copy.matrices()[name].weight
    dense = unpacked(weight.get_value())
    weight.set_value((dense + np.asarray(error)).astype(dense.dtype))
    return max(divergence(copy, Reference(windows, logp, perplexity, batch), engine=Here()).kl, 0.0)
