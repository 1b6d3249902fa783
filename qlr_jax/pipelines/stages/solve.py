"""Solve: every matrix for every spec that a plan asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import allocators
from allocators.strategies import DEFAULT
from qlr_jax.core.lazy import LazyMap, handle
from qlr_jax.core.solution import Solution
from qlr_jax.pipelines.run import Candidate, Run
from qlr_jax.run.workspace import Key

Specs = tuple[Key, ...]


def solve_plans(run: Run, plans: Mapping[str, allocators.Allocation]) -> dict[str, Candidate]:
    """Every (matrix, spec) of these plans solved once, and the candidates that are made of them.

    Plans of the same specs share their solutions. Controls that the recipe wants quick are solved for themselves, with fewer state
    bits, unless they are the plan that is delivered.
    """
    specs = {name: tuple(plan.specs.items()) for name, plan in plans.items()}
    quick = run.settings.controls not in (None, run.settings.solver)
    apart = {name for name in plans if quick and specs[name] != specs[DEFAULT]}
    solutions: dict[Specs, LazyMap[str, Solution]] = {}
    for kind, names in (("final", [name for name in plans if name not in apart]), ("control", [n for n in plans if n in apart])):
        if names:
            solved = _solved(run, kind, dict.fromkeys(key for name in names for key in specs[name]))
            solutions |= {specs[name]: solutions_of(plans[name].specs, solved) for name in names}
    return {name: Candidate(plan, solutions[specs[name]]) for name, plan in plans.items()}


def _solved(run: Run, kind: str, wanted: Mapping[Key, None]) -> Mapping[Key, Solution]:
    problems = {key: run.statistics.problem(*key) for key in wanted}
    config = run.settings.solver if kind == "final" else run.settings.controls
    assert config is not None, "controls are planned only where they are solved"
    with run.progress.stage("compressing" if kind == "final" else "compressing controls, quickly", total=len(problems)) as stage:

        def on_done(key: Key, solution: Solution) -> None:
            stage.advance(note=f"{key[0]} {solution.summary()}")

        return run.solver(kind)(problems, seed=run.recipe.seed, config=config, on_done=on_done)


def solutions_of(specs: Mapping[str, str], solved: Mapping[Key, Solution]) -> LazyMap[str, Solution]:
    """The solutions of one plan's specs by matrix, each looked up when it is used."""
    return LazyMap(specs, _Named(specs, solved))


@dataclass(frozen=True)
class _Named:
    specs: Mapping[str, str]
    solved: Mapping[Key, Solution]

    def __call__(self, name: str) -> Solution:
        return self.solved[name, self.specs[name]]

    def stands_for(self, name: str) -> Any:
        return handle(self.solved, (name, self.specs[name]))
