"""The mixed-integer programme that is left of a knapsack once the Lagrangian bound has fixed what it can."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from allocators.hull import Block, Blocks

REPAIRS = 20


@dataclass(frozen=True)
class Relaxation:
    """The Lagrangian relaxation at one price: L = Σ_blocks min_x [damage(x) + price · bytes(x)] − price · limit.

    cost   damage + price · bytes of every option, one array a row
    keys   for every block, the least cost under each key
    bound  L: no allocation within the limit does less damage
    """

    price: float
    limit: int
    cost: list[np.ndarray]
    keys: list[np.ndarray]
    bound: float


def relax(blocks: Blocks, price: float, limit: int) -> Relaxation:
    """The relaxation of a table at a price (damage per byte)."""
    cost = [damage + price * size for damage, size in zip(blocks.damage, blocks.size, strict=True)]
    keys = [np.array([sum(cost[i][o].min() for i, o in zip(b.rows, key, strict=True)) for key in b.keys]) for b in blocks.blocks]
    return Relaxation(price, limit, cost, keys, math.fsum(float(least.min()) for least in keys) - price * limit)


class Part(NamedTuple):
    """A row under one key: the options left, their reduced costs, their bytes above the least of them."""

    row: int
    options: np.ndarray
    reduced: np.ndarray
    size: np.ndarray


class Key(NamedTuple):
    """One key that a block may still take: its cost above the best key, its bytes above the least, its rows."""

    excess: float
    size: int
    parts: list[Part]


@dataclass
class Core:
    """What is left to decide, over the blocks that are not all alike; n blocks alike are one block taken n times.

        minimise Σ cost · x + price · (room − Σ size · x)   subject to   Σ size · x ≤ room,   Σ x over a group = n or its key's x

    cost    of each whole-number variable, in units of the window U − L
    size    bytes of each variable above the least that is left
    groups  (variables, n, None), or (variables, n, the key's own variable)
    alike   blocks that share variables: each one's keys; the keys' variables; the variables of each key's parts (empty: no choice)
    base    bytes of the least that is left
    """

    relaxation: Relaxation
    window: float
    cost: list[float] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    groups: list[tuple[list[int], int, int | None]] = field(default_factory=list)
    alike: list[tuple[list[list[Key]], list[int], list[list[list[int]]]]] = field(default_factory=list)
    base: int = 0

    def group(self, costs: Sequence[float], sizes: Sequence[int], copies: int, switch: int | None) -> list[int]:
        """Variables for the members of a new group; none where there is no choice."""
        if len(costs) < 2:
            return []
        numbers = list(range(len(self.cost), len(self.cost) + len(costs)))
        self.cost += [max(float(cost), 0.0) / self.window for cost in costs]
        self.size += [int(size) for size in sizes]
        self.groups.append((numbers, copies, switch))
        return numbers


def build(blocks: Blocks, relaxation: Relaxation, upper: float) -> Core:
    """Leave out every option (and key) that no allocation of damage below ``upper`` can take."""
    core = Core(relaxation, upper - relaxation.bound)
    reach = core.window + 1e-12 * (abs(upper) + relaxation.price * relaxation.limit)
    alike: dict[tuple[object, ...], list[list[Key]]] = {}
    for block, least in zip(blocks.blocks, relaxation.keys, strict=True):
        base, keys = _reduce(block, blocks, relaxation.cost, least - least.min(), reach)
        core.base += base
        same = tuple((key.excess, key.size, *((p.reduced.tobytes(), p.size.tobytes()) for p in key.parts)) for key in keys)
        alike.setdefault(same, []).append(keys)
    for copies in alike.values():
        keys, n = copies[0], len(copies)
        switches = core.group([key.excess for key in keys], [key.size for key in keys], n, None)
        parts = [
            [core.group(p.reduced, p.size, n, switch) for p in key.parts]
            for key, switch in zip(keys, switches or [None], strict=True)
        ]
        core.alike.append((copies, switches, parts))
    return core


def _reduce(block: Block, blocks: Blocks, cost: list[np.ndarray], excess: np.ndarray, reach: float) -> tuple[int, list[Key]]:
    """A block's least bytes, and what is left of its keys within reach of the bound."""
    kept = []
    for key, more in zip(block.keys, excess.tolist(), strict=True):
        if more > reach:
            continue
        floor, parts = 0, []
        for i, options in zip(block.rows, key, strict=True):
            reduced = cost[i][options] - cost[i][options].min()
            near = more + reduced <= reach
            size = blocks.size[i][options[near]]
            floor += int(size.min())
            parts.append(Part(i, options[near], reduced[near], size - size.min()))
        kept.append((more, floor, parts))
    base = min(floor for _, floor, _ in kept)
    return base, [Key(more, floor - base, parts) for more, floor, parts in kept]


def read(core: Core, x: np.ndarray, rows: int) -> np.ndarray:
    """Option number by row, from a solver's nearly whole numbers."""

    def deal(variables: list[int], copies: int) -> list[int]:
        """Which member each copy takes."""
        if not variables or not copies:
            return [0] * copies
        counts = np.maximum(np.rint(x[variables]), 0).astype(int)
        dealt = np.repeat(np.arange(len(variables)), counts).tolist()
        return (dealt + [int(np.argmax(x[variables]))] * copies)[:copies]

    picks = np.zeros(rows, dtype=np.int64)
    for copies, switches, parts in core.alike:
        taken = deal(switches, len(copies))
        for k, variables in enumerate(parts):
            own = [keys[k] for keys, key in zip(copies, taken, strict=True) if key == k]
            for number, group in enumerate(variables):
                for key, member in zip(own, deal(group, len(own)), strict=True):
                    part = key.parts[number]
                    picks[part.row] = part.options[member]
    return picks


def solve(core: Core, blocks: Blocks, gap: float, seconds: float) -> tuple[np.ndarray | None, float, bool]:
    """HiGHS on the core.

    gap      absolute gap in damage at which to stop
    seconds  time limit
    returns  option number by row (None where nothing was found), proved lower bound on the damage, whether the gap was reached

    Where the whole-number bytes of a result exceed the limit (possible within the solver's tolerances), HiGHS runs again with so
    much less room; the bound stays the one that was proved with all of it.
    """
    end, price, floor = time.perf_counter() + seconds, core.relaxation.price, core.relaxation.bound
    room, count = core.relaxation.limit - core.base, len(core.cost)
    if not count:  # a single allocation is left: the one that is known
        return None, floor + core.window, True
    offset = floor + price * room
    cost = np.array(core.cost) - price / core.window * np.array(core.size)
    most = np.concatenate([np.full(len(numbers), n) for numbers, n, _ in core.groups])
    # HiGHS measures its gap against the value of this objective, which is at most max(1, what the offset holds) in size
    relative = min(gap / max(core.window, price * room), 1.0)
    bound, over = floor, 0
    for _ in range(REPAIRS):
        left = end - time.perf_counter()
        if left <= 0:
            break
        result = milp(
            cost,
            integrality=np.ones(count),
            bounds=Bounds(0, most),
            constraints=[_groups(core), _budget(core, room - over)],
            options=dict(mip_rel_gap=relative, time_limit=left),
        )
        dual = result.mip_dual_bound
        if not over and result.status in (0, 1) and dual is not None and math.isfinite(dual):
            bound = max(floor, offset + dual * core.window)
        if result.x is None:
            break
        picks = read(core, result.x, len(blocks.size))
        excess = sum(int(blocks.size[i][k]) for i, k in enumerate(picks)) - core.relaxation.limit
        if excess <= 0:
            return picks, bound, result.status == 0 and not over
        over += excess
    return None, bound, False


def _groups(core: Core) -> LinearConstraint:
    """One option of every group, where its key is chosen."""
    entries = [(g, v, 1.0) for g, (numbers, _, _) in enumerate(core.groups) for v in numbers]
    entries += [(g, switch, -1.0) for g, (_, _, switch) in enumerate(core.groups) if switch is not None]
    row, column, value = zip(*entries, strict=True)
    total = np.array([n if switch is None else 0 for _, n, switch in core.groups], dtype=float)
    return LinearConstraint(sparse.csr_array((value, (row, column)), shape=(len(core.groups), len(core.cost))), total, total)


def _budget(core: Core, room: int) -> LinearConstraint:
    """The bytes, in units of their common divisor: at most the room, and no more below it than the window pays for."""
    unit = math.gcd(*core.size) or 1
    size = np.array([number // unit for number in core.size], dtype=float)
    most = room // unit
    least = most - min(core.window / core.relaxation.price, float(room)) / unit - 1.0
    scale = max(1.0, float(size.max()) / 1e6)
    return LinearConstraint(size[None, :] / scale, least / scale, most / scale)
