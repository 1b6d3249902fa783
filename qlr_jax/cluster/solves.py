"""Solves on the workers of a cluster, a batch a piece; what is solved is kept here as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from qlr_jax.cluster.engine import DaskEngine, Remote
from qlr_jax.core.batch import Problems, batches, solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.lazy import LazyMap
from qlr_jax.core.solution import Solution

Key = tuple[str, str]


def solve_remotely(
    engine: DaskEngine,
    store: MutableMapping[Key, Solution],
    title: str,
    problems: Problems[Key],
    *,
    seed: int,
    config: SolverConfig,
    on_done: Callable[[Key, Solution], None] | None = None,
) -> LazyMap[Key, Solution]:
    """`solve_many` on the workers: a batch of which all solutions are in `store` is not solved again.

    Batches are those of one process, and so are their bits.

    Args:
        engine: of the cluster.
        store: where solutions are kept, and those of an earlier run are.
        title: of the pieces.
        problems, seed, config, on_done: as for `solve_many`; arrays may be what stands for them.

    Returns:
        Every solution, read from `store` where it is used here, and taken from the workers where a piece needs it.
    """
    known: dict[Key, Any] = {}
    asked: dict[int, Remote] = {}
    units = batches(problems)
    for number, keys in enumerate(units):
        if all(key in store for key in keys):
            if on_done is not None:
                for key in keys:
                    on_done(key, store[key])
            continue
        asked[number] = engine.submit(_solved, {key: list(problems[key]) for key in keys}, seed, config, title=title)
        known |= dict.fromkeys(keys, asked[number])
    for number, found in engine.results(asked):
        for key in units[number]:
            if key not in store:  # of an earlier run: the same
                store[key] = found[key]
            if on_done is not None:
                on_done(key, found[key])
    return LazyMap(problems, _Kept(engine, store, known))


class _Kept:
    """A solution by its key: from where it is kept, or what stands for it in a piece."""

    def __init__(self, engine: DaskEngine, store: Mapping[Key, Solution], known: Mapping[Key, Remote]):
        self._engine, self._store, self._known, self._parts = engine, store, known, dict[Key, Any]()

    def __call__(self, key: Key) -> Solution:
        return self._store[key]

    def stands_for(self, key: Key) -> Any:
        if key not in self._parts:
            # one of an earlier run is sent to the workers
            self._parts[key] = self._engine.part(self._known[key], key) if key in self._known else self._sent(key)
        return self._parts[key]

    def _sent(self, key: Key) -> Remote:
        return self._engine.submit(_same, self._store[key], title="sending")


def _same(value: Any) -> Any:
    return value


def _solved(problems: Mapping[Key, Iterable[Any]], seed: int, config: SolverConfig) -> dict[Key, Solution]:
    return dict(solve_many({key: tuple(problem) for key, problem in problems.items()}, seed=seed, config=config))
