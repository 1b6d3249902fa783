"""Aligned columns of text."""

from __future__ import annotations

from collections.abc import Sequence


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text columns: the first to the left, the others to the right.

    >>> print(columns(["model", "KL"], [["uniform", "0.2"]]))
    model     KL
    uniform  0.2
    """
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]])
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)
