"""Every way of spending a budget, in one table: the job, the plan, the cost model and the reports iterate it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from allocators.allocation import Allocation, check_limit
from allocators.baselines import filled_uniform, greedy, random, rank0, uniform
from allocators.errors import AllocationError, Infeasible
from allocators.exact.knapsack import allocate
from allocators.table import OptionTable


class Role(Enum):
    """What a strategy's allocation is for, where no strategy was asked for by name.

    DELIVERED is solved, refined and delivered, unless a model beside it measures better. BASELINE and CONTROL are solved and
    measured with it: what is delivered never has a higher KL than the baseline, and the control shows what low-rank factors
    are worth. Of LISTED the predicted damage is reported beside that of the others.
    """

    DELIVERED = "delivered candidate"
    BASELINE = "baseline"
    CONTROL = "control"
    LISTED = "listed apart"


@dataclass(frozen=True)
class Strategy:
    """One way of choosing a spec for every matrix within a limit.

    Args:
        name: as in `--strategy NAME`, the recipe, allocation.json and report.json.
        function: `(table, limit, **settings) -> Allocation`; it raises Infeasible where it has none within the limit.
        role: what its allocation is for.
        label: as tables and plots print it.
        text: what it does, in a few words that go on from "the model is compressed with": for reports, help and cards.
        settings: which of gap, seconds and seed the function takes.
        per_matrix: whether specs differ from matrix to matrix; otherwise there is one for all.
        ranks: whether it may give a matrix low-rank factors.
    """

    name: str
    function: Callable[..., Allocation]
    role: Role
    label: str
    text: str
    settings: tuple[str, ...] = ()
    per_matrix: bool = True
    ranks: bool = True

    @property
    def solved(self) -> bool:
        """Whether every job solves and measures it."""
        return self.role is not Role.LISTED

    def allocate(self, table: OptionTable, limit: int, **settings: Any) -> Allocation:
        """This strategy's allocation.

        Args:
            table: matrices × options, before pruning.
            limit: bytes that all rows may take together.
            settings: gap, seconds, seed; those that the function does not take are left out.

        Raises:
            Infeasible: where it has no allocation within the limit.
        """
        return self.function(table, limit, **{name: settings[name] for name in self.settings if name in settings})


DEFAULT, BASELINE, CONTROL = "allocated", "uniform", "rank0"
STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            DEFAULT,
            allocate,
            Role.DELIVERED,
            "allocated",
            "rank and bits of every matrix chosen together",
            settings=("gap", "seconds"),
        ),
        Strategy(BASELINE, uniform, Role.BASELINE, "uniform", "one spec everywhere, the best that fits", per_matrix=False),
        Strategy(
            "filled_uniform",
            filled_uniform,
            Role.LISTED,
            "filled uniform",
            "one spec everywhere, and what is left of the budget filled greedily",
        ),
        Strategy(
            CONTROL,
            rank0,
            Role.CONTROL,
            "rank 0",
            "bits of every matrix chosen together, no rank",
            settings=("gap", "seconds"),
            ranks=False,
        ),
        Strategy("greedy", greedy, Role.LISTED, "greedy", "the change that saves most damage per byte taken again and again"),
        Strategy("random", random, Role.LISTED, "random", "rank and bits of every matrix drawn at random", settings=("seed",)),
    )
}
"""Name -> strategy, in the order of tables; a further one is a function and a row here."""


def find_strategy(name: str) -> Strategy:
    """The strategy of this name.

    Raises:
        AllocationError: where there is none; the text names all there are.

    Example:
        >>> find_strategy("rank0").label
        'rank 0'
        >>> find_strategy("best")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        allocators.errors.AllocationError: strategy 'best' is not known; there are allocated, uniform, ...
    """
    if name not in STRATEGIES:
        raise AllocationError(f"strategy {name!r} is not known; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def solved_strategies() -> tuple[str, ...]:
    """Names of the strategies whose models every job solves and measures, the delivered candidate first.

    Example:
        >>> solved_strategies()
        ('allocated', 'uniform', 'rank0')
    """
    return tuple(name for name, strategy in STRATEGIES.items() if strategy.solved)


def baselines(table: OptionTable, limit: int, seed: int = 0, *, gap: float = 0.0, seconds: float = 10.0) -> dict[str, Allocation]:
    """The allocation of every strategy but the default; one that has none at this limit (no single spec fits) is left out.

    Args:
        table: matrices × options, before pruning.
        limit: bytes that all rows may take together.
        seed: of the random strategy.
        gap: relative gap at which an exact search may stop.
        seconds: time for each exact search.

    Returns:
        Allocations by the strategy's name, in the table's order.

    Raises:
        Infeasible: where the limit is below the table's least.

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
        >>> table = OptionTable((Row("q", 64, options), Row("k", 64, options)))
        >>> found = baselines(table, 56)
        >>> found["uniform"].damage, found["filled_uniform"].damage
        (3.0, 2.5)
    """
    check_limit(table, limit)
    return _others(table, limit, DEFAULT, seed=seed, gap=gap, seconds=seconds)


def _others(table: OptionTable, limit: int, name: str, **settings: Any) -> dict[str, Allocation]:
    """The allocations of every strategy but the one of this name that have any."""
    found = {}
    for other, strategy in STRATEGIES.items():
        if other != name:
            try:
                found[other] = strategy.allocate(table, limit, **settings)
            except Infeasible:
                continue
    return found


def compared(
    table: OptionTable, limit: int, *, gap: float = 0.0, seconds: float = 10.0, seed: int = 0, strategy: str = DEFAULT
) -> Allocation:
    """A strategy's allocation with those of all the others attached; the default's is never worse than any of them.

    Where a gap is asked for, a baseline may happen to do less damage within it; then the exact one takes over its specs. A strategy
    that is asked for by name keeps its own.

    Args:
        table: matrices × options, before pruning.
        limit: bytes that all rows may take together.
        gap: relative gap at which an exact search may stop.
        seconds: time for each exact search.
        seed: of the random strategy.
        strategy: a name of STRATEGIES.

    Raises:
        Infeasible: where the limit is below the table's least, or the strategy has no allocation within it.
        AllocationError: for a strategy that does not exist.

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
        >>> best = compared(OptionTable((Row("q", 64, options), Row("k", 64, options))), 56)
        >>> best.damage, best.baselines["uniform"].damage, best.to_dict()["baselines"]["uniform"]["spec"]
        (2.5, 3.0, 'int-3')
    """
    settings = {"gap": gap, "seconds": seconds, "seed": seed}
    found = find_strategy(strategy).allocate(table, limit, **settings)
    others = _others(table, limit, strategy, **settings)
    better = min(others.values(), key=lambda other: other.damage)
    if strategy == DEFAULT and better.damage < found.damage:
        taken = {name: getattr(better, name) for name in ("specs", "bytes", "damage", "bits_per_weight")}
        found = replace(found, **taken, bound=None if found.bound is None else min(found.bound, better.damage))
    return replace(found, baselines=others)


def job_plans(best: Allocation, strategy: str = DEFAULT, *, controls: bool = True) -> dict[str, Allocation]:
    """The allocations that a job solves and measures: under "allocated" the strategy's, beside it the baseline and the control.

    Args:
        best: the strategy's allocation, as `compared` returns it with those of the others.
        strategy: the same name of STRATEGIES.
        controls: whether any is solved beside it.

    Returns:
        Allocations by the names of `solved_strategies`, those that exist at this limit.

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
        >>> table = OptionTable((Row("q", 64, options), Row("k", 64, options)))
        >>> plans = job_plans(compared(table, 56, strategy="greedy"), "greedy")
        >>> {name: plan.method for name, plan in plans.items()}
        {'allocated': 'greedy', 'uniform': 'uniform', 'rank0': 'rank0'}
    """
    beside = {**best.baselines, strategy: best} if controls else {}
    return {DEFAULT: best} | {name: beside[name] for name in solved_strategies() if name != DEFAULT and name in beside}


def delivered(kl: Mapping[str, float], strategy: str = DEFAULT) -> str:
    """Which of a job's models is delivered: of the default strategy the one of least KL, else what was asked for by name.

    Args:
        kl: KL on the calibration text, nats a token, by the names of `job_plans`.
        strategy: a name of STRATEGIES.

    Returns:
        One of the names in `kl`; of equal ones the first in the order of `solved_strategies`.

    Example:
        >>> delivered({"allocated": 0.031, "uniform": 0.030, "rank0": 0.033})
        'uniform'
        >>> delivered({"allocated": 0.031, "uniform": 0.030, "rank0": 0.033}, "greedy")
        'allocated'
    """
    if strategy != DEFAULT:
        return DEFAULT
    return min(kl, key=lambda name: (kl[name], solved_strategies().index(name)))
