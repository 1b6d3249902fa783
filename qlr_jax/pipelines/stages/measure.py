"""Measure: the option table with its damages, from the statistics and a few solves."""

from __future__ import annotations

from qlr_jax import sensitivity
from qlr_jax.pipelines.run import Run


def measure(run: Run) -> sensitivity.Sensitivity:
    """The option table with the predicted damage of every option, and what that follows from."""
    recipe, progress, method = run.recipe, run.progress, run.recipe.attribution
    if method == "kronecker" and not run.statistics.outputs:
        progress.say("without output Hessians damage is measured by each matrix alone")
        method = "alone"
    known = run.original, run.statistics, run.reference, run.source.prices
    config = run.settings.solver
    if run.source.backbones:
        how = {"config": config, "seed": recipe.seed, "method": method, "progress": progress, "engine": run.engine}
        return sensitivity.measure_given(*known, **how)
    return sensitivity.measure(
        *known,
        config=config,
        search=run.settings.search,
        seed=recipe.seed,
        method=method,
        progress=progress,
        solver=run.solver("probe"),
        engine=run.engine,
    )
