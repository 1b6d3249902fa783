"""How long things take, beside an earlier commit on the same machine in the same session.

    python benchmarks/speed.py --before COMMIT                                    search, solve, first: some minutes
    python benchmarks/speed.py --before COMMIT --rows search,solve --repeats 1    quickly
    python benchmarks/speed.py --before COMMIT --rows demo,again,large,ci         what takes longest
    python benchmarks/speed.py --before COMMIT --rows model --model PATH/TO/LLAMA --calibration text.txt
    python benchmarks/speed.py --rows search                                      this tree alone
    python benchmarks/speed.py --before COMMIT --json speed.json                  writes every run as well, after each

Both commits run in turns, `--repeats` times; medians are shown. The earlier one is checked out into a worktree, and its native
extension, where it has one, is built there in place. Every run is a process of its own with PYTHONPATH at its tree and the user's
caches (XDG_CACHE_HOME, so JAX's compilation cache too, where the tree uses one) in a folder of its own, empty unless the row says
otherwise. CPU seconds are of the process and its children (getrusage); where a row is about a part of the run, of that part.

    search   trellis search, 12 state bits, 2 bits: 65,536 Gaussian weights, µs a weight, compiled before
    solve    1024 × 1024, trellis-2+r16@trellis-4, H and G, 12 state bits, the second call
    first    the first solve of 256 × 768 with factors, H and G in a fresh process; cached: again, with the caches of that run
    large    4096 × 4096, trellis-2+r64@trellis-4, the second call; memory: the most resident memory of that run
    demo     `qlr demo` with empty caches; again: with the caches of that run
    model    `qlr compress MODEL` at 2.5 bits, 64 × 512 tokens, 12 state bits
    ci       .ci/run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax.report.terminal.columns import columns

HERE = Path(__file__).resolve().parents[1]
CLOCK = """
import json, resource, time
def clock():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter()
def tell(before, scale=1.0):
    cpu, wall = (scale * (b - a) for a, b in zip(before, clock()))
    print(json.dumps({"cpu": cpu, "wall": wall, "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
SEARCH = """
import jax, numpy as np
from qlr_jax.core.quantizers import parse_quantizer
grid = parse_quantizer("trellis-2").for_backbone(None, 12)
x = np.random.default_rng(0).standard_normal((1024, 64), np.float32)
height, width = grid.tile
static, traced, one = grid.static(), grid.traced(), np.ones((1, 1), np.float32)
run = jax.jit(lambda part: static.round_block(part, (one,), traced, False)[0])
parts = [x.reshape(-1)[k : k + height * 32 * width].reshape(-1, width) for k in range(0, x.size, height * 32 * width)]
jax.block_until_ready(run(parts[0]))
before = clock()
for part in parts:
    jax.block_until_ready(run(part))
tell(before, 1e6 / x.size)
"""
SOLVE = """
import numpy as np
import qlr_jax as qlr
m, n, outputs, spec, second = {m}, {n}, {outputs}, {spec!r}, {second}
draw = np.random.default_rng(0)
def moment(size):
    x = draw.standard_normal((2 * size, size), np.float32) * np.geomspace(3, 0.1, size, dtype=np.float32)
    return x.T @ x / len(x)
w, h, g = draw.standard_normal((m, n), np.float32), moment(n), moment(m) if outputs else None
before = clock()
solve = lambda: np.asarray(qlr.solve(w, h, spec, output_hessian=g, state_bits=12).value.dense())
solve()
if second:
    before = clock()
    solve()
tell(before)
"""
R16, R64 = "trellis-2+r16@trellis-4", "trellis-2+r64@trellis-4"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: as it is printed.
        code: what its process runs, which tells its own seconds; None: a command, whose seconds are all of it.
        most: of now over before, that is aimed at; least: CPU seconds at most, where that is.
        after: the row in whose caches it runs; it is run after that one, whether that is asked for or not.
        shows: "cpu" or "wall" is compared.
        memory: bytes at most, where that is aimed at too.
    """

    title: str
    code: str | None = None
    most: float | None = None
    least: float | None = None
    after: str | None = None
    shows: str = "cpu"
    memory: float | None = None


def solving(m: int, n: int, outputs: bool, spec: str, second: bool) -> str:
    """The code of a solve; of the second one, or of the first."""
    return SOLVE.format(m=m, n=n, outputs=outputs, spec=spec, second=second)


ROWS = {
    "search": Row("search, 12 state bits, µs a weight", SEARCH, 1 / 10),
    "solve": Row(f"solve 1024 × 1024 {R16}", solving(1024, 1024, True, R16, True), 1 / 4),
    "first": Row("first solve of a shape, G and factors", solving(256, 768, True, R16, False), None, 12),
    "cached": Row("the same, caches filled", solving(256, 768, True, R16, False), None, 3, after="first"),
    "large": Row(f"solve 4096 × 4096 {R64}", solving(4096, 4096, False, R64, True), 1 / 4, memory=3e9),
    "demo": Row("qlr demo, nothing cached", None, 1 / 5, shows="wall"),
    "again": Row("a second qlr demo", None, 1 / 8, after="demo", shows="wall"),
    "model": Row("compress a model at 2.5 bpw", None, 1 / 4),
    "ci": Row(".ci/run", None, None, 480, shows="wall"),
}
USUAL = ("search", "solve", "first", "cached")


def command(name: str, tree: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """What a row's process is."""
    cli = [sys.executable, "-m", "qlr_jax.cli"]
    if code := ROWS[name].code:
        return [sys.executable, "-c", CLOCK + code]
    if name == "ci":
        return ["bash", str(tree / ".ci" / "run")]
    if name == "model":
        if not (options.model and options.calibration):
            raise SystemExit("the row model needs --model and --calibration")
        (folder / "recipe.yaml").write_text("budget: 2.5bpw\nsequences: 64\nsequence_length: 512\nstate_bits: 12\nrefine: 0\n")
        given = ["--recipe", str(folder / "recipe.yaml"), "--calibration", options.calibration]
        return [*cli, "compress", options.model, str(folder / "out"), *given]
    return [*cli, "demo", "--out", str(folder / "out")]


def measured(name: str, tree: Path, caches: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of one run."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    environment = kept | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(caches), "JAX_PLATFORMS": "cpu"}
    if ROWS[name].code:  # as a command would; the library alone keeps nothing that it compiles
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(caches / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        line = command(name, tree, Path(folder), options)
        done = subprocess.run(line, cwd=tree, env=environment, text=True, capture_output=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{name} in {tree} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    if ROWS[name].code:
        return json.loads(done.stdout.splitlines()[-1])
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall": wall}


@contextmanager
def checked_out(commit: str | None) -> Iterator[dict[str, Path]]:
    """The trees by name: this one, and a worktree of the earlier commit where one is given."""
    if commit is None:
        yield {"now": HERE}
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "-C", str(HERE), "worktree", "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            if (tree / "setup.py").is_file():  # its native extension, where it has one
                subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, capture_output=True)
            yield {"before": tree, "now": HERE}
        finally:
            subprocess.run(["git", "-C", str(HERE), "worktree", "remove", "--force", str(tree)], check=True)


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A line a row: before, now, their ratio, what is aimed at."""
    header = ["what", "before", "now", "ratio", "to reach", "CPU", "wall", "memory now"]
    lines = []
    for name, trees in found.items():
        row, ends = ROWS[name], {tree: median(runs) for tree, runs in trees.items() if runs}
        if "now" not in ends:
            continue
        now, before = ends["now"], ends.get("before")
        ratio = now[row.shows] / before[row.shows] if before else None
        aim = f"≤ {row.most:.3g}" if row.most else f"≤ {row.least} s"
        value, limit = (ratio, row.most) if row.most else (now[row.shows], row.least)
        aim += "" if value is None or limit is None else " yes" if value <= limit else " no"
        both = [f"{before[kind] / now[kind]:.2f}×" if before else "" for kind in ("cpu", "wall")]
        memory = f"{now['memory'] / 1e9:.2f} GB" if "memory" in now else ""
        memory += "" if row.memory is None else f" (≤ {row.memory / 1e9:g} {'yes' if now['memory'] <= row.memory else 'no'})"
        shown = [f"{end[row.shows]:.3g} {row.shows}" if end else "" for end in (before, now)]
        lines.append([row.title, *shown, f"{ratio:.3f}" if ratio else "", aim, *both, memory])
    return columns(header, lines)


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def rows_of(text: str) -> list[str]:
    """The rows of an option, each after the one that it needs."""
    names = list(ROWS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"--rows has {unknown[0]!r}; there are {', '.join(ROWS)}")
    needed = {after for name in names if (after := ROWS[name].after)}
    return [name for name in ROWS if name in {*names, *needed}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="to compare with; left out: this tree alone")
    parser.add_argument("--rows", default=",".join(USUAL), help=f"of {', '.join(ROWS)}; or all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="folder of the row model")
    parser.add_argument("--calibration", help="its calibration text")
    parser.add_argument("--json", type=Path, help="write every run")
    options = parser.parse_args()
    names = rows_of(options.rows)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    with checked_out(options.before) as trees, tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for name in names:
                for which, tree in trees.items():
                    caches = Path(folder) / which / (ROWS[name].after or name)
                    if not ROWS[name].after:
                        shutil.rmtree(caches, ignore_errors=True)
                    caches.mkdir(parents=True, exist_ok=True)
                    took = measured(name, tree, caches, options)
                    found[name].setdefault(which, []).append(took)
                    line = f"{repeat + 1} {name} {which}: {took['cpu']:.4g} CPU, {took['wall']:.4g} wall"
                    print(line, file=sys.stderr, flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
