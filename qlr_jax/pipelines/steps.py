"""The steps of a job, each a function of what the ones before it found: allocate, solve, refine, solve in sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import jax
import numpy as np

import allocators
from qlr_jax.core.batch import solve_many
from qlr_jax.core.lazy import Lazy, LazyMap
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.solution import Solution
from qlr_jax.evaluation import Comparison, Reference, divergence
from qlr_jax.models import Llama, kind_of, layer_of
from qlr_jax.pipelines.preparation import solver_config
from qlr_jax.pipelines.sequential import solve_sequentially
from qlr_jax.progress import Progress
from qlr_jax.sensitivity import Statistics
from qlr_jax.settings.recipe import Recipe

PROVED_GAP = 1e-4  # of the predicted damage; the predictions are good to a few parts in a hundred
CANDIDATES = ("allocated", "uniform", "rank0")
Solutions = MutableMapping[tuple[str, str], Solution]
"""(matrix, spec) -> its solution; where they lie on a disk, each is read when it is used (`LazyMap`)."""
Solver = Callable[..., Solutions]
"""`solve_many`, or what calls it."""


def allocate(problem: allocators.Problem, progress: Progress) -> dict[str, allocators.Allocation]:
    """The allocation under the budget, and what it is compared with: the best uniform spec, and rank 0 at the same bytes."""
    if problem.keeps_original:
        progress.say(f"the original fits {problem.budget} as it is; every matrix is kept in bf16")
        rows = problem.table.rows
        kept = tuple(allocators.Row(r.name, r.weights, (allocators.Option("bf16", 2 * r.weights, 0.0),), r.counted) for r in rows)
        same = allocators.allocate(table := allocators.OptionTable(kept), table.most_bytes)
        return dict.fromkeys(CANDIDATES, same)
    with progress.stage("allocating"):
        best = allocators.compared(problem.table, problem.limit, gap=PROVED_GAP)
    return {"allocated": best} | {name: best.baselines[name] for name in CANDIDATES if name in best.baselines}


def solve(
    plans: Iterable[allocators.Allocation],
    solutions: Solutions,
    statistics: Statistics,
    recipe: Recipe,
    progress: Progress,
    solver: Solver = solve_many,
) -> None:
    """Every (matrix, spec) that any plan wants and that `solutions` lacks, solved and put there."""
    wanted = dict.fromkeys((name, spec) for plan in plans for name, spec in plan.specs.items())
    problems = {key: statistics.problem(*key) for key in wanted if key not in solutions}
    with progress.stage("compressing", total=len(problems)) as stage:

        def on_done(key: tuple[str, str], solution: Solution) -> None:
            stage.advance(note=f"{key[0]} {solution.told()}")

        solutions.update(solver(problems, seed=recipe.seed, config=solver_config(recipe), on_done=on_done))


def refine(
    problem: allocators.Problem,
    plans: dict[str, allocators.Allocation],
    judged: dict[str, Comparison],
    solutions: Solutions,
    original: Llama,
    sample: Reference,
    statistics: Statistics,
    recipe: Recipe,
    progress: Progress,
    solver: Solver = solve_many,
) -> allocators.Refined:
    """Better the allocated plan by measuring others near it; `plans`, `judged` and `solutions` are brought up to date."""
    known = {tuple(plan.specs.items()): judged[name] for name, plan in plans.items()}
    config = solver_config(recipe)

    def measure(specs: Mapping[str, str]) -> float:
        key = tuple(specs.items())
        if key not in known:
            missing = {(n, s): statistics.problem(n, s) for n, s in specs.items() if (n, s) not in solutions}
            solutions.update(solver(missing, seed=recipe.seed, config=config))
            known[key] = divergence(with_weights(original, chosen(specs, solutions)), sample)
        return known[key].kl

    groups: dict[str, set[str]] = {}
    for name in problem.table.index:
        groups.setdefault(f"kind {kind_of(name)}", set()).add(name)
        groups.setdefault(f"layer {layer_of(name)}", set()).add(name)
    others = [plan for name, plan in plans.items() if name != "allocated"]
    with progress.stage("refining", total=recipe.refine) as stage:
        found = allocators.refine.refine(
            problem.table,
            plans["allocated"],
            problem.limit,
            measure,
            groups=groups,
            evaluations=recipe.refine + len(plans),
            seconds=recipe.refine_seconds,
            candidates=others,
            on_measured=lambda proposal, kl, kept: stage.advance(note=f"{proposal}: KL {kl:.5f}" + (", kept" if kept else "")),
        )
    if found.allocation not in others:
        plans["allocated"] = dataclasses.replace(found.allocation, baselines=plans["allocated"].baselines)
        judged["allocated"] = known[tuple(found.allocation.specs.items())]
    return found


def resolve(
    plan: allocators.Allocation,
    judged: dict[str, Comparison],
    name: str,
    tokens: np.ndarray,
    original: Llama,
    sample: Reference,
    statistics: Statistics,
    recipe: Recipe,
    progress: Progress,
    solver: Solver = solve_many,
) -> Solutions:
    """The plan solved again block by block, each behind the compressed ones before it; nothing where that is no better."""
    config = solver_config(recipe)
    with progress.stage("compressing in sequence", total=len(plan.specs)) as stage:

        def solved(problems: Any) -> Solutions:
            on_done = lambda key, solution: stage.advance(note=f"{key[0]} {solution.told()}")  # noqa: E731
            return solver(problems, seed=recipe.seed, config=config, on_done=on_done)

        found = solve_sequentially(original, plan.specs, tokens, statistics, solved, recipe.damping)
    after = divergence(with_weights(original, chosen(plan.specs, found)), sample)
    before = judged[name]
    told = f"solved in sequence the KL on the calibration text is {after.kl:.5f}, before {before.kl:.5f}"
    progress.say(told + (": kept" if after.kl < before.kl else ": not kept"))
    if after.kl >= before.kl:
        return LazyMap()
    judged[name] = after
    return found


def chosen(specs: Mapping[str, str], solutions: Solutions) -> LazyMap[str, QLRMatrix]:
    """The compressed matrices of one plan, each taken from its solution when it is used."""
    return LazyMap(specs, lambda name: solutions[name, specs[name]].value)


def with_weights(model: Llama, matrices: Mapping[str, QLRMatrix]) -> Llama:
    """A copy of the model with these matrices decoded in place of its own; everything else is shared.

    Where a model's weight stays on disk, the matrix is looked up, and decoded, whenever the weight is used.
    """
    copy: Llama = jax.tree.map(lambda leaf: leaf, model)
    linears = copy.linears()
    for name in matrices:
        weight = linears[name].weight
        held = weight.get_value()
        if isinstance(held, Lazy):
            weight.set_value(Lazy(held.shape, lambda name=name: matrices[name].dense(), held.dtype))
        else:
            weight.set_value(matrices[name].dense().astype(held.dtype))
    return copy
