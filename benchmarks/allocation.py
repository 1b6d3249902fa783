"""Rank and bits chosen together, against the best uniform spec and against bits alone, at several sizes of the bundled model.

    python benchmarks/allocation.py                                  2.0, 2.25, 2.5, 3.0 bits a weight, three seeds: the table
    python benchmarks/allocation.py --budgets 2.25bpw --seeds 0 --refine 12
    python benchmarks/allocation.py --read allocation.json --picture docs/sizes.png

Everything is as in `qlr demo`, the options' table measured once a seed (seeds are of the rotations' signs and of all samples). KL
in nats a token on held-out text; the ratio columns are means over seeds of ratios within a seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import allocators
from allocators.strategies import BASELINE, CONTROL, DEFAULT, STRATEGIES, solved_strategies
from qlr_jax import calibration, evaluation
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.pipelines.run import Run
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages import allocate, calibrate, evaluate_on_calibration, measure, refine, solve_plans
from qlr_jax.progress import plain
from qlr_jax.report.content.allocation import rank_line
from qlr_jax.settings.recipe import DEMO

MODELS = solved_strategies()


@one_blas_thread()
def run(seed: int, budgets: list[str], refinements: int, state_bits: int | None, tokens: int) -> list[dict]:
    """One seed: every budget's three models, measured."""
    recipe, progress = DEMO.updated(seed=seed, refine=refinements, refine_seconds=3600.0), plain(every=60)
    if state_bits:
        recipe = recipe.updated(state_bits=state_bits, search_state_bits=state_bits)
    start = time.perf_counter()
    source = open_source("bundled", recipe)
    statistics, sample = calibrate(source, calibration.standard_library("calibration"), progress)
    calibrated = time.perf_counter() - start
    cache = {}
    job = Run(source, statistics, sample, progress, lambda kind: partial(solve_many, into=cache))
    table = measure(job).table
    measured = time.perf_counter() - start - calibrated
    windows = evaluation.windows(calibration.standard_library("heldout"), source.tokenizer, 256)
    held_out = evaluation.reference(source.model, calibration.subsample(windows, tokens))
    records = []
    for budget in budgets:
        start = time.perf_counter()
        problem = allocators.Budget.parse(budget).on(table)
        candidates = evaluate_on_calibration(job, solve_plans(job, allocate(job, problem)))
        solved = time.perf_counter() - start
        first = candidates[DEFAULT]
        refined = None
        if refinements:
            candidates, refined = refine(job, problem, candidates)
            candidates["unrefined"] = first
        record = {"seed": seed, "budget": budget, "seconds": {"calibrate": calibrated, "measure": measured, "solve": solved}}
        record |= {"gap": first.plan.gap, "status": first.plan.status.value, "models": {}}
        for name, candidate in candidates.items():
            plan, found = candidate.plan, evaluation.divergence(candidate.model(source.model), held_out)
            record["models"][name] = {
                "bits_per_weight": plan.bits_per_weight,
                "damage": plan.damage,
                "calibration_kl": candidate.kl,
                "kl": found.kl,
                "perplexity": found.perplexity,
                "perplexity_original": found.perplexity_original,
                "agreement": found.agreement,
                "specs": dict(plan.specs),
            }
        record["ranks"] = rank_line([{"name": n, "spec": s} for n, s in candidates[DEFAULT].plan.specs.items()])
        if refined is not None:
            record["refined"] = {
                "gained": refined.gained,
                "tried": refined.tried,
                "accepted": refined.accepted,
                "seconds": refined.seconds,
            }
        records.append(record)
        told = {name: round(m["kl"], 5) for name, m in record["models"].items()}
        print(f"seed {seed}, {budget}: {told}; {record['ranks']}; {record.get('refined', '')}", flush=True)
    return records


def table_of(records: list[dict]) -> str:
    """The table of RESULTS.md, in Markdown."""
    labels = [STRATEGIES[name].label for name in MODELS]
    lines = [
        "| " + " | ".join(["bits a weight", *labels, *(f"{labels[0]} / {label}" for label in labels[1:])]) + " |",
        "|---" * (2 * len(labels)) + "|",
    ]
    for budget in dict.fromkeys(r["budget"] for r in records):
        part = [r["models"] for r in records if r["budget"] == budget]

        def told(values: list[float], digits: int) -> str:
            return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

        cells = [told([m[name]["kl"] for m in part], 4) for name in MODELS]
        cells += [told([m[DEFAULT]["kl"] / m[name]["kl"] for m in part], 3) for name in MODELS[1:]]
        lines.append(f"| {budget.removesuffix('bpw')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(records: list[dict], path: Path) -> None:
    """KL against size, every seed a mark, lines through the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=150)
    styles = {DEFAULT: ("o", "#0b57a4"), BASELINE: ("s", "#8a8a8a"), CONTROL: ("^", "#c25a00")}
    for name, (mark, colour) in reversed(styles.items()):
        label = STRATEGIES[name].label
        points = [(r["models"][name]["bits_per_weight"], r["models"][name]["kl"], r["budget"]) for r in records]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], mark, color=colour, alpha=0.45, markersize=5)
        means = [
            (mean(x for x, _, b in points if b == budget), mean(y for _, y, b in points if b == budget))
            for budget in dict.fromkeys(b for _, _, b in points)
        ]
        axes.plot(*zip(*means, strict=True), color=colour, linewidth=1.6, label=label, marker=mark, markersize=7)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, as stored")
    axes.set_ylabel("KL from the original, nats a token (held-out)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--budgets", nargs="+", default=["2.0bpw", "2.25bpw", "2.5bpw", "3.0bpw"])
    parse.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parse.add_argument("--refine", type=int, default=0, help="allocations tried by measuring; the unrefined one is reported beside")
    parse.add_argument("--state-bits", type=int, help="of the trellis, other than the demo's")
    parse.add_argument("--tokens", type=int, default=32768, help="of held-out text, on which KL is measured")
    parse.add_argument("--out", type=Path, default=Path("allocation.json"))
    parse.add_argument("--read", type=Path, nargs="+", help="records of earlier runs, in place of a run")
    parse.add_argument("--picture", type=Path)
    args = parse.parse_args()
    records = [record for path in args.read or () for record in json.loads(path.read_text())["records"]]
    for seed in () if args.read else args.seeds:
        records += run(seed, args.budgets, args.refine, args.state_bits, args.tokens)
        machine = {"machine": platform.machine(), "python": platform.python_version()}
        args.out.write_text(
            json.dumps({"arguments": vars(args) | {"out": str(args.out)}, **machine, "records": records}, default=str)
        )
    print(table_of(records))
    if args.picture:
        picture(records, args.picture)


if __name__ == "__main__":
    main()
