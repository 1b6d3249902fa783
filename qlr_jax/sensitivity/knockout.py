"""How much each matrix's error matters to the model's output: one matrix changed at a time, KL measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qlr_jax.evaluation import Reference, divergence
from qlr_jax.models import Llama


def knockout(
    model: Llama, errors: Mapping[str, np.ndarray], reference: Reference, on_done: Callable[[str], None] | None = None
) -> dict[str, float]:
    """KL(original ‖ model with one linear layer changed by its ΔW), nats a token, for each of `errors` (name -> (out, in)).

    The model is left as it was.
    """
    found: dict[str, float] = {}
    linears = model.linears()
    for name, error in errors.items():
        weight = linears[name].weight
        kept = weight.get_value()
        held = kept.dense() if hasattr(kept, "dense") else kept
        weight.set_value((held + error).astype(held.dtype))
        try:
            found[name] = max(divergence(model, reference).kl, 0.0)
        finally:
            weight.set_value(kept)
        if on_done is not None:
            on_done(name)
    return found
