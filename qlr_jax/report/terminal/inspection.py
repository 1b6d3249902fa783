"""What is inside a compressed folder, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.content.allocation import rank_line
from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import (
    MISSING,
    bits,
    is_number,
    kind_of,
    part_of,
    rows_of,
    shape_of,
    size,
)


def inspection(result: Mapping[str, Any]) -> str:
    """What is inside a compressed folder: one line a matrix, then the totals."""
    matrices = rows_of(result, "matrices")
    rows = [
        [
            str(matrix.get("name") or kind_of(matrix)),
            str(matrix.get("spec") or MISSING),
            shape_of(matrix),
            size(matrix.get("bytes")),
            bits(matrix.get("bits")),
        ]
        for matrix in matrices
    ]
    lines = [columns(["matrix", "spec", "shape", "stored", "bits a weight"], rows)] if rows else ["no compressed matrix"]
    if rows:
        lines.append(rank_line(matrices))
    for key, value in {**result, **part_of(result, "totals")}.items():
        if is_number(value):
            shown = size(value) if "bytes" in key else bits(value) if "bits" in key else f"{value:,}"
            lines.append(f"{key.replace('_', ' ')}: {shown}")
        elif isinstance(value, str):
            lines.append(f"{key.replace('_', ' ')}: {value}")
    return "\n".join(lines)
