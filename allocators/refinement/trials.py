"""Refining an allocation by trials: others near it are built and measured, in the order that predicted damages suggest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from allocators.allocation import Allocation, check_limit, from_picks, from_specs
from allocators.errors import AllocationError
from allocators.exact.hull import Blocks
from allocators.exact.knapsack import CELLS, solve_blocks
from allocators.options import few
from allocators.refinement.moves import moves, promising
from allocators.refinement.regression import damage_factors
from allocators.table import OptionTable

STEP, LEAST = 1.5, 1.1  # factor of the first rescalings, and of the last: the logarithm is halved from round to round
GROWTH = 1.5  # of a factor's logarithm after success

Measure = Callable[[Mapping[str, str]], float]


@dataclass(frozen=True)
class Trial:
    """One measured allocation.

    Args:
        proposal: what was changed, in words.
        measured: its loss.
        accepted: whether it became the best.
    """

    proposal: str
    measured: float
    accepted: bool


@dataclass(frozen=True)
class Refined:
    """The best allocation that was measured, and how it was reached.

    Args:
        allocation: the one of least measured loss.
        measured: its loss.
        start: measured loss of the allocation that was refined.
        candidates: measured loss of the further allocations, by method.
        history: every measurement in order, start and candidates first.
        seconds: time taken.
    """

    allocation: Allocation
    measured: float
    start: float
    candidates: Mapping[str, float] = field(default_factory=dict)
    history: tuple[Trial, ...] = ()
    seconds: float = 0.0

    @property
    def gained(self) -> float:
        """(start − measured) / |start|, 0 where nothing was gained."""
        return (self.start - self.measured) / abs(self.start) if self.start != self.measured else 0.0

    @property
    def tried(self) -> int:
        """How many allocations were measured beyond start and candidates."""
        return len(self.history) - 1 - len(self.candidates)

    @property
    def accepted(self) -> int:
        """How many of those became the best."""
        return sum(trial.accepted for trial in self.history[1 + len(self.candidates) :])

    @property
    def explain(self) -> str:
        """One sentence for people."""
        if self.measured >= self.start:
            return f"Measuring found nothing better than the allocation predicted best, in {self.tried} trials."
        if not self.accepted:
            better = f"The {self.allocation.method} allocation measures {self.gained:.2%} better than the one predicted best"
            return f"{better}, and none of {self.tried} trials improved on it."
        return f"Measuring lowered the loss by {self.gained:.2%}: {self.accepted} of {self.tried} trials were kept."


# Longer than 60 lines for its documentation.
def refine(
    table: OptionTable,
    start: Allocation,
    limit: int,
    measure: Measure,
    *,
    groups: Mapping[str, Collection[str]] | Sequence[Collection[str]] = (),
    evaluations: int = 24,
    seconds: float = math.inf,
    candidates: Sequence[Allocation] = (),
    on_measured: Callable[[str, float, bool], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Refined:
    """Lower the measured loss of an allocation by a few trials, each within the limit and the ties.

        min over x tried of measure(x)   subject to   Σ bytes(i, x_i) ≤ limit   and the table's ties

    Start and candidates are measured first, so that the result is never worse than any of them. Then two kinds of trial:

    1. rescaling: the exact allocation again, with the predicted damages scaled by factors, which moves bytes between rows in many
       small steps that each cost least. The factors are those that all measurements so far, good or bad, make likeliest
       (`damage_factors`); where they lead to nothing new, one group (later one row) is scaled up or down on top of them, by steps
       that grow while they help and shrink from round to round.
    2. swaps: one row takes more bytes and another fewer (or one alone), in order of least predicted loss.

    An allocation that was measured before is not measured again, and one is kept only where the measured loss falls.

    Args:
        table: matrices × options; its damages are the prediction.
        start: the allocation to improve, usually the exact one.
        limit: bytes that all rows may take together.
        measure: specs by row -> loss; the same specs give the same loss. One that is no finite number is never accepted.
        groups: sets of rows whose damage is likely to err alike (layers, kinds), by name or without.
        evaluations: calls of `measure` at most, start and candidates among them.
        seconds: time at most for the trials: none begins that would end later, if it takes as long as the mean of those before.
            Start and candidates are always measured.
        candidates: further allocations within the limit (uniform, rank0).
        on_measured: called after every measurement with proposal, loss, and whether it is the best so far.
        clock: seconds since some time.

    Raises:
        AllocationError: where an allocation does not fit the table, ties or limit, a group names no row, evaluations do not
            suffice for start and candidates, or the start's loss is no finite number.

    Source:
        Hooke and Jeeves, Journal of the ACM 8 (1961), for the pattern of steps; `damage_factors` for what directs them

    Example:
        >>> from allocators import Option, Row, allocate
        >>> options = (Option("int-2", 16, 4.0), Option("int-3", 24, 2.0), Option("int-4", 32, 1.0))
        >>> table = OptionTable(tuple(Row(name, 64, options) for name in "qkv"))
        >>> def loss(specs):  # v matters three times as much as predicted
        ...     return sum((3 if name == "v" else 1) * table[name].option(spec).damage for name, spec in specs.items())
        >>> found = refine(table, allocate(table, 72), 72, loss)
        >>> found.start, found.measured, found.allocation.specs["v"], found.explain
        (10.0, 9.0, 'int-4', 'Measuring lowered the loss by 10.00%: 1 of 11 trials were kept.')
    """
    trials = _Trials(table, check_limit(table, limit), measure, evaluations, seconds, on_measured, clock)
    trials.begin(start, candidates)
    trials.rescale(_named(table, groups))
    trials.swap()
    return trials.result()


def _named(table: OptionTable, groups: Mapping[str, Collection[str]] | Sequence[Collection[str]]) -> dict[str, list[int]]:
    """Row numbers by group name."""
    given = groups.items() if isinstance(groups, Mapping) else ((few(sorted(group), 3), group) for group in groups)
    found: dict[str, list[int]] = {}
    for name, rows in given:
        if isinstance(rows, str) or not rows:
            raise AllocationError(f"group {name!r} is {rows!r}; pass a set of row names")
        found[str(name)] = sorted(table.index[table[row].name] for row in rows)
    return found


class _Trials:
    """The state of one refinement: what was measured, the best of it, and the factors of the damages by now."""

    def __init__(
        self,
        table: OptionTable,
        limit: int,
        measure: Measure,
        evaluations: int,
        seconds: float,
        on_measured: Callable[[str, float, bool], None] | None,
        clock: Callable[[], float],
    ) -> None:
        if type(evaluations) is not int or evaluations < 1:
            raise AllocationError(f"evaluations is {evaluations!r}; pass a whole number, at least 1 for the start")
        if not seconds > 0:
            raise AllocationError(f"seconds is {seconds!r}; pass a positive time")
        self.table, self.limit, self.measure, self.on_measured, self.clock = table, limit, measure, on_measured, clock
        self.evaluations, self.seconds, self.began = evaluations, seconds, clock()
        self.given, self.count, self.first = np.zeros(0, np.int64), 0, 0
        self.took: list[float] = []
        self.blocks = Blocks(table)
        self.factors = np.ones(len(table.rows))
        self.best, self.loss = np.zeros(0, np.int64), math.inf
        self.known: dict[tuple[int, ...], float] = {}
        self.history: list[Trial] = []

    # ---- measuring

    def begin(self, start: Allocation, candidates: Sequence[Allocation]) -> None:
        """Measure what is given."""
        given = (start, *candidates)
        for allocation in given:
            from_specs(self.table, allocation.specs, self.limit, allocation.method)
        if self.evaluations < len(given):
            raise AllocationError(f"evaluations is {self.evaluations}; pass at least {len(given)} for the start and its candidates")
        for number, allocation in enumerate(given):
            self._measured(self._unused(allocation.method) if number else "start", self._picks(allocation))
            if self.history[-1].accepted:
                self.found = allocation
            elif not number:
                value = self.history[0].measured
                raise AllocationError(f"the measured loss of the start is {value}; pass a measure that gives a finite number")
        self.given, self.count, self.first = self.best, len(candidates), len(self.known)

    def _picks(self, allocation: Allocation) -> np.ndarray:
        return np.array([row.options.index(row.option(allocation.specs[row.name])) for row in self.table.rows])

    def _unused(self, method: str) -> str:
        taken = {trial.proposal for trial in self.history}
        return next(name for name in (method, *(f"{method} {k}" for k in range(2, len(taken) + 3))) if name not in taken)

    def _measured(self, proposal: str, picks: np.ndarray) -> float:
        """Measure (or look up) an allocation, and keep it where it is the best."""
        key = tuple(picks.tolist())
        if key not in self.known:
            before = self.clock()
            value = float(self.measure({row.name: row.options[k].spec for row, k in zip(self.table.rows, key, strict=True)}))
            self.known[key] = value if math.isfinite(value) else math.inf
            self.took.append(self.clock() - before)
        value = self.known[key]
        accepted = value < self.loss
        if accepted:
            self.best, self.loss = picks, value
        self.history.append(Trial(proposal, value, accepted))
        if self.on_measured:
            self.on_measured(proposal, value, accepted)
        return value

    @property
    def room(self) -> bool:
        """Whether another trial is within the evaluations and, going by the mean of those so far, within the seconds.

        What was given may be known to the caller already and take no time, so it counts only as long as there was no trial.
        """
        took = self.took[self.first :] or self.took
        within = self.clock() - self.began + sum(took) / max(len(took), 1) <= self.seconds
        return len(self.known) < self.evaluations and within

    def _try(self, proposal: str, picks: np.ndarray) -> bool | None:
        """Whether an allocation lowers the loss; None where it was measured before."""
        if tuple(picks.tolist()) in self.known:
            return None
        self._measured(proposal, picks)
        return self.history[-1].accepted

    # ---- rescaling

    def rescale(self, groups: Mapping[str, list[int]]) -> None:
        """Refit the factors to the measurements; where that brings nothing new, rescale a group or a row and measure that."""
        rows = {row.name: [i] for i, row in enumerate(self.table.rows) if len(row.options) > 1}
        step = STEP
        self._refit(groups)
        while step > LEAST:
            for level in (groups, rows):
                order = sorted(level, key=lambda name: -self._share(level[name]))
                for sign in (1, -1):
                    for name in order:
                        self._scale(name, level[name], step**sign, groups)
                        if not self.room:
                            return
            step **= 0.5

    def _share(self, rows: Sequence[int]) -> float:
        return sum(float(self.blocks.damage[i][self.best[i]]) for i in rows)

    def _refit(self, groups: Mapping[str, list[int]]) -> None:
        """Measure the exact allocation of the damages as measured so far, as long as that helps."""
        while self.room:
            of = [key for key, value in self.known.items() if math.isfinite(value)]
            damage = np.array([[d[k] for d, k in zip(self.blocks.damage, key, strict=True)] for key in of])
            self.factors = damage_factors(damage, np.array([self.known[key] for key in of]), list(groups.values()))
            if not self._rescaled("as measured so far", self.factors):
                break

    def _scale(self, name: str, rows: list[int], factor: float, groups: Mapping[str, list[int]]) -> None:
        """Scale some rows on top of the factors so far, and refit to what that measured; further while it helps."""
        while self.room:
            factors = self.factors.copy()
            factors[rows] *= factor
            helped = self._rescaled(f"{name} × {factor:.3g}", factors)
            if helped is not None:
                self._refit(groups)
            if not helped:
                break
            factor **= GROWTH

    def _rescaled(self, proposal: str, factors: np.ndarray) -> bool | None:
        """Measure the exact allocation of the damages times these factors."""
        damage = [d * f for d, f in zip(self.blocks.damage, factors, strict=True)]
        return self._try(proposal, solve_blocks(self.blocks.with_damage(damage), self.limit, cells=CELLS[:1]).picks)

    # ---- swaps

    def swap(self) -> None:
        """Changes of one row or two, in order of least predicted loss, starting over from each that helps."""
        while self.room and any(self._try(proposal, picks) for proposal, picks in self._exchanges() if self.room):
            pass

    def _exchanges(self) -> Iterator[tuple[str, np.ndarray]]:
        damage = [d * f for d, f in zip(self.blocks.damage, self.factors, strict=True)]
        best, found = self.best, moves(self.blocks, self.best)
        left = self.limit - sum(int(size[k]) for size, k in zip(self.blocks.size, best, strict=True))
        change = np.concatenate(
            [
                sum((damage[i][options[:, k]] - damage[i][best[i]] for k, i in enumerate(b.rows)), np.zeros(len(options)))
                for b, options in zip(self.blocks.blocks, found.options, strict=True)
            ]
        )
        some = promising(found.size, change)
        change, size, owner = change[some], found.size[some], found.block[some]
        both = change[:, None] + change
        both[(size[:, None] + size > left) | (owner[:, None] >= owner)] = np.inf
        np.fill_diagonal(both, np.where(size <= left, change, np.inf))  # one move alone
        count = min(both.size, 20 * self.evaluations)
        order = np.argpartition(both, count - 1, axis=None)[:count] if count else []
        for flat in sorted(order, key=lambda k: both.flat[k]):
            if np.isfinite(both.flat[flat]):
                pair = {int(some[k]) for k in np.unravel_index(int(flat), both.shape)}
                picks = found.apply(self.blocks, best, *pair)
                changed = [i for i in np.flatnonzero(picks != best)]
                yield ", ".join(f"{self.table.rows[i].name} → {self.table.rows[i].options[picks[i]].spec}" for i in changed), picks

    def result(self) -> Refined:
        """What was found."""
        took, allocation = self.clock() - self.began, self.found
        if self.best is not self.given:
            allocation = from_picks(self.table, self.best, self.limit, "refined", seconds=took, baselines=self.found.baselines)
        first, *rest = self.history
        candidates = {trial.proposal: trial.measured for trial in rest[: self.count]}
        return Refined(allocation, self.loss, first.measured, candidates, tuple(self.history), took)
