"""How much each matrix's error matters to the model's output: one matrix changed at a time, KL measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qlr_jax.evaluation import Reference, divergence
from qlr_jax.models import Llama
from qlr_jax.models.products import unpacked


def knockout(
    model: Llama, errors: Mapping[str, np.ndarray], reference: Reference, on_done: Callable[[str], None] | None = None
) -> dict[str, float]:
    """KL(original ‖ model with one matrix changed by its ΔW), nats a token, for each error; the model is left as it was.

    Args:
        model: the original.
        errors: name -> ΔW (out, in).
        reference: the original's log-probabilities.
        on_done: called with each matrix's name.
    """
    kl: dict[str, float] = {}
    matrices = model.matrices()
    for name, error in errors.items():
        weight = matrices[name].weight
        original = weight.get_value()
        dense = unpacked(original)
        weight.set_value((dense + error).astype(dense.dtype))
        try:
            kl[name] = max(divergence(model, reference).kl, 0.0)
        finally:
            weight.set_value(original)
        if on_done is not None:
            on_done(name)
    return kl
