"""How much each matrix's error matters to the model's output: one matrix compressed at a time, KL measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qlr_jax.core.typing import Array
from qlr_jax.evaluation import Reference, divergence
from qlr_jax.models import Llama


def knockout(
    model: Llama, replacements: Mapping[str, Array], reference: Reference, on_done: Callable[[str], None] | None = None
) -> dict[str, float]:
    """KL(original ‖ model with one linear layer replaced), nats a token, for each of `replacements` (name -> Ŵ (out, in)).

    The model is left as it was. Small errors add up in KL nearly linearly (HIGGS, arXiv 2411.17525, theorem 1), so a KL
    measured at one error gives a coefficient for every other error of that matrix.
    """
    found: dict[str, float] = {}
    linears = model.linears()
    for name, dense in replacements.items():
        weight = linears[name].weight
        kept = weight.get_value()
        weight.set_value(dense.astype(kept.dtype))
        try:
            found[name] = max(divergence(model, reference).kl, 0.0)
        finally:
            weight.set_value(kept)
        if on_done is not None:
            on_done(name)
    return found
