"""The solver beside its peer, a literal implementation of the paper; and how its time and memory grow with the matrix.

    python benchmarks/solver.py peer                                      three shapes, ranks 0, 16, 64: about 45 minutes on a CPU
    python benchmarks/solver.py peer --sizes 256x256 --ranks 0 16         two minutes
    python benchmarks/solver.py peer --search exhaustive structured       beside it the peer with the library's E8 search
    python benchmarks/solver.py peer --weights trained flat               and on a Gaussian weight
    python benchmarks/solver.py growth --large                            n = 256 to 4096
    python benchmarks/solver.py peer --json solver.json                   written after every cell; --resume keeps what is in it

`peer`: the literal CALDERA of `literal.py` (E8 codebook searched whole, full decompositions); preset="paper", the same method and
grids by our means; and our default method in no more bytes: for each of the ranks 0 to 64 with trellis-4 factors the largest
backbone rate that fits, the best few by prediction solved, the least error reported. Marks: preset="paper" in a tenth of the
peer's CPU time at ranks above 0, its error at most 1.01 of the peer's; the default's error at most 0.85 of the peer's.

`growth`: the default solver with trellis-2+r64@trellis-4 at n × n, and the exponents fitted to its CPU time.

Every cell runs in a process of its own, BLAS on one thread. CPU seconds are those of a run after one that compiled (the least of
up to three where runs are short); what was compiled in it all the same is noted. Peak memory is the process's, compilation
included; beside it, less that of an idle process with the same imports.

The problem: 75 % of the weight's energy is Gaussian with rows and columns of log-normal size (σ = 0.2), 25 % a low-rank part
of random directions with singular values k^-0.7, k up to a quarter of the smaller side; "flat" is Gaussian and no more. H is the
mean x xᵀ of 2 n activations x = M diag(k^-0.5) z, M and z Gaussian, in which one channel in 128 is 8 times larger.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# no JAX up here: the parent stays small, and only the cells hold a backend
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

RANKS = (0, 4, 8, 16, 32, 64)  # of the default method's candidates
GROWN = "trellis-2+r64@trellis-4"
CPU_RATIO, PAPER_ERROR, DEFAULT_ERROR = 0.1, 1.01, 0.85  # what the marks ask for
MB = 1e6


# Cells: what runs in a process of its own ----------------------------------------------------------------------------------


def problem(shape: tuple[int, int], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """W and H, as the head of this file says."""
    m, n = shape
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((m, n), np.float32)
    if kind == "trained":
        weight *= np.exp(0.2 * draw.standard_normal((m, 1), np.float32)) * np.exp(0.2 * draw.standard_normal((1, n), np.float32))
        count = min(m, n) // 4
        sides = [np.linalg.qr(draw.standard_normal((size, count), np.float32))[0] for size in (m, n)]
        low = (sides[0] * np.arange(1, count + 1, dtype=np.float32) ** -0.7) @ sides[1].T
        weight = weight * np.float32(0.75**0.5 / np.linalg.norm(weight)) + low * np.float32(0.25**0.5 / np.linalg.norm(low))
        weight *= np.float32((m * n) ** 0.5)  # mean square 1
    x = draw.standard_normal((2 * n, n), np.float32) * np.arange(1, n + 1, dtype=np.float32) ** -0.5
    x = x @ draw.standard_normal((n, n), np.float32)
    x[:, draw.choice(n, max(n // 128, 1), replace=False)] *= 8
    return weight, x.T @ x / np.float32(len(x))


def peak_bytes() -> int:
    """The largest resident size so far. ru_maxrss, where there is no other, may start from the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def compiling() -> Iterator[list[float]]:
    """Seconds of every compilation inside."""
    import jax

    seconds: list[float] = []
    active = True

    def listen(event: str, duration: float, **_: object) -> None:
        if active and event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    active = False


def timed(first: Callable[[], object], run: Callable[[], Any]) -> tuple[Any, dict]:
    """What `run` returns, and its cost after `first` has compiled for it."""
    import jax
    import scipy.linalg  # noqa: F401 - JAX's factorizations use its BLAS, and only what is loaded by now is limited

    from qlr_jax.core.blas import one_blas_thread

    jax.devices()
    with one_blas_thread():
        cost: dict = {"peak_before_bytes": peak_bytes()}
        start = time.process_time()
        with compiling() as early:
            first()
        cost |= {"warm_up_cpu_seconds": time.process_time() - start, "compilation_seconds": sum(early)}
        runs: list[tuple[float, float]] = []
        with compiling() as late:
            # short runs are disturbed by whatever else the machine does
            while len(runs) < 3 and sum(cpu for cpu, _ in runs) < 5:
                cpu, wall = time.process_time(), time.perf_counter()
                found = run()
                runs.append((time.process_time() - cpu, time.perf_counter() - wall))
    cost |= {"cpu_seconds": min(runs)[0], "seconds": min(runs)[1], "runs": len(runs), "late_compilation": sum(late)}
    return found, cost | {"peak_bytes": peak_bytes()}


def cell_problem(task: dict) -> dict:
    weight, hessian = problem(tuple(task["shape"]), task["weight"], task["seed"])
    np.savez(task["file"], weight=weight, hessian=hessian)
    return {"weight_energy": float(np.square(weight).sum()), "mean_diagonal": float(np.trace(hessian) / len(hessian))}


def cell_idle(task: dict) -> dict:
    import jax
    import scipy.linalg  # noqa: F401
    from literal import literal  # noqa: F401

    import qlr_jax

    qlr_jax.solve  # noqa: B018
    jax.numpy.zeros(1).block_until_ready()
    return {"peak_bytes": peak_bytes(), "jax": jax.__version__, "device": jax.devices()[0].device_kind}


def loaded(task: dict) -> tuple[np.ndarray, np.ndarray]:
    with np.load(task["file"]) as arrays:
        return arrays["weight"], arrays["hessian"]


def cell_literal(task: dict) -> dict:
    from literal import literal

    weight, hessian = loaded(task)
    rank, search, trail = task["rank"], task["search"], []

    def run() -> np.ndarray:
        trail.clear()
        return literal(weight, hessian, rank, outer=task["outer"], search=search, trail=trail)[0]

    approximation, cost = timed(lambda: literal(weight, hessian, rank, outer=1, inner=1, search=search), run)
    return {"relative_error": exact_error(weight, approximation, hessian), "iterations": len(trail), "trail": trail, **cost}


def cell_solve(task: dict) -> dict:
    from qlr_jax import solve

    weight, hessian = loaded(task)

    def run(**options: object) -> Any:
        return solve(weight, hessian, task["spec"], preset=task["preset"], **task["options"] | options)

    solution, cost = timed(lambda: run(iterations=1), run)
    found = {"relative_error": exact_error(weight, np.asarray(solution.value.dense()), hessian), "nbytes": solution.value.nbytes}
    found |= {"bits": 8 * solution.value.nbytes / weight.size, "verdict": solution.verdict.name}
    return found | {"iterations": solution.stats["iterations"], "trail": list(solution.stats["history"]), **cost}


def cell_shortlist(task: dict) -> dict:
    """The default method's candidates in the peer's bytes, the best by prediction first."""
    from qlr_jax.core.spec import Spec
    from qlr_jax.sensitivity import predict, profile

    shape = tuple(task["shape"])
    limit, found = Spec.parse(task["spec"]).nbytes(shape), []
    profiled = profile(*loaded(task), max_rank=max(RANKS))
    for rank in (r for r in RANKS if r <= min(shape)):
        tail = f"+r{rank}@trellis-4" if rank else ""
        fits = [s for s in (f"trellis-{rate / 16:g}{tail}" for rate in range(16, 65)) if Spec.parse(s).nbytes(shape) <= limit]
        if fits:
            best = Spec.parse(fits[-1])
            found.append({"spec": str(best), "nbytes": best.nbytes(shape), "predicted": predict(profiled, best)})
    return {"limit": limit, "candidates": sorted(found, key=lambda c: c["predicted"])}


def exact_error(weight: np.ndarray, approximation: np.ndarray, hessian: np.ndarray) -> float:
    """√(tr(E H Eᵀ) / tr(W H Wᵀ)) in float64, by neither side's own code."""
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    e = w - approximation
    return float(np.sqrt(np.sum((e @ h) * e) / np.sum((w @ h) * w)))


CELLS = {"problem": cell_problem, "idle": cell_idle, "literal": cell_literal, "solve": cell_solve, "shortlist": cell_shortlist}


# The parent ----------------------------------------------------------------------------------------------------------------


class Record:
    """All results so far; on disk after every cell."""

    def __init__(self, path: Path | None, resume: bool, timeout: float, folder: str) -> None:
        self.path, self.timeout, self.folder, self.made = path, timeout, folder, set()
        old = json.loads(path.read_text()) if path and resume and path.exists() else {}
        self.cells: dict[str, dict] = {k: v for k, v in old.get("cells", {}).items() if "failed" not in v}
        self.tables = {name: old.get(name, []) for name in ("peer", "growth", "exponents")}
        self.machine = {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()}

    def save(self) -> None:
        if self.path:
            whole = json.dumps({"machine": self.machine, **self.tables, "cells": self.cells}, indent=1) + "\n"
            beside = self.path.with_suffix(self.path.suffix + ".part")
            beside.write_text(whole)
            beside.replace(self.path)

    def cell(self, name: str, **task: object) -> dict:
        """The result of a cell, from before or now; {"failed": why} where there is none."""
        key = json.dumps({"cell": name, **task}, sort_keys=True)
        if key not in self.cells:
            if "shape" in task and name != "problem":
                made = self.problem(task)
                if "failed" in made:
                    return made
            self.cells[key] = self.run(name, task)
            self.save()
        return self.cells[key]

    def problem(self, task: dict) -> dict:
        """Make the problem's file, once a run: in a process of its own, as its 2 n activations must not count as the solver's."""
        file = self.file(task)
        if file in self.made:
            return {}
        found = self.run("problem", {key: task[key] for key in ("shape", "weight", "seed")})
        self.made.add(file)
        return found

    def file(self, task: dict) -> str:
        return str(Path(self.folder) / f"{task['weight']}-{'x'.join(map(str, task['shape']))}-{task['seed']}.npz")

    def run(self, name: str, task: dict) -> dict:
        sent = {**task, "cell": name} | ({"file": self.file(task)} if "shape" in task else {})
        label = " ".join(str(v) for v in (name, *task.values()) if v not in (None, {}))
        print(f"  {time.strftime('%H:%M:%S')}  {label}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "cell", json.dumps(sent)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished in {self.timeout:.0f} s"}
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"  {label}: {last}", file=sys.stderr, flush=True)
            return {"failed": f"status {done.returncode}: {last}"}
        return json.loads(lines[-1])


def shape_of(text: str) -> tuple[int, int]:
    m, _, n = text.partition("x")
    return int(m), int(n or m)


def ratio(value: float | None, peer: float | None) -> float | None:
    return value / peer if value is not None and peer else None


def shown(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"


HEAD = "{:20s} {:30s} {:>6s} {:>8s} {:>7s} {:>9s} {:>7s} {:>8s} {:>7s}".format(
    "method", "spec", "bits", "error", "× peer", "CPU s", "× peer", "peak MB", "- idle"
)


def peer(arguments: argparse.Namespace, record: Record) -> None:
    """Table of the peer and ours, for each weight, shape and rank."""
    idle = record.cell("idle").get("peak_bytes", 0)
    print(f"an idle process that has imported all: {idle / MB:.0f} MB; error: √(tr E H Eᵀ / tr W H Wᵀ)")
    record.tables["peer"], marks = [], []
    for weight in arguments.weights:
        for shape in arguments.sizes:
            for rank in arguments.ranks:
                rows = compare(arguments, record, weight, shape, rank, idle)
                print(f"\n{weight} weight, {shape[0]} × {shape[1]}, rank {rank}\n{HEAD}")
                for row in rows:
                    say(row)
                    marks += row["marks"].items()
                record.tables["peer"] += rows
                record.save()
    print()
    for name in dict.fromkeys(name for name, _ in marks):
        met = [m for n, m in marks if n == name]
        print(f"{name}: met in {sum(met)} of {len(met)}")


def compare(arguments: argparse.Namespace, record: Record, weight: str, shape: tuple[int, int], rank: int, idle: int) -> list[dict]:
    """One row a method; the peer's first."""
    spec = "e8-2" + (f"+r{rank}@e8-4" if rank else "")
    task = {"shape": list(shape), "weight": weight, "seed": arguments.seed}
    paper = record.cell("solve", **task, spec=spec, preset="paper", options={})
    short = record.cell("shortlist", **task, spec=spec)
    options = {"state_bits": arguments.state_bits}
    tried = {
        candidate["spec"]: record.cell("solve", **task, spec=candidate["spec"], preset=None, options=options)
        for candidate in short.get("candidates", [])[: arguments.shortlist]
    }
    solved = {s: f for s, f in tried.items() if "failed" not in f}
    best = min(solved, key=lambda s: solved[s]["relative_error"], default=None)
    default = solved[best] if best else next(iter(tried.values()), short)
    peers = {s: record.cell("literal", **task, rank=rank, search=s, outer=arguments.outer) for s in arguments.search}
    first = next(iter(peers.values()), {})
    stored = {"nbytes": paper.get("nbytes"), "bits": paper.get("bits")}  # the peer has no packed form: as many as preset="paper"
    found = [(f"literal ({search})", spec, stored | cell) for search, cell in peers.items()]
    found += [('preset="paper"', spec, paper), ("default", best or "-", default)]
    rows = []
    for method, text, cell in found:
        row = {"weight": weight, "shape": list(shape), "rank": rank, "method": method, "spec": text, **cell}
        row["error_ratio"] = ratio(cell.get("relative_error"), first.get("relative_error"))
        row["cpu_ratio"] = ratio(cell.get("cpu_seconds"), first.get("cpu_seconds"))
        row["peak_above_idle_bytes"] = cell["peak_bytes"] - idle if "peak_bytes" in cell else None
        row["marks"] = {}
        if method == 'preset="paper"' and row["error_ratio"] is not None:
            row["marks"][f"paper: error <= {PAPER_ERROR} of the peer's"] = row["error_ratio"] <= PAPER_ERROR
            if rank:
                row["marks"][f"paper: CPU <= {CPU_RATIO} of the peer's"] = row["cpu_ratio"] <= CPU_RATIO
        if method == "default" and row["error_ratio"] is not None:
            row["marks"][f"default: error <= {DEFAULT_ERROR} of the peer's"] = row["error_ratio"] <= DEFAULT_ERROR
            row["candidates"] = [
                c | {"relative_error": tried.get(c["spec"], {}).get("relative_error")} for c in short["candidates"]
            ]
        rows.append(row)
    return rows


def say(row: dict) -> None:
    peak, above = (None if v is None else v / MB for v in (row.get("peak_bytes"), row["peak_above_idle_bytes"]))
    parts = [f"{row['method']:20s} {row['spec']:30s}", shown(row.get("bits"), 6, 3), shown(row.get("relative_error"), 8, 5)]
    parts += [shown(row["error_ratio"], 7, 3), shown(row.get("cpu_seconds"), 9, 2), shown(row["cpu_ratio"], 7, 4)]
    parts += [shown(peak, 8, 0), shown(above, 7, 0)]
    parts += [f"  {name.split(':')[1].split()[0]} {'met' if met else 'missed'}" for name, met in row["marks"].items()]
    print(" ".join(parts) + remark(row), flush=True)


def remark(found: dict) -> str:
    if "failed" in found:
        return f"   FAILED: {found['failed']}"
    late = found.get("late_compilation")
    return f"   {late:.1f} s of compilation in it" if late else ""


def growth(arguments: argparse.Namespace, record: Record) -> None:
    """Table of the default solver by size, and the exponents of its time."""
    idle = record.cell("idle").get("peak_bytes", 0)
    sizes = [*arguments.sizes, *([(4096, 4096)] if arguments.large and (4096, 4096) not in arguments.sizes else [])]
    print(f"{arguments.spec}; an idle process that has imported all: {idle / MB:.0f} MB")
    head = ("shape", "error", "seconds", "CPU s", "rounds", "µs/weight", "peak MB", "- idle", "W + H MB")
    print("{:>12s} {:>8s} {:>9s} {:>9s} {:>6s} {:>9s} {:>8s} {:>7s} {:>8s}".format(*head))
    record.tables["growth"], record.tables["exponents"] = [], []
    for m, n in sizes:
        task = {"shape": [m, n], "weight": arguments.weights[0], "seed": arguments.seed, "spec": arguments.spec}
        found = record.cell("solve", **task, preset=None, options={"state_bits": arguments.state_bits})
        row = {"shape": [m, n], "spec": arguments.spec, "inputs_bytes": 4 * n * (m + n), **found}
        record.tables["growth"].append(row)
        record.save()
        parts = [f"{f'{m} × {n}':>12s}"]
        if "failed" not in found:
            cpu, peak = found["cpu_seconds"], found["peak_bytes"]
            parts += [shown(found["relative_error"], 8, 5), shown(found["seconds"], 9, 2), shown(cpu, 9, 2)]
            parts += [
                f"{found['iterations']:6d}",
                shown(cpu / (m * n) * 1e6, 9, 2),
                shown(peak / MB, 8, 0),
                shown((peak - idle) / MB, 7, 0),
            ]
            parts += [shown(row["inputs_bytes"] / MB, 8, 0)]
        print(" ".join(parts) + remark(found), flush=True)
    done = [r for r in record.tables["growth"] if "failed" not in r]
    works = {"n": lambda m, n: n, "m n": lambda m, n: m * n, "m n (m + n) + n³": lambda m, n: m * n * (m + n) + n**3}
    for label, rows in (("all sizes", done), ("the last two", done[-2:])):
        if len(rows) < 2:
            continue
        for name, work in works.items():
            x = np.log([float(work(*r["shape"])) for r in rows])
            costs = {"solve": [r["cpu_seconds"] for r in rows], "round": [r["cpu_seconds"] / r["iterations"] for r in rows]}
            slopes = {of: float(np.polyfit(x, np.log(y), 1)[0]) for of, y in costs.items()}
            record.tables["exponents"].append({"against": name, "over": label, **slopes})
            print(f"over {label:12s} CPU s ~ ({name})^{slopes['solve']:.2f}, a round ~ ({name})^{slopes['round']:.2f}")
    record.save()


def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parse.add_subparsers(dest="part", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--seed", type=int, default=0)
    both.add_argument("--state-bits", type=int, default=12, help="of the trellises of our default method")
    both.add_argument("--timeout", type=float, default=4 * 3600.0, help="seconds a cell may take (default four hours)")
    both.add_argument("--json", type=Path, metavar="FILE", help="written after every cell")
    both.add_argument("--resume", action="store_true", help="keep the finished cells that FILE holds: only for unchanged code")
    one = parts.add_parser("peer", parents=[both], help=peer.__doc__)
    one.add_argument("--sizes", type=shape_of, nargs="+", default=[(512, 512), (1024, 1024), (1024, 2816)], metavar="OUTxIN")
    one.add_argument("--ranks", type=int, nargs="+", default=[0, 16, 64])
    one.add_argument("--weights", nargs="+", choices=["trained", "flat"], default=["trained"])
    one.add_argument("--flat", dest="weights", action="store_const", const=["flat"], help="the same as --weights flat")
    searches = {"choices": ["exhaustive", "argmax", "structured"], "default": ["exhaustive"]}
    one.add_argument("--search", nargs="+", **searches, help="the peer's; what comes first is what the others are measured by")
    one.add_argument("--outer", type=int, default=15, help="the peer's outer iterations")
    one.add_argument("--shortlist", type=int, default=3, help="candidates of the default method that are solved")
    two = parts.add_parser("growth", parents=[both], help=growth.__doc__)
    two.add_argument("--sizes", type=shape_of, nargs="+", default=[(n, n) for n in (256, 512, 1024, 2048)], metavar="OUTxIN")
    two.add_argument("--large", action="store_true", help="4096 × 4096 too")
    two.add_argument("--spec", default=GROWN)
    two.add_argument("--weights", nargs=1, choices=["trained", "flat"], default=["trained"])
    inside = parts.add_parser("cell")  # what the parent calls
    inside.add_argument("task", type=json.loads)
    arguments = parse.parse_args()
    if arguments.part == "cell":
        print(json.dumps(CELLS[arguments.task["cell"]](arguments.task)))
        return
    with tempfile.TemporaryDirectory() as folder:
        record = Record(arguments.json, arguments.resume, arguments.timeout, folder)
        (peer if arguments.part == "peer" else growth)(arguments, record)
    if arguments.json:
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
