"""What each part of the solver is worth: one setting changed at a time, on the matrices of the bundled model, at the same bytes.

    python benchmarks/ablation.py                                  the table of RESULTS.md: minutes on a CPU
    python benchmarks/ablation.py --specs trellis-2+r8@trellis-4   one spec
    python benchmarks/ablation.py --json ablation.json

For every setting: the relative error of each matrix over that of the default, as a geometric mean over the matrices, with the
10th and 90th percentile, by kind of matrix, and CPU time over the default's (compiled before, side by side in one run). Below 1 the
setting is better than the default. Hessians are of the standard library's calibration text.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax import calibration
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.config import PRESETS, SolverConfig
from qlr_jax.core.objective import checked_hessian
from qlr_jax.models import KINDS, input_of, kind_of, load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED

SPECS = ("trellis-2+r8@trellis-4", "trellis-2+r32@trellis-4", "trellis-2+r16@int-8", "trellis-1.5+r16@trellis-3", "e8-2+r16@e8-4")
SETTINGS: dict[str, dict] = {
    "default": {},
    "start: outliers": {"start": "outliers"},
    "start: backbone": {"start": "backbone"},
    "start: low-rank": {"start": "low-rank"},
    "factors rounded plainly": {"factor_rounding": "plain"},
    "one scale a factor": {"factor_scales": "matrix"},
    "backbone scale: rms": {"backbone_scale": "rms"},
    "cold subspace iteration": {"warm_start": False},
    "downdate 0": {"downdate": 0.0},
    "downdate 0.25": {"downdate": 0.25},
    "downdate 0.5": {"downdate": 0.5},
    "downdate 0.75": {"downdate": 0.75},
    "downdate 0.9": {"downdate": 0.9},
    "downdate 1": {"downdate": 1.0},
    "1 iteration": {"iterations": 1},
    "no early stop": {"tolerance": 0.0},
    "15 iterations, no early stop": {"iterations": 15, "tolerance": 0.0},
    "inner 1": {"inner": 1},
    "inner 10": {"inner": 10},
    "preset paper": PRESETS["paper"],
}


def load(sequences: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights and Hessians of the bundled model's linear layers; layers that share an input share the array."""
    model, tokenizer = load_model(BUNDLED), load_tokenizer(BUNDLED)
    tokens = calibration.calibration_tokens(calibration.standard_library("calibration"), tokenizer, sequences, 256)
    found = {name: checked_hessian(h, len(h)) for name, h in calibration.hessians(model, tokens).items()}
    weights = {name: np.asarray(linear.weight.get_value(), np.float32) for name, linear in model.linears().items()}
    return weights, {name: found[input_of(name)] for name in weights}


@one_blas_thread()
def errors(weights: dict, hessians: dict, spec: str, state_bits: int, settings: dict) -> tuple[dict[str, float], float]:
    """Relative error of every matrix, and CPU seconds of a second, compiled run."""
    config = SolverConfig(**{"state_bits": state_bits, **settings})
    problems = {name: (w, hessians[name], spec) for name, w in weights.items()}
    solve_many(dict(list(problems.items())[: len(KINDS)]), config=config)  # one of each kind: compiled
    start = time.process_time()
    solved = solve_many(problems, config=config)
    return {name: s.stats["relative_error"] for name, s in solved.items()}, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--state-bits", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+", help="of the model; all where not given")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    weights, hessians = load(arguments.sequences)
    if arguments.layers:
        weights = {n: w for n, w in weights.items() if int(n.split(".")[2]) in arguments.layers}
    rows = []
    for spec in arguments.specs:
        base, base_time = errors(weights, hessians, spec, arguments.state_bits, {})
        print(f"\n{spec}: default relative error {np.mean(list(base.values())):.4f} (mean), {base_time:.1f} CPU s", flush=True)
        print(f"{'':30s} {'ratio':>6s} {'p10':>6s} {'p90':>6s} {'time':>5s}   " + " ".join(f"{k:>5s}" for k in KINDS))
        for name in arguments.settings:
            if name == "default":
                continue
            found, seconds = errors(weights, hessians, spec, arguments.state_bits, SETTINGS[name])
            logs = {n: np.log(found[n] / base[n]) for n in base}
            by_kind = {k: float(np.exp(np.mean([v for n, v in logs.items() if kind_of(n) == k]))) for k in KINDS}
            values = np.array(list(logs.values()))
            low, high = np.exp(np.quantile(values, [0.1, 0.9]))
            row = {"spec": spec, "setting": name, "ratio": float(np.exp(values.mean())), "p10": float(low), "p90": float(high)}
            row |= {"time": seconds / base_time, "by_kind": by_kind, "default_error": float(np.mean(list(base.values())))}
            rows.append(row)
            kinds = " ".join(f"{by_kind[k]:5.3f}" for k in KINDS)
            print(f"{name:30s} {row['ratio']:6.3f} {low:6.3f} {high:6.3f} {row['time']:5.2f}   {kinds}", flush=True)
            if arguments.json:
                machine = {"device": jax.devices()[0].device_kind, "platform": platform.platform(), "jax": jax.__version__}
                setup = {"machine": machine, "state_bits": arguments.state_bits, "sequences": arguments.sequences}
                arguments.json.write_text(json.dumps(setup | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
