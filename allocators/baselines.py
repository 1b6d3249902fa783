"""Simple allocations, which the exact one is compared with; each is a row of `strategies.STRATEGIES`."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from allocators.allocation import Allocation, check_limit, from_picks
from allocators.errors import Infeasible
from allocators.exact.fill import fill
from allocators.exact.hull import Blocks
from allocators.exact.knapsack import allocate
from allocators.table import OptionTable


def uniform(table: OptionTable, limit: int) -> Allocation:
    """The best single spec: of those that every counted row offers and that fit, the one of least damage; nothing is filled up.

        min over specs s of Σ damage(i, s)   subject to   Σ bytes(i, s) ≤ limit

    Rows with a single option (locked) keep it. Uncounted rows (embeddings, head) get the best that still fits beside the spec.

    Args:
        table: matrices × options, before pruning.
        limit: bytes that all rows may take together.

    Raises:
        Infeasible: where no single spec fits.

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
        >>> dict(uniform(OptionTable((Row("q", 64, options), Row("k", 64, options))), 63).specs)
        {'q': 'int-3', 'k': 'int-3'}
    """
    start, limit = time.perf_counter(), check_limit(table, limit)
    counted, others = table.select(lambda row: row.counted), table.select(lambda row: not row.counted)
    if counted is None:
        raise Infeasible("no row of the table counts toward bits per weight, so there is no uniform spec")
    best: tuple[float, dict[str, str], str] | None = None
    for spec in table.uniform_specs():
        chosen = {row.name: row.options[0].spec if len(row.options) == 1 else spec for row in counted.rows}
        options = [counted[name].option(of) for name, of in chosen.items()]
        left = limit - sum(option.bytes for option in options)
        if left < (others.least_bytes if others else 0) or any(
            len({tie.key(counted[name].option(chosen[name])) for name in tie.rows}) > 1 for tie in counted.ties
        ):
            continue
        rest = allocate(others, left) if others else None
        damage = sum(option.damage for option in options) + (rest.damage if rest else 0.0)
        if best is None or damage < best[0]:
            best = damage, chosen | (dict(rest.specs) if rest else {}), spec
    if best is None:
        raise Infeasible(f"no spec that every counted row offers fits {limit} bytes; pass a larger budget")
    picks = [row.options.index(row.option(best[1][row.name])) for row in table.rows]
    return from_picks(table, picks, limit, "uniform", seconds=time.perf_counter() - start, spec=best[2])


def filled_uniform(table: OptionTable, limit: int) -> Allocation:
    """The best single spec, with what is left of the limit filled greedily.

    Args:
        table, limit: as in `uniform`.

    Raises:
        Infeasible: where no single spec fits.
    """
    start, first, blocks = time.perf_counter(), uniform(table, limit), Blocks(table)
    picks = np.array([row.options.index(row.option(first.specs[row.name])) for row in table.rows])
    at = fill(blocks, blocks.include(picks), limit - first.bytes)
    return from_picks(table, blocks.options(at), limit, "filled_uniform", seconds=time.perf_counter() - start, spec=first.spec)


def rank0(table: OptionTable, limit: int, **settings: float) -> Allocation:
    """The exact best allocation without any low-rank part.

        min Σ damage(i, x_i)   subject to   rank(x_i) = 0,   Σ bytes(i, x_i) ≤ limit   and the table's ties

    Args:
        table: matrices × options.
        limit: bytes that all rows may take together.
        settings: of `allocate`: gap, seconds.

    Raises:
        Infeasible: where a row or a tie offers nothing without rank, or the limit is below the least of what is offered.

    Example:
        >>> from allocators.options import Option, Row
        >>> row = Row("q", 64, (Option("int-2", 16, 3.0), Option("int-2+r4@bf16", 24, 1.5), Option("int-4", 32, 2.0)))
        >>> dict(rank0(OptionTable((row,)), 30).specs)
        {'q': 'int-2'}
    """
    without = table.restrict(lambda row, option: option.rank == 0, "leaving out every rank")
    return replace(allocate(without, limit, **settings), method="rank0")


def greedy(table: OptionTable, limit: int) -> Allocation:
    """From the smallest allocation, again and again the affordable change that saves most damage per byte.

    Args:
        table: matrices × options.
        limit: bytes that all rows may take together.

    Source:
        Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), section 11.2 (the greedy for the relaxation, carried on)

    Example:
        >>> from allocators.options import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))
        >>> greedy(OptionTable((Row("q", 64, options), Row("k", 64, options))), 60).bytes
        56
    """
    start, limit, blocks = time.perf_counter(), check_limit(table, limit), Blocks(table)
    at = blocks.at(0)
    at = fill(blocks, at, limit - int(blocks.path.size[0]))
    return from_picks(table, blocks.options(at), limit, "greedy", seconds=time.perf_counter() - start)


def random(table: OptionTable, limit: int, seed: int = 0) -> Allocation:
    """A random allocation that all but fills the limit: the best one for random damages.

    Gumbel noise stands in for the damages, so at the price λ of the limit each lone row's option has probability ∝ exp(−λ · bytes):
    the distribution of largest entropy at that mean size. λ may be negative: a large limit is filled too.

    Args:
        table: matrices × options.
        limit: bytes that all rows may take together.
        seed: one seed, one allocation.
    """
    start, limit = time.perf_counter(), check_limit(table, limit)
    draw = np.random.default_rng(seed)
    noise = [-draw.gumbel(size=len(row.options)) for row in table.rows]
    size = [np.array([option.bytes for option in row.options], float) for row in table.rows]
    unit = float(np.mean([np.ptp(of) for of in size])) or 1.0
    for price in (0.0, *np.geomspace(1.0, 1e6, 21)):  # damages that fall with bytes, until their least is beyond the limit
        blocks = Blocks(table, [n - price * of / unit for n, of in zip(noise, size, strict=True)])
        if blocks.path.size[-1] >= min(limit, table.most_bytes):
            break
    steps = blocks.path.steps_within(limit)
    at = fill(blocks, blocks.at(steps), limit - int(blocks.path.size[steps]))
    return from_picks(table, blocks.options(at), limit, "random", seconds=time.perf_counter() - start)
