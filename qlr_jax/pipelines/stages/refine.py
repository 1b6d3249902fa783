"""Refine: better the allocated plan by building and measuring others near it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import allocators
from allocators.strategies import DEFAULT
from qlr_jax.core.lazy import LazyMap, handle
from qlr_jax.core.solution import Solution
from qlr_jax.evaluation import Comparison, divergence
from qlr_jax.models import is_linear, kind_of, layer_of
from qlr_jax.pipelines.run import Candidate, Run
from qlr_jax.pipelines.stages.solve import solutions_of
from qlr_jax.run.workspace import Key


def refine(
    run: Run, problem: allocators.Problem, candidates: Mapping[str, Candidate]
) -> tuple[dict[str, Candidate], allocators.Refined]:
    """The candidates with the allocated one bettered where the measured KL falls, and what was tried.

    Args:
        problem: the table and the limit that every proposal keeps to.
        candidates: measured on calibration text; proposals start from all of them but quick controls.
    """
    known = {name: candidates[name] for name in candidates if name == DEFAULT or run.recipe.controls == "full"}
    solved: LazyMap[Key, Solution] = LazyMap()
    measured: dict[tuple[tuple[str, str], ...], Comparison] = {}
    for candidate in known.values():
        assert candidate.calibration is not None, "candidates are measured before they are refined"
        solved.update(LazyMap(candidate.plan.specs.items(), _Solved(candidate.solutions)))
        measured[tuple(candidate.plan.specs.items())] = candidate.calibration

    def measure(specs: Mapping[str, str]) -> float:
        key = tuple(specs.items())
        if key not in measured:
            missing = {item: run.statistics.problem(*item) for item in specs.items() if item not in solved}
            solved.update(run.solver("final")(missing, seed=run.recipe.seed, config=run.settings.solver))
            trial = Candidate(known[DEFAULT].plan, solutions_of(specs, solved))
            measured[key] = divergence(trial.parts(run.original), run.reference, engine=run.engine)
        return measured[key].kl

    groups: dict[str, set[str]] = {}
    for name in problem.table.index:
        groups.setdefault(f"kind {kind_of(name)}", set()).add(name)
        if is_linear(name):
            groups.setdefault(f"layer {layer_of(name)}", set()).add(name)
    start, others = known[DEFAULT].plan, [c.plan for name, c in known.items() if name != DEFAULT]
    # plans of the same specs are one candidate: a second must not give room for another trial
    distinct = [plan for i, plan in enumerate(others) if plan.specs not in [start.specs, *(other.specs for other in others[:i])]]
    with run.progress.stage("refining", total=run.recipe.refine) as stage:
        found = allocators.refine(
            problem.table,
            start,
            problem.limit,
            measure,
            groups=groups,
            evaluations=run.recipe.refine + 1 + len(distinct),
            seconds=run.recipe.refine_seconds,
            candidates=distinct,
            on_measured=lambda proposal, kl, kept: stage.advance(note=f"{proposal}: KL {kl:.5f}" + (", kept" if kept else "")),
        )
    if found.allocation in (start, *others):  # one of the others is delivered as what it is
        return dict(candidates), found
    plan = dataclasses.replace(found.allocation, baselines=start.baselines)
    better = Candidate(plan, solutions_of(plan.specs, solved), measured[tuple(plan.specs.items())])
    return {**candidates, DEFAULT: better}, found


@dataclasses.dataclass(frozen=True)
class _Solved:
    """What a candidate has solved, by matrix and spec."""

    solutions: Mapping[str, Solution]

    def __call__(self, key: Key) -> Solution:
        return self.solutions[key[0]]

    def stands_for(self, key: Key) -> Any:
        return handle(self.solutions, key[0])
