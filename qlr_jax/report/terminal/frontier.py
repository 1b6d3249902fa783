"""The curve of size against damage as text, with the models that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from allocators.strategies import CONTROL
from qlr_jax.report.content.frontier import point_name
from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import (
    MISSING,
    is_number,
    number,
    rows_of,
)

CORNERS = 12  # that the terminal shows


def frontier_text(curves: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] = ()) -> str:
    """Some corners of the curve, with what rank saves there; then the measured models.

    Args:
        curves: of `pipelines.allocate.curves`.
        measured: of `pipelines.allocate.measured_points`.
    """
    corners, without = rows_of(curves, "all"), rows_of(curves, CONTROL)
    count = min(CORNERS, len(corners))
    shown = [corners[round(at * (len(corners) - 1) / max(count - 1, 1))] for at in range(count)]
    header = ["bits a weight", "MB", "damage", "saved by a further MB"] + (["without rank"] if without else [])
    rows = []
    for row in shown:
        price = row.get("price")
        cells = [
            f"{bits_of:.2f}" if is_number(bits_of := row.get("bits_per_weight")) else MISSING,
            number(row["bytes"] / 1e6),
            number(row["damage"]),
        ]
        cells.append(number(price * 1e6) if is_number(price) else "nothing")
        rows.append([*cells, *([number(_between(without, row["bytes"]))] if without else [])])
    lines = [
        columns(header, rows),
        f"{len(shown)} of {curves.get('corners', len(corners)):,} corners; damage: predicted KL, nats a token",
    ]
    if measured:
        cells = [
            [
                point_name(row),
                number(row["bytes"] / 1e6),
                number(row["kl"]),
                number(row.get("predicted")),
                str(row.get("on") or ""),
            ]
            for row in measured
        ]
        lines += ["", columns(["measured", "MB", "KL", "predicted", "on"], cells)]
    return "\n".join(lines)


def _between(corners: Sequence[Mapping[str, Any]], size: int) -> float | None:
    """The damage of a curve at a size, straight between its corners, level after the last; None before the first."""
    for low, high in pairwise(corners):
        if low["bytes"] <= size <= high["bytes"]:
            part = (size - low["bytes"]) / (high["bytes"] - low["bytes"])
            return low["damage"] + part * (high["damage"] - low["damage"])
    return corners[-1]["damage"] if corners and size >= corners[-1]["bytes"] else None
