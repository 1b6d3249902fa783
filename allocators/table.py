"""The option table: which specs each matrix may take, what each costs in bytes, and what damage it is predicted to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from allocators.errors import AllocationError, Infeasible
from allocators.options import ModelFacts, Option, Row, Tie, few

FORMAT, VERSION = "qlr-option-table", 1
COLUMNS = ("spec", "bytes", "damage", "measured", "rank")


@dataclass(frozen=True)
class OptionTable:
    """Matrices × options, with the ties between matrices: what an allocation chooses from.

        minimise Σ damage(i, x_i)   subject to   Σ bytes(i, x_i) ≤ limit   and the ties

    Locks are tables with fewer options: `lock`, `at_least` and `restrict` return a new table.

    Args:
        rows: one Row a matrix, names distinct.
        ties: disjoint groups of rows that must agree.
        model: facts for byte and device budgets.
        notes: anything JSON can hold about where the table comes from; carried along, never read.

    Raises:
        AllocationError: for no rows, a name twice, or a tie that does not fit the rows.
        Infeasible: where tied rows offer nothing in common.

    Example:
        >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 3.0), Option("int-4", 32, 1.0))),
        ...                      Row("k", 64, (Option("int-2", 16, 2.0), Option("int-4", 32, 0.5)))))
        >>> table.least_bytes, table.most_bytes, table.uniform_specs()
        (32, 64, ('int-2', 'int-4'))
        >>> table.lock("q", "int-4").least_bytes
        48
        >>> OptionTable.from_json(table.to_json()) == table
        True
    """

    rows: tuple[Row, ...]
    ties: tuple[Tie, ...] = ()
    model: ModelFacts = field(default_factory=ModelFacts)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "ties", tuple(self.ties))
        if not self.rows:
            raise AllocationError("the table has no rows; pass at least one matrix")
        if len(self.index) < len(self.rows):
            names = [row.name for row in self.rows]
            raise AllocationError(
                f"the table has two rows named {next(n for n in names if names.count(n) > 1)}; name each matrix once"
            )
        seen: set[str] = set()
        for tie in self.ties:
            for name in tie.rows:
                if name not in self.index:
                    raise AllocationError(f"a tie names {name}, which is no row; rows are {few(self.index)}")
                if name in seen:
                    raise AllocationError(f"row {name} is in two ties; pass one tie with all the rows that must agree")
                seen.add(name)
            if len({self[name].counted for name in tie.rows}) > 1:
                raise AllocationError(
                    f"the tie of {few(tie.rows)} mixes rows that count toward bits per weight with rows that do not"
                )
            if not self.shared(tie):
                raise Infeasible(f"the tied rows {few(tie.rows)} offer no {tie.on} in common; loosen a lock or the tie")

    @cached_property
    def index(self) -> dict[str, int]:
        """Row number by name."""
        return {row.name: i for i, row in enumerate(self.rows)}

    def __getitem__(self, name: str) -> Row:
        if name not in self.index:
            raise AllocationError(f"the table has no row {name}; rows are {few(self.index)}")
        return self.rows[self.index[name]]

    def shared(self, tie: Tie) -> set[str]:
        """The backbones (or specs) that every row of a tie offers."""
        return set.intersection(*({tie.key(option) for option in self[name].options} for name in tie.rows))

    def blocks(self) -> Iterator[tuple[list[int], Tie | None]]:
        """Row numbers that are decided together: each tie's rows, and every other row alone."""
        tied = {name: tie for tie in self.ties for name in tie.rows}
        for i, row in enumerate(self.rows):
            tie = tied.get(row.name)
            if tie is None:
                yield [i], None
            elif tie.rows[0] == row.name:
                yield [self.index[name] for name in tie.rows], tie

    def _extreme(self, pick: Callable[..., int]) -> int:
        total, known = 0, dict[int, int]()  # rows of one shape share their options
        for rows, tie in self.blocks():
            if tie is None:
                options = self.rows[rows[0]].options
                if id(options) not in known:
                    known[id(options)] = pick(option.bytes for option in options)
                total += known[id(options)]
            else:
                ends = []  # of every row, by what it may have in common with the others
                for i in rows:
                    sizes: dict[str, list[int]] = {}
                    for option in self.rows[i].options:
                        sizes.setdefault(tie.key(option), []).append(option.bytes)
                    ends.append({key: pick(of) for key, of in sizes.items()})
                total += pick(sum(of[key] for of in ends) for key in self.shared(tie))
        return total

    @cached_property
    def least_bytes(self) -> int:
        """Bytes of the smallest allocation that the ties allow."""
        return self._extreme(min)

    @cached_property
    def most_bytes(self) -> int:
        """Bytes of the largest allocation that the ties allow."""
        return self._extreme(max)

    def weights(self, counted_only: bool = False) -> int:
        """How many weights the rows hold."""
        return sum(row.weights for row in self.rows if row.counted or not counted_only)

    def uniform_specs(self) -> tuple[str, ...]:
        """The specs that every counted row offers, in the first row's order; rows with a single option (locked) do not vote."""
        counted = [row for row in self.rows if row.counted]
        voters = [row for row in counted if len(row.options) > 1] or counted
        if not voters:
            return ()
        common = set.intersection(*({option.spec for option in row.options} for row in voters))
        return tuple(option.spec for option in voters[0].options if option.spec in common)

    # ---- tables made from tables

    def select(self, keep: Callable[[Row], bool]) -> OptionTable | None:
        """The table of some rows only, ties cut down to them; None where no row is left."""
        rows = tuple(row for row in self.rows if keep(row))
        names = {row.name for row in rows}
        ties = (replace(tie, rows=tuple(n for n in tie.rows if n in names)) for tie in self.ties)
        return replace(self, rows=rows, ties=tuple(tie for tie in ties if len(tie.rows) > 1)) if rows else None

    def restrict(self, keep: Callable[[Row, Option], bool], why: str = "the restriction") -> OptionTable:
        """Only the options that are wanted.

        Args:
            keep: whether a row keeps an option.
            why: what does this, for the error.

        Raises:
            Infeasible: where a row or a tie is left with none.

        Example:
            >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 3.0), Option("int-2+r4@bf16", 32, 1.0))),))
            >>> [option.spec for option in table.restrict(lambda row, option: option.rank == 0)["q"].options]
            ['int-2']
        """
        rows = []
        for row in self.rows:
            options = tuple(option for option in row.options if keep(row, option))
            if not options:
                raise Infeasible(f"{why} leaves row {row.name} no option; it offers {few(o.spec for o in row.options)}")
            rows.append(row if len(options) == len(row.options) else replace(row, options=options))
        return replace(self, rows=tuple(rows))

    def _matching(self, pattern: str) -> set[str]:
        found = {name for name in self.index if fnmatchcase(name, pattern)}
        if not found:
            raise AllocationError(f"no row matches {pattern!r}; rows are {few(self.index)}")
        return found

    def lock(self, pattern: str, spec: str) -> OptionTable:
        """Every row whose name matches the pattern (`*` is any text) keeps this spec.

        Raises:
            AllocationError: where no row matches, or one does not offer the spec.
        """
        names = self._matching(pattern)
        for name in names:
            self[name].option(spec)
        return self.restrict(lambda row, option: row.name not in names or option.spec == spec, f"the lock {pattern}={spec}")

    def at_least(self, pattern: str, bits: float) -> OptionTable:
        """Every row whose name matches the pattern stores at least so many bits per weight.

        Raises:
            AllocationError: where no row matches, or one has no option as large.
        """
        names = self._matching(pattern)
        if not (bits > 0 and math.isfinite(bits)):
            raise AllocationError(f"at_least {pattern}: bits is {bits!r}; pass a positive number of bits per weight")
        floor = bits * (1 - 1e-12)
        return self.restrict(lambda row, o: row.name not in names or row.bits(o) >= floor, f"at least {bits:g} bits for {pattern}")

    def tie(self, *patterns: str, on: str = "backbone") -> OptionTable:
        """Tie the rows that match the patterns with the same text in place of `*`.

        Args:
            patterns: names with `*` for any text.
            on: "backbone" or "spec".

        Raises:
            AllocationError: where a pattern matches no row, or nothing is tied.

        Example:
            >>> row = lambda name: Row(name, 64, (Option("int-2", 16, 3.0), Option("int-4", 32, 1.0)))
            >>> table = OptionTable(tuple(row(f"{layer}.{kind}") for layer in range(2) for kind in "qko"))
            >>> [tie.rows for tie in table.tie("*.q", "*.k").ties]
            [('0.q', '0.k'), ('1.q', '1.k')]
        """
        groups: dict[tuple[str, ...], list[str]] = {}
        for pattern in patterns:
            self._matching(pattern)
            matcher = re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)
            for name in self.index:
                if found := matcher.fullmatch(name):
                    group = groups.setdefault(found.groups(), [])
                    if name not in group:
                        group.append(name)
        ties = tuple(Tie(tuple(names), on) for names in groups.values() if len(names) > 1)
        if not ties:
            raise AllocationError(f"the patterns {few(patterns)} tie nothing: no two rows share the text in place of '*'")
        return replace(self, ties=self.ties + ties)

    # ---- to and from text

    def to_json(self) -> str:
        """The table as text, with a format version; an option is a list in the order of `columns`."""
        rows = [
            dict(
                name=row.name,
                weights=row.weights,
                counted=row.counted,
                options=[[getattr(o, c) for c in COLUMNS] for o in row.options],
            )
            for row in self.rows
        ]
        ties = [dict(rows=list(tie.rows), on=tie.on) for tie in self.ties]
        head = dict(format=FORMAT, version=VERSION, columns=COLUMNS, model=vars(self.model), notes=dict(self.notes))
        return json.dumps(head | dict(ties=ties, rows=rows), allow_nan=False)

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, Any]) -> OptionTable:
        """The table that `to_json` wrote, from its text or the parsed object.

        Raises:
            AllocationError: where it is anything else, or of another version.
        """
        try:
            data = source if isinstance(source, Mapping) else json.loads(source)
        except ValueError as error:
            raise AllocationError(f"this is no option table: not JSON ({error}); pass what OptionTable.to_json wrote") from None
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise AllocationError(
                f"this is no option table: its format is {found!r}, not {FORMAT!r}; pass what OptionTable.to_json wrote"
            )
        if data.get("version") != VERSION:
            raise AllocationError(
                f"the table has format version {data.get('version')!r} and this program reads {VERSION}; measure it again"
            )
        try:
            if tuple(data["columns"]) != COLUMNS:
                raise AllocationError(f"the table's columns are {data['columns']!r}; version {VERSION} has {list(COLUMNS)}")
            rows = tuple(
                Row(row["name"], row["weights"], tuple(Option(*cells) for cells in row["options"]), row["counted"])
                for row in data["rows"]
            )
            ties = tuple(Tie(tuple(tie["rows"]), tie["on"]) for tie in data["ties"])
            return cls(rows, ties, ModelFacts(**data["model"]), data["notes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise AllocationError(f"the option table is damaged: {type(error).__name__} {error}; measure it again") from None
