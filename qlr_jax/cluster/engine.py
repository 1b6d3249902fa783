"""The engine that hands pieces to the workers of a Dask cluster."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from qlr_jax.cluster.files import Offer, offer
from qlr_jax.cluster.worker import Slot, facts, part, run
from qlr_jax.engine import Call, Pinned
from qlr_jax.errors import QLRError

Key = TypeVar("Key", bound=Hashable)
LOOKS = 1.0  # seconds between looks at which workers are there


class Remote:
    """What stands for what a piece returned: an array stays on the workers, and comes here where numpy asks for it."""

    def __init__(self, engine: DaskEngine, future: Future):
        self.engine, self.future = engine, future

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.engine.result(self), dtype)


class DaskEngine:
    """Pieces on the workers of a Dask cluster (`qlr_jax.engine.Engine`).

    A worker that is lost costs its pieces: Dask runs them again elsewhere, with what they need of other pieces. Every argument that
    is an object given to `share` travels as the call that makes it on the worker.

    Attributes:
        client: of the cluster.
        say: is told which workers come and go.
    """

    ahead = 4

    def __init__(self, client: Client, say: Callable[[str], None] = lambda line: None):
        self.client: Any = client  # whose calls are for threads and for coroutines alike
        self.say = say
        self._job, self._facts = uuid.uuid4().hex, facts()
        self._shared: dict[int, tuple[Any, Any]] = {}
        self._count = {"done": 0, "lost": 0}
        self._lock, self._looked = threading.Lock(), 0.0
        self._workers: dict[str, int] = {}
        self.check()

    # ---- engine.Engine

    def submit(self, function: Callable[..., Any], *arguments: Any, title: str = "") -> Remote:
        futures: dict[int, Future] = {}
        given = [self._travelling(argument, futures) for argument in arguments]
        key = f"{title or function.__name__.strip('_')}-{uuid.uuid4().hex}"
        with self._scheduler():
            future = self.client.submit(
                run, self._job, self._facts, function, given, list(futures.values()), key=key, pure=False, retries=0
            )
        future.add_done_callback(self._done)
        return Remote(self, future)

    def split(self, value: Any, parts: int) -> tuple[Remote, ...]:
        return tuple(self.part(value, k) for k in range(parts))

    def part(self, value: Remote, key: Any) -> Remote:
        """What stands for a part of what a piece returned."""
        name = f"part-{uuid.uuid4().hex}"
        with self._scheduler():
            return Remote(self, self.client.submit(part, value.future, key, key=name, pure=False))

    def result(self, value: Any) -> Any:
        if not isinstance(value, Remote):
            return value
        for _, found in self.results({0: value}):
            return found
        raise AssertionError("a piece has one result")

    def results(self, values: Mapping[Key, Any]) -> Iterator[tuple[Key, Any]]:
        waiting: dict[Any, list[Key]] = {}
        for key, value in values.items():
            if isinstance(value, Remote):
                waiting.setdefault(value.future.key, []).append(key)
            else:
                yield key, value
        futures = list({v.future.key: v.future for v in values.values() if isinstance(v, Remote)}.values())
        with self._scheduler():
            for future in self._completed(futures):
                found = self._found(future)
                for key in waiting[future.key]:
                    yield key, found

    def _found(self, future: Future) -> Any:
        """What a piece returned; its own error is told as such, and not taken for one of the cluster."""
        try:
            return future.result()
        except (QLRError, KilledWorker):
            raise
        except Exception as error:
            if future.status != "error":  # the connection's, not the piece's
                raise
            title = str(future.key).rpartition("-")[0]
            raise QLRError(f"a piece of work ({title}) failed on a worker: {type(error).__name__}: {error}") from error

    def forget(self) -> None:
        pass  # workers keep the last block that they had

    # ---- what travels

    def share(self, value: Any, call: Call | Pinned) -> None:
        """An object that the workers make for themselves.

        Args:
            value: the object here, as it stands among the arguments of pieces.
            call: what makes it there.
        """
        self._shared[id(value)] = value, call

    def share_items(self, mapping: Mapping[str, Any]) -> None:
        """The values of a shared mapping are looked up in it, wherever one stands among the arguments."""
        whole = self._shared[id(mapping)][1]
        for name, value in mapping.items():
            self._shared[id(value)] = value, Call(part, (whole, name))

    def offer(self, place: Path) -> Offer:
        """The files of a model, for workers that do not see them."""
        return offer(self.client, place)

    def _travelling(self, value: Any, futures: dict[int, Future]) -> Any:
        if id(value) in self._shared:
            return self._shared[id(value)][1]
        if isinstance(value, Remote):
            places = list(futures)
            if id(value.future) not in futures:
                futures[id(value.future)] = value.future
                places.append(id(value.future))
            return Slot(places.index(id(value.future)))
        if isinstance(value, Call):
            return Call(value.function, self._travelling(value.arguments, futures), value.kept)
        if type(value) in (list, tuple):
            return type(value)(self._travelling(own, futures) for own in value)
        if type(value) is dict:
            return {key: self._travelling(own, futures) for key, own in value.items()}
        return value

    # ---- who is there

    def check(self) -> None:
        """Refuse workers whose results would be others.

        Raises:
            QLRError: naming one, and what differs.
        """
        from qlr_jax.cluster.worker import check

        with self._scheduler():
            found = self.client.run(check, self._facts, on_error="return")
        for address, error in found.items():
            if isinstance(error, BaseException):
                raise QLRError(str(error) if isinstance(error, QLRError) else f"worker {address}: {type(error).__name__}: {error}")
        self._workers = dict.fromkeys(found, 0)

    def check_memory(self, needed: int) -> None:
        """Refuse workers that would be killed by a job's largest piece.

        Args:
            needed: bytes.

        Raises:
            QLRError: naming the one with the least memory.
        """
        with self._scheduler():
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
        limits = {address: worker["memory_limit"] for address, worker in workers.items() if worker["memory_limit"]}
        least = min(limits, key=limits.__getitem__, default=None)
        if least is not None and limits[least] < needed:
            raise QLRError(
                f"worker {least} may use {limits[least] / 1e9:.2f} GB, and the largest piece of this job takes about "
                f"{needed / 1e9:.2f} GB; start workers with at least that (--memory-limit), fewer on a machine"
            )

    @property
    def status(self) -> str:
        """How many pieces are done, running and lost.

        A piece is lost with the worker that was running it, and is run again.
        """
        running = sum(self._workers.values())
        lost = f", {self._count['lost']} lost and run again" if self._count["lost"] else ""
        return f"{self._count['done']} pieces done, {running} running{lost}"

    def _done(self, future: Future) -> None:
        if future.status == "finished":
            with self._lock:
                self._count["done"] += 1

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOKS:
            return
        self._looked = time.monotonic()
        now = {address: len(keys) for address, keys in self.client.processing().items()}
        for address in self._workers.keys() - now.keys():
            self._count["lost"] += self._workers[address]
            self.say(f"worker {address} is lost; its pieces run again on the {len(now)} that are left")
        for address in now.keys() - self._workers.keys():
            self.say(f"worker {address} has come")
        self._workers = now

    def _completed(self, futures: list[Future]) -> Iterator[Future]:
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(done.put)
        left = len(futures)
        while left:
            self._look()
            try:
                future = done.get(timeout=LOOKS)
            except queue.Empty:
                continue
            left -= 1
            yield future

    @contextmanager
    def _scheduler(self) -> Iterator[None]:
        """What goes wrong on a cluster, as one sentence."""
        try:
            yield
        except KilledWorker as error:
            last, title = getattr(error.last_worker, "address", ""), str(error.task).rpartition("-")[0]
            raise QLRError(
                f"a piece of work ({title}) was lost with {error.allowed_failures + 1} workers, one after "
                f"the other, the last {last}: most likely it needs more memory than they have; give workers more (--memory-limit), "
                "and go on with --resume"
            ) from None
        except (FutureCancelledError, OSError, TimeoutError) as error:
            raise QLRError(
                f"the cluster's scheduler is lost ({type(error).__name__}); what is solved is kept, so go on with --resume, on any "
                "cluster or on none"
            ) from None
