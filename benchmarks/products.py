"""Products with packed matrices in C++ at batch 1, by instruction set, beside PyTorch's dense bf16, side by side in one run.

    python benchmarks/products.py                                 4096 × 4096, one thread
    python benchmarks/products.py --threads 2 --shape 1536 576 --matrices 200
    python benchmarks/products.py --specs trellis-2 e8-2 --rounds 20 --json products.json

Random codes. Matrices take turns, so that each is out of the processor's cache when its turn comes, rotations and factors included.
The best of the rounds counts: other work on the machine can only add time. Error: the largest difference to the runtime's own path,
over the largest output. Rounded: with activations of 16 bits inside the product, where there is one. Thousand million weights a
second, and times as fast as dense bf16.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.table import show
from benchmarks.torch_runtime import fill, processor_name
from qlr_jax.formats.qlr import modeling_qlr as runtime
from qlr_jax.formats.qlr import native_products
from qlr_jax.native import product

SPECS = ["trellis-2", "trellis-2+r16@trellis-4", "trellis-4", "int-4g32", "int-4g32+r16@bf16", "int-8g32", "nf-4g64", "e8-2"]
SETS = ("avx2", "avx512", "neon")


@torch.inference_mode()
def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--specs", nargs="+", default=SPECS)
    parse.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="out and in")
    parse.add_argument("--matrices", type=int, default=8, help="that take turns")
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--rounds", type=int, default=10)
    parse.add_argument("--json", type=Path)
    args = parse.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if product.library() is None:
        raise SystemExit("the C++ library is not built")
    rows, cols = args.shape
    x, y = torch.randn(1, cols), torch.empty(1, rows)
    dense = [torch.randn(rows, cols, dtype=torch.bfloat16) for _ in range(args.matrices)]
    short = x.bfloat16()
    works: dict[str, Callable[[], object]] = {"bf16": lambda: [nn.functional.linear(short, weight) for weight in dense]}
    errors = {}
    for spec in args.specs:
        linears = [runtime.QLRLinear(spec, (rows, cols), seed=i) for i in range(args.matrices)]
        for linear in linears:
            fill(linear)
        known = [native_products.Known(linear, native_products._layer) for linear in linears]
        want = _alone(linears[0], x)
        for name, exact in itertools.product(SETS, (True, False)):

            def work(known=known, name=name, exact=exact) -> str:
                of = (product.Type.FLOAT32, args.threads, native_products.team(), name, exact)
                return "".join(product.multiply(k.structure, x.data_ptr(), y.data_ptr(), 1, *of) for k in known)

            if product.multiply(known[0].structure, x.data_ptr(), y.data_ptr(), 1, product.Type.FLOAT32, by=name, exact=exact):
                continue  # this machine has none of it
            kind = name if exact else f"{name} rounded"
            errors[spec, kind] = float((y - want).abs().max() / want.abs().max())
            works[f"{spec} {kind}"] = work
    best = dict.fromkeys(works, float("inf"))
    for _ in range(args.rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    count = args.matrices * rows * cols
    found = [{"product": "bf16", "Gweights/s": count / best["bf16"] / 1e9, "times bf16": 1.0, "error": 0.0}]
    for (spec, name), error in errors.items():
        seconds = best[f"{spec} {name}"]
        facts = {"Gweights/s": count / seconds / 1e9, "times bf16": best["bf16"] / seconds, "error": error}
        found.append({"product": f"{spec} {name}", **facts})
    show(f"{processor_name()}, {args.threads} threads, {rows} × {cols}", found, args.json)


def _alone(linear: runtime.QLRLinear, x: torch.Tensor) -> torch.Tensor:
    """By the runtime's own path."""
    kept, runtime.native_products = runtime.native_products, lambda: None
    try:
        return linear(x)
    finally:
        runtime.native_products = kept


if __name__ == "__main__":
    main()
