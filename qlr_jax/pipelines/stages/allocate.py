"""Allocate: which option each matrix gets under the budget, and the plans that this is compared with."""

from __future__ import annotations

import allocators
from allocators.strategies import DEFAULT, compared, job_plans, solved_strategies
from qlr_jax.pipelines.run import Run

PROVED_GAP = 1e-4  # of the predicted damage; the predictions are good to a few parts in a hundred


def allocate(run: Run, problem: allocators.Problem) -> dict[str, allocators.Allocation]:
    """The allocation of the recipe's strategy under the budget, and those that it is compared with, by name of the strategy."""
    if problem.keeps_original:
        run.progress.say(f"the original fits {problem.budget} as it is; every matrix is kept in bf16")
        rows = problem.table.rows
        kept = tuple(allocators.Row(r.name, r.weights, (allocators.Option("bf16", 2 * r.weights, 0.0),), r.counted) for r in rows)
        same = allocators.allocate(table := allocators.OptionTable(kept), table.most_bytes)
        return dict.fromkeys(solved_strategies() if run.settings.controls else (DEFAULT,), same)
    with run.progress.stage("allocating"):
        strategy, controls = run.recipe.strategy, run.settings.controls is not None
        best = compared(problem.table, problem.limit, gap=PROVED_GAP, strategy=strategy)
        return job_plans(best, strategy, controls=controls)
