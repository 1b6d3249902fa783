"""Where the many independent pieces of a job run: here, one after another, or on the machines of a cluster (`qlr_jax.cluster`).

A piece is a call of a function at the top of a module, which changes nothing that it is given. What a piece returns stands for
itself here, and on a cluster for an array that stays where it was made; either may be given to further pieces. What is large and
can be made again where it is needed, a block of the model above all, is given as a `Call`. Sums are taken in an order that the
number of machines does not change (`TreeSum`): a job leaves the same bytes wherever its pieces run.

Example:
    >>> squares = [HERE.submit(pow, i, 2) for i in range(5)]
    >>> total = TreeSum(HERE, lambda a, b: a + b)
    >>> for square in squares:
    ...     total.add(square)
    >>> HERE.result(total.value)
    30
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)
FAN_IN = 8  # values of one sum of a `TreeSum`


@dataclass(frozen=True)
class Call:
    """An argument that is made where the piece runs: `function(*arguments)`.

    Attributes:
        function: at the top of a module.
        arguments: as of a piece: values, other calls, what pieces returned.
        kept: whether what it makes is kept until one with other arguments is made: pieces that follow each other share a block.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kept: bool = False


@dataclass(frozen=True)
class Pinned:
    """What every machine makes once and keeps: the model.

    Attributes:
        name: which of them.
        call: what makes it.
    """

    name: str
    call: Call = field(compare=False)


class Engine(Protocol):
    """Runs pieces.

    Attributes:
        ahead: how many steps of a chain of pieces are handed out before the first of them is waited for.
    """

    ahead: int

    @property
    def status(self) -> str:
        """How many pieces are done and running, where that is worth saying; else empty."""
        ...

    def submit(self, function: Callable[..., Any], *arguments: Any, title: str = "") -> Any:
        """What stands for `function(*arguments)`.

        Args:
            function: at the top of a module.
            arguments: lists, tuples and dicts are looked into for calls and for what pieces returned.
            title: of such pieces, for whoever watches.
        """
        ...

    def split(self, value: Any, parts: int) -> tuple[Any, ...]:
        """What stands for each part of a tuple that a piece returned."""
        ...

    def result(self, value: Any) -> Any:
        """The value itself."""
        ...

    def results(self, values: Mapping[Key, Any]) -> Iterator[tuple[Key, Any]]:
        """The values themselves, each as soon as it is there."""
        ...

    def forget(self) -> None:
        """Let go what `Call.kept` has kept."""
        ...

    def share(self, value: Any, call: Any) -> None:
        """Let an object be made anew where pieces run, wherever it stands among their arguments."""
        ...

    def share_items(self, mapping: Mapping[str, Any]) -> None:
        """The same for the values of a shared mapping."""
        ...

    def check_memory(self, needed: int) -> None:
        """Refuse machines that have less memory, in bytes, than a job's largest piece needs."""
        ...

    def offer(self, place: Path) -> Any:
        """What has a model's files where pieces run: its `fetch` gives their place there."""
        ...


def place_of(path: str, files: Any) -> Path:
    """Where a model lies for the process that asks: at the path, if it sees that, else copied there from what `offer` returned."""
    return Path(path) if Path(path).exists() else files.fetch()


@dataclass
class Maker:
    """Makes the arguments of pieces; of each function of a `Call` it keeps what was made last, where that is to be kept."""

    _kept: dict[Any, tuple[tuple[Any, ...], Any]] = field(default_factory=dict)
    _pinned: dict[str, Any] = field(default_factory=dict)

    def made(self, value: Any) -> Any:
        """The value with every `Call` in it replaced by what it makes."""
        if isinstance(value, Call):
            return self._call(value)
        if isinstance(value, Pinned):
            if value.name not in self._pinned:
                self._pinned[value.name] = self._call(value.call)
            return self._pinned[value.name]
        if type(value) in (list, tuple):
            return type(value)(map(self.made, value))
        if type(value) is dict:
            return {key: self.made(own) for key, own in value.items()}
        return value

    def _call(self, call: Call) -> Any:
        if not call.kept:
            return call.function(*map(self.made, call.arguments))
        known = self._kept.get(call.function)
        if known is None or not _same(known[0], call.arguments):
            self._kept.pop(call.function, None)  # before the next is made: two blocks are never in memory
            known = call.arguments, call.function(*map(self.made, call.arguments))
            self._kept[call.function] = known
        return known[1]

    def forget(self) -> None:
        """Let go what is kept."""
        self._kept.clear()


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Call):
        return one.function is other.function and _same(one.arguments, other.arguments)
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is dict:
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    return type(one) in (int, str, bool, float, Pinned) and one == other


class Here:
    """Runs every piece at once, in this process."""

    ahead, status = 0, ""

    def __init__(self) -> None:
        self._maker = Maker()

    def submit(self, function: Callable[..., Any], *arguments: Any, title: str = "") -> Any:
        return function(*map(self._maker.made, arguments))

    def split(self, value: Any, parts: int) -> tuple[Any, ...]:
        assert len(value) == parts
        return tuple(value)

    def result(self, value: Any) -> Any:
        return self._maker.made(value)

    def results(self, values: Mapping[Key, Any]) -> Iterator[tuple[Key, Any]]:
        return ((key, self.result(value)) for key, value in values.items())

    def forget(self) -> None:
        self._maker.forget()

    def share(self, value: Any, call: Any) -> None:
        pass  # it is here

    def share_items(self, mapping: Mapping[str, Any]) -> None:
        pass

    def check_memory(self, needed: int) -> None:
        pass  # plans say what a job needs (`cost`)

    def offer(self, place: Path) -> None:
        pass


HERE = Here()
"""This process."""


class TreeSum:
    """A sum of what pieces returned, in one order: `FAN_IN` of them one after another, then as many of such sums, and so on.

    In memory are one sum a level, and the value that is added: three for up to 64 values.
    """

    def __init__(self, engine: Engine, add: Callable[[Any, Any], Any], title: str = ""):
        self._engine, self._add, self._title = engine, add, title
        self._levels: list[tuple[int, Any]] = []

    def add(self, value: Any) -> None:
        """One more."""
        level = 0
        while True:
            if level == len(self._levels):
                self._levels.append((0, None))
            count, held = self._levels[level]
            value = self._plus(held, value) if count else value
            if count + 1 < FAN_IN:
                self._levels[level] = count + 1, value
                return
            self._levels[level] = 0, None
            level += 1

    @property
    def value(self) -> Any:
        """What they add up to; None of nothing."""
        total = None
        for count, held in self._levels:
            if count:
                total = held if total is None else self._plus(held, total)
        return total

    def _plus(self, one: Any, other: Any) -> Any:
        return self._engine.submit(self._add, one, other, title=self._title)
