"""Dynamic programming over undominated (bytes, damage) states, pruned by what each can still lead to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocators.exact.hull import lower_hull, merge_steps
from allocators.exact.reduction import Choices, trim, undominated

TRAIL = 40_000_000  # states kept for reading the solution back; eight bytes each


@dataclass(frozen=True)
class DynamicResult:
    """The best of some choices, and what is proved about it.

    Args:
        picks: choice number by block; None where nothing better than the damage known before was found.
        damage: of the picks, or the one known before.
        bound: no allocation of the choices within the limit does less damage.
        whole: False where states were trimmed, or time ran out: with more room more may be proved.
    """

    picks: np.ndarray | None
    damage: float
    bound: float
    whole: bool


class Completions:
    """The hulls of the blocks that are still to be decided, added up: what a state can reach, and a bound on it.

    Args:
        stages: the choices of every stage, in the order in which they are decided.
    """

    def __init__(self, stages: Sequence[Choices]) -> None:
        self.hulls = [lower_hull(c.size, c.damage) for c in stages]
        corners = [(c.size[h], c.damage[h]) for c, h in zip(stages, self.hulls, strict=True)]
        self.owner, self.point, self.slope = merge_steps(corners)
        at = list(zip(self.owner.tolist(), self.point.tolist(), strict=True))
        self.size = np.array([corners[k][0][p] - corners[k][0][p - 1] for k, p in at], dtype=np.int64)
        self.damage = np.array([corners[k][1][p] - corners[k][1][p - 1] for k, p in at], dtype=float)
        self.first_size = np.array([size[0] for size, _ in corners], dtype=np.int64)
        self.first_damage = np.array([damage[0] for _, damage in corners])

    def after(self, stage: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes and damage of the corners that the later stages reach together, and the slope from each to the next."""
        later = self.owner > stage
        size = np.concatenate(([self.first_size[stage + 1 :].sum()], self.size[later])).cumsum()
        damage = np.concatenate(([self.first_damage[stage + 1 :].sum()], self.damage[later])).cumsum()
        return size, damage, np.append(self.slope[later], 0.0)

    def complete(self, stage: int, corner: int) -> np.ndarray:
        """Choice numbers of the later stages at a corner."""
        point = np.zeros(len(self.hulls), dtype=np.int64)
        steps = np.flatnonzero(self.owner > stage)[:corner]
        np.maximum.at(point, self.owner[steps], self.point[steps])
        return np.array([hull[p] for hull, p in zip(self.hulls, point, strict=True)], dtype=np.int64)[stage + 1 :]


def target_damage(damage: float, gap: float) -> float:
    """Only allocations of less damage than this are worth finding: those that improve on a known damage by more than the gap."""
    return damage - gap * (1 - 1e-9) * abs(damage)


# Longer than 60 lines for its docstring; the loop is one recurrence with its pruning, and shares every variable.
def dynamic_program(choices: Sequence[Choices], limit: int, known: float, gap: float, cells: int, end: float) -> DynamicResult:
    """The choices of least damage within a limit, one a block, or a bound on how much less than `known` any can do.

        states(k) = undominated {(b + bytes(x), d + damage(x)) : (b, d) ∈ states(k − 1), x ∈ choices(k)}

    A state is followed by the hull of the blocks still to come: a corner of it within the limit completes it to an allocation, the
    hull itself bounds every completion, and states whose bound is not below `target_damage(best, gap)` are dropped. Blocks whose
    hull has the longest steps come first, because the hull of the others is then a close bound. Where states × choices exceeds
    `cells`, states are trimmed, and what that may lose is taken off the bound.

    Args:
        choices: of every block; they may already lack what does not improve on `target_damage(known, gap)`.
        limit: bytes of all blocks together.
        known: damage of an allocation found before.
        gap: relative gap at which to stop.
        cells: states × choices of a stage, at most.
        end: value of time.perf_counter() at which to stop.

    Source:
        Dyer, Riha and Walker, Journal of Computational and Applied Mathematics 58 (1995); Pisinger, EJOR 83 (1995); Kellerer,
        Pferschy and Pisinger, Knapsack Problems (2004), chapter 11; trimming after Ibarra and Kim, Journal of the ACM 22 (1975)

    Example:
        >>> two = Choices((0,), np.array([16, 24, 32]), np.array([3.0, 1.5, 1.0]), np.array([[0], [1], [2]]))
        >>> found = dynamic_program([two, two], 56, 6.0, 0.0, 1000, time.perf_counter() + 10)
        >>> found.damage, found.bound, sorted(found.picks.tolist())
        (2.5, 2.5, [1, 2])
    """
    order, stages = _stages(choices)
    completions, trail = Completions(stages), []
    size, damage = np.zeros(1, np.int64), np.zeros(1)
    best, how = known, None
    lost, floor, lower = sum(c.loss for c in choices), target_damage(known, gap), -np.inf
    whole = lost == 0
    for stage, own in enumerate(stages):
        if time.perf_counter() > end:
            whole = False
            break
        all_size, all_damage = (own.size[:, None] + size).ravel(), (own.damage[:, None] + damage).ravel()
        corner_size, corner_damage, slope = completions.after(stage)
        fits = np.flatnonzero(all_size <= limit - corner_size[0])
        all_size, all_damage = all_size[fits], all_damage[fits]
        corner = np.searchsorted(corner_size, limit - all_size, side="right") - 1
        total = all_damage + corner_damage[corner]
        if len(total) and total.min() < best:
            k = int(total.argmin())
            best, how = float(total[k]), (stage, int(fits[k] // len(size)), int(fits[k] % len(size)), int(corner[k]))
        bound = total - slope[corner] * (limit - all_size - corner_size[corner])
        hopeful = bound < target_damage(best, gap)
        if not hopeful.all():
            floor = min(floor, float(bound[~hopeful].min()))
        left = np.flatnonzero(hopeful)
        left = left[undominated(all_size[left], all_damage[left])]
        lower = float(bound[left].min()) if len(left) else np.inf
        if min(floor, lower) - lost >= target_damage(best, gap) or stage == len(stages) - 1:
            break
        some, loss = trim(all_damage[left], max(2, min(cells // len(stages[stage + 1].size), TRAIL // len(stages))))
        lost, whole, left = lost + loss, whole and len(some) == len(left), left[some]
        item, parent = np.divmod(fits[left], len(size))
        trail.append((item.astype(np.int32), parent.astype(np.int32)))
        size, damage = all_size[left], all_damage[left]
    picks = None
    if how:
        picks = np.zeros(len(choices), dtype=np.int64)
        picks[order] = _traced_back(trail, completions, *how)[1:]
    return DynamicResult(picks, best, min(floor, lower, best) - lost, whole)


def _stages(choices: Sequence[Choices]) -> tuple[list[int], list[Choices]]:
    """The blocks that have a choice, those with the longest hull steps first; and the stages: all others at once, then these."""
    lone = [k for k, c in enumerate(choices) if len(c.size) == 1]
    order = sorted((k for k, c in enumerate(choices) if len(c.size) > 1), key=lambda k: -_longest_step(choices[k]))
    decided = (np.array([sum(int(choices[k].size[0]) for k in lone)]), np.array([sum(float(choices[k].damage[0]) for k in lone)]))
    return order, [Choices((), *decided, np.zeros((1, 0), np.int64)), *(choices[k] for k in order)]


def _longest_step(choices: Choices) -> int:
    return int(np.diff(choices.size[lower_hull(choices.size, choices.damage)]).max())


def _traced_back(
    trail: list[tuple[np.ndarray, np.ndarray]], completions: Completions, stage: int, item: int, parent: int, corner: int
) -> np.ndarray:
    """Choice number by stage: back along the trail from the best state, and on along the hull."""
    picks = [item]
    for items, parents in reversed(trail[:stage]):
        picks.append(int(items[parent]))
        parent = int(parents[parent])
    return np.concatenate((np.array(picks[::-1], dtype=np.int64), completions.complete(stage, corner)))
