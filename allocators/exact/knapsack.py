"""The exact best allocation of a table within a limit: a multiple-choice knapsack, with its proof."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocators.allocation import Allocation, Status, check_limit, from_picks
from allocators.errors import AllocationError
from allocators.exact.dynamic import dynamic_program, target_damage
from allocators.exact.fill import fill
from allocators.exact.hull import Blocks
from allocators.exact.reduction import Choices, Relaxation, relax, remaining
from allocators.table import OptionTable

CELLS = (2**17, 2**20, 2**22)  # of states × choices of a dynamic program: one after another, until one is whole


def allocate(table: OptionTable, limit: int, *, gap: float = 0.0, seconds: float = 10.0) -> Allocation:
    """The allocation of least damage within a limit, with the proof.

        minimise Σ_i damage(i, x_i)   subject to   Σ_i bytes(i, x_i) ≤ limit   and the table's ties

    Three steps. The hull of the table gives the best multiplier λ, the bound L = Σ min (damage + λ bytes) − λ limit, and, filled
    up greedily, a first allocation of damage U. An option whose reduced cost exceeds U − L is in no better allocation and is left
    out. What remains, often an option or two a row, is solved by dynamic programming over undominated (bytes, damage) states, each
    bounded by the hull of the rows still to come. Where they are too many to keep they are trimmed, and what that may have lost is
    taken off the bound.

    Args:
        table: matrices × options.
        limit: bytes that all rows may take together (`Budget.parse("2.25bpw").on(table).limit`).
        gap: relative gap at which to stop; 0 asks for the best of all.
        seconds: time after which the best found is returned with the gap that is proved.

    Raises:
        Infeasible: where the limit is below the table's least.
        AllocationError: for a gap or a time out of range.

    Source:
        Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11; Pisinger, EJOR 83 (1995)

    Example:
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
    found = solve_blocks(Blocks(table), limit, gap=gap, end=start + seconds, cells=CELLS)
    within, proof = found.damage - found.bound, Status.STOPPED
    if within <= max(found.rounding, gap * abs(found.damage)):
        proof = Status.OPTIMAL if within <= found.rounding else Status.WITHIN_GAP
    took = time.perf_counter() - start
    return from_picks(table, found.picks, limit, "exact", status=proof, bound=min(found.bound, found.damage), seconds=took)


@dataclass(frozen=True)
class Solved:
    """What `solve_blocks` returns.

    Args:
        picks: option number by row.
        damage: of the picks.
        bound: no allocation within the limit does less damage.
        rounding: how far sums of damages may be off by rounding.
    """

    picks: np.ndarray
    damage: float
    bound: float
    rounding: float


def solve_blocks(blocks: Blocks, limit: int, *, gap: float = 0.0, end: float = math.inf, cells: Sequence[int] = CELLS) -> Solved:
    """`allocate` for a table that is made ready, under the damages that it was made ready with.

    Args:
        blocks: the table.
        limit: bytes that all rows may take together.
        gap: relative gap at which to stop.
        end: value of time.perf_counter() at which to stop.
        cells: sizes of the dynamic programs to try, smallest first.
    """
    picks, relaxation = _relaxed(blocks, _reachable(blocks, limit))
    damage, bound = _damage(blocks, picks), relaxation.bound
    rounding = 1e-12 * (abs(damage) + relaxation.price * limit)
    for most in cells:
        if damage - bound <= max(rounding, gap * abs(damage)):
            break
        left = remaining(blocks, relaxation, target_damage(damage, gap), math.isqrt(most))
        found = dynamic_program(left, relaxation.limit, damage, gap, most, end)
        bound = max(bound, found.bound)
        better = picks if found.picks is None else _chosen(left, found.picks, len(picks))
        if _damage(blocks, better) < damage:
            picks, damage = better, _damage(blocks, better)
        if found.whole or time.perf_counter() > end:
            break
    return Solved(picks, damage, bound, rounding)


def _reachable(blocks: Blocks, limit: int) -> int:
    """The most bytes within the limit that whole options can add up to, as far as their common divisor tells."""
    unit = math.gcd(*(int(gap) for size in blocks.size for gap in np.unique(size - size[0])))
    base = sum(int(size[0]) for size in blocks.size)
    return base + (limit - base) // unit * unit if unit else base


def _relaxed(blocks: Blocks, limit: int) -> tuple[np.ndarray, Relaxation]:
    """The break solution of the hull, filled up greedily: option number by row; and the relaxation at its price."""
    path = blocks.path
    steps = path.steps_within(limit)
    price = float(path.slope[steps]) if steps < len(path.slope) else 0.0
    at = fill(blocks, blocks.at(steps), limit - int(path.size[steps]))
    return blocks.options(at), relax(blocks, price, limit)


def _chosen(left: Sequence[Choices], picks: np.ndarray, rows: int) -> np.ndarray:
    """Option number by row, from the choice number of every block."""
    options = np.empty(rows, dtype=np.int64)
    for choices, k in zip(left, picks, strict=True):
        options[list(choices.rows)] = choices.options[k]
    return options


def _damage(blocks: Blocks, picks: np.ndarray) -> float:
    return math.fsum(float(damage[k]) for damage, k in zip(blocks.damage, picks, strict=True))
