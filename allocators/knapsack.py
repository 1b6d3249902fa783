"""The exact best allocation of a table within a limit: a multiple-choice knapsack, with its proof."""

from __future__ import annotations

import math
import time

import numpy as np

from allocators.allocation import Allocation, Status, check_limit, from_picks
from allocators.core import Relaxation, build, relax, solve
from allocators.errors import AllocationError
from allocators.greedy import fill
from allocators.hull import Blocks
from allocators.table import OptionTable


def allocate(table: OptionTable, limit: int, *, gap: float = 0.0, seconds: float = 10.0) -> Allocation:
    """The allocation of least damage within a limit, with the proof.

        minimise Σ_i damage(i, x_i)   subject to   Σ_i bytes(i, x_i) ≤ limit   and the table's ties

    Three steps. The hull of the table gives the best multiplier λ, the bound L = Σ min (damage + λ bytes) − λ limit, and, filled
    up greedily, a first allocation of damage U. An option whose reduced cost exceeds U − L is in no better allocation and is left
    out. What remains, often an option or two a row, goes to HiGHS in units of U − L. The bytes of every result are added up again
    in whole numbers, so that no solver tolerance can exceed the limit.

    table    matrices × options
    limit    bytes that all rows may take together (``Budget.parse("2.25bpw").on(table).limit``)
    gap      relative gap at which to stop; 0 asks for the best of all
    seconds  time for HiGHS, after which the best found is returned with the gap that is proved
    raises   Infeasible where the limit is below the table's least
    source   Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11; Pisinger, EJOR 83 (1995) for the fixing

    >>> from allocators.options import Option, Row
    >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
    >>> best = allocate(OptionTable((Row("q", 64, options), Row("k", 64, options))), 56)
    >>> best.bytes, best.damage, best.bound, best.status.value
    (56, 2.5, 2.5, 'optimal')
    """
    start = time.perf_counter()
    limit = check_limit(table, limit)
    if not (0 <= gap < 1):
        raise AllocationError(f"gap is {gap!r}; pass a relative gap from 0 to below 1, such as 1e-4")
    if not seconds > 0:
        raise AllocationError(f"seconds is {seconds!r}; pass a positive time")
    blocks = Blocks(table)
    picks, relaxation = _relaxed(blocks, _reachable(blocks, limit))
    damage, bound = _damage(blocks, picks), relaxation.bound
    window, rounding = damage - bound, 1e-12 * (abs(damage) + relaxation.price * limit)
    tolerance = rounding
    if window > max(rounding, gap * abs(damage)):
        found, bound, finished = solve(build(blocks, relaxation, damage), blocks, gap * abs(damage), seconds)
        if found is not None and _damage(blocks, found) < damage:
            picks, damage = found, _damage(blocks, found)
        if finished and gap == 0:  # HiGHS calls a programme solved within its tolerances, which are parts in 10⁶ of the window
            tolerance = max(rounding, 2e-6 * (abs(damage) + window))
    proved = damage - bound <= tolerance
    status = Status.OPTIMAL if proved else Status.WITHIN_GAP if damage - bound <= gap * abs(damage) else Status.STOPPED
    took = time.perf_counter() - start
    return from_picks(table, picks, limit, "exact", status=status, bound=min(bound, damage), seconds=took)


def _reachable(blocks: Blocks, limit: int) -> int:
    """The most bytes within the limit that whole options can add up to, as far as their common divisor tells."""
    unit = math.gcd(*(int(gap) for size in blocks.size for gap in np.unique(size - size[0])))
    base = sum(int(size[0]) for size in blocks.size)
    return base + (limit - base) // unit * unit if unit else base


def _relaxed(blocks: Blocks, limit: int) -> tuple[np.ndarray, Relaxation]:
    """The break solution of the hull, filled up greedily: option number by row; and the relaxation at its price."""
    walk = blocks.walk
    steps = walk.steps_within(limit)
    price = float(walk.slope[steps]) if steps < len(walk.slope) else 0.0
    at = fill(blocks, blocks.at(steps), limit - int(walk.size[steps]))
    return blocks.options(at), relax(blocks, price, limit)


def _damage(blocks: Blocks, picks: np.ndarray) -> float:
    return math.fsum(float(damage[k]) for damage, k in zip(blocks.damage, picks, strict=True))
