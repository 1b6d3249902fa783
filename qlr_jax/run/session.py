"""The work of a job as it goes on: its folder, its journal, and where its pieces run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from allocators import OptionTable
from qlr_jax.core.batch import solve_many
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.solution import Solution
from qlr_jax.engine import HERE, Engine
from qlr_jax.formats.qlr.packed import JOB
from qlr_jax.locks import locked, refuse_locked
from qlr_jax.paths import output_folder
from qlr_jax.progress import Progress, logged, silent, with_status
from qlr_jax.run.journal import Clock, Journal
from qlr_jax.run.workspace import Key, Workspace

TITLES = {"probe": "probing", "final": "compressing", "control": "compressing controls"}  # of solves on a cluster


class Session:
    """One job under way, a context: entered before the model is loaded, begun once it is known what the job is of.

    Attributes:
        out: the folder that the job writes.
        command: what was typed, for the report.
        resume: whether to go on with a job that was interrupted.
        progress: where it says how far it is; once begun, into the log as well.
        clock: seconds of every stage.
        engine: where its pieces run, once it is entered.

    Raises:
        QLRError: `out` cannot be written, holds something other than a job, another job is at work there, or it lies inside one of
            `sources`, which are read; on entering, a cluster that does not answer.
    """

    _space: Workspace  # these two since it was begun
    _journal: Journal

    def __init__(
        self,
        out: str | Path,
        command: str,
        resume: bool = False,
        cluster: Any = None,
        progress: Progress | None = None,
        sources: Iterable[str | Path | None] = (),
    ):
        self.out, self.command, self.resume = output_folder(out, (JOB,), sources), command, resume
        self.progress, self.clock = progress or silent(), Clock()
        self.engine: Engine = HERE
        self._cluster, self._open = cluster, ExitStack()
        refuse_locked(self.out)

    def __enter__(self) -> Session:
        with ExitStack() as opened:
            opened.enter_context(locked(self.out))
            self.engine = opened.enter_context(on_cluster(self._cluster, self.progress))
            self.progress = with_status(self.progress, lambda: self.engine.status)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._open:
            if error[0] is None:
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

    def table(self, measure: Callable[[], OptionTable]) -> OptionTable:
        """The option table that an interrupted run kept, or the one measured now."""
        return self._space.table(measure)

    def solver(self, kind: str) -> Callable[..., LazyMap[Key, Solution]]:
        """What solves matrices of this kind, and keeps each as soon as it is done."""
        return self._journal.watched(self._solve, kind)

    def _solve(self, kind: str, problems: Any, **settings: Any) -> LazyMap[Key, Solution]:
        # in sequence each block waits for the one before it: nothing to share
        engine, store = HERE if kind == "sequential" else self.engine, self._space.store(kind)
        solved = solver_on(engine, store, TITLES.get(kind, kind))(problems, **settings)
        return LazyMap(problems, store.__getitem__) if engine is HERE else solved

    def note(self, **facts: Any) -> None:
        """Put what is known so far into job/report.json."""
        self._journal.add(**facts)


def solver_on(engine: Engine, store: MutableMapping[Key, Solution] | None = None, title: str = "probing") -> Callable[..., Any]:
    """`solve_many`, or on a cluster what does the same there.

    Args:
        engine: where pieces run.
        store: where solutions go, and those of an earlier run are; None: a dict.
        title: of the pieces.
    """
    if engine is HERE:
        return partial(solve_many, into=store)
    from qlr_jax.cluster.engine import DaskEngine
    from qlr_jax.cluster.solves import solve_remotely

    assert isinstance(engine, DaskEngine)
    return partial(solve_remotely, engine, {} if store is None else store, title)


@contextmanager
def on_cluster(cluster: Any, progress: Progress) -> Iterator[Engine]:
    """The engine of a cluster, or this process where there is none.

    Args:
        cluster: as `qlr_jax.cluster.connected` takes it, or None.
        progress: is told who comes and goes.

    Raises:
        QLRError: as `connected`.
    """
    if cluster is None:
        yield HERE
        return
    from qlr_jax.cluster import connected

    with connected(cluster, progress.say) as engine:
        yield engine
