"""Reduction of a knapsack by its Lagrangian bound: the choices of each block that a better allocation could still take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from allocators.exact.hull import Block, Blocks


@dataclass(frozen=True)
class Relaxation:
    """The Lagrangian relaxation at one price.

        L = Σ_blocks min_x [damage(x) + price · bytes(x)] − price · limit

    Args:
        price: λ, damage a byte.
        limit: bytes of all rows.
        cost: damage + price · bytes of every option, one array a row.
        keys: for every block, the least cost under each key.
        bound: L: no allocation within the limit does less damage.
    """

    price: float
    limit: int
    cost: list[np.ndarray]
    keys: list[np.ndarray]
    bound: float


def relax(blocks: Blocks, price: float, limit: int) -> Relaxation:
    """The relaxation of a table at a price.

    Args:
        blocks: the table.
        price: λ, damage a byte, 0 or more.
        limit: bytes of all rows.
    """
    cost = [damage + price * size for damage, size in zip(blocks.damage, blocks.size, strict=True)]
    keys = [np.array([sum(cost[i][o].min() for i, o in zip(b.rows, key, strict=True)) for key in b.keys]) for b in blocks.blocks]
    return Relaxation(price, limit, cost, keys, math.fsum(float(least.min()) for least in keys) - price * limit)


@dataclass(frozen=True)
class Choices:
    """What one block may take: choices of which none is as good as another in both bytes and damage.

    Args:
        rows: row numbers.
        size: bytes of each choice, rising.
        damage: of each choice, falling.
        options: option numbers, (choices, rows).
        loss: a choice that was left out does less damage by at most this than one that stayed, in no fewer bytes.
    """

    rows: tuple[int, ...]
    size: np.ndarray
    damage: np.ndarray
    options: np.ndarray
    loss: float = 0.0


def undominated(size: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Indices by rising bytes and falling damage, without those that another matches in both.

    Args:
        size: bytes, (choices,).
        damage: of each, (choices,).

    Example:
        >>> undominated(np.array([3, 1, 2, 2]), np.array([1.0, 5.0, 7.0, 2.0])).tolist()
        [1, 3, 0]
    """
    order = np.argsort(size, kind="stable")
    ordered = damage[order]
    kept = order[ordered < np.minimum.accumulate(np.concatenate(([np.inf], ordered)))[:-1]]
    return kept[np.append(size[kept][1:] > size[kept][:-1], True)[: len(kept)]]  # of equal bytes the last, which does the least


def trim(damage: np.ndarray, most: int) -> tuple[np.ndarray, float]:
    """At most so many of some choices in order of rising bytes and falling damage, and what leaving the others out may lose.

    The damages are cut into equal intervals and the first of each is kept, so that every other one has a choice of fewer bytes
    beside it whose damage is greater by at most the loss.

    Args:
        damage: of the choices, falling, (choices,).
        most: how many to keep, 2 or more.

    Returns:
        Indices of those kept, and the loss.

    Source:
        Ibarra and Kim, Journal of the ACM 22 (1975)

    Example:
        >>> trim(np.array([4.0, 3.9, 2.0, 1.0]), 3)[0].tolist()
        [0, 2, 3]
    """
    if len(damage) <= most:
        return np.arange(len(damage)), 0.0
    width = (damage[0] - damage[-1]) / (most - 1)
    first = np.flatnonzero(np.diff(np.floor((damage[0] - damage) / width), prepend=-1.0))
    last = np.concatenate((first[1:], [len(damage)])) - 1
    return first, float((damage[first] - damage[last]).max())


def remaining(blocks: Blocks, relaxation: Relaxation, target: float, most: int) -> list[Choices]:
    """For every block, the choices that an allocation of less damage than the target can take.

    A choice whose reduced cost exceeds target − L is in no such allocation.

    Args:
        blocks: the table.
        relaxation: of it, at the price of the limit.
        target: damage; only allocations below it are of interest.
        most: choices of tied rows to keep, at most.

    Source:
        Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11
    """
    reach = target - relaxation.bound + 1e-12 * (abs(target) + relaxation.price * relaxation.limit)
    return [
        _remaining(block, blocks, relaxation.cost, least - least.min(), reach, most)
        for block, least in zip(blocks.blocks, relaxation.keys, strict=True)
    ]


def _remaining(block: Block, blocks: Blocks, cost: list[np.ndarray], excess: np.ndarray, reach: float, most: int) -> Choices:
    found = []
    for key, more in zip(block.keys, excess.tolist(), strict=True):
        if more > reach and more > 0:
            continue
        size, damage, reduced = np.zeros(1, np.int64), np.zeros(1), np.array([more])
        options, loss = np.zeros((1, 0), np.int64), 0.0
        for i, offered in zip(block.rows, key, strict=True):
            extra = cost[i][offered] - cost[i][offered].min()
            near = np.flatnonzero((more + extra <= reach) | (extra == 0))
            offered, extra = offered[near], extra[near]
            total = (reduced[:, None] + extra).ravel()
            joint = np.flatnonzero((total <= reach) | (total == total.min()))
            old, new = np.divmod(joint, len(offered))
            size, damage = size[old] + blocks.size[i][offered][new], damage[old] + blocks.damage[i][offered][new]
            kept = undominated(size, damage)
            if len(block.rows) > 1:
                some, lost = trim(damage[kept], most)
                kept, loss = kept[some], loss + lost
            size, damage, reduced = size[kept], damage[kept], total[joint][kept]
            options = np.concatenate((options[old[kept]], offered[new[kept]][:, None]), axis=1)
        found.append((size, damage, options, loss))
    size, damage, options = (np.concatenate([part[k] for part in found]) for k in range(3))
    kept = undominated(size, damage)
    return Choices(block.rows, size[kept], damage[kept], options[kept], max(part[3] for part in found))
