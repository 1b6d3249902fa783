"""What every solver returns: a spec for each matrix, with its bytes, its damage and what is proved about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from allocators.errors import AllocationError, Infeasible
from allocators.options import few
from allocators.table import OptionTable


class Status(Enum):
    """How far an allocation is proved; `status.explain` says it in words."""

    OPTIMAL = "optimal"
    WITHIN_GAP = "within gap"
    STOPPED = "stopped"
    UNPROVED = "unproved"

    @property
    def explain(self) -> str:
        """One sentence for people."""
        return {
            Status.OPTIMAL: "No allocation of this table within the limit does less damage.",
            Status.WITHIN_GAP: "No allocation of this table within the limit does less damage by more than the gap asked for.",
            Status.STOPPED: "The search ended before the gap asked for was proved; allow more seconds, or accept the gap reported.",
            Status.UNPROVED: "A rule of thumb chose this allocation; nothing is proved about it but a bound, where one is given.",
        }[self]


@dataclass(frozen=True)
class Allocation:
    """One spec for every row of a table.

    Args:
        specs: spec by row name.
        bytes: what all rows take together; never above the limit.
        damage: their predicted damage.
        limit: the bytes that were allowed.
        method: which solver or baseline.
        status: what is proved.
        bound: no allocation within the limit does less damage than this; None where none was computed.
        bits_per_weight: of the counted rows; None where no row is counted.
        seconds: time taken.
        spec: the spec that every free row takes, or was filled up from, where the method gives all of them the same.
        baselines: other strategies' allocations within the same limit, by name, for comparison (`compared` attaches them).
    """

    specs: Mapping[str, str]
    bytes: int
    damage: float
    limit: int
    method: str
    status: Status = Status.UNPROVED
    bound: float | None = None
    bits_per_weight: float | None = None
    seconds: float = 0.0
    spec: str | None = None
    baselines: Mapping[str, Allocation] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """(damage − bound) / |damage|, 0 where both are 0; None without a bound."""
        if self.bound is None:
            return None
        return (self.damage - self.bound) / abs(self.damage) if self.damage else -self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `spec` and `baselines` (without their specs by row) only where there are any."""
        plain = {
            name: getattr(self, name)
            for name in ("method", "bytes", "limit", "damage", "bound", "gap", "bits_per_weight", "seconds")
        } | {"status": self.status.value, "specs": dict(self.specs)}
        if self.spec is not None:
            plain["spec"] = self.spec
        if self.baselines:
            plain["baselines"] = {name: other._summary() for name, other in self.baselines.items()}
        return plain

    def _summary(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("damage", "bytes", "bits_per_weight")}
        return plain | ({} if self.spec is None else {"spec": self.spec})


def from_picks(table: OptionTable, picks: Sequence[int] | np.ndarray, limit: int, method: str, **proof: Any) -> Allocation:
    """The allocation that takes option `picks[i]` of row i, totals added up from the table in whole bytes and checked.

    Args:
        table: matrices × options.
        picks: option number by row, (rows,).
        limit: bytes that all rows may take together.
        method: which solver or baseline it is of.
        proof: what else is known of it: fields of `Allocation`.

    Raises:
        AllocationError: where it is over the limit or breaks a tie.
    """
    options = [row.options[int(k)] for row, k in zip(table.rows, picks, strict=True)]
    total = sum(option.bytes for option in options)
    if total > limit:
        raise AllocationError(f"the {method} allocation takes {total} bytes, more than the limit of {limit}")
    for tie in table.ties:
        if len(keys := {tie.key(options[table.index[name]]) for name in tie.rows}) > 1:
            raise AllocationError(
                f"the {method} allocation gives the tied rows {few(tie.rows)} different {tie.on}s: {few(sorted(keys))}"
            )
    counted = [(row.weights, option.bytes) for row, option in zip(table.rows, options, strict=True) if row.counted]
    bits = 8 * sum(size for _, size in counted) / sum(weights for weights, _ in counted) if counted else None
    damage = math.fsum(option.damage for option in options)
    specs = {row.name: option.spec for row, option in zip(table.rows, options, strict=True)}
    return Allocation(specs, total, damage, limit, method, bits_per_weight=bits, **proof)


def from_specs(table: OptionTable, specs: Mapping[str, str], limit: int | None = None, method: str = "given") -> Allocation:
    """The allocation with these specs, one for every row: its bytes and damage by this table.

    Args:
        table: matrices × options.
        specs: spec by row name.
        limit: bytes allowed; what the specs take where not given.
        method: what to call it.

    Raises:
        AllocationError: for a missing or unknown row, a spec that is not offered, a broken tie, or too many bytes.

    Example:
        >>> from allocators.options import Option, Row
        >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 3.0), Option("int-4", 32, 1.0))),))
        >>> from_specs(table, {"q": "int-4"}).bits_per_weight
        4.0
    """
    for name in specs:
        table[name]
    if missing := [name for name in table.index if name not in specs]:
        raise AllocationError(f"no spec is given for {few(missing)}; pass one for every row")
    picks = [row.options.index(row.option(specs[row.name])) for row in table.rows]
    total = sum(row.options[k].bytes for row, k in zip(table.rows, picks, strict=True))
    return from_picks(table, picks, total if limit is None else limit, method)


def check_limit(table: OptionTable, limit: int) -> int:
    """The limit as a whole number of bytes.

    Raises:
        AllocationError: where it is no whole number.
        Infeasible: where no allocation of the table is within it.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, np.integer)):
        raise AllocationError(f"the limit is {limit!r}; pass a whole number of bytes (Budget.parse(...).on(table).limit)")
    if limit < table.least_bytes:
        raise Infeasible(f"the limit of {limit} bytes is below the table's least; pass {table.least_bytes} to {table.most_bytes}")
    return int(limit)
