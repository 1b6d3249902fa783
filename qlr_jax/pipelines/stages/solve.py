"""Solve: every matrix for every spec that a plan asks for."""

from __future__ import annotations

from collections.abc import Mapping

import allocators
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.solution import Solution
from qlr_jax.pipelines.run import Candidate, Run
from qlr_jax.run.workspace import Key


def solve_plans(run: Run, plans: Mapping[str, allocators.Allocation]) -> dict[str, Candidate]:
    """Every (matrix, spec) of these plans solved once, and the candidates that are made of them."""
    wanted = dict.fromkeys((name, spec) for plan in plans.values() for name, spec in plan.specs.items())
    problems = {key: run.statistics.problem(*key) for key in wanted}
    with run.progress.stage("compressing", total=len(problems)) as stage:

        def on_done(key: Key, solution: Solution) -> None:
            stage.advance(note=f"{key[0]} {solution.summary()}")

        solved = run.solver("final")(problems, seed=run.recipe.seed, config=run.settings.solver, on_done=on_done)
    return {name: Candidate(plan, solutions_of(plan.specs, solved)) for name, plan in plans.items()}


def solutions_of(specs: Mapping[str, str], solved: Mapping[Key, Solution]) -> LazyMap[str, Solution]:
    """The solutions of one plan's specs by matrix, each looked up when it is used."""
    return LazyMap(specs, lambda name: solved[name, specs[name]])
