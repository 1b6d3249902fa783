"""Solving block by block, each on what the compressed blocks before it hand on, so that error does not pile up unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.calibration.compensated import aimed, moments
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.objective import checked_hessian
from qlr_jax.core.solution import Solution
from qlr_jax.models import Llama, input_of, layer_of
from qlr_jax.models.forward import through
from qlr_jax.models.llama import Block
from qlr_jax.sensitivity import Statistics

BATCH = 8  # sequences of one pass


def solve_sequentially(
    model: Llama,
    specs: Mapping[str, str],
    tokens: np.ndarray,
    statistics: Statistics,
    solver: Callable[[dict[tuple[str, str], Any]], Mapping[tuple[str, str], Solution]],
    damping: float,
) -> LazyMap[tuple[str, str], Solution]:
    """The matrices of one allocation, each solved for W* = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ in the metric E[x̂ x̂ᵀ].

    Args:
        specs: name -> spec, of one plan: another plan hands on other x̂, and is solved anew.
        tokens: (sequences, time) of calibration text.
        statistics: the weights, and G of the outputs, which stay those of the original.
        solver: problems -> solutions.
        damping: of E[x̂ x̂ᵀ], in W*.

    Source: GPTQ, arXiv 2210.17323, section 4 (inputs of compressed blocks); GPTAQ, arXiv 2504.02692 (the original's output as aim).
    """
    fill = -len(tokens) % min(BATCH, len(tokens))
    rows = np.concatenate([tokens, tokens[:fill]])  # repeats: every batch has one shape, and nothing weighs much more
    batches = np.split(rows, len(rows) // min(BATCH, len(tokens)))
    rope = model.rope(tokens.shape[1])
    original = [np.asarray(model.embed(jnp.asarray(batch))) for batch in batches]
    behind = list(original)
    found: LazyMap[tuple[str, str], Solution] = LazyMap()
    for i in range(model.config.num_hidden_layers):
        block, prefix = model.block(i), f"model.layers.{i}."
        original, known = moments(block, original, behind, rope)
        problems, metrics = {}, {name: checked_hessian(own, len(own)) for name, (own, _) in known.items()}
        for name in (n for n in specs if layer_of(n) == i):
            local = input_of(name).removeprefix(prefix)
            weight = aimed(np.asarray(statistics.weights[name]), *known[local], damping)
            problems[name, specs[name]] = (weight, metrics[local], specs[name], statistics.outputs.get(name), None)
        solved = solver(problems)
        found.update(solved)
        placed = _placed(block, {name.removeprefix(prefix): s.value.dense() for (name, _), s in solved.items()})
        behind = [np.asarray(through(placed, jnp.asarray(y), rope)) for y in behind]
    return found


def _placed(block: Block, weights: Mapping[str, jax.Array]) -> Block:
    copy = jax.tree.map(lambda leaf: leaf, block)
    for name, linear in copy.linears().items():
        if name in weights:
            linear.weight.set_value(weights[name].astype(linear.weight.get_value().dtype))
    return copy
