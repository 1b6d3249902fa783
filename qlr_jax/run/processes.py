"""Many processes for one job: process 0 runs it, and the solves are shared out through the folder that all of them see.

    job/workers/process-<p>.json     who is there: a heartbeat that keeps counting, and how it left
    job/workers/statistics.json      where H and G of every matrix lie, once process 0 has them
    job/workers/request-<i>.json     what process 0 wants solved
    job/workers/finished.json        the others are no longer needed, or why process 0 stopped
    job/<kind>/<matrix>.<spec>.safetensors  what is solved, by whomever (`Workspace`)

JAX brings the processes together (`jax.distributed`) and is let go then: solves need no message between processes, and with its
service kept up, JAX would abort all processes some time after it has lost one. From a request each process knows its own share,
solves it on its own devices, and writes what it finds as files, of which process 0 reads the others'. What is written does not say
who wrote it: a job that lost a process goes on with any number of them, and ends with the bytes of one process alone, as long as
each has as many devices (`core.sharding`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.core.batch import Problems, batches, solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.solution import Solution
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr.packed import JOB
from qlr_jax.locks import release, take
from qlr_jax.paths import output_folder
from qlr_jax.run.workspace import Key, SolutionStore, Workspace

WORKERS = "workers"
POLL, HEARTBEAT = 0.2, 1.0  # seconds between looks at the folder, and between signs of life
PATIENCE = 60.0  # seconds without a sign of life after which a process counts as lost
ARRIVAL = 10  # times that, before the first: processes load and compile at their own pace
SEEN = 30.0  # seconds after which a folder that another machine made is seen here, if ever


@dataclass(frozen=True)
class Cluster:
    """Which process of how many this is, as `join` returns it."""

    process: int = 0
    processes: int = 1


def join(out: str | Path, coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Cluster:
    """Meet the other processes of a job that writes to `out`; call it before anything is computed.

    Args:
        out: of the job, in a folder that all processes see.
        coordinator: `host:port` of process 0, where all others reach it.
        processes: how many there are; 1 joins nothing.
        process: which one this is, from 0.

    Raises:
        QLRError: numbers that do not fit, an `out` that cannot be written, holds something else or is not seen here, JAX in use
            already, or processes that do not come within five minutes.

    Example:
        >>> join("small", processes=1)
        Cluster(process=0, processes=1)
    """
    import jax

    given = (coordinator, processes, process)
    if (processes == 1 and process in (None, 0)) or given == (None, None, None):
        return Cluster()
    if None in given:
        raise QLRError(f"coordinator {coordinator}, processes {processes}, process {process}: pass all three, or none of them")
    assert coordinator is not None and processes is not None and process is not None
    if processes < 1 or not 0 <= process < processes:
        raise QLRError(f"process {process} of {processes} does not exist; count from 0 to processes - 1")
    if not coordinator.rpartition(":")[2].isdigit():
        raise QLRError(f"the coordinator {coordinator!r} is no host:port; pass e.g. 10.0.0.1:9911")
    place = output_folder(out, keep=(JOB,))
    folder = place / JOB / WORKERS
    if not process:  # before the others can come: what they find there is of this run
        take(place)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        jax.distributed.initialize(coordinator, processes, process)
        jax.distributed.shutdown()
    except (RuntimeError, ValueError) as error:
        release(place)
        raise QLRError(
            f"the processes did not come together: {str(error).splitlines()[0]}; start all of them with the same coordinator and "
            "count, before anything is computed"
        ) from None
    until = time.monotonic() + SEEN
    while not folder.is_dir():
        if time.monotonic() > until:
            raise QLRError(f"process {process} does not see {folder}, which process 0 made; give an output folder that all share")
        time.sleep(POLL)
    return Cluster(process, processes)


def cost(problem: tuple, config: SolverConfig) -> float:
    """Operations of one solve, about: m · n · (states searched + products with H), as often as Q may be quantized again."""
    (m, n), spec = problem[0].shape, Spec.parse(problem[2])
    quantizers = [spec.quantizer(config.state_bits), *(spec.factor_quantizers(config.state_bits) if spec.rank else ())]
    searched = 2 * max(quantizer.search_cost.states for quantizer in quantizers)
    return m * n * (searched + n) * (config.iterations if spec.rank else 1)


def share(problems: Problems[Key], process: int, processes: int, config: SolverConfig | None = None) -> dict[Key, tuple]:
    """The problems that are this process's: whole batches of `solve_many`, the dearest first to whoever has least so far.

    All processes come to the same shares from the same problems; together they are all of them, and none is in two.

    Example:
        >>> w = np.eye(32, dtype=np.float32)
        >>> problems = {(name, spec): (w, w, spec) for name in "ab" for spec in ("int-4", "int-3")}
        >>> [sorted(share(problems, p, 2)) for p in (0, 1)]
        [[('a', 'int-4'), ('b', 'int-4')], [('a', 'int-3'), ('b', 'int-3')]]
    """
    config = config or SolverConfig()
    costs = [(sum(cost(problems[key], config) for key in keys), keys) for keys in batches(problems)]
    loads, mine = [0.0] * processes, set()
    for taken, keys in sorted(costs, key=lambda c: -c[0]):  # stable: equal ones stay in order
        least = loads.index(min(loads))
        loads[least] += taken
        if least == process:
            mine.update(keys)
    return {key: problem for key, problem in problems.items() if key in mine}


def gather(
    store: SolutionStore, keys: Iterable[Key], on_done: Callable[[Key, Solution], None] | None, still_there: Callable[[], None]
) -> None:
    """Wait until all of these solutions are kept, each noted as soon as its file is there, whoever writes it.

    Args:
        store: where they will be.
        keys: whose solutions are waited for.
        on_done: called as soon as one is there.
        still_there: called between two checks of the folder; raises where there is no point in waiting on.
    """
    missing = dict.fromkeys(keys)
    while missing:
        for key in [key for key in missing if key in store]:
            del missing[key]
            if on_done is not None:
                on_done(key, store[key])
        if missing:
            still_there()
            time.sleep(POLL)


@dataclass
class WorkerGroup:
    """One job's processes while they work: a context in which each shows that it is there.

    Process 0 writes where its statistics lie (`publish`) and calls `solve`; every other one takes the statistics and calls `serve`,
    which returns when it is no longer needed.

    Attributes:
        root: the job's folder, which all of them see.
        patience: seconds without a sign of life after which a process counts as lost.
    """

    cluster: Cluster
    root: Path
    patience: float = PATIENCE
    _asked: int = 0
    _over: threading.Event = field(default_factory=threading.Event, repr=False)
    _heard: dict[int, tuple[int, float]] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        return self.root / WORKERS

    @property
    def alone(self) -> bool:
        return self.cluster.processes == 1

    def __enter__(self) -> WorkerGroup:
        if not self.alone:
            self._heartbeat = threading.Thread(target=self._show, daemon=True)
            self._heartbeat.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.alone:
            return
        self._over.set()
        self._heartbeat.join()
        message = None if error is None else f"{type(error).__name__}: {error}" if not isinstance(error, QLRError) else str(error)
        with suppress(OSError):
            self._write(self._own, self._card() | {"left": message or "done"})
            if not self.cluster.process:
                self._write(self.folder / "finished.json", {"error": message})
                self._wait_until_left()

    def publish(self, space: Workspace, hessians: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Put H and G where the other processes read them, and tell them; arrays that matrices share stay shared."""
        if not self.alone:
            places = {kind: self._placed(space, kind, own) for kind, own in (("hessians", hessians), ("outputs", outputs))}
            self._write(self.folder / "statistics.json", places | {"devices": _devices()})

    def _placed(self, space: Workspace, kind: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
        put, found = space.spill(kind), {}
        places: dict[int, tuple[np.ndarray, str]] = {}  # the array too: its id is its own as long as it lives
        for name, array in arrays.items():
            if id(array) not in places:
                file = Path(getattr(array, "filename", None) or getattr(put(name, array), "filename"))  # noqa: B009
                places[id(array)] = array, os.path.relpath(file, self.root)
            found[name] = places[id(array)][1]
        return found

    def statistics(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """H and G of every matrix, read where they are used; waits until process 0 has them.

        Raises:
            QLRError: process 0 is lost or has stopped, or has another number of devices.
        """
        known = self._await(self.folder / "statistics.json")
        assert known is not None
        if known["devices"] != _devices():
            raise QLRError(
                f"process {self.cluster.process} has {_devices()} devices and process 0 has {known['devices']}, so results would "
                "differ; run all processes with as many devices each"
            )
        named = (file for kind in ("hessians", "outputs") for file in known[kind].values())
        files = {file: np.load(self.root / file, mmap_mode="r") for file in named}
        hessians, outputs = ({name: files[file] for name, file in known[kind].items()} for kind in ("hessians", "outputs"))
        return hessians, outputs

    def solve(
        self,
        space: Workspace,
        kind: str,
        problems: Problems[Key],
        *,
        seed: int,
        config: SolverConfig,
        on_done: Callable[[Key, Solution], None] | None = None,
    ) -> LazyMap[Key, Solution]:
        """`solve_many` on all processes: what is new is asked of them, this one does its share, and the rest is waited for.

        Args:
            space: where solutions are kept.
            kind: of the solutions, a folder there.
            problems, seed, config, on_done: as for `solve_many`.

        Returns:
            Every solution, read where it is used.

        Raises:
            QLRError: a process is lost or has stopped; what is solved is kept.
        """
        store = space.store(kind)
        found = LazyMap(problems, store.__getitem__)
        if self.alone:
            solve_many(problems, seed=seed, config=config, on_done=on_done, into=store)
            return found
        todo = [keys for keys in batches(problems) if not all(key in store for key in keys)]
        mine = wanted = {key: problems[key] for keys in todo for key in keys}
        if len(todo) > 1:
            request = {"kind": kind, "seed": seed, "config": asdict(config), "keys": list(wanted)}
            self._write(self.folder / f"request-{self._asked}.json", request)
            self._asked += 1
            mine = share(wanted, 0, self.cluster.processes, config)
        solve_many(mine, seed=seed, config=config, on_done=on_done, into=store)
        gather(store, [key for key in problems if key not in mine], on_done, self._check)
        return found

    def serve(self, space: Workspace, problem: Callable[[str, str], tuple], on_done: Callable[[Key, Solution], None]) -> int:
        """Solve this process's share of every request until process 0 needs no more.

        Args:
            problem: (matrix, spec) -> what `solve_many` takes.
            on_done: called when a matrix is finished.

        Returns:
            How many matrices were solved here.

        Raises:
            QLRError: process 0 is lost or has stopped.
        """
        solved = 0
        while request := self._await(self.folder / f"request-{self._asked}.json"):
            self._asked += 1
            config = SolverConfig(**request["config"])
            problems = {(name, spec): problem(name, spec) for name, spec in request["keys"]}
            mine = share(problems, self.cluster.process, self.cluster.processes, config)
            store = space.store(request["kind"])
            solve_many(mine, seed=request["seed"], config=config, on_done=self._while_asked(on_done), into=store)
            solved += len(mine)
        return solved

    def _while_asked(self, on_done: Callable[[Key, Solution], None]) -> Callable[[Key, Solution], None]:
        def done(key: Key, solution: Solution) -> None:
            on_done(key, solution)
            self._finished()

        return done

    def _await(self, path: Path) -> dict[str, Any] | None:
        """What process 0 writes there; None where it is over before."""
        while not path.is_file():
            if self._finished():
                return None
            self._check()
            time.sleep(POLL)
        return json.loads(path.read_text(encoding="utf-8"))

    def _finished(self) -> bool:
        """Whether process 0 needs no more; QLRError where it has stopped."""
        path = self.folder / "finished.json"
        if not path.is_file():
            return False
        if error := json.loads(path.read_text(encoding="utf-8"))["error"]:
            raise QLRError(f"process 0 has stopped: {error}")
        return True

    # Signs of life: a count that goes up, so that no two clocks need agree -------------------------------------------------

    @property
    def _own(self) -> Path:
        return self.folder / f"process-{self.cluster.process}.json"

    def _card(self, beat: int = 0) -> dict[str, Any]:
        return {"beat": beat, "pid": os.getpid(), "host": platform.node(), "left": None}

    def _show(self) -> None:
        beat = 0
        while not self._over.wait(HEARTBEAT if beat else 0):
            beat += 1
            with suppress(OSError):  # a folder that is slow for once
                self._write(self._own, self._card(beat))

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.{self.cluster.process}")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)

    def _read(self, process: int) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            return json.loads((self.folder / f"process-{process}.json").read_text(encoding="utf-8"))
        return None

    def _others(self) -> list[int]:
        return list(range(1, self.cluster.processes)) if not self.cluster.process else [0]

    def _check(self) -> None:
        """QLRError where a process that is waited for is lost or has stopped."""
        for process in self._others():
            card, now = self._read(process), time.monotonic()
            beat = card["beat"] if card else 0
            if card and card["left"] and (process or card["left"] != "done"):
                raise QLRError(f"process {process} has stopped: {card['left']}; what is solved is kept, so go on with --resume")
            last, since = self._heard.setdefault(process, (beat, now))
            if beat != last:
                self._heard[process] = beat, now
            elif now - since > self.patience * (1 if beat else ARRIVAL):
                who = f"process {process} of {self.cluster.processes}" + (f" ({card['host']}, pid {card['pid']})" if card else "")
                raise QLRError(
                    f"{who} has not been heard of for {now - since:.0f} s; what is solved is kept, so go on with --resume, "
                    "with as many processes as you have"
                )

    def _wait_until_left(self) -> None:
        """Give the others the time to read that the job is over; what is lost is not waited for longer than the patience."""
        until = time.monotonic() + self.patience
        while time.monotonic() < until and not all((card := self._read(p)) and card["left"] for p in self._others()):
            time.sleep(POLL)


def _devices() -> int:
    from qlr_jax.core.sharding import available

    return available()
