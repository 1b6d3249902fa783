"""Lower convex hulls of bytes against damage: of a row, of tied rows together, of the whole table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from allocators.table import OptionTable


def lower_hull(size: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Indices of the lower left convex hull, from the least bytes to the least damage.

    Args:
        size: bytes, (points,).
        damage: of each, (points,).

    Example:
        >>> lower_hull(np.array([1, 2, 3, 4]), np.array([9.0, 8.0, 1.0, 2.0])).tolist()
        [0, 2]
    """
    hull: list[int] = []
    points_b, points_d = size.tolist(), damage.tolist()
    for j in np.lexsort((damage, size)).tolist():
        b, d = points_b[j], points_d[j]
        if hull and d >= points_d[hull[-1]]:
            continue
        while len(hull) > 1:
            p, q = hull[-2], hull[-1]
            if (points_d[p] - points_d[q]) * (b - points_b[q]) > (points_d[q] - d) * (points_b[q] - points_b[p]):
                break
            hull.pop()
        hull.append(j)
    return np.array(hull)


@dataclass(frozen=True)
class Block:
    """Rows that are decided together: a row alone, or the rows of a tie.

    Args:
        rows: row numbers.
        keys: one entry a key that all rows offer (a backbone; for a lone row one entry): its undominated option numbers, by row.
        size: bytes of the joint choices considered: every undominated option of a lone row; for tied rows the hull under each key.
        damage: their damage.
        choice: their option numbers, (choices, rows).
        hull: which of them form the block's lower convex hull, in order of bytes.
    """

    rows: tuple[int, ...]
    keys: tuple[tuple[np.ndarray, ...], ...]
    size: np.ndarray
    damage: np.ndarray
    choice: np.ndarray
    hull: np.ndarray


def merge_steps(hulls: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All steps of several hulls, steepest first: the edges of their Minkowski sum's hull.

    Args:
        hulls: (bytes, damage) of the corners of each hull, in order of bytes.

    Returns:
        By step: which hull it is of, which of its corners it reaches, and the damage that it saves per byte.
    """
    owner = np.concatenate([np.full(len(size) - 1, k) for k, (size, _) in enumerate(hulls)])
    point = np.concatenate([np.arange(1, len(size)) for size, _ in hulls])
    slopes = [np.minimum.accumulate(-np.diff(damage) / np.diff(size)) if len(size) > 1 else np.zeros(0) for size, damage in hulls]
    slope = np.concatenate(slopes)
    order = np.argsort(-slope, kind="stable")
    return owner[order], point[order], slope[order]


def _joint(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hull of the sum of some rows' options (bytes, damage, option numbers): its bytes, damage and choices."""
    hulls = [lower_hull(size, damage) for size, damage, _ in parts]
    owner, point, _ = merge_steps([(size[h], damage[h]) for h, (size, damage, _) in zip(hulls, parts, strict=True)])
    at = np.zeros((len(owner) + 1, len(parts)), dtype=np.int64)
    at[np.arange(1, len(at)), owner] = point
    at = np.maximum.accumulate(at, axis=0)  # a hull's corners come in order: where others step it stays at its last
    picks = [hull[at[:, k]] for k, hull in enumerate(hulls)]
    size, damage = (np.sum([part[k][pick] for part, pick in zip(parts, picks, strict=True)], axis=0) for k in range(2))
    return size, damage, np.stack([part[2][pick] for part, pick in zip(parts, picks, strict=True)], axis=1)


Group = tuple[tuple[int, ...], list[tuple[np.ndarray, ...]]]


def _groups(table: OptionTable) -> list[Group]:
    """Rows that are decided together and, for each key that all of them offer, the option numbers under it, by row."""
    groups: list[Group] = []
    for rows, tie in table.blocks():
        if tie is None:
            keys = [tuple(np.arange(len(table.rows[i].options)) for i in rows)]
        else:
            shared, under = table.shared(tie), []
            for i in rows:
                of: dict[str, list[int]] = {}
                for number, option in enumerate(table.rows[i].options):
                    of.setdefault(tie.key(option), []).append(number)
                under.append(of)
            keys = [tuple(np.array(of[key]) for of in under) for key in under[0] if key in shared]
        groups.append((tuple(rows), keys))
    return groups


@dataclass(frozen=True)
class HullPath:
    """The table's hull as a path: all blocks at their first hull point, then one step of one block after another, steepest first.

    Args:
        block: which block moves, (steps,).
        point: to which of its hull points, (steps,).
        slope: damage saved per byte, never rising, (steps,).
        size: bytes before the first step and after each one, (steps + 1,).
        damage: likewise.
    """

    block: np.ndarray
    point: np.ndarray
    slope: np.ndarray
    size: np.ndarray
    damage: np.ndarray

    def steps_within(self, limit: int) -> int:
        """How many whole steps fit (the break solution); -1 where not even the first point does."""
        return int(np.searchsorted(self.size, limit, side="right")) - 1


class Blocks:
    """A table made ready for the solvers: arrays in place of rows, ties resolved into blocks.

    Args:
        table: matrices × options.
        damage: in place of the table's own damage, one array a row (another objective over the same options).
        groups: the rows decided together and, by key, which of their options share it: of this table, where they are known already.
    """

    def __init__(self, table: OptionTable, damage: list[np.ndarray] | None = None, groups: list[Group] | None = None) -> None:
        self.table = table
        self.size = [np.array([o.bytes for o in row.options], dtype=np.int64) for row in table.rows]
        self.damage = damage or [np.array([o.damage for o in row.options]) for row in table.rows]
        self.groups = groups or _groups(table)
        self.blocks: list[Block] = []
        for rows, keys in self.groups:
            self.blocks.append(
                self._block(rows, tuple(tuple(self._best(i, o) for i, o in zip(rows, key, strict=True)) for key in keys))
            )

    def with_damage(self, damage: list[np.ndarray]) -> Blocks:
        """The same table under another damage of its options, one array a row."""
        return Blocks(self.table, damage, self.groups)

    def _best(self, i: int, among: np.ndarray) -> np.ndarray:
        order = among[np.lexsort((self.damage[i][among], self.size[i][among]))]
        least = np.minimum.accumulate(self.damage[i][order])
        return order[np.concatenate(([True], self.damage[i][order][1:] < least[:-1]))]

    def _block(self, rows: tuple[int, ...], keys: tuple[tuple[np.ndarray, ...], ...]) -> Block:
        if len(rows) == 1 and len(keys) == 1:
            options = keys[0][0]
            size, damage, choice = self.size[rows[0]][options], self.damage[rows[0]][options], options[:, None]
        else:
            joint = [_joint([(self.size[i][o], self.damage[i][o], o) for i, o in zip(rows, key, strict=True)]) for key in keys]
            size, damage, choice = (np.concatenate([part[k] for part in joint]) for k in range(3))
        return Block(rows, keys, size, damage, choice, lower_hull(size, damage))

    @cached_property
    def path(self) -> HullPath:
        """The hull of the whole table."""
        block, point, slope = merge_steps([(b.size[b.hull], b.damage[b.hull]) for b in self.blocks])
        moves = [(self.blocks[k], p) for k, p in zip(block, point, strict=True)]

        def total(of: str) -> np.ndarray:
            first = sum(getattr(b, of)[b.hull[0]] for b in self.blocks)
            return np.cumsum([first] + [getattr(b, of)[b.hull[p]] - getattr(b, of)[b.hull[p - 1]] for b, p in moves])

        size, damage = total("size"), total("damage")
        return HullPath(block, point, slope, size, damage)

    def at(self, steps: int) -> np.ndarray:
        """The joint choice of every block after so many steps of the path."""
        point = np.zeros(len(self.blocks), dtype=np.int64)
        np.maximum.at(point, self.path.block[:steps], self.path.point[:steps])
        return np.array([b.hull[p] for b, p in zip(self.blocks, point, strict=True)])

    def include(self, picks: np.ndarray) -> np.ndarray:
        """Make an allocation (option number by row) one of the joint choices of every block; returns where it is."""
        for n, block in enumerate(self.blocks):
            own = picks[list(block.rows)]
            size = sum(self.size[i][k] for i, k in zip(block.rows, own, strict=True))
            damage = sum(self.damage[i][k] for i, k in zip(block.rows, own, strict=True))
            self.blocks[n] = replace(
                block,
                size=np.append(block.size, size),
                damage=np.append(block.damage, damage),
                choice=np.concatenate([block.choice, own[None, :]]),
            )
        return np.array([len(block.size) - 1 for block in self.blocks])

    def options(self, at: np.ndarray) -> np.ndarray:
        """Option number by row, from the joint choice of every block."""
        picks = np.empty(len(self.size), dtype=np.int64)
        for block, k in zip(self.blocks, at, strict=True):
            picks[list(block.rows)] = block.choice[k]
        return picks
