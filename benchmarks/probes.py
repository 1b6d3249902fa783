"""How many matrices need be solved with factors before predictions of the others are as good, on the bundled model.

    python benchmarks/probes.py                        100, 21 and 7 matrices at most
    python benchmarks/probes.py --solved 40            a quick look

The demo's recipe is measured with so many anchored matrices (`sensitivity.anchors.ANCHORED`); one of each kind always is. A random
sample of options is then solved, and compared with what was predicted for it: Spearman's rank correlation of the relative errors
over all of them and, the median over matrices, over the options of a matrix; 10th, 50th and 90th percentile of solved over
predicted; CPU seconds of the probing.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax import calibration
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.pipelines.run import Run
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages import calibrate, measure
from qlr_jax.progress import plain
from qlr_jax.report.terminal.columns import columns
from qlr_jax.sensitivity import anchors, final_error
from qlr_jax.settings.host import prepare
from qlr_jax.settings.recipe import DEMO


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@one_blas_thread()
def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--anchored", type=int, nargs="+", default=[100, 21, 7])
    parse.add_argument("--solved", type=int, default=300, help="options of the sample")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--json", type=Path)
    args = parse.parse_args()
    prepare()
    source = open_source("bundled", DEMO.updated(seed=args.seed))
    run = Run(source, *calibrate(source, calibration.standard_library("calibration"), plain(every=30)))
    draw = np.random.default_rng(args.seed)
    options = [(row.name, option.spec) for row in source.prices.rows for option in row.options if "+r" in option.spec]
    sample = [options[i] for i in draw.choice(len(options), args.solved, replace=False)]
    problems = {key: run.statistics.problem(*key) for key in sample}
    solved = {k: final_error(s) for k, s in solve_many(problems, seed=args.seed, config=source.settings.solver).items()}
    measure(run)  # compiles what is timed below
    found = []
    for count in args.anchored:
        anchors.ANCHORED = count
        before = cpu()
        table = measure(run)
        seconds = cpu() - before
        known = {(row.name, option.spec) for row in table.table.rows for option in row.options if option.measured}
        left = [key for key in sample if key not in known]
        one, two = np.array([table.error(*key) for key in left]), np.array([solved[key] for key in left])
        own = [np.flatnonzero([key[0] == name for key in left]) for name in dict(left)]
        within = [spearmanr(one[at], two[at])[0] for at in own if len(at) > 3]
        low, middle, high = np.quantile(two / one, [0.1, 0.5, 0.9])
        ratios = {"p10": low, "p50": middle, "p90": high}
        facts = {"anchored": count, "solves": len(anchors.solved_first(source.prices)), "cpu": seconds, "left": len(left)}
        found.append(facts | {"over all": spearmanr(one, two)[0], "within": float(np.nanmedian(within))} | ratios)
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(columns(list(found[0]), [[f"{value:.4g}" for value in line.values()] for line in found]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
