"""The allocation of least joint damage: exact where it rises with the sum, local search and a proved bound where pairs interact."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from allocators.allocation import Allocation, Status, check_limit, from_picks
from allocators.errors import AllocationError
from allocators.exact.knapsack import allocate
from allocators.table import OptionTable
from benchmarks.interactions.models import Interactions, Pairwise, Saturating
from benchmarks.interactions.pairwise import JointProblem, bounds

STARTS = 3  # allocations met on the way to the bound that are improved


def allocate_jointly(
    table: OptionTable, limit: int, interactions: Interactions | None = None, *, gap: float = 0.0, seconds: float = 10.0
) -> Allocation:
    """The allocation of least joint damage within a limit; its damage and bound are those of the joint model.

    None and `Saturating` are solved exactly. `Pairwise` starts from the allocation of least sum and is never worse than it:

    1. bound: tangents of the joint damage, each a table that is solved exactly (see `bounds`); the best of the allocations met
       on the way are the starts;
    2. linearise: with the others as they are, a row's option contributes d + 2 √d Σ_{j≠i} ρ_ij √d_j; the exact allocation of that
       table is taken while it does less joint damage, or else that of the convex upper model, which adds Λ (√d − √d_now)²;
    3. descend: the best move of one block, or swap between two, while there is one.

    2 and 3 take turns while they help, and where the gap is not proved all is done a second time from the best.

    Args:
        table: matrices × options, damages of 0 or more for `Pairwise`.
        limit: bytes that all rows may take together.
        interactions: `Pairwise(rows, ρ)`, `Saturating(ceiling)` or None for the plain sum.
        gap: relative gap that counts as proved: the status is then WITHIN_GAP, else UNPROVED with the bound that was reached.
        seconds: time after which the best found is returned, a round or two later.

    Raises:
        Infeasible: where the limit is below the table's least.
        AllocationError: for interactions that do not fit the table.

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 4.0), Option("int-3", 24, 2.0), Option("int-4", 32, 1.0))
        >>> table = OptionTable(tuple(Row(name, 64, options) for name in "qkv"))
        >>> found = allocate_jointly(table, 72, Pairwise("qk", [[1.0, 0.9], [0.9, 1.0]]))
        >>> dict(found.specs), round(found.damage, 2), found.bound <= found.damage
        ({'q': 'int-4', 'k': 'int-3', 'v': 'int-2'}, 9.55, True)
    """
    start = time.perf_counter()
    if interactions is None:
        return allocate(table, limit, gap=gap, seconds=seconds)
    if isinstance(interactions, Saturating):
        plain = allocate(table, limit, gap=gap, seconds=seconds)
        mapped = {name: interactions.of(getattr(plain, name)) for name in ("damage", "bound")}
        return replace(plain, **mapped, method="saturating", seconds=time.perf_counter() - start)
    if not isinstance(interactions, Pairwise):
        raise AllocationError(
            f"the interactions are {interactions!r}; pass Pairwise(rows, correlation), Saturating(ceiling) or None"
        )
    limit = check_limit(table, limit)
    first = allocate(table, limit, gap=gap, seconds=seconds)
    problem = JointProblem.of(table, interactions, limit, start + seconds)
    picks = np.array([row.options.index(row.option(first.specs[row.name])) for row in table.rows])
    if not problem.others.any():
        return replace(first, method="pairwise", seconds=time.perf_counter() - start)
    bound = -np.inf
    for _ in range(2):  # a second time from the better picks, if that is needed
        proved, met = bounds(problem, picks)
        bound, starts = max(bound, proved), sorted((picks, *met), key=problem.value)[:STARTS]
        picks = starts[0]
        for start_from in starts:
            if problem.time_left and problem.value(picks) - bound > gap * abs(bound):
                picks = min(picks, problem.improve(start_from), key=problem.value)
        if not problem.time_left or problem.value(picks) - bound <= gap * abs(bound):
            break
    damage = problem.value(picks)
    within = damage - (bound := min(bound, damage))
    status = Status.WITHIN_GAP if within <= gap * abs(damage) else Status.UNPROVED
    status = Status.OPTIMAL if within <= 1e-12 * abs(damage) else status
    found = from_picks(table, picks, limit, "pairwise", status=status, bound=bound, seconds=time.perf_counter() - start)
    return replace(found, damage=damage)
