"""Models of joint damage: what several damaged matrices do together, where that is not the sum of what each does alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from allocators.allocation import from_specs
from allocators.errors import AllocationError
from allocators.options import few
from allocators.table import OptionTable


@dataclass(frozen=True)
class Saturating:
    """Joint damage that levels off, as a divergence does once the output is noise anyway.

        joint = ceiling · (1 − exp(−Σ_i damage(i, x_i) / ceiling))

    It rises with the sum, so that the allocation of least sum stays the best; only the figures change.

    Args:
        ceiling: the most damage there can be, in the unit of the table's damages.

    Raises:
        AllocationError: where the ceiling is not a positive number.

    Example:
        >>> from allocators.options import Option, Row
        >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 3.0),)), Row("k", 64, (Option("int-2", 16, 1.0),))))
        >>> round(Saturating(8.0).damage(table, {"q": "int-2", "k": "int-2"}), 3)
        3.148
    """

    ceiling: float

    def __post_init__(self) -> None:
        if isinstance(self.ceiling, bool) or not (isinstance(self.ceiling, int | float) and 0 < self.ceiling < math.inf):
            raise AllocationError(f"the ceiling is {self.ceiling!r}; pass the most damage there can be, a positive number")

    def of(self, total: float) -> float:
        """Joint damage of a sum of damages."""
        return -self.ceiling * math.expm1(-total / self.ceiling)

    def damage(self, table: OptionTable, specs: Mapping[str, str]) -> float:
        """Joint damage of an allocation given by its specs, one for every row."""
        return self.of(from_specs(table, specs).damage)


@dataclass(frozen=True, eq=False)
class Pairwise:
    """Joint damage with a term for every pair of matrices.

        joint = Σ_ij ρ_ij √damage(i, x_i) √damage(j, x_j)

    To second order the divergence is ½ ‖Σ_i v_i‖² in the Fisher metric, with v_i = J ΔW_i what matrix i does to the output: ‖v_i‖²
    is twice its own damage, and ρ the normalised Gram matrix of the v_i. Their directions are taken to stay as measured while
    their sizes follow the options. The identity gives the plain sum.

    Args:
        rows: names in the order of ρ; rows of a table that are not named are taken to act alone (ρ = 0).
        correlation: ρ, (rows, rows): symmetric, ones on the diagonal, no entry beyond ±1.

    Raises:
        AllocationError: where it is not; `damage` also for a negative damage, which has no root.

    Source:
        for the metric: Amari, Neural Computation 10 (1998)

    Example:
        >>> from allocators.options import Option, Row
        >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 4.0),)), Row("k", 64, (Option("int-2", 16, 1.0),))))
        >>> Pairwise(("q", "k"), [[1.0, 0.5], [0.5, 1.0]]).damage(table, {"q": "int-2", "k": "int-2"})
        7.0
    """

    rows: tuple[str, ...]
    correlation: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        given = np.array(self.correlation, dtype=float)
        if len(set(self.rows)) < len(self.rows):
            raise AllocationError(f"the interactions name a row twice among {few(self.rows)}; name each once")
        if given.shape != (len(self.rows), len(self.rows)):
            raise AllocationError(
                f"the correlation has shape {given.shape} for {len(self.rows)} rows; pass one row and column each"
            )
        if not np.isfinite(given).all() or np.abs(given).max(initial=0.0) > 1 + 1e-9:
            raise AllocationError(
                "the correlation has entries beyond -1 to 1; pass the Gram matrix divided by its diagonal's roots"
            )
        if np.abs(given - given.T).max(initial=0.0) > 1e-9 or np.abs(np.diag(given) - 1).max(initial=0.0) > 1e-9:
            raise AllocationError("the correlation is not symmetric with ones on its diagonal; pass a normalised Gram matrix")
        given = (given + given.T) / 2
        np.fill_diagonal(given, 1.0)
        given.flags.writeable = False
        object.__setattr__(self, "correlation", given)

    def matrix(self, table: OptionTable) -> np.ndarray:
        """ρ over all rows of a table, in the table's order."""
        places = [table.index[table[name].name] for name in self.rows]
        full = np.eye(len(table.rows))
        full[np.ix_(places, places)] = self.correlation
        return full

    def damage(self, table: OptionTable, specs: Mapping[str, str]) -> float:
        """Joint damage of an allocation given by its specs, one for every row."""
        from_specs(table, specs)
        size = np.sqrt([_rooted(row.name, row.option(specs[row.name]).damage) for row in table.rows])
        return float(size @ self.matrix(table) @ size)

    def amplitudes(self, table: OptionTable) -> list[np.ndarray]:
        """√damage of every option, one array a row."""
        return [np.sqrt([_rooted(row.name, option.damage) for option in row.options]) for row in table.rows]


def _rooted(name: str, damage: float) -> float:
    if damage < 0:
        raise AllocationError(f"row {name} has an option of damage {damage:g}; pairwise damage needs damages of 0 or more")
    return damage


Interactions = Pairwise | Saturating
