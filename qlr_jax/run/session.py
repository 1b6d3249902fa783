"""The work of a job as it goes on: its folder, its journal, and the processes that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from allocators import OptionTable
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.solution import Solution
from qlr_jax.formats.qlr.packed import JOB
from qlr_jax.locks import locked, refuse_locked
from qlr_jax.paths import output_folder
from qlr_jax.progress import Progress, logged, silent
from qlr_jax.run.journal import Clock, Journal
from qlr_jax.run.processes import Cluster, WorkerGroup
from qlr_jax.run.workspace import Key, Workspace
from qlr_jax.sensitivity import Statistics


class Session:
    """One job under way, a context: entered before the model is loaded, begun once it is known what the job is of.

    Attributes:
        out: the folder that the job writes.
        command: what was typed, for the report.
        resume: whether to go on with a job that was interrupted.
        progress: where it says how far it is; once begun, into the log as well.
        clock: seconds of every stage.
        assists: whether this process only solves for process 0.

    Raises:
        QLRError: `out` cannot be written, holds something other than a job, another job is at work there, or it lies inside one of
            `sources`, which are read.
    """

    _space: Workspace  # these two since it was begun
    _journal: Journal

    def __init__(
        self,
        out: str | Path,
        command: str,
        resume: bool = False,
        cluster: Cluster | None = None,
        progress: Progress | None = None,
        sources: Iterable[str | Path | None] = (),
    ):
        self.out, self.command, self.resume = output_folder(out, (JOB,), sources), command, resume
        self.progress, self.clock = progress or silent(), Clock()
        self._workers = WorkerGroup(cluster or Cluster(), self.out / JOB)
        self.assists = self._workers.cluster.process > 0
        self._lock = ExitStack()
        if not self.assists:
            refuse_locked(self.out)

    def __enter__(self) -> Session:
        if not self.assists:
            self._lock.enter_context(locked(self.out))
        self._workers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._workers.__exit__(*error)
            if error[0] is None and not self.assists:
                self._space.finish()

    @contextmanager
    def stage(self, name: str, title: str | None = None) -> Iterator[None]:
        """A stage of the job, timed; with a title it is shown as under way too."""
        with self.clock.stage(name):
            if title is None:
                yield
            else:
                with self.progress.stage(title):
                    yield

    def begin(self, facts: Mapping[str, Any], known: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
        """Open the job's folder: what is kept there of an earlier run is not done again.

        Args:
            facts: what the job is of; a job that was begun with others is refused.
            known: for job/report.json.
            notes: what is to be said, and logged, before the work begins.
        """
        self._space = Workspace.open(self.out, facts, self.resume)
        if self.resume and not self._space.begun:
            self.progress.say(f"{self.out} holds no job to go on with; it begins now")
        self._journal = Journal(self.clock, self._space.write_report, {"command": self.command, **known})
        self.progress = logged(self.progress, self._space.log)
        for line in notes:
            self.progress.say(line)

    def spill(self, kind: str) -> Callable[[str, np.ndarray], np.ndarray]:
        """(name, array) -> the same array, in a file of the job's folder."""
        return self._space.spill(kind)

    def publish(self, statistics: Statistics) -> None:
        """Let the other processes have the Hessians."""
        self._workers.publish(self._space, statistics.hessians, statistics.outputs)

    def table(self, measure: Callable[[], OptionTable]) -> OptionTable:
        """The option table that an interrupted run kept, or the one measured now."""
        return self._space.table(measure)

    def solver(self, kind: str) -> Callable[..., LazyMap[Key, Solution]]:
        """What solves matrices of this kind, on all processes, and keeps each as soon as it is done."""
        # in sequence each block waits for the one before it: nothing to share
        workers = WorkerGroup(Cluster(), self._space.root) if kind == "sequential" else self._workers
        return self._journal.watched(partial(workers.solve, self._space), kind)

    def note(self, **facts: Any) -> None:
        """Put what is known so far into job/report.json."""
        self._journal.add(**facts)

    def assist(self, facts: Mapping[str, Any], weights: Mapping[str, Any], backbones: Mapping[str, Any]) -> dict[str, Any]:
        """Solve this process's share of what process 0 asks for, until it needs no more; says how much that was."""
        with self.progress.stage("waiting for process 0"):
            statistics = Statistics(weights, *self._workers.statistics(), backbones)
            space = Workspace.open(self.out, facts, resume=True)
        with self.progress.stage("solving for process 0") as stage:
            done = lambda key, found: stage.advance(note=f"{key[0]} {found.summary()}")  # noqa: E731
            solved = self._workers.serve(space, statistics.problem, done)
        cluster = self._workers.cluster
        return {"process": cluster.process, "processes": cluster.processes, "solved": solved}
