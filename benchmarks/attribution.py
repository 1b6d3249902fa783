"""How well each way of attributing KL to matrices predicts the KL of whole allocations, on the bundled model.

    python benchmarks/attribution.py                       60 random allocations at each of 2.0, 2.5 and 3.0 bits a weight
    python benchmarks/attribution.py --allocations 10 --state-bits 6     a quick look

Every matrix is solved with every option of a small grid (rates, with and without rank). Random allocations of one size, within 0.01
bits a weight, are put together from these and their KL is measured on held-out text. Prediction: Σ KL(probe) · (error(option) /
error(probe))² over matrices, with the errors as solved, so that nothing but the attribution is judged; `pairs` adds the
interactions of all pairs, 2 Σ_{i<j} ρ_ij √d_i √d_j. Reported: Spearman's rank correlation, and measured over predicted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import allocators
from benchmarks.interactions.gram import gram_matrix
from qlr_jax import calibration, evaluation
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.spec import Spec
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages import calibrate
from qlr_jax.progress import plain
from qlr_jax.sensitivity import ATTRIBUTIONS, PROBE, Attribution, Case, attribute, final_error
from qlr_jax.settings.recipe import DEMO

RATES = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4)
WITH_RANK = (1.25, 1.75, 2.25, 2.75, 3.5)
SIZES = (2.0, 2.5, 3.0)


def grid() -> list[str]:
    """The options of every matrix."""
    return [f"trellis-{rate:g}" for rate in RATES] + [f"trellis-{rate:g}+r8@trellis-2" for rate in WITH_RANK]


@one_blas_thread()
def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--allocations", type=int, default=60, help="random allocations of each size")
    parse.add_argument("--state-bits", type=int, default=8)
    parse.add_argument("--tokens", type=int, default=8192, help="of held-out text, on which KL is measured")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--out", type=Path, default=Path("attribution.json"))
    args = parse.parse_args()
    progress, recipe = plain(every=30), DEMO.updated(state_bits=args.state_bits, seed=args.seed)
    source = open_source("bundled", recipe)
    statistics, sample = calibrate(source, calibration.standard_library("calibration"), progress)
    text = evaluation.windows(calibration.standard_library("heldout"), source.tokenizer, 256)
    held_out = evaluation.reference(source.model, calibration.subsample(text, args.tokens))

    names, config = list(source.weights), source.settings.solver
    problems = {(name, spec): statistics.problem(name, spec) for spec in grid() for name in names}
    start = time.perf_counter()
    with progress.stage("solving", total=len(problems)) as stage:
        solved = solve_many(problems, seed=args.seed, config=config, on_done=lambda key, _: stage.advance(note=" ".join(key)))
    print(f"{len(problems)} solves in {time.perf_counter() - start:.0f} s")
    weighted = {key: final_error(s) for key, s in solved.items()}
    local = {key: s.stats["relative_error"] for key, s in solved.items()}
    dense = {key: np.asarray(s.value.dense()) for key, s in solved.items()}

    case = Case(
        source.model, {n: dense[n, PROBE] - source.weights[n] for n in names}, sample, statistics.hessians, statistics.outputs
    )
    found, seconds = {}, {}
    for method in ATTRIBUTIONS:
        start = time.perf_counter()
        found[method] = attribute(method, case, seed=args.seed)
        seconds[method] = time.perf_counter() - start
        print(f"{method}: {seconds[method]:.1f} s", flush=True)
    gram = gram_matrix(source.model, case.errors, sample.windows)

    rows = tuple(
        allocators.Row(n, w.size, tuple(allocators.Option(s, Spec.parse(s).nbytes(w.shape), 0.0) for s in grid()))
        for n, w in source.weights.items()
    )
    table = allocators.OptionTable(rows)
    records = []
    for size in SIZES:
        limit = allocators.Budget.parse(f"{size}bpw").on(table).limit
        seeds = itertools.count()
        while sum(r["size"] == size for r in records) < args.allocations:
            plan = allocators.random(table, limit, seed := next(seeds))
            if abs(plan.bits_per_weight - size) > 0.01:
                continue
            model = changed(source.model, {n: dense[n, s] for n, s in plan.specs.items()})
            kl = evaluation.divergence(model, held_out).kl
            records.append({"size": size, "seed": seed, "kl": kl} | predictions(plan.specs, found, weighted, local, gram))
        print(f"{size} bits a weight: measured", flush=True)

    columns = [name for name in records[0] if name not in ("size", "seed", "kl")]
    print(
        f"\n{'attribution':22}{'seconds':>8}"
        + "".join(f"{f'ρ at {s}':>9}" for s in SIZES)
        + "   measured / predicted, median (p10 to p90)"
    )
    summary = {}
    for name in columns:
        line, summary[name] = f"{name:22}{seconds[name.split(' ')[0]]:8.1f}", {}
        ratios = []
        for size in SIZES:
            part = [r for r in records if r["size"] == size]
            rho = float(spearmanr([r[name] for r in part], [r["kl"] for r in part]).statistic)
            ratio = np.quantile([r["kl"] / r[name] for r in part], [0.5, 0.1, 0.9]).tolist()
            summary[name][size] = {"spearman": rho, "ratio": ratio}
            line += f"{rho:9.3f}"
            ratios.append(f"{ratio[0]:.3g} ({ratio[1]:.3g} to {ratio[2]:.3g})")
        print(line + "   " + "; ".join(ratios))
    args.out.write_text(json.dumps({"arguments": vars(args) | {"out": str(args.out)}, "summary": summary, "records": records}))


def predictions(
    specs: dict[str, str],
    found: dict[str, Attribution],
    weighted: dict[tuple[str, str], float],
    local: dict[tuple[str, str], float],
    gram: np.ndarray,
) -> dict[str, float]:
    """Predicted KL of an allocation by every method; that of the second order with the interactions of pairs as well."""
    out = {}
    for method, attribution in found.items():
        error = local if method == "error" else weighted
        damage = np.array([attribution.kl[n] * (error[n, s] / error[n, PROBE]) ** 2 for n, s in specs.items()])
        out[method] = float(damage.sum())
        if method == "second-order":
            size = np.sqrt(np.diagonal(gram))
            correlation = gram / np.outer(size, size)
            out[f"{method} + pairs"] = float(np.sqrt(damage) @ correlation @ np.sqrt(damage))
    return out


def changed(model, weights):
    """A copy of the model with these weights."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    linears = copy.linears()
    for name, weight in weights.items():
        linears[name].weight.set_value(weight.astype(linears[name].weight.get_value().dtype))
    return copy


if __name__ == "__main__":
    main()
