"""The section of the allocation: a heat map, layers × kinds of matrices, and the list of all matrices under it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qlr_jax.report.content.allocation import (
    FULL,
    MATRIX_HEADS,
    bound_line,
    by_layer_and_kind,
    matrix_rows,
    rank_line,
    specified_matrices,
    vocabulary_line,
)
from qlr_jax.report.html.elements import folded, table
from qlr_jax.report.html.style import RAMP
from qlr_jax.report.words import bits, is_number, kind_of, sentence, short_spec

MEANING = (
    "A cell is the spec in short: bits of the trellis, rounded, “+r8” a low-rank term of rank 8; its colour is bits per weight, "
    "all side data counted. Rows are layers."
)


def step_of(value: Any, low: float, high: float) -> int:
    """The colour of a cell, as a step of the ramp.

    Args:
        value: bits per weight of the matrix.
        low, high: the least and the most of all matrices.

    >>> step_of(1.5, 1.5, 4.0), step_of(4.0, 1.5, 4.0), step_of(16.0, 1.5, 4.0)
    (0, 6, 6)
    """
    if high <= low:
        return len(RAMP) // 2 if value < FULL else len(RAMP) - 1
    return min(max(int((value - low) / (high - low) * len(RAMP)), 0), len(RAMP) - 1)


def allocation_section(report: Mapping[str, Any]) -> str:
    """The section: a table whose cells say the spec in short and whose colour says bits per weight; empty without specs."""
    matrices = specified_matrices(report)
    if not matrices:
        return ""
    known = [matrix["bits"] for matrix in matrices if is_number(matrix.get("bits"))]
    below = [value for value in known if value < FULL] or known or [0.0]
    ends = min(below), max(below)
    ramp = "".join(f'<i class="s{at}"></i>' for at in range(len(RAMP)))
    scale = f'<div class="ramp"><span>{ends[0]:.2f}</span><div>{ramp}</div><span>{ends[1]:.2f} bits per weight</span></div>'
    said = filter(None, (vocabulary_line(matrices), rank_line(matrices)))
    lines = "".join(f"<p>{escape(sentence(line))}</p>" for line in said)
    return (
        f'<section id="allocation"><h2>Where bits and rank went</h2><p class="soft">{MEANING}</p>{scale if known else ""}'
        f"{_heat_map(matrices, ends)}{lines}{matrix_list(matrices)}</section>"
    )


def _heat_map(matrices: Sequence[Mapping[str, Any]], ends: tuple[float, float]) -> str:
    layers, kinds, placed = by_layer_and_kind(matrices)
    if not placed:
        return ""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("layer", *kinds))
    rows = [
        f'<tr><th scope="row">{layer}</th>{"".join(_cell(placed.get((layer, kind)), *ends) for kind in kinds)}</tr>'
        for layer in layers
    ]
    return f'<div class="scroll"><table class="heat"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


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


def matrix_list(matrices: Sequence[Mapping[str, Any]]) -> str:
    """Every matrix with all its figures, folded away until it is asked for."""
    rows = [[escape(cell) for cell in row] for row in matrix_rows(matrices)]
    bounds = f"<p>{escape(sentence(line))}</p>" if (line := bound_line(matrices)) else ""
    return folded(f"All {len(rows)} matrices in figures", bounds + table(MATRIX_HEADS, rows))
