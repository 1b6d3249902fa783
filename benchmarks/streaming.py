"""Peak memory of a job against the number of blocks, weights on disk and weights in memory, at one width; random weights.

    python benchmarks/streaming.py                              4, 8, 16 and 32 blocks of width 512
    python benchmarks/streaming.py --blocks 4 8 --width 256

Every job runs in a process of its own, through `qlr.compress`; peak memory is the process's largest resident size. The last column
is what a further block adds, from a line through all points.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(width: int, blocks: int, streaming: bool, work: str, answers: multiprocessing.Queue) -> None:
    """One job, in this process: its peak memory before and in the end, and its seconds."""
    import jax

    from qlr_jax import job
    from qlr_jax.calibration import standard_library
    from qlr_jax.models import LlamaConfig, find_folder
    from qlr_jax.recipe import Recipe

    folder = Path(work) / f"model-{blocks}"
    config = LlamaConfig(2048, width, 2 * width, blocks, width // 64, max_position_embeddings=256)
    if not folder.exists():
        written = multiprocessing.get_context("spawn").Process(target=make, args=(config, str(folder)))
        written.start()
        written.join()
    text = Path(work) / "text.txt"
    text.write_text(standard_library("calibration")[:400_000], encoding="utf-8")
    recipe = Recipe(
        budget="3bpw", backbones=("int-2g64", "int-3g64", "int-4g64"), factors=("int-4",), ranks=(0, 8), iterations=1, sequences=32,
        sequence_length=256, measure_tokens=1024, refine=0, streaming=streaming,
    )  # fmt: skip
    jax.devices()
    before, start = job.peak_rss(), time.perf_counter()
    out = Path(tempfile.mkdtemp(dir=work)) / "out"
    job.compress(find_folder(folder), out, calibration=text, recipe=recipe)
    answers.put({"before": before, "peak": job.peak_rss(), "seconds": time.perf_counter() - start})


def make(config: object, folder: str) -> None:
    """A folder of random weights."""
    import jax

    from qlr_jax.models import Llama, save_model
    from qlr_jax.preparation import BUNDLED

    save_model(Llama(config, jax.random.key(0)), folder, tokenizer_from=BUNDLED)


def main() -> None:
    """Run and print."""
    import numpy as np

    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--blocks", nargs="+", type=int, default=[4, 8, 16, 32])
    parse.add_argument("--width", type=int, default=512)
    parse.add_argument("--out", type=Path, default=Path("streaming.json"))
    args = parse.parse_args()
    records, context = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work:
        for streaming in (True, False):
            for blocks in args.blocks:
                answers = context.Queue()
                process = context.Process(target=run, args=(args.width, blocks, streaming, work, answers))
                process.start()
                found = answers.get()
                process.join()
                weights = 4 * blocks * (4 * args.width**2 + 6 * args.width**2)
                records.append({"blocks": blocks, "streaming": streaming, "weights": weights, **found})
                told = f"peak {found['peak'] / 1e6:.0f} MB, {found['seconds']:.0f} s"
                print(f"{blocks} blocks, {'on disk' if streaming else 'in memory'}: {told}", flush=True)
    print(f"\n| blocks of width {args.width} | weights, float32 | peak, on disk | peak, in memory |\n|---|---|---|---|")
    for blocks in args.blocks:
        cells = {r["streaming"]: r["peak"] / 1e6 for r in records if r["blocks"] == blocks}
        weights = next(r["weights"] for r in records if r["blocks"] == blocks) / 1e6
        print(f"| {blocks} | {weights:.0f} MB | {cells[True]:.0f} MB | {cells[False]:.0f} MB |")
    slopes = {}
    for streaming in (True, False):
        points = [(r["blocks"], r["peak"] / 1e6) for r in records if r["streaming"] == streaming]
        slopes[streaming] = float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float("nan")
    print(f"| a further block | | {slopes[True]:.1f} MB | {slopes[False]:.1f} MB |")
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    args.out.write_text(json.dumps({"width": args.width, **machine, "records": records}, indent=1))


if __name__ == "__main__":
    main()
