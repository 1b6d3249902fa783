"""Many processes for one job: process 0 runs it, and the solves are shared out through the folder that all of them see.

    job/together-<run>/process-<p>.json     who is there: a pulse that keeps counting, and how it left
    job/together-<run>/request-<i>.json     what process 0 wants solved: keys, settings, and what the matrices are known by
    job/together-<run>/finished.json        the job is over, or why process 0 stopped
    job/<kind>/<matrix>.<spec>.safetensors  what is solved, by whomever (`Workspace`)

Every process reads the same model and text and has the same Hessians; from a request each knows its own share, solves it on its
own devices and writes what it finds as files. Process 0 reads the others'. Solving needs no message between processes and no
collective, and what is written does not say who wrote it: a job that lost a process goes on with any number of them, and ends with
the bytes of one process alone, as long as each has as many devices (`core.devices`).
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.core.batch import Problems, batches
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.solver import Solution
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.workspace import Key, Workspace, _Kept

POLL, PULSE = 0.2, 1.0  # seconds between looks at the folder, and between signs of life
PATIENCE = 60.0  # seconds without a sign of life after which a process counts as lost
ARRIVAL = 10  # times that, before the first: processes load and compile at their own pace
SAMPLED = 64  # rows of a matrix that tell it from another


@dataclass(frozen=True)
class Cluster:
    """Which process of how many this is; `run` is a number that all of them share and no other run has."""

    process: int = 0
    processes: int = 1
    run: int = 0


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Cluster:
    """Join the other processes of a job; call it before anything is computed.

    Args:
        coordinator: `host:port` of process 0, where all others reach it. Where nothing at all is given, JAX asks the cluster
            (Slurm, MPI, Cloud TPU, Kubernetes).
        processes: how many there are; 1 joins nothing.
        process: which one this is, from 0.

    Raises:
        QLRError: numbers that do not fit, no cluster found, JAX in use already, or processes that do not come within five minutes.

    Example:
        >>> initialize(processes=1)
        Cluster(process=0, processes=1, run=0)
    """
    import jax
    from jax.experimental import multihost_utils

    if processes == 1 and process in (None, 0):
        return Cluster()
    given = (coordinator, processes, process)
    if any(g is not None for g in given) and any(g is None for g in given):
        raise QLRError(f"coordinator={coordinator}, processes={processes}, process={process}: pass all three, or none of them")
    if processes is not None and (processes < 1 or not 0 <= process < processes):
        raise QLRError(f"process {process} of {processes} does not exist; count from 0 to processes - 1")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise QLRError(f"the coordinator {coordinator!r} is no host:port; pass e.g. 10.0.0.1:9911")
    # JAX would abort every process some time after it has lost one, and again as they leave; `Together` ends them with a sentence
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(coordinator, processes, process, shutdown_timeout_seconds=10)
    except (RuntimeError, ValueError) as error:
        raise QLRError(
            f"the processes did not come together: {str(error).splitlines()[0]}; start all of them with the same coordinator and "
            "count, before anything is computed"
        ) from None
    number = multihost_utils.broadcast_one_to_all(np.uint32(int.from_bytes(os.urandom(4), "big")))
    return Cluster(jax.process_index(), jax.process_count(), int(number))


def cost(problem: tuple, config: SolverConfig) -> float:
    """Operations of one solve, about: m · n · (states searched + products with H), as often as Q may be found anew."""
    (m, n), spec = problem[0].shape, Spec.parse(problem[2])
    searched = 2 * 2**config.state_bits if "trellis" in str(spec) else 0
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
    space: Workspace,
    kind: str,
    keys: Iterable[Key],
    *,
    on_done: Callable[[Key, Solution], None] | None = None,
    still_there: Callable[[], None] = lambda: None,
) -> dict[Key, Solution]:
    """Every solution from the workspace, each as soon as its file is there, whoever writes it.

    Args:
        still_there: called between looks; raises where there is no point in waiting on.
    """
    kept, missing, found = _Kept(space.root / kind), dict.fromkeys(keys), {}
    while missing:
        for key in [key for key in missing if key in kept]:
            del missing[key]
            found[key] = kept[key]
            if on_done is not None:
                on_done(key, found[key])
        if missing:
            still_there()
            time.sleep(POLL)
    return found


def digest(problem: tuple) -> list[int]:
    """What tells a problem's arrays from others: a checksum of evenly spaced rows of each."""
    found = []
    for array in (part for part in (*problem[:2], *problem[3:]) if part is not None):
        rows = np.linspace(0, len(array) - 1, min(len(array), SAMPLED)).astype(int)
        found.append(zlib.crc32(np.ascontiguousarray(array[rows]).tobytes()))
    return found


@dataclass
class Together:
    """One job's processes while they work: a context in which each shows that it is there.

    Process 0 calls `solve` as it would the workspace's; every other one calls `serve`, which returns when the job is over.

        with Together(cluster, space) as team:
            if cluster.process:
                team.serve(statistics.problem)
            else:
                ... team.solve("final", problems, seed=0, config=config) ...

    Attributes:
        space: of the same job on all processes; a folder that all of them see.
        patience: seconds without a sign of life after which a process counts as lost.
    """

    cluster: Cluster
    space: Workspace
    patience: float = PATIENCE
    _asked: int = 0
    _over: threading.Event = field(default_factory=threading.Event, repr=False)
    _heard: dict[int, tuple[int, float]] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        return self.space.root / f"together-{self.cluster.run:08x}"

    def __enter__(self) -> Together:
        if self.cluster.processes > 1:
            if not self.cluster.process:
                self.space._write(self.folder / "begun.json", lambda path: path.write_text(json.dumps(asdict(self.cluster))))
            self._pulse = threading.Thread(target=self._show, daemon=True)
            self._pulse.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.cluster.processes == 1:
            return
        self._over.set()
        self._pulse.join()
        told = None if error is None else f"{type(error).__name__}: {error}" if not isinstance(error, QLRError) else str(error)
        with suppress(OSError):
            self._tell(self._own, self._card() | {"left": told or "done"})
            if not self.cluster.process:
                self._tell(self.folder / "finished.json", {"error": told})
                self._wait_until_left()

    def solve(
        self,
        kind: str,
        problems: Problems[Key],
        *,
        seed: int,
        config: SolverConfig,
        on_done: Callable[[Key, Solution], None] | None = None,
    ) -> dict[Key, Solution]:
        """`Workspace.solve` on all processes: what is new is asked of them, this one does its share, and the rest is waited for.

        Raises:
            QLRError: a process is lost or has stopped; what is solved is kept.
        """
        kept = _Kept(self.space.root / kind)
        todo = [keys for keys in batches(problems) if not all(key in kept for key in keys)]
        wanted = {key: problems[key] for keys in todo for key in keys}
        if self.cluster.processes > 1 and len(todo) > 1:
            request = {"kind": kind, "seed": seed, "config": asdict(config)}
            request |= {"keys": list(wanted), "known_by": [digest(p) for p in wanted.values()]}
            self._tell(self.folder / f"request-{self._asked}.json", request)
            self._asked += 1
            mine = share(wanted, 0, self.cluster.processes, config)
        else:
            mine = wanted
        found = self.space.solve(kind, mine, seed=seed, config=config, on_done=on_done)
        rest = [key for key in problems if key not in found]
        found |= gather(self.space, kind, rest, on_done=on_done, still_there=self._check)
        return {key: found[key] for key in problems}

    def serve(self, problem: Callable[[str, str], tuple]) -> None:
        """Solve this process's share of every request, until process 0 has finished.

        Args:
            problem: (matrix, spec) -> what `solve_many` takes.

        Raises:
            QLRError: process 0 is lost or has stopped; or it has other matrices or Hessians than this one.
        """
        while True:
            path = self.folder / f"request-{self._asked}.json"
            if path.is_file():
                request = json.loads(path.read_text(encoding="utf-8"))
                self._asked += 1
                self._answer(request, problem)
            elif (self.folder / "finished.json").is_file():
                if error := json.loads((self.folder / "finished.json").read_text(encoding="utf-8"))["error"]:
                    raise QLRError(f"process 0 has stopped: {error}")
                return
            else:
                self._check()
                time.sleep(POLL)

    def _answer(self, request: dict[str, Any], problem: Callable[[str, str], tuple]) -> None:
        keys, config = [tuple(key) for key in request["keys"]], SolverConfig(**request["config"])
        problems = {key: problem(*key) for key in keys}
        for key, known in zip(keys, request["known_by"], strict=True):
            if digest(problems[key]) != known:
                raise QLRError(
                    f"{key[0]} has another weight or Hessian in process {self.cluster.process} than in process 0; run all "
                    "processes on the same kind of machine with as many devices each, and on the same model and text"
                )
        mine = share(problems, self.cluster.process, self.cluster.processes, config)

        def on_done(key: Key, solution: Solution) -> None:
            if self._stopped():
                raise QLRError("process 0 has stopped; what is solved is kept, so go on with --resume")

        self.space.solve(request["kind"], mine, seed=request["seed"], config=config, on_done=on_done)

    # Signs of life: a count that goes up, so that no two clocks need agree -------------------------------------------------

    @property
    def _own(self) -> Path:
        return self.folder / f"process-{self.cluster.process}.json"

    def _card(self, beat: int = 0) -> dict[str, Any]:
        return {"beat": beat, "pid": os.getpid(), "host": platform.node(), "left": None}

    def _show(self) -> None:
        beat = 0
        while not self._over.wait(PULSE if beat else 0):
            if self.folder.is_dir():
                beat += 1
                with suppress(OSError):  # a folder that is slow for once
                    self._tell(self._own, self._card(beat))
            else:
                self._over.wait(POLL)

    def _tell(self, path: Path, told: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.{self.cluster.process}")
        temporary.write_text(json.dumps(told), encoding="utf-8")
        os.replace(temporary, path)

    def _read(self, process: int) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            return json.loads((self.folder / f"process-{process}.json").read_text(encoding="utf-8"))
        return None

    def _others(self) -> list[int]:
        return list(range(1, self.cluster.processes)) if not self.cluster.process else [0]

    def _stopped(self) -> bool:
        return (self.folder / "finished.json").is_file()

    def _check(self) -> None:
        """QLRError where a process that is waited for is lost or has stopped."""
        if self.cluster.processes == 1:
            raise QLRError("a finished solve has gone from the workspace; go on with --resume")
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
