"""Generation in JAX from packed weights, from the same weights decoded, side by side in one run.

    python benchmarks/generation.py OUT                     a folder that `qlr compress` made
    python benchmarks/generation.py OUT --new 64 --prompt 200 --rounds 5

    first     seconds of the first prompt: tracing, compiling, running; without JAX's compilation cache
    prompt    tokens a second that a prompt is read at, once compiled
    decode    tokens a second, one at a time
The models take turns within every round and the best round counts, because other work on the machine can only add time. `decoded`
holds every weight as float32, which is what `generate` does without the C++ library.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import qlr_jax as qlr
from benchmarks.table import show
from qlr_jax import evaluation
from qlr_jax.models import Llama
from qlr_jax.native import product


def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("out", type=Path)
    parse.add_argument("--prompt", type=int, default=40, help="tokens of the prompt")
    parse.add_argument("--new", type=int, default=64, help="tokens that are made")
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--json", type=Path)
    args = parse.parse_args()
    packed = qlr.load(args.out)
    models = {"packed": packed.for_generation(), "decoded": packed.densified()}
    prompt = np.random.default_rng(0).integers(10, packed.config.vocab_size, (1, args.prompt))

    def seconds(model: Llama, new: int) -> float:
        start = time.perf_counter()
        evaluation.generate(model, prompt, max_new_tokens=new, stop=())
        return time.perf_counter() - start

    first = {name: seconds(model, 1) for name, model in models.items()}
    for model in models.values():
        seconds(model, args.new)  # compiles the loop
    best = {name: [float("inf")] * 2 for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            best[name] = [min(old, seconds(model, new)) for old, new in zip(best[name], (1, args.new), strict=True)]
    facts = [
        {"weights": name, "first s": first[name], "prompt": args.prompt / one, "decode": (args.new - 1) / (all_ - one)}
        for name, (one, all_) in best.items()
    ]
    title = f"{args.out}, jax {jax.__version__}, products {product.instruction_set() or 'in XLA'}, {os.cpu_count()} cores"
    show(title, facts, args.json)


if __name__ == "__main__":
    main()
