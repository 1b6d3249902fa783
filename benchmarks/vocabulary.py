"""A packed embedding and head against ones in bf16, at the same bytes of the whole model.

    python benchmarks/vocabulary.py MODEL --calibration web.txt --held-out wiki.txt --budgets 5bpw:all 4.5bpw:all
    python benchmarks/vocabulary.py MODEL ... --recipe light.yaml --table table.json --json vocabulary.json

Each budget is allocated twice from one table of options: with embedding and head among its rows, and with both kept in bf16, so
that the linear layers get what is left. KL in nats a token and perplexity on held-out text. MODEL is anything that `qlr compress`
takes; a table is what `qlr sensitivity` wrote for it (else it is measured first), of which the recipe's ranks are taken.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import allocators
from allocators.strategies import DEFAULT
from qlr_jax import calibration, evaluation
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.pipelines.run import Run
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages import allocate, calibrate, measure, solve_plans
from qlr_jax.pipelines.stages.select import held_out_rows
from qlr_jax.pipelines.texts import Texts
from qlr_jax.progress import plain
from qlr_jax.settings.recipe import Recipe


def variants(table: allocators.OptionTable, budget: str) -> dict[str, allocators.Problem | None]:
    """The budget put to all options, and to those that keep embedding and head in bf16; None where that cannot be."""
    kept = table.restrict(lambda row, option: row.counted or option.spec == "bf16", "keeping embedding and head")
    found: dict[str, allocators.Problem | None] = {"packed": allocators.Budget.parse(budget).on(table)}
    try:
        found["bf16"] = allocators.Budget.parse(budget).on(kept)
    except allocators.AllocationError:
        found["bf16"] = None
    return found


@one_blas_thread()
def run(model: str, recipe: Recipe, texts: Texts, budgets: list[str], saved: str | None) -> list[dict]:
    """Every budget's two models, solved and measured."""
    progress, start = plain(every=60), time.perf_counter()
    source = open_source(model, recipe, whole=True)
    statistics, sample = calibrate(source, texts.calibration, progress)
    cache: dict = {}
    job = Run(source, statistics, sample, progress, lambda kind: partial(solve_many, into=cache))
    table = allocators.OptionTable.from_json(Path(saved).read_text()) if saved else measure(job).table
    table = table.restrict(lambda row, option: option.rank in recipe.ranks, "the recipe's ranks")
    assert texts.held_out is not None, "an option that is required"
    windows = held_out_rows(job, texts.held_out)
    held_out = evaluation.reference(source.model, calibration.subsample(windows, recipe.evaluation_tokens))
    prepared, records = time.perf_counter() - start, []
    for budget in budgets:
        for name, problem in variants(table, budget).items():
            if problem is None:
                records.append({"budget": budget, "vocabulary": name, "fits": False})
                continue
            start = time.perf_counter()
            plan = allocate(job, problem)[DEFAULT]
            candidate = solve_plans(job, {DEFAULT: plan})[DEFAULT]
            found = evaluation.divergence(candidate.model(source.model), held_out)
            own = {row.name: plan.specs[row.name] for row in table.rows if not row.counted}
            whole = plan.bytes + table.model.fixed_bytes
            records.append({
                "budget": budget, "vocabulary": name, "fits": True, "bytes": whole,
                "linear_bits": plan.bits_per_weight, "specs": own,
                "predicted": plan.damage, "kl": found.kl, "perplexity": found.perplexity,
                "perplexity_original": found.perplexity_original, "agreement": found.agreement,
                "seconds": {"prepare": prepared, "solve and measure": time.perf_counter() - start},
            })  # fmt: skip
            print(line(records[-1]), flush=True)
    return records


def line(record: dict) -> str:
    """One row of the table."""
    head = f"{record['budget']:>12}  {record['vocabulary']:>7}"
    if not record["fits"]:
        return f"{head}  does not fit"
    specs = ", ".join(record["specs"].values())
    return (
        f"{head}  {record['bytes'] / 1e6:8.2f} MB  {record['linear_bits']:7.4f}  {record['kl']:8.4f}  {record['predicted']:9.4f}  "
        f"{record['perplexity']:10.3f}  {record['perplexity_original']:8.3f}  {specs}"
    )


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", default=["5bpw:all"])
    parser.add_argument("--recipe")
    parser.add_argument("--table")
    parser.add_argument("--json")
    given = parser.parse_args()
    if missing := [path for path in (*given.calibration, *given.held_out) if not Path(path).exists()]:
        sys.exit(f"{missing[0]} is not there, so nothing is measured")
    recipe = Recipe.of(given.recipe)
    records = run(given.model, recipe, Texts.read(given.calibration, given.held_out), given.budgets, given.table)
    head = f"{'budget':>12}  {'vocab.':>7}  {'whole model':>11}  {'linear':>7}  {'KL':>8}  {'predicted':>9}  {'perplexity':>10}"
    print(f"\n{head}  original  embedding, head")
    print("\n".join(map(line, records)))
    if given.json:
        facts = {"machine": platform.machine(), "command": sys.argv, "recipe": recipe.to_yaml()}
        Path(given.json).write_text(json.dumps(facts | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
