"""The parts of an option table: an option, a matrix's row of options, a tie between rows, and facts of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from allocators.errors import AllocationError

BINDS = ("backbone", "spec")


def backbone(spec: str) -> str:
    """The part of a spec that a tie binds: the text before the first `+`.

    Example:
        >>> backbone("trellis-2+r32@trellis-4"), backbone("int-4g32")
        ('trellis-2', 'int-4g32')
    """
    return spec.split("+", 1)[0]


def few(names: Iterable[str], limit: int = 6) -> str:
    """Names for an error message: the first few, then how many more there are.

    Example:
        >>> few("abcdefgh")
        'a, b, c, d, e, f and 2 more'
    """
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@dataclass(frozen=True, slots=True)
class Option:
    """One way of storing one matrix.

    Args:
        spec: the spec's text, e.g. `trellis-2+r32@trellis-4`.
        bytes: everything stored for the matrix under this spec, side data and padding included.
        damage: predicted damage, in any unit that adds over matrices (nats of KL a token, for instance).
        measured: True where the damage was measured by a full solve, False where it was predicted.
        rank: of the low-rank part; read from the spec's text when not given.

    Raises:
        AllocationError: for a value that cannot be used.

    Example:
        >>> Option("trellis-2+r32@trellis-4", 1200, 0.5).rank
        32
    """

    spec: str
    bytes: int
    damage: float
    measured: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.spec, str) or not self.spec:
            raise AllocationError(f"an option's spec is {self.spec!r}; pass a text such as 'trellis-2'")
        if type(self.bytes) is not int or self.bytes < 0:
            raise AllocationError(f"option {self.spec}: bytes is {self.bytes!r}; pass a whole number, 0 or more")
        if isinstance(self.damage, bool) or not isinstance(self.damage, (int, float)) or not math.isfinite(self.damage):
            raise AllocationError(f"option {self.spec}: damage is {self.damage!r}; pass a finite number, or leave the option out")
        if self.rank is None:
            found = re.search(r"\+r(\d+)", self.spec)
            object.__setattr__(self, "rank", int(found[1]) if found else 0)
        elif type(self.rank) is not int or self.rank < 0:
            raise AllocationError(f"option {self.spec}: rank is {self.rank!r}; pass a whole number, 0 or more")
        object.__setattr__(self, "damage", float(self.damage))
        object.__setattr__(self, "measured", bool(self.measured))


@dataclass(frozen=True)
class Row:
    """One matrix and its options.

    Args:
        name: the matrix's name in the model.
        weights: how many weights it has (m · n).
        options: what it may become, at least one, no spec twice.
        counted: whether it counts toward bits per weight (embeddings and head do not).

    Raises:
        AllocationError: for a value that cannot be used.
    """

    name: str
    weights: int
    options: tuple[Option, ...]
    counted: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if type(self.weights) is not int or self.weights <= 0:
            raise AllocationError(f"row {self.name}: weights is {self.weights!r}; pass the number of weights, at least 1")
        if not self.options:
            raise AllocationError(f"row {self.name} has no option; pass at least one")
        specs = [option.spec for option in self.options]
        if len(set(specs)) < len(specs):
            twice = next(spec for spec in specs if specs.count(spec) > 1)
            raise AllocationError(f"row {self.name} offers {twice} twice; pass each spec once")

    def option(self, spec: str) -> Option:
        """The option with this spec.

        Raises:
            AllocationError: where the row does not offer it.
        """
        if (option := self._by_spec.get(spec)) is not None:
            return option
        raise AllocationError(f"row {self.name} does not offer {spec}; it offers {few(o.spec for o in self.options)}")

    @cached_property
    def _by_spec(self) -> dict[str, Option]:
        return {option.spec: option for option in self.options}

    def bits(self, option: Option) -> float:
        """Stored bits per weight of one of its options."""
        return 8 * option.bytes / self.weights


@dataclass(frozen=True)
class Tie:
    """Rows that must agree.

    Args:
        rows: their names.
        on: "backbone" (rank and factors stay free) or "spec".

    Raises:
        AllocationError: for another `on`.
    """

    rows: tuple[str, ...]
    on: str = "backbone"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.on not in BINDS:
            raise AllocationError(f"a tie on {self.on!r} is unknown; pass 'backbone' or 'spec'")

    def key(self, option: Option) -> str:
        """What tied rows must have in common."""
        return option.spec if self.on == "spec" else backbone(option.spec)


@dataclass(frozen=True)
class ModelFacts:
    """What a byte or device budget must know of the model beyond the table's rows.

    Args:
        fixed_bytes: of the tensors that are in no row (norms, biases), as stored.
        layers, kv_heads, head_dim: for the key-value cache: 2 · layers · kv_heads · head_dim numbers a token.

    Raises:
        AllocationError: for a value that is no whole number of 0 or more.
    """

    fixed_bytes: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 0:
                raise AllocationError(f"model facts: {name} is {value!r}; pass a whole number, 0 or more")
