"""Peak memory of a job against the number of blocks, weights on disk and weights in memory, at one width; random weights.

    python benchmarks/streaming.py                              4, 8, 16 and 32 blocks of width 512
    python benchmarks/streaming.py --blocks 4 8 --width 256
    python benchmarks/streaming.py --modes disk --stages        weights on disk alone, and what each stage adds a block

Every job runs in a process of its own, through `qlr.compress`. Two peaks are told, read every 20 ms (Linux): the process's own
memory (RssAnon of /proc/self/status), and its resident size, in which pages of files that it has read by way of a map count too:
statistics in job/. The system takes those pages back when anything else wants the memory. The last line of a table is what a
further block adds, from a line through all points.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Watch:
    """A job's progress, and the most memory of each of its stages: stage -> {"anon", "rss"} in bytes."""

    def __init__(self, every: float = 0.02):
        self.peaks: dict[str, dict[str, int]] = defaultdict(lambda: {"anon": 0, "rss": 0})
        self._stages, self._every, self._ends = ["between stages"], every, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ends.wait(self._every):
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peaks = self.peaks[self._stages[-1]]
            for name, field in (("anon", "RssAnon"), ("rss", "VmRSS")):
                peaks[name] = max(peaks[name], 1024 * int(lines[field].split()[0]))

    def end(self) -> None:
        self._ends.set()

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Watch]:
        self._stages.append(title)
        try:
            yield self
        finally:
            self._stages.pop()

    def advance(self, count: int = 1, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


def run(width: int, blocks: int, streaming: bool, work: str, answers: multiprocessing.Queue) -> None:
    """One job, in this process: the most memory by stage, and processor seconds."""
    import jax

    from qlr_jax import job
    from qlr_jax.calibration import standard_library
    from qlr_jax.models import LlamaConfig, find_folder
    from qlr_jax.settings.recipe import Recipe

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
    watch, start = Watch(), time.process_time()
    out = Path(tempfile.mkdtemp(dir=work)) / "out"
    job.compress(find_folder(folder), out, calibration=text, recipe=recipe, progress=watch)
    seconds = time.process_time() - start
    watch.end()
    peaks: dict[str, Any] = {of: max(stage[of] for stage in watch.peaks.values()) for of in ("anon", "rss")}
    answers.put(peaks | {"stages": dict(watch.peaks), "seconds": seconds})


def make(config: object, folder: str) -> None:
    """A folder of random weights."""
    import jax

    from qlr_jax.models import Llama, save_model
    from qlr_jax.models.bundled import BUNDLED

    save_model(Llama(config, jax.random.key(0)), folder, tokenizer_from=BUNDLED)


def main() -> None:
    """Run and print."""
    import numpy as np

    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--blocks", nargs="+", type=int, default=[4, 8, 16, 32])
    parse.add_argument("--width", type=int, default=512)
    parse.add_argument("--modes", nargs="+", choices=("disk", "memory"), default=["disk", "memory"], help="where weights lie")
    parse.add_argument("--stages", action="store_true", help="tell every stage's growth as well")
    parse.add_argument("--out", type=Path, default=Path("streaming.json"))
    args = parse.parse_args()
    records, context = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work:
        for mode in args.modes:
            for blocks in args.blocks:
                answers = context.Queue()
                process = context.Process(target=run, args=(args.width, blocks, mode == "disk", work, answers))
                process.start()
                found = answers.get()
                process.join()
                weights = 4 * blocks * (4 * args.width**2 + 6 * args.width**2)
                records.append({"blocks": blocks, "mode": mode, "weights": weights, **found})
                told = f"{found['anon'] / 1e6:.0f} MB of its own, {found['rss'] / 1e6:.0f} MB resident"
                print(f"{blocks} blocks, weights on {mode}: {told}, {found['seconds']:.0f} s of the processor", flush=True)

    def slope(mode: str, value: Any) -> float:
        points = [(r["blocks"], value(r) / 1e6) for r in records if r["mode"] == mode]
        return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float("nan")

    columns = [(mode, of) for mode in args.modes for of in ("anon", "rss")]
    named = {("disk", "anon"): "on disk: own", ("disk", "rss"): "resident", ("memory", "anon"): "in memory: own"}
    heads = [f"blocks of width {args.width}", "weights, float32", *[named.get(column, "resident") for column in columns]]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for blocks in args.blocks:
        cells = {(r["mode"], of): r[of] / 1e6 for r in records if r["blocks"] == blocks for of in ("anon", "rss")}
        weights = next(r["weights"] for r in records if r["blocks"] == blocks) / 1e6
        print(f"| {blocks} | {weights:.0f} MB | " + " | ".join(f"{cells[column]:.0f} MB" for column in columns) + " |")
    slopes = [slope(mode, lambda r, of=of: r[of]) for mode, of in columns]
    print(f"| a further block | {4e-5 * args.width**2:.1f} MB | " + " | ".join(f"{value:.1f} MB" for value in slopes) + " |")
    for mode in args.modes if len(args.blocks) > 1 else ():
        points = [(r["blocks"], r["seconds"]) for r in records if r["mode"] == mode]
        exponent, last = (np.polyfit(*np.log(list(zip(*some, strict=True))), 1)[0] for some in (points, points[-2:]))
        told = ", ".join(f"{seconds:.0f}" for _, seconds in points)
        print(f"\nweights on {mode}: {told} s of the processor ∝ blocks^{exponent:.2f}, blocks^{last:.2f} from the last two")
    for mode in args.modes if args.stages else ():
        print(f"\nweights on {mode}: own memory at the most, MB")
        for stage in next(r["stages"] for r in records if r["mode"] == mode):
            found = [r["stages"][stage]["anon"] for r in records if r["mode"] == mode and stage in r["stages"]]
            grows = slope(mode, lambda r, stage=stage: r["stages"].get(stage, {"anon": 0})["anon"])
            print(f"  {stage:<32}" + "".join(f"{value / 1e6:>8.0f}" for value in found) + f"   {grows:+.1f} a block")
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    args.out.write_text(json.dumps({"width": args.width, **machine, "records": records}, indent=1))


if __name__ == "__main__":
    main()
