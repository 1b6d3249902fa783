"""How far a job has come, on stderr: a bar on a terminal, plain lines elsewhere, nothing in tests and libraries.

Example:
    with progress.stage("compressing", total=56) as stage:
        stage.advance(note="layer 3 down_proj")
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVERY_SECONDS = 5.0  # plain lines come no closer than this


class Stage(Protocol):
    """One stage that is under way. `advance` may be called from several threads."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` says what is being worked on."""
        ...


class Progress(Protocol):
    """Where a job reports how far it is."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """A stage of `total` units (None: unknown), under way as long as the context is open."""
        ...

    def say(self, line: str) -> None:
        """One line that stays."""
        ...


def silent() -> Progress:
    """Shows nothing.

    >>> with silent().stage("loading", total=2) as stage:
    ...     stage.advance()
    """
    return _Silent()


def plain(stream: TextIO | None = None, *, every: float = EVERY_SECONDS) -> Progress:
    """Lines of text: one when a stage starts, one at most every `every` seconds, one with the seconds when it ends.

    `stream` is stderr unless given.
    """
    return _Plain(stream, every)


def bars() -> Progress:
    """A rich bar on stderr: what is being done, how far it is, how long it will still take."""
    return _Bars()


def choose(json: bool = False) -> Progress:
    """`bars()` where stderr is a terminal that can draw them, else `plain()`; `json` (for a program to read) is plain always."""
    from rich.console import Console

    console = Console(stderr=True)
    return bars() if console.is_terminal and not console.is_dumb_terminal and not json else plain()


def logged(progress: Progress, write: Callable[[str], None]) -> Progress:
    """What `progress` shows, and every stage and every note as a line with its time given to `write`."""
    return _Logged(progress, write)


def with_status(progress: Progress, status: Callable[[], str]) -> Progress:
    """What `progress` shows, every note followed by what `status` says just then, where it says something."""
    return _WithStatus(progress, status)


def duration(seconds: float) -> str:
    """A span of time as people say it.

    >>> duration(0.04), duration(7.31), duration(95), duration(7500)
    ('0.0 s', '7.3 s', '1 min 35 s', '2 h 05 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Silent:
    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        yield _SilentStage()

    def say(self, line: str) -> None:
        pass


class _SilentStage:
    def advance(self, count: int = 1, note: str = "") -> None:
        pass


class _Plain:
    def __init__(self, stream: TextIO | None, every: float):
        self._stream, self._every, self._lock = stream, every, threading.Lock()

    def say(self, line: str) -> None:
        with self._lock:
            print(line, file=self._stream or sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        started = time.monotonic()
        self.say(f"{title} ({total})" if total is not None else title)
        stage = _PlainStage(self.say, title, total, self._every)
        try:
            yield stage
        except BaseException:
            self.say(f"{title}: stopped after {duration(time.monotonic() - started)}")
            raise
        self.say(f"{title}: done in {duration(time.monotonic() - started)}")


class _PlainStage:
    def __init__(self, say: Callable[[str], None], title: str, total: int | None, every: float):
        self._say, self._title, self._total, self._every = say, title, total, every
        self._lock, self._done = threading.Lock(), 0
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first pieces came, and how many: what is before them is paid once

    def advance(self, count: int = 1, note: str = "") -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            since, known = self._first = self._first or (now, self._done)
            if now - self._last_line < self._every or self._done == self._total:
                return
            self._last_line = now
            line = f"{self._title}: {self._done}" + (f" of {self._total}" if self._total is not None else "")
            if self._total and known < self._done < self._total:
                line += f", about {duration((now - since) * (self._total - self._done) / (self._done - known))} left"
            self._say(line + (f" ({note})" if note else ""))


class _Bars:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console, self._lock, self._open = Console(stderr=True), threading.Lock(), 0
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("still"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self._console,
            transient=True,
        )

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        started = time.monotonic()
        with self._lock:
            self._open += 1
            if self._open == 1:
                self._bars.start()
        task = self._bars.add_task(title, total=total, note="")
        try:
            yield _BarStage(self._bars, task)
            ending = "done in"
        except BaseException:
            ending = "stopped after"
            raise
        finally:
            self._bars.remove_task(task)
            self.say(f"{title}: {ending} {duration(time.monotonic() - started)}")
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._bars.stop()


class _BarStage:
    def __init__(self, bars: RichProgress, task: TaskID):
        self._bars, self._task = bars, task

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            self._bars.update(self._task, advance=count, note=note)
        else:
            self._bars.update(self._task, advance=count)


class _Logged:
    def __init__(self, shown: Progress, write: Callable[[str], None]):
        self._shown, self._write = shown, write

    def _log(self, line: str) -> None:
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def say(self, line: str) -> None:
        self._shown.say(line)
        self._log(line)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        started = time.monotonic()
        self._log(title if total is None else f"{title} ({total})")
        ending = "done in"
        try:
            with self._shown.stage(title, total) as stage:
                yield _LoggedStage(stage, title, self._log)
        except BaseException:
            ending = "stopped after"
            raise
        finally:
            self._log(f"{title}: {ending} {duration(time.monotonic() - started)}")


class _LoggedStage:
    def __init__(self, shown: Stage, title: str, log: Callable[[str], None]):
        self._shown, self._title, self._log, self._last = shown, title, log, time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._shown.advance(count, note)
        if note:
            now = time.monotonic()
            self._log(f"{self._title}: {note}, {now - self._last:.1f} s")  # of several that end together, the first has it
            self._last = now


class _WithStatus:
    def __init__(self, shown: Progress, status: Callable[[], str]):
        self._shown, self._status = shown, status

    def say(self, line: str) -> None:
        self._shown.say(line)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        with self._shown.stage(title, total) as stage:
            yield _WithStatusStage(stage, self._status)


class _WithStatusStage:
    def __init__(self, shown: Stage, status: Callable[[], str]):
        self._shown, self._status = shown, status

    def advance(self, count: int = 1, note: str = "") -> None:
        self._shown.advance(count, " · ".join(filter(None, (note, self._status()))))
