"""Allocations under pairwise joint damage: local search, and lower bounds that are proved by exact solves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocators.exact.hull import Blocks
from allocators.exact.knapsack import CELLS, Solved, solve_blocks
from allocators.refinement.moves import moves, promising
from allocators.table import OptionTable
from benchmarks.interactions.models import Pairwise

ROUNDS = 12  # tangents tried for the bound
LINEARISATIONS = 4  # in a row
STEPS = 500  # moves and swaps of one descent


@dataclass(frozen=True)
class JointProblem:
    """A table with pairwise damage, made ready.

    Args:
        blocks: the table.
        rho: ρ over its rows, (rows, rows).
        others: ρ without its diagonal.
        size: √damage of every option, one array a row.
        least: below every eigenvalue of ρ.
        convex: Λ, above every eigenvalue of `others`.
        limit: bytes that all rows may take together.
        end: value of time.perf_counter() at which to stop.
    """

    blocks: Blocks
    rho: np.ndarray
    others: np.ndarray
    size: list[np.ndarray]
    least: float
    convex: float
    limit: int
    end: float

    @classmethod
    def of(cls, table: OptionTable, interactions: Pairwise, limit: int, end: float) -> JointProblem:
        rho = interactions.matrix(table)
        others = rho - np.eye(len(rho))
        least, *_, most = np.linalg.eigvalsh(rho) if len(rho) > 1 else np.ones(2)
        rounding = 4 * len(rho) * np.finfo(float).eps * max(abs(least), abs(most))
        curves = float(least - rounding), max(float(most + rounding) - 1, 0.0)
        return cls(Blocks(table), rho, others, interactions.amplitudes(table), *curves, limit, end)

    @property
    def time_left(self) -> bool:
        return time.perf_counter() < self.end

    def at(self, picks: np.ndarray) -> np.ndarray:
        """√damage of every row of an allocation."""
        return np.array([size[k] for size, k in zip(self.size, picks, strict=True)])

    def value(self, picks: np.ndarray) -> float:
        """Joint damage of an allocation."""
        now = self.at(picks)
        return float(now @ self.rho @ now)

    def solve(self, damage: list[np.ndarray]) -> Solved:
        """The exact allocation of the table under other damages."""
        return solve_blocks(self.blocks.with_damage(damage), self.limit, end=self.end, cells=CELLS[:1])

    def improve(self, picks: np.ndarray) -> np.ndarray:
        """Linearise and descend, in turn, while the joint damage falls."""
        while self.time_left:
            better = self.descend(self.linearise(picks))
            if not self.falls(better, picks):
                break
            picks = better
        return picks

    def falls(self, after: np.ndarray, before: np.ndarray) -> bool:
        old = self.value(before)
        return self.value(after) < old - 1e-12 * abs(old)

    def linearise(self, picks: np.ndarray) -> np.ndarray:
        """Exact allocations of the table linearised where it is, while the joint damage falls (the tangents of the bound go on)."""
        for _ in range(LINEARISATIONS):
            if not self.time_left:
                break
            now = self.at(picks)
            slope = 2 * self.others @ now
            for curve in dict.fromkeys((0.0, self.convex)):
                model = [s * s + g * s + curve * (s - a) ** 2 for s, g, a in zip(self.size, slope, now, strict=True)]
                better = self.solve(model).picks
                if self.falls(better, picks):
                    break
            else:
                return picks
            picks = better
        return picks

    def descend(self, picks: np.ndarray) -> np.ndarray:
        """The best move of one block or swap between two, again and again while there is one."""
        for _ in range(STEPS):
            better = self.step(picks)
            if not self.time_left or not self.falls(better, picks):
                return picks
            picks = better
        return picks

    def step(self, picks: np.ndarray) -> np.ndarray:
        """The allocation after the best move or swap, which may be no better."""
        now, found = self.at(picks), moves(self.blocks, picks)
        left = self.limit - sum(int(size[k]) for size, k in zip(self.blocks.size, picks, strict=True))
        slope, changes, gains = 2 * self.rho @ now, [], []
        for block, options in zip(self.blocks.blocks, found.options, strict=True):
            rows = list(block.rows)
            change = np.stack([self.size[i][options[:, k]] - now[i] for k, i in enumerate(rows)], axis=1)
            changes.append(change)
            gains.append(change @ slope[rows] + ((change @ self.rho[np.ix_(rows, rows)]) * change).sum(axis=1))
        gain = np.concatenate(gains)
        alone = np.flatnonzero(found.size <= left)
        best, chosen = (float(gain[alone].min()), (int(alone[gain[alone].argmin()]),)) if len(alone) else (0.0, ())
        some = promising(found.size, gain)
        change = np.zeros((len(some), len(now)))
        for place, move in enumerate(some):
            k = int(found.block[move])
            change[place, list(self.blocks.blocks[k].rows)] = changes[k][found.number[move]]
        both = gain[some][:, None] + gain[some] + 2 * change @ self.rho @ change.T
        size, owner = found.size[some], found.block[some]
        both[(size[:, None] + size > left) | (owner[:, None] == owner)] = np.inf
        if both.size and both.min() < best:
            chosen = tuple(int(some[k]) for k in np.unravel_index(int(both.argmin()), both.shape))
        return found.apply(self.blocks, picks, *chosen)


def bounds(problem: JointProblem, picks: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The best proved lower bound on the joint damage within the limit, and the allocations that were met on the way.

    Every bound is a sum of one function a row, which the exact allocation minimises. With a = √d ≥ 0 and any reference r ≥ 0:

        tangent     ρ − σ1 has no negative eigenvalue for σ = λ_min(ρ), so its form lies above its tangent at r:
                    aᵀρa ≥ Σ σ a_i² + 2 aᵀ(ρ − σ1) r − rᵀ(ρ − σ1) r
        Gershgorin  2 a_i a_j ≤ (r_j / r_i) a_i² + (r_i / r_j) a_j² for the pairs of ρ < 0, and for those of ρ > 0
                    a_i a_j ≥ l_i a_j + l_j a_i − l_i l_j, l the least of each row:
                    aᵀρa ≥ Σ μ_i a_i² + 2 aᵀρ⁺l − lᵀρ⁺l,   μ_i = 1 − Σ_j ρ⁻_ij r_j / r_i

    No term is clipped: μ_i a_i² is part of a valid inequality whatever its sign. Both are tight where a = r (the second where no
    ρ is positive). The tangent's reference starts from the picks and moves toward what minimises the bound, by Frank and Wolfe's
    steps, which climb to the best of all tangents.

    Args:
        problem: the table with its interactions.
        picks: option number by row, of the best allocation known, (rows,).

    Source:
        Frank and Wolfe, Naval Research Logistics Quarterly 3 (1956); McCormick, Mathematical Programming 10 (1976)
    """
    rho, size = problem.rho, problem.size
    count = len(rho)
    best, met = -np.inf, []

    def prove(linear: np.ndarray, square: Sequence[float], constant: float) -> np.ndarray:
        nonlocal best
        found = problem.solve([m * s * s + g * s for s, g, m in zip(size, linear, square, strict=True)])
        best = max(best, found.bound + constant - 1e-12 * (abs(found.bound) + abs(constant)))  # above any rounding
        met.append(found.picks)
        return found.picks

    least = np.array([s.min() for s in size])
    above, below = np.maximum(problem.others, 0), np.maximum(-problem.others, 0)
    now = problem.at(picks)
    for scale in (np.maximum(now, 1e-6 * now.max()), np.ones(count)):
        if scale.min() > 0:
            prove(2 * above @ least, (1 - below @ scale / scale).tolist(), -float(least @ above @ least))
    shift = problem.least
    form, reference = rho - shift * np.eye(count), now
    for k in range(ROUNDS):
        if k and not problem.time_left:
            break
        linear = 2 * form @ reference
        other = problem.at(prove(linear, [shift] * count, -float(reference @ form @ reference)))
        reference = reference + 2 / (k + 3) * (other - reference)
    return best, list({tuple(p.tolist()): p for p in met}.values())
