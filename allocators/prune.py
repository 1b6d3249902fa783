"""Options that no best allocation needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from allocators.options import Option, Tie
from allocators.table import OptionTable


@dataclass(frozen=True)
class Dropped:
    """An option that was pruned.

    Args:
        row: the matrix's name.
        spec: of the option.
        by: spec of the option that is as good in bytes and in damage; None where a tied row lacks the backbone.
    """

    row: str
    spec: str
    by: str | None


@dataclass(frozen=True)
class Pruned:
    """What `prune` returns.

    Args:
        table: the smaller table.
        dropped: every option that was left out.
    """

    table: OptionTable
    dropped: tuple[Dropped, ...]


def _split_dominated(options: tuple[Option, ...], tie: Tie | None = None) -> tuple[list[int], list[tuple[int, int]]]:
    """Indices of the options that no other one (of the same tie key) matches in bytes and damage; and (dropped, by) pairs."""
    order = sorted(range(len(options)), key=lambda j: (options[j].bytes, options[j].damage, options[j].rank, options[j].spec))
    best: dict[str | None, int] = {}
    kept, dropped = [], []
    for j in order:
        key = tie.key(options[j]) if tie else None
        if key in best and options[best[key]].damage <= options[j].damage:
            dropped.append((j, best[key]))
        else:
            best[key] = j
            kept.append(j)
    return sorted(kept), dropped


def prune(table: OptionTable) -> Pruned:
    """Leave out dominated options, keeping at least one best allocation at every limit.

        j is dropped when some k of the same row has bytes(k) ≤ bytes(j) and damage(k) ≤ damage(j)

    In a tied row, k must also have j's backbone (or spec), because the other rows of the tie may need it; and an option whose
    backbone some tied row lacks is dropped outright. Take baselines from the table before pruning: what is pruned in one row
    may have been the uniform spec of all of them.

    Args:
        table: matrices × options; it is not changed.

    Source:
        Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), section 11.2.1

    Example:
        >>> from allocators.options import Row
        >>> row = Row("q", 64, (Option("int-2", 16, 3.0), Option("nf-2", 16, 2.0), Option("int-4", 32, 1.0)))
        >>> prune(OptionTable((row,))).dropped
        (Dropped(row='q', spec='int-2', by='nf-2'),)
    """
    rows, dropped = list(table.rows), []
    for numbers, tie in table.blocks():
        shared = table.shared(tie) if tie else None
        for i in numbers:
            row = rows[i]
            within = tuple(o for o in row.options if tie is None or shared is None or tie.key(o) in shared)
            kept, pairs = _split_dominated(within, tie)
            gone = [Dropped(row.name, o.spec, None) for o in row.options if o not in within]
            gone += [Dropped(row.name, within[j].spec, within[k].spec) for j, k in pairs]
            if gone:
                rows[i] = replace(row, options=tuple(within[j] for j in kept))
                dropped += gone
    return Pruned(replace(table, rows=tuple(rows)), tuple(dropped))
