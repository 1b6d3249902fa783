"""What `qlr sensitivity` found, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.content.sensitivity import UNIT, how_measured, measured_matrices, probe_cells, share, totals
from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import (
    is_number,
    model_name,
    number,
    part_of,
)

MOST = 8  # matrices that the terminal names


def sensitivity_text(result: Mapping[str, Any]) -> str:
    """The most sensitive matrices, totals by kind and by layer, how it was measured and how long that took.

    Args:
        result: of `job.sensitivity`: out, table, matrices, options, seconds, notes; whatever is missing is left out.
    """
    notes = part_of(result, "notes")
    rows = [row for row in measured_matrices(notes) if is_number(row["damage"])]
    counts = [f"{result[key]:,} {key}" for key in ("matrices", "options") if is_number(result.get(key))]
    lines = [f"{model_name(notes)}: {', '.join(counts)}" if counts else model_name(notes)]
    if rows:
        total = sum(row["damage"] for row in rows)
        lines += ["", f"damage of every matrix at its probe, {notes.get('unit') or UNIT}; all together {number(total)}"]
        worst = sorted(rows, key=lambda row: -row["damage"])[:MOST]
        cells = [[row["name"], number(row["damage"]), share(row["damage"], total), *probe_cells(row)] for row in worst]
        lines += [columns(["most sensitive", "damage", "share", "probe", "error", "coefficient"], cells), ""]
        for title, key in (("kind", "kind"), ("layer", "layer")):
            lines.append(f"by {title}: " + ", ".join(f"{name} {share(part, total)}" for name, part in totals(rows, key)))
    lines += ["", *how_measured(notes, result.get("seconds"))]
    lines += [f"{key}: {result[key]}" for key in ("table", "out") if result.get(key)]
    return "\n".join(lines).strip()
