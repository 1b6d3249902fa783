"""The folder job/ of a compression under way: what is finished lies there, so that an interrupted job can go on.

    job/begun.json            what the job is of: recipe, model, texts, versions; a job with any other is refused
    job/table.json            the option table, once it is measured
    job/<kind>/<matrix>.<spec>.safetensors       every solve that is done; kinds: `probe`, `final`, `control`, `sequential`
    job/hessians, job/outputs                    H and G, where they are not kept in memory
    job/report.json           how far the job is: stages, figures so far, a line a matrix
    job/log.txt               one line a matrix and a stage

Every file is written under another name and renamed, so that one that is there is whole. Solutions are not kept in memory: a
`SolutionStore` reads each where it is used.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allocators import OptionTable
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.solution import Solution, Verdict
from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr.packed import JOB
from qlr_jax.models.checkpoint import read_tensor
from qlr_jax.paths import enough_space
from qlr_jax.run.facts import completed

BEGUN, TABLE, LOG, REPORT = "begun.json", "table.json", "log.txt", "report.json"
Key = tuple[str, str]
"""A matrix and the spec that it is solved for."""


@dataclass
class Workspace:
    """Where one job keeps what is done.

    Attributes:
        root: the folder; made when the first thing is kept.
        facts: what the job is of.
    """

    root: Path
    facts: Mapping[str, Any]
    _mapped: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, out: Path, facts: Mapping[str, Any], resume: bool) -> Workspace:
        """The workspace of a job that writes to `out`.

        Raises:
            QLRError: a job is under way there and `resume` is not said; or it is of another recipe, model or text: what differs.
        """
        facts = json.loads(json.dumps(facts))  # as they are read back
        space = cls(out / JOB, facts)
        path = space.root / BEGUN
        if not path.is_file():
            return space
        if not resume:
            raise QLRError(f"{out} holds a job that was interrupted; go on with it (--resume), or remove {space.root}")
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QLRError(f"{path} cannot be read ({error}); remove {space.root} and start again") from None
        if changed := list(_changes(completed(begun, facts), facts)):
            raise QLRError(
                f"the job in {out} was begun otherwise: {'; '.join(changed[:3])}; give what it was begun with, "
                f"or remove {space.root} and start again"
            )
        return space

    @property
    def begun(self) -> bool:
        """Whether anything is kept."""
        return (self.root / BEGUN).is_file()

    def store(self, kind: str) -> SolutionStore:
        """The solutions of one kind, a file each; `solve_many` into it keeps what is new and does not solve again what is kept."""
        return SolutionStore(self, self.root / kind)

    def spill(self, kind: str) -> Callable[[str, np.ndarray], np.ndarray]:
        """A function that puts a named array into a file, and gives it back as one that is read where it is used."""

        def put(name: str, array: np.ndarray) -> np.ndarray:
            path = self.root / kind / f"{name}.npy"

            def write(temporary: Path) -> None:
                with temporary.open("wb") as file:
                    np.save(file, np.asarray(array))

            self.write(path, write)
            array = np.load(path, mmap_mode="r")
            self._mapped.append(array)
            return array

        return put

    def _release(self) -> None:
        """Pages of spilled arrays that were read count as this process's memory until they are given back; they are read again."""
        for array in self._mapped if hasattr(mmap, "MADV_DONTNEED") else ():  # not on Windows
            array._mmap.madvise(mmap.MADV_DONTNEED)

    def table(self, measure: Callable[[], OptionTable]) -> OptionTable:
        """The option table that is kept, or the one measured now."""
        path = self.root / TABLE
        if path.is_file():
            return OptionTable.from_json(path.read_bytes())
        table = measure()
        self.write(path, lambda temporary: temporary.write_text(table.to_json(), encoding="utf-8"))
        # as it is read back, so that a job that goes on has the same numbers
        return OptionTable.from_json(table.to_json())

    def log(self, line: str) -> None:
        """Add a line to the log, once anything is kept: a matrix or a stage is done."""
        self._release()
        if self.root.is_dir():
            with (self.root / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Put what is known so far where it can be looked at, once anything is kept."""
        if self.begun:
            self.write(self.root / REPORT, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))

    def finish(self) -> None:
        """Remove what is no longer needed: all but the log."""
        for path in self.root.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOG:
                path.unlink(missing_ok=True)

    def write(self, path: Path, write: Callable[[Path], Any]) -> None:
        """A file inside the workspace, whole or not at all."""
        with enough_space(self.root):
            if not self.begun:
                self.root.mkdir(parents=True, exist_ok=True)
                _renamed(self.root / BEGUN, lambda p: p.write_text(json.dumps(self.facts, indent=1), encoding="utf-8"))
            path.parent.mkdir(exist_ok=True)
            _renamed(path, write)


class SolutionStore(MutableMapping[Key, Solution]):
    """The solutions of one folder, written when they are set and read when they are asked for."""

    def __init__(self, space: Workspace, folder: Path):
        self._space, self._folder = space, folder

    def path(self, key: Key) -> Path:
        name, spec = key
        return self._folder / f"{name}.{spec.replace('/', '_')}.safetensors"

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and self.path(key).is_file()

    def __getitem__(self, key: Key) -> Solution:
        return _load(self.path(key))

    def __setitem__(self, key: Key, solution: Solution) -> None:
        self._space.write(self.path(key), lambda path: _save(path, solution))

    def __delitem__(self, key: Key) -> None:
        self.path(key).unlink()

    def __iter__(self) -> Iterator[Key]:
        raise NotImplementedError("what is kept is asked for by key")

    def __len__(self) -> int:
        return len(list(self._folder.glob("*.safetensors")))


def _save(path: Path, solution: Solution) -> None:
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in solution.value.arrays.items()}
    recorded = {"layout": asdict(solution.value.layout), "verdict": solution.verdict.name, "stats": dict(solution.stats)}
    save_file(arrays, path, metadata={"solution": json.dumps(recorded)})


def _load(path: Path) -> Solution:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as handle:
            recorded = json.loads((handle.metadata() or {})["solution"])
            arrays: dict[str, Any] = {name: read_tensor(handle, path, name) for name in handle.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise QLRError(f"{path} cannot be read ({error}); remove it, and go on with --resume") from None
    layout = Layout(**{**recorded["layout"], "shape": tuple(recorded["layout"]["shape"])})
    stats = recorded["stats"]
    if "felt_error" in stats:  # the key in a job that version 0.1.0 began
        stats["weighted_error"] = stats.pop("felt_error")
    return Solution(QLRMatrix(arrays, layout), Verdict[recorded["verdict"]], stats)


def _renamed(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")  # several machines may write here
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _changes(begun: Any, now: Any, at: str = "") -> Iterator[str]:
    """What differs between two nested mappings, a sentence each."""
    if isinstance(begun, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*begun, *now]):
            yield from _changes(begun.get(key), now.get(key), f"{at} {key}".strip())
    elif begun != now:
        yield f"{at} was {_short(begun)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:56] + " …"
