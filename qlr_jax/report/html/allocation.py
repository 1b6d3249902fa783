"""The allocation as a heat map, layers × matrix kinds, and the list of all matrices under it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.report.html.style import RAMP
from qlr_jax.report.words import bits, is_number, kind_of, kind_order, number, rank_line, rows_of, short_spec, size

FULL = 12.0  # matrices of so many bits a weight and more were left as they are: they do not stretch the colours


def step_of(value: Any, low: float, high: float) -> int:
    """The colour of a cell: its place between the least and the most bits per weight, in steps of the ramp.

    >>> step_of(1.5, 1.5, 4.0), step_of(4.0, 1.5, 4.0), step_of(16.0, 1.5, 4.0)
    (0, 6, 6)
    """
    if high <= low:
        return len(RAMP) // 2 if value < FULL else len(RAMP) - 1
    return min(max(int((value - low) / (high - low) * len(RAMP)), 0), len(RAMP) - 1)


def heat_map(report: Mapping[str, Any]) -> str:
    """The section of the allocation: a table whose cells say the spec in short and whose colour says bits per weight."""
    matrices = [matrix for matrix in rows_of(report, "matrices") if matrix.get("spec")]
    if not matrices:
        return ""
    known = [matrix["bits"] for matrix in matrices if is_number(matrix.get("bits"))]
    below = [value for value in known if value < FULL] or known or [0.0]
    low, high = min(below), max(below)
    placed = {(matrix["layer"], kind_of(matrix)): matrix for matrix in matrices if isinstance(matrix.get("layer"), int)}
    kinds = kind_order(kind for _, kind in placed)
    parts = ['<section id="allocation"><h2>Where bits and rank went</h2>']
    parts.append(
        '<p class="soft">A cell is the spec in short: bits of the trellis, rounded, “+r8” a low-rank term of rank 8; its colour '
    )
    parts.append("is bits per weight, all side data counted. Rows are layers.</p>")
    if known:
        parts.append(f'<div class="ramp"><span>{low:.2f}</span><div>')
        parts += [f'<i class="s{at}"></i>' for at in range(len(RAMP))]
        parts.append(f"</div><span>{high:.2f} bits per weight</span></div>")
    if placed:
        parts.append('<div class="scroll"><table class="heat"><thead><tr><th scope="col">layer</th>')
        parts += [f'<th scope="col">{escape(kind)}</th>' for kind in kinds]
        parts.append("</tr></thead><tbody>")
        for layer in sorted({layer for layer, _ in placed}):
            parts.append(
                f'<tr><th scope="row">{layer}</th>'
                + "".join(_cell(placed.get((layer, kind)), low, high) for kind in kinds)
                + "</tr>"
            )
        parts.append("</tbody></table></div>")
    parts.append(f"<p>{escape(rank_line(matrices).capitalize())}.</p>")
    return "".join(parts) + matrix_list(matrices) + "</section>"


def _cell(matrix: Mapping[str, Any] | None, low: float, high: float) -> str:
    if matrix is None:
        return "<td></td>"
    value = matrix.get("bits")
    colour = f' class="s{step_of(value, low, high)}"' if is_number(value) else ""
    backbone, plus, rank = short_spec(matrix["spec"]).partition("+")
    backbone = f"{float(backbone):.2f}" if re.fullmatch(r"\d+\.\d{3,}", backbone) else backbone  # as a phone's cell has room for
    text = f"<span>{escape(backbone)}</span>" + (f"<wbr>{escape(plus + rank)}" if rank else "")
    title = f"{matrix.get('name', kind_of(matrix))}: {matrix['spec']}, {bits(value)} bits per weight"
    return f'<td{colour} title="{escape(title)}">{text}</td>'


def matrix_list(matrices: list[Mapping[str, Any]]) -> str:
    """Every matrix with all its figures, folded away until it is asked for."""
    header = ("matrix", "shape", "spec", "stored", "bits per weight", "relative error", "predicted error", "predicted damage")
    rows = []
    for matrix in matrices:
        cells = [
            str(matrix.get("name") or kind_of(matrix)),
            " × ".join(str(side) for side in matrix.get("shape") or ()),
            str(matrix["spec"]),
            size(matrix.get("bytes")),
            bits(matrix.get("bits")),
            *[number(matrix.get(key)) for key in ("relative_error", "predicted_error", "predicted_damage")],
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in header)
    return (
        f'<details><summary>All {len(rows)} matrices in figures</summary><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )
