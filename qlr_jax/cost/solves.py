"""The work of solving matrices: one batch, all probes, the final solves of a plan."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from allocators.strategies import STRATEGIES
from qlr_jax.core.batch import SMALL, portions
from qlr_jax.core.ldlq import GROUP, row_group
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.cost.counted import Counted
from qlr_jax.cost.rates import Work

ANCHORED = 21  # as in sensitivity.anchors
ROUNDS = 1.0  # alternations after the first, as nearly every solve had them: the error soon stops falling
CHOICES = {True: 40, False: 20}  # specs that a plan with or without ranks spreads the matrices of one shape over, about
KINDS = {True: 4, False: 1}  # the same of kinds of specs (`core.problem.kind_of_spec`), where backbones store their own rates
RANKED = 0.85  # part of the matrices that get factors where every matrix has a spec of its own, about
# Functions that are compiled for a batch shape that is solved, small ones as parts of one, and those with factors.
COMPILED = {"solve": 8, "factors": 7}
LATER = 0.1  # of the functions of solves, the part that is compiled again for another number of state bits


def probe_solves(job: Counted) -> Work:
    """The solves that `sensitivity.measure` makes: all matrices plainly, some of each kind with factors."""
    found, bits = Work(compiled=_compiled(job)), job.recipe.search_state_bits
    anchored = max(1, ANCHORED // len({kind for kind, _ in job.groups}))
    for (kind, shape), count, kinds in _alike(job):
        found += _solves(job, kind, shape, bits, False, count)
        if job.has_factors:
            found += _solves(job, kind, shape, bits, True, min(count, anchored * kinds))
            found += _solves(job, kind, shape, bits, True, kinds) * _again(job)
    return found


def _again(job: Counted) -> int:
    """Further solves with factors of one matrix of each kind: the least and the largest rank, the finest factors."""
    ranks = sorted(rank for rank in job.recipe.ranks if rank)
    middle, finest = ranks[(len(ranks) - 1) // 2], len(job.recipe.factors) - 1
    return len({(ranks[0], 0), (ranks[-1], 0), (middle, finest)} - {(middle, 0)})


def plan_solves(job: Counted, name: str, bits: int) -> Work:
    """The final solves of the allocation of one strategy, with so many state bits."""
    strategy = STRATEGIES[name]
    choices, part, spread = 1, float(strategy.ranks and job.has_factors), strategy.per_matrix
    if spread:
        choices, part = (CHOICES if job.backbone.traced() else KINDS)[strategy.ranks], RANKED * part
    found = Work()
    for (kind, shape), count, _ in _alike(job):
        for factors, share in ((True, part), (False, 1 - part)):
            found += _solves(job, kind, shape, bits, factors, count, choices, spread) * share
    if name == job.recipe.strategy and bits != job.recipe.search_state_bits:
        found += Work(compiled=LATER * _compiled(job))
    return found


def vocabulary_solves(job: Counted, state_bits: int) -> Work:
    """One solve each of embedding and head on a trellis, row by row (`core.rows`)."""
    found = Work()
    for m, n in job.settings.vocabulary.values():
        cost, once = job.backbone.for_backbone((m, n), state_bits).search_cost, m * n
        found += Work(products=10 * m * n * n, placed=once, factored=n**3 / 3 + 256 * n * n, compiled=6)
        found += job.rates.search(cost, once, m, 1.0)
    return found


def _alike(job: Counted) -> list[tuple[tuple[str, tuple[int, int]], int, int]]:
    """((kind, shape), matrices, kinds) of what is batched together: small matrices of one shape whatever their kind."""
    found: dict[Any, list[Any]] = {}
    for (kind, shape), count in job.groups.items():
        entry = found.setdefault(shape if shape[0] < SMALL else (kind, shape), [(kind, shape), 0, 0])
        entry[1] += count
        entry[2] += 1
    return [(key, count, kinds) for key, count, kinds in found.values()]


def _compiled(job: Counted) -> float:
    """Functions that solves need: of every shape of a batch, with every bucket of ranks."""
    buckets = len({bucket(rank, 10**6) for rank in job.recipe.ranks if rank})
    shapes = {(shape, job.batch_size(kind, shape)) for kind, shape in job.groups}
    return len(shapes) * (COMPILED["solve"] + COMPILED["factors"] * buckets)


def _solves(
    job: Counted,
    kind: str,
    shape: tuple[int, int],
    state_bits: int,
    factors: bool,
    count: int,
    choices: int = 1,
    spread: bool = False,
) -> Work:
    """`solve_many` of `count` matrices: the specs of small ones are of so many kinds, all of large ones differ if `spread`."""
    b = job.batch_size(kind, shape)
    found = Work(decoded=shape[0] * shape[1]) * count  # of every solution, its error as it is stored
    if shape[0] >= SMALL:
        b = 1 if spread else b  # siblings seldom get the same spec
        return found + work_of_solve(job, b, shape, state_bits, factors) * (count / b)
    distinct = choices * (1 - (1 - 1 / choices) ** count) if choices > 1 else 1.0
    alike = max(1, round(count / distinct))
    for filled, batches in Counter(filled for _, filled in portions(alike, b, shape[0], job.machine.kind != "cpu")).items():
        found += work_of_solve(job, filled, shape, state_bits, factors) * (batches * count / alike)
    return found


def work_of_solve(job: Counted, b: int, shape: tuple[int, int], state_bits: int, factors: bool) -> Work:
    """One batch of `solver.solve_batch`, filled up where it is small.

    Args:
        job: whose solver settings and quantizers are used.
        b, shape: matrices of the batch, and (m, n) of each.
        state_bits: of trellis codes.
        factors: whether they have factors.
    """
    m, n = shape
    sides = [n, m] if job.outputs else [n]
    quadratic = 2 * m * n * n + (2 * m * m * n if job.outputs else 0)  # operations of tr(G E H Eᵀ), and of feedback
    metrics = {n: b if m < SMALL else 0.4, m: b if job.outputs else 0}  # H of a large matrix serves those that share it
    found = Work(
        factored=metrics[n] * n**3 / 3
        + 256 * n * n * metrics[n]
        + (metrics[m] * (2 * m**3 / 3 + 256 * m * m) if job.outputs else 0),
        passed=30 * sum(b * side * side for side in sides) + 60 * b * m * n,
        products=b * 3 * quadratic,
    )

    def search(quantizer: Quantizer, weights: float, sequences: float) -> Work:
        return job.rates.search(quantizer.search_cost, weights, sequences, _filled(job, sequences))

    def rounding(bits: int) -> Work:
        quantizer = job.backbone.for_backbone(shape, bits)
        waste, steps = _staggered(job, quantizer, m, n)
        once = b * m * n * waste
        own = Work(products=b * quadratic * (waste + 2), placed=once, steps=steps)
        return own + search(quantizer, once, b * m / 64 if m >= 64 else b * m / 16)

    if not factors:
        return found + rounding(state_bits)
    grid, first = job.backbone.for_backbone(shape, state_bits), replace(job.settings.solver, state_bits=state_bits).first_bits
    race = 2 if job.outputs else 1
    iterations = job.settings.solver.iterations
    rounds, k = min(ROUNDS, iterations - 1), bucket(sorted(job.recipe.ranks)[len(job.recipe.ranks) // 2], min(shape))
    inner = job.settings.solver.inner
    fit = Work(
        products=b * (quadratic + 3 * (4 * m * n * k + 2 * n * n * k) + inner * (6 * n * n * k + 4 * m * n * k + 4 * m * m * k)),
        factored=b * (3 * 4 * m * k * k + m * m * k),
        placed=inner * b * k * (m + n),
        steps=inner * (k / 4 + n / 64) * 512,
    )
    fit += search(grid, inner * b * k * m, b * m / 64) + search(grid, inner * b * k * n, b * k / 4)
    found += rounding(first) * (race + rounds) + fit * (2 * race + rounds)
    return found if first == state_bits else found + rounding(state_bits) + fit


def _staggered(job: Counted, quantizer: Quantizer, m: int, n: int) -> tuple[float, float]:
    """Of one rounding: its waste while the groups of rows follow each other, and steps of all searches."""
    height = quantizer.tile[0]
    rows = -(-m // height) * height
    high = row_group(rows, height) if job.outputs else rows
    count = rows // high
    wide = min(GROUP, max(16, n // (4 * count))) if count > 1 else GROUP
    ahead = max(1, n // wide)
    waste = (ahead + count - 1) / ahead
    return waste, waste * n * quantizer.search_cost.steps


def _filled(job: Counted, sequences: float) -> float:
    """Sequences that are searched over those that are asked for: they go in eights or in batches of 32 on a CPU."""
    size = 32 if sequences > 16 else 8
    slower = 1.0 if sequences > 16 else 1.33
    return slower * size * math.ceil(sequences / size) / sequences if job.machine.kind == "cpu" else 1.0
