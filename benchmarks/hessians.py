"""Hessians plain and weighted by the end loss, compared by KL: the bundled model, every matrix at the same rate.

    python benchmarks/hessians.py                            the table of RESULTS.md: about ten minutes on two CPU cores
    python benchmarks/hessians.py --weightings loss --specs trellis-2 --seeds 0 1 2 --state-bits 10
    python benchmarks/hessians.py --json hessians.json

Every linear layer is solved with the Hessian of each weighting and put into the model. KL(original ‖ compressed), nats a token, on
held-out text and on a part of the calibration text: mean and standard deviation over seeds, which are of the rotations' signs. The
ratio is that of held-out KL to plain's, seed by seed, as a geometric mean with its standard error; below 1 the weighting is better.
A seed alone moves KL by some parts in a hundred, so many seeds with few state bits tell more than few seeds with many.

Beside the recipe's settings (plain, loss, loss-by-matrix) three tamer forms of loss, since squared gradients have heavy tails:
    clip99      each matrix's squared gradients clipped at their 99th percentile
    root        square roots of the squared gradients: tokens weighted by the norm of the gradient
    half        ½ + ½ w, w normalised
Effective tokens, (Σ w)² / (T Σ w²): the share of tokens that would tell as much if all counted alike.
Text is the standard library's: 128 calibration and at most 128 held-out windows of 256 tokens, as in the demo.
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
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.objective import checked_hessian, checked_weight
from qlr_jax.evaluation import divergence, reference, windows
from qlr_jax.models import input_of, load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.pipelines.run import with_weights

LENGTH = 256
Arrays = dict[str, np.ndarray]


def half(weights: Arrays) -> Arrays:
    return {name: 0.5 + 0.5 * w / w.mean() for name, w in weights.items()}


WEIGHTINGS = {
    "plain": lambda s: None,
    "loss": calibration.token_weights,
    "loss-by-matrix": lambda s: calibration.token_weights(s, by_matrix=True),
    "loss clip99": lambda s: calibration.token_weights({n: np.minimum(v, np.quantile(v, 0.99)) for n, v in s.items()}),
    "loss root": lambda s: calibration.token_weights({n: np.sqrt(v) for n, v in s.items()}),
    "loss half": lambda s: half(calibration.token_weights(s)),
}


def effective_share(weights: Arrays | None) -> float:
    """(Σ w)² / (T Σ w²), mean over the Hessians."""
    if weights is None:
        return 1.0
    return float(np.mean([w.mean(dtype=np.float64) ** 2 / np.square(w, dtype=np.float64).mean() for w in weights.values()]))


@one_blas_thread()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weightings", nargs="+", choices=list(WEIGHTINGS), default=list(WEIGHTINGS), metavar="WEIGHTING")
    parser.add_argument("--specs", nargs="+", default=["trellis-2", "trellis-3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--state-bits", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=128, help="of calibration text")
    parser.add_argument("--tokens", type=int, default=32768, help="of held-out text, at most")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    chosen = ["plain", *(w for w in arguments.weightings if w != "plain")]

    model, tokenizer = load_model(BUNDLED), load_tokenizer(BUNDLED)
    matrices = {name: checked_weight(linear.weight.get_value()) for name, linear in model.linears().items()}
    tokens = calibration.calibration_tokens(calibration.standard_library("calibration"), tokenizer, arguments.sequences, LENGTH)
    held_out = windows(calibration.standard_library("heldout"), tokenizer, LENGTH)
    texts = {
        "held_out": reference(model, calibration.subsample(held_out, arguments.tokens)),
        "calibration": reference(model, calibration.subsample(tokens, 4096)),
    }

    start = time.perf_counter()
    squares = calibration.squared_gradients(model, tokens)
    backward = time.perf_counter() - start
    hessians, effective = {}, {}
    for name in chosen:
        start = time.perf_counter()
        weights = WEIGHTINGS[name](squares)
        found = {key: checked_hessian(h, len(h)) for key, h in calibration.hessians(model, tokens, weights=weights).items()}
        hessians[name] = {n: found[n] if n in (weights or {}) else found[input_of(n)] for n in matrices}
        effective[name] = effective_share(weights)
        print(f"{name}: Hessians in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(f"backward pass over {tokens.size} tokens: {backward:.1f} s; compiled with it")

    rows = []
    for spec in arguments.specs:
        kl: dict[str, dict[str, list[float]]] = {name: {text: [] for text in texts} for name in chosen}
        for seed in arguments.seeds:
            for name in chosen:
                problems = {n: (w, hessians[name][n], spec) for n, w in matrices.items()}
                solved = solve_many(problems, seed=seed, config=SolverConfig(state_bits=arguments.state_bits))
                compressed = with_weights(model, {n: s.value for n, s in solved.items()})
                for text, of in texts.items():
                    kl[name][text].append(divergence(compressed, of).kl)
                print(f"{spec} seed {seed} {name}: held-out KL {kl[name]['held_out'][-1]:.5f}", file=sys.stderr, flush=True)
        print(f"\n{spec}, {arguments.state_bits} state bits, seeds {' '.join(map(str, arguments.seeds))}")
        print(f"{'':16s} {'KL held out':>18s} {'ratio to plain':>16s} {'KL calibration':>18s} {'effective tokens':>17s}")
        for name in chosen:
            out, inside = np.array(kl[name]["held_out"]), np.array(kl[name]["calibration"])
            logs, many = np.log(out / np.array(kl["plain"]["held_out"])), len(out) > 1
            ratio = float(np.exp(logs.mean()))
            error = float(ratio * logs.std(ddof=1) / np.sqrt(len(logs))) if many else float("nan")
            spreads = [float(v.std(ddof=1)) if many else float("nan") for v in (out, inside)]
            held, seen = (f"{v.mean():9.5f} ± {d:.5f}" for v, d in zip((out, inside), spreads, strict=True))
            print(f"{name:16s} {held} {ratio:8.3f} ± {error:.3f}  {seen} {effective[name]:16.0%}", flush=True)
            row = {"spec": spec, "weighting": name, "kl": kl[name], "ratio": ratio, "ratio_error": error}
            rows.append(row | {"effective_tokens": effective[name]})
    if arguments.json:
        machine = {"device": jax.devices()[0].device_kind, "platform": platform.platform(), "jax": jax.__version__}
        setup = {"machine": machine, "state_bits": arguments.state_bits, "seeds": arguments.seeds, "sequences": arguments.sequences}
        arguments.json.write_text(json.dumps(setup | {"backward_seconds": backward, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
