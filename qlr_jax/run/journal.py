"""How long a job's stages took, and how far it is: what job/report.json says while the job is under way."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qlr_jax.core.solution import Solution

EVERY = 5.0  # seconds between two writings while matrices are solved


@dataclass
class Clock:
    """Seconds of every stage of a job.

    Attributes:
        ended: called with a stage's name when it is over.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    ended: Callable[[str], None] = lambda name: None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.ended(name)


class Journal:
    """What is known of a job so far, handed on to be written after every stage and every few seconds of solving.

    Of matrices that end together the first has the seconds of all.

    Example:
        >>> written = []
        >>> journal = Journal(Clock(), written.append, {"model": "bundled"})
        >>> with journal.clock.stage("load"):
        ...     pass
        >>> written[-1]["model"], written[-1]["stage"], list(written[-1]["seconds"])
        ('bundled', 'load', ['load'])
    """

    def __init__(self, clock: Clock, write: Callable[[Mapping[str, Any]], None], facts: Mapping[str, Any]):
        self.clock, self._write = clock, write
        self._state: dict[str, Any] = {"format": 1, **facts, "stage": None, "seconds": clock.seconds}
        self._matrices: dict[str, list[dict[str, Any]]] = {}
        self._written = 0.0
        clock.ended = lambda stage: self.add(stage=stage)

    def add(self, **facts: Any) -> None:
        """Facts that are known from now on."""
        self._state |= facts
        self._written = time.monotonic()
        self._write(self._state | {"matrices": self._matrices})

    def watched(self, solve: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """`solve` for one kind of solutions, every matrix noted as soon as it is there."""

        def solved(problems: Any, *, on_done: Callable[[Any, Solution], None] | None = None, **settings: Any) -> Any:
            last = time.monotonic()

            def done(key: tuple[str, str], solution: Solution) -> None:
                nonlocal last
                now = time.monotonic()
                line = {"name": key[0], "spec": key[1], "bits": solution.bits, "error": solution.stats["relative_error"]}
                self._matrices.setdefault(kind, []).append(line | {"seconds": now - last})
                last = now
                if now - self._written > EVERY:
                    self.add()
                if on_done is not None:
                    on_done(key, solution)

            return solve(kind, problems, on_done=done, **settings)

        return solved


def peak_rss() -> int:
    """The largest resident size of this process so far, bytes.

    Example:
        >>> peak_rss() > 2**20
        True
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
