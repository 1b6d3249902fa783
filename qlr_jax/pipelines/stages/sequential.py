"""Solve in sequence: block by block, each on what the compressed blocks before it hand on, so that no error piles up unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.calibration import Corpus
from qlr_jax.calibration.compensated import compensated_target, moments
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.objective import checked_hessian
from qlr_jax.core.solution import Solution
from qlr_jax.evaluation import divergence
from qlr_jax.models import input_of, is_linear, layer_of
from qlr_jax.models.forward import TOGETHER, through
from qlr_jax.models.llama import Block, shallow_copy
from qlr_jax.pipelines.run import Candidate, Run, with_weights
from qlr_jax.pipelines.stages.calibrate import calibration_tokens
from qlr_jax.pipelines.stages.solve import solutions_of
from qlr_jax.run.workspace import Key


def solve_in_sequence(run: Run, candidate: Candidate, text: str | Corpus) -> Candidate:
    """The candidate solved again block by block, each behind the compressed ones before it; as it was where that is no better.

    A packed embedding comes first, and stays as it is, like a packed head.

    Args:
        text: of calibration.
    """
    specs, settings = candidate.plan.specs, {"seed": run.recipe.seed, "config": run.settings.solver}
    solver = run.solver("sequential")
    linear = {name: spec for name, spec in specs.items() if is_linear(name)}
    vocabulary = {name: candidate.solutions[name] for name in specs if name not in linear}
    with run.progress.stage("compressing in sequence", total=len(linear)) as stage:

        def on_done(key: Key, solution: Solution) -> None:
            stage.advance(note=f"{key[0]} {solution.summary()}")

        def solved(problems: Mapping[Key, Any]) -> Mapping[Key, Solution]:
            return solver(problems, on_done=on_done, **settings)

        behind = with_weights(run.original, {name: solution.value for name, solution in vocabulary.items()})
        found = solve_blocks(run, linear, calibration_tokens(run.source, text), solved, behind.embed)
    found.update({(name, specs[name]): solution for name, solution in vocabulary.items()})
    again = Candidate(candidate.plan, solutions_of(specs, found))
    again = again.replace(calibration=divergence(again.parts(run.original), run.reference, engine=run.engine))
    message = f"solved in sequence the KL on the calibration text is {again.kl:.5f}, before {candidate.kl:.5f}"
    run.progress.say(message + (": kept" if again.kl < candidate.kl else ": not kept"))
    return again if again.kl < candidate.kl else candidate


def solve_blocks(
    run: Run, specs: Mapping[str, str], tokens: np.ndarray, solver: Any, embed: Callable[[jax.Array], jax.Array]
) -> LazyMap[Key, Solution]:
    """The matrices of one allocation, each solved for W* = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ in the metric E[x̂ x̂ᵀ].

    Args:
        specs: name -> spec, of one plan: another plan hands on other x̂, and is solved again.
        tokens: (sequences, time) of calibration text.
        solver: problems -> solutions.
        embed: tokens -> the hidden state that enters the first block of the compressed model.

    Source: GPTQ, arXiv 2210.17323, section 4 (inputs of compressed blocks); GPTAQ, arXiv 2504.02692 (the original's output).
    """
    model, statistics = run.original, run.statistics
    fill = -len(tokens) % min(TOGETHER, len(tokens))
    rows = np.concatenate([tokens, tokens[:fill]])  # repeats: every batch has one shape, and nothing weighs much more
    batches = np.split(rows, len(rows) // min(TOGETHER, len(tokens)))
    rope = model.rope(tokens.shape[1])
    original = [np.asarray(model.embed(jnp.asarray(batch))) for batch in batches]
    behind = [np.asarray(embed(jnp.asarray(batch))) for batch in batches]
    found: LazyMap[Key, Solution] = LazyMap()
    for i in range(model.config.num_hidden_layers):
        block, prefix = model.block(i), f"model.layers.{i}."
        original, known = moments(block, original, behind, rope)
        problems, metrics = {}, {name: checked_hessian(own, len(own)) for name, (own, _) in known.items()}
        for name in (n for n in specs if layer_of(n) == i):
            local = input_of(name).removeprefix(prefix)
            weight = compensated_target(np.asarray(statistics.weights[name]), *known[local], run.recipe.damping)
            problems[name, specs[name]] = (weight, metrics[local], specs[name], statistics.outputs.get(name), None)
        solved = solver(problems)
        found.update(solved)
        placed = _placed(block, {name.removeprefix(prefix): s.value.dense() for (name, _), s in solved.items()})
        behind = [np.asarray(through(placed, jnp.asarray(y), rope)) for y in behind]
    return found


def _placed(block: Block, weights: Mapping[str, jax.Array]) -> Block:
    copy = shallow_copy(block)
    for name, linear in copy.linears().items():
        if name in weights:
            linear.weight.set_value(weights[name].astype(linear.weight.get_value().dtype))
    return copy
