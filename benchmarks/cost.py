"""The cost model of `qlr plan` beside real jobs: memory and processor seconds by stage, predicted and measured.

    python benchmarks/cost.py                        the table of RESULTS.md: five jobs, over half an hour on two CPU cores
    python benchmarks/cost.py --jobs narrow wide     without the demo
    python benchmarks/cost.py --json cost.json       writes what was measured as well, every stage and every solve
    python benchmarks/cost.py --read cost.json       the table again, by the model as it is now; nothing runs

Every job runs in a process of its own, one after another: its peak of resident memory is read, and set back, at every stage
(Linux). Seconds are of the processor, of all threads together (`resource.getrusage`), because wall time on busy cores says nothing;
even so neighbours that share caches make them up to half again as large.

    demo      the bundled model by `qlr demo`, without refining
    narrow    a random Llama of 4 layers of 512 (inner 1408), 8 state bits
    streamed  the same, its weights and statistics on disk
    wide      a random Llama of 2 layers of 1024 (inner 2816), 8 state bits
    other     a random Llama of 3 layers of 768 (inner 2048), 10 state bits, no output Hessians, other factors
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocators.strategies import solved_strategies
from qlr_jax import cost
from qlr_jax.models import LlamaConfig
from qlr_jax.report.terminal.columns import columns
from qlr_jax.settings.recipe import DEMO, Recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "demo": {},
    "narrow": {
        "sequences": 16, "sequence_length": 256, "measure_tokens": 2048, "state_bits": 8, "refine": 0, "evaluation_tokens": 4096,
        "ranks": (0, 8, 16), "factors": ("trellis-2", "trellis-4"),
    },
    "streamed": {
        "sequences": 16, "sequence_length": 256, "measure_tokens": 2048, "state_bits": 8, "refine": 0, "evaluation_tokens": 4096,
        "ranks": (0, 8, 16), "factors": ("trellis-2", "trellis-4"), "streaming": True,
    },
    "wide": {
        "sequences": 16, "sequence_length": 256, "measure_tokens": 2048, "state_bits": 8, "refine": 0, "evaluation_tokens": 4096,
        "ranks": (0, 8, 32), "factors": ("trellis-3",),
    },
    "other": {
        "sequences": 32, "sequence_length": 128, "measure_tokens": 1024, "state_bits": 10, "refine": 0, "evaluation_tokens": 2048,
        "ranks": (0, 16, 64), "factors": ("trellis-2", "int-4g32"), "outputs": "alike", "budget": "2.5bpw",
    },
}  # fmt: skip
SHAPES = {
    "narrow": (512, 1408, 4, 8),
    "streamed": (512, 1408, 4, 8),
    "wide": (1024, 2816, 2, 16),
    "other": (768, 2048, 3, 12),
}  # hidden, inner, layers, heads; half as many key-value heads
TITLES = {  # the job's own names of stages, and those of the plan; what they begin with
    "load": "load", "calibrate": "calibrate", ": spectra": "measure: spectra", ": probing": "measure: probes",
    ": sensitivity": "measure: attribution", "solve": "solve", "judge": "judge", "evaluate": "evaluate", ": saving": "save",
}  # fmt: skip


# ---- one job, watched: everything below runs in a process of its own


@dataclass
class Watch:
    """What a stage took; stages may lie inside each other."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    compiled: list[float] = field(default_factory=list)
    solves: list[dict[str, Any]] = field(default_factory=list)
    _peaks: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], _resident("VmHWM"))
        self._peaks.append(0.0)
        _forget_peak()
        cpu, wall, compiled = _cpu(), time.perf_counter(), len(self.compiled)
        try:
            yield
        finally:
            peak = max(self._peaks.pop(), _resident("VmHWM"))
            if self._peaks:
                self._peaks[-1] = max(self._peaks[-1], peak)
            _forget_peak()
            found = self.stages.setdefault(name, dict.fromkeys(("cpu", "wall", "compiles", "compile_seconds"), 0.0))
            found["cpu"] += _cpu() - cpu
            found["wall"] += time.perf_counter() - wall
            found["compiles"] += len(self.compiled) - compiled
            found["compile_seconds"] += sum(self.compiled[compiled:])
            found["peak"] = max(found.get("peak", 0.0), peak)
            found["after"] = _resident("VmRSS")


class Told:
    """A progress whose stages are watched; their names begin with a colon."""

    def __init__(self, watch: Watch):
        self.watch = watch

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Told]:
        with self.watch.stage(f": {title}"):
            yield self

    def advance(self, count: int = 1, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _resident(key: str) -> float:
    """VmRSS or VmHWM (the peak since it was set back) of this process, bytes."""
    with open("/proc/self/status") as file:
        return next(1024.0 * int(line.split()[1]) for line in file if line.startswith(key))


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def watched(name: str, folder: Path) -> dict[str, Any]:
    """Run one job in this process and tell what it took."""
    import jax

    from qlr_jax import job
    from qlr_jax.calibration import standard_library
    from qlr_jax.core import batch
    from qlr_jax.run import session

    watch = Watch()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: (
            watch.compiled.append(duration_secs) if event.endswith("backend_compile_duration") else None
        )
    )

    class Clock(session.Clock):
        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            with super().stage(name), watch.stage(name):
                yield

    solve_batch = batch.solve_batch

    def timed(weights: Any, metric: Any, specs: Any, **options: Any) -> Any:
        cpu, wall, compiled = _cpu(), time.perf_counter(), len(watch.compiled)
        found = solve_batch(weights, metric, specs, **options)
        watch.solves.append({
            "shape": weights.shape, "specs": [*map(str, specs)], "state_bits": options["config"].state_bits,
            "iterations": found[0].stats["iterations"], "outputs": options.get("outputs") is not None,
            "cpu": _cpu() - cpu, "wall": time.perf_counter() - wall,
            "compiles": len(watch.compiled) - compiled, "compile_seconds": sum(watch.compiled[compiled:]),
        })  # fmt: skip
        return found

    session.Clock, batch.solve_batch = Clock, timed
    before = _resident("VmRSS")
    started = _cpu()
    with watch.stage("job"):
        if name == "demo":
            done = job.demo(folder / "out", recipe=DEMO.updated(**SETTINGS[name]), progress=Told(watch))
        else:
            for part in ("calibration", "heldout"):
                (folder / f"{part}.txt").write_text(standard_library(part)[:400_000], encoding="utf-8")
            done = job.compress(
                folder / "model",
                folder / "out",
                calibration=folder / "calibration.txt",
                recipe=Recipe(**SETTINGS[name]),
                evaluate_on=folder / "heldout.txt",
                progress=Told(watch),
            )
    plans = {kind: json.loads((done.out / "allocation.json").read_text()).get(kind) for kind in solved_strategies()}
    return {
        "name": name, "before": before, "imports_cpu": started, "stages": watch.stages, "solves": watch.solves,
        "peak": watch.stages["job"]["peak"], "cpu": watch.stages["job"]["cpu"], "wall": watch.stages["job"]["wall"],
        "disk": sum(path.stat().st_size for path in done.out.rglob("*") if path.is_file()), "plans": plans,
    }  # fmt: skip


def made(name: str, folder: Path) -> None:
    """A random Llama with the bundled tokenizer, in folder/model."""
    import jax

    from qlr_jax.models import Llama, save_model
    from qlr_jax.models.bundled import BUNDLED

    save_model(Llama(config_of(name), jax.random.key(0)), folder / "model", tokenizer_from=BUNDLED)


def config_of(name: str) -> LlamaConfig:
    hidden, inner, layers, heads = SHAPES[name]
    return LlamaConfig(2048, hidden, inner, layers, heads, heads // 2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)


def run(name: str) -> dict[str, Any]:
    """One job in fresh processes."""
    with tempfile.TemporaryDirectory() as place:
        steps = ["--watch", *(["--make"] if name in SHAPES else [])]
        for step in reversed(steps):
            command = [sys.executable, __file__, step, name, "--folder", place]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(told.stdout.splitlines()[-1])


def planned(name: str) -> cost.Plan:
    """What the model foretells of the job."""
    machine = cost.Machine.parse()
    if name == "demo":
        config, size = cost.find_config("bundled")
        return cost.plan_job(config, DEMO.updated(**SETTINGS[name]), machine, model=name, original_bytes=size)
    return cost.plan_job(config_of(name), Recipe(**SETTINGS[name]), machine, model=name)


def table(found: dict[str, Any]) -> str:
    """Predicted beside measured, a row a stage."""
    plan, stages = planned(found["name"]), found["stages"]
    header = ["stage", "CPU s predicted", "measured", "ratio", "peak MB predicted", "measured", "ratio"]
    rows = []
    for title, name in TITLES.items():
        if title in stages:
            mine = [stage for stage in plan.stages if stage.name.startswith(name)]
            seconds, peak = sum(stage.cpu_seconds for stage in mine), max(stage.host for stage in mine)
            rows.append([name, *pair(seconds, stages[title]["cpu"]), *pair(peak / 1e6, stages[title]["peak"] / 1e6, 0)])
    rows.append(["job", *pair(plan.cpu_seconds, found["cpu"]), *pair(plan.host / 1e6, found["peak"] / 1e6, 0)])
    return f"{found['name']}: {found['wall']:.0f} s on the wall\n" + columns(header, rows)


def pair(predicted: float, measured: float, digits: int = 1) -> list[str]:
    return [f"{predicted:.{digits}f}", f"{measured:.{digits}f}", f"{predicted / measured:.2f}" if measured > 0 else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--json", type=Path, help="write what was measured")
    parser.add_argument("--read", type=Path, nargs="+", help="what --json wrote, in place of running jobs")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        return made(options.make, options.folder)
    if options.watch:
        return print(json.dumps(watched(options.watch, options.folder), default=float))
    found = []
    if options.read:
        found = [job for path in options.read for job in json.loads(path.read_text(encoding="utf-8"))]
    for name in [] if options.read else options.jobs:
        found.append(run(name))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for job in found:
        print("\n" + table(job))


if __name__ == "__main__":
    main()
