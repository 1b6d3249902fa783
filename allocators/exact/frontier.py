"""The whole size-damage curve of a table, by one sweep over the Lagrange multiplier."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from allocators.allocation import Allocation, Status, check_limit, from_picks
from allocators.exact.hull import Blocks
from allocators.table import OptionTable


@dataclass(frozen=True)
class Frontier:
    """The lower convex hull of all allocations, each corner with its allocation.

    Args:
        bytes: of each corner, rising.
        damage: of each corner, falling; no allocation of the same bytes or fewer does less.
        price: damage saved per byte on the way to the next corner (the Lagrange multiplier), falling; one entry fewer.
    """

    bytes: np.ndarray
    damage: np.ndarray
    price: np.ndarray
    _blocks: Blocks

    def __len__(self) -> int:
        return len(self.bytes)

    def allocation(self, corner: int) -> Allocation:
        """The allocation of a corner: the best of the table at exactly its bytes."""
        start = time.perf_counter()
        corner = range(len(self))[corner]
        picks = self._blocks.options(self._blocks.at(corner))
        found = from_picks(self._blocks.table, picks, int(self.bytes[corner]), "frontier")
        return from_picks(
            self._blocks.table,
            picks,
            found.limit,
            "frontier",
            status=Status.OPTIMAL,
            bound=found.damage,
            seconds=time.perf_counter() - start,
        )

    def bracket(self, limit: int) -> tuple[int, int]:
        """The corners on both sides of a limit in bytes: the exact best there does damage between the bound and the first's."""
        below = self._blocks.path.steps_within(check_limit(self._blocks.table, limit))
        return below, min(below + 1, len(self) - 1)

    def bound(self, limit: int) -> float:
        """No allocation within the limit does less damage: the hull between its corners."""
        below, above = self.bracket(limit)
        if below == above:
            return float(self.damage[below])
        return float(self.damage[below] - self.price[below] * (limit - self.bytes[below]))

    def subsample(self, points: int) -> list[int]:
        """At most so many corners, both ends among them, evenly spaced over the bytes: for a plot."""
        wanted = np.linspace(self.bytes[0], self.bytes[-1], max(points, 2))
        return np.unique(np.abs(self.bytes[:, None] - wanted).argmin(axis=0)).tolist()

    thin = subsample


def frontier(table: OptionTable) -> Frontier:
    """Every corner of the hull of size against damage.

        L(λ) = Σ_blocks min_x [damage(x) + λ · bytes(x)];  as λ falls from ∞ to 0 its minimisers are the corners

    Args:
        table: matrices × options; ties are kept.

    Source:
        Everett, Operations Research 11 (1963); Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), section 11.2

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
        >>> curve = frontier(OptionTable((Row("q", 64, options), Row("k", 64, options))))
        >>> curve.bytes.tolist(), curve.damage.tolist()
        ([32, 40, 48, 56, 64], [6.0, 4.5, 3.0, 2.5, 2.0])
    """
    blocks = Blocks(table)
    return Frontier(blocks.path.size, blocks.path.damage, blocks.path.slope, blocks)
