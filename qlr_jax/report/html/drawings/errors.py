"""Relative error against stored bits per weight of one matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlr_jax.report.content.allocation import FULL
from qlr_jax.report.content.sensitivity import worst_matrix
from qlr_jax.report.html.drawings.svg import LETTER, Plane, apart, label, line, marker, svg
from qlr_jax.report.words import (
    is_number,
    number,
    part_of,
)

if TYPE_CHECKING:
    from allocators import OptionTable, Row


DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")  # lines that lie close are distinguished by them


def error_bits(table: OptionTable, matrix: str | None = None) -> str:
    """Relative error against stored bits per weight of one matrix, a line a rank; empty where its coefficient is not known.

        error(option) = √(damage(option) / coefficient)

    Of options of the same rank (backbones, grids of the factors) the line is the least error at so many bits.

    Args:
        table: with `notes["matrices"][name]["coefficient"]`.
        matrix: the matrix's name; the one of the largest damage at its probe where not given.
    """
    name = matrix or worst_matrix(table.notes)
    coefficient = part_of(table.notes, "matrices", name or "").get("coefficient")
    if name is None or name not in table.index or not is_number(coefficient) or coefficient <= 0:
        return ""
    lines = {rank: curve for rank, curve in _by_rank(table[name], coefficient).items() if curve}
    if not lines:
        return ""
    width, height, right = 460, 320, 50
    xs = [bits for curve in lines.values() for bits, _, _ in curve]
    ys = [error for curve in lines.values() for _, error, _ in curve]
    log = max(ys) > 4 * min(ys)
    plane = Plane.around(xs, ys, log_y=log, box=(52, 28, width - right, height - 44))
    out = [label(_ending(name, width - 56), 52, 16), *plane.grid(), *plane.titles("bits per weight, as stored", "relative error")]
    where = apart([plane.py(curve[-1][1]) for curve in lines.values()], 13, 34, height - 50)
    for at, ((rank, curve), y) in enumerate(zip(lines.items(), where, strict=True)):
        shade = 2 + round(4 * at / max(len(lines) - 1, 1))
        style = f"stroke:var(--step{shade});stroke-width:1.8;stroke-dasharray:{DASHES[at % len(DASHES)] or 'none'}"
        pixels = [(plane.px(x), plane.py(error)) for x, error, _ in curve]
        out.append(line(pixels, style, f"rank {rank}"))
        out.append(line([pixels[-1], (width - right + 4, y)], "stroke-width:.7"))
        out.append(label(f"rank {rank}" if at == 0 and rank == 0 else f"r{rank}", width - right + 6, y + 4))
        for x, error, spec in curve:
            if spec:
                title = f"{spec}: {number(x)} bits, error {number(error)}, measured"
                out.append(marker("circle", plane.px(x), plane.py(error), "uniform", 4, title))
    return svg(out, f"Relative error against bits per weight of {name}", width, height)


def _by_rank(row: Row, coefficient: float) -> dict[int, list[tuple[float, float, str]]]:
    """Rank -> (bits, least error so far, spec if measured), bits rising; what is stored as it was is left out."""
    best: dict[int, list[tuple[float, float, str]]] = {}
    for option in sorted(row.options, key=lambda option: (option.rank or 0, option.bytes, option.damage)):
        if option.damage <= 0 or row.bits(option) >= FULL:
            continue
        curve = best.setdefault(option.rank or 0, [])
        error = math.sqrt(option.damage / coefficient)
        if not curve or error < curve[-1][1]:
            curve.append((row.bits(option), error, option.spec if option.measured else ""))
    return best


def _ending(name: str, width: float) -> str:
    """The end of a name, as much as so many pixels hold."""
    letters = int(width / LETTER / 1.1)
    return name if len(name) <= letters else "…" + name[-letters + 1 :]
