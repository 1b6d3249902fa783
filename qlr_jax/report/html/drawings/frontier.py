"""Size against predicted damage, with the models that were built and measured on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allocators.strategies import CONTROL
from qlr_jax.report.content.frontier import point_name
from qlr_jax.report.html.drawings.predictions import MARKS, RADIUS
from qlr_jax.report.html.drawings.svg import LETTER, Plane, apart, label, line, marker, svg, ticks
from qlr_jax.report.words import (
    bits,
    is_number,
    number,
    rows_of,
    size,
)

WIDE, HIGH = 520, 380
BOX = (58, 44, WIDE - 16, HIGH - 78)
FAINT = 1e-4  # a log axis goes so far below the largest damage; what is smaller has no visible effect on a model


def frontier_svg(curves: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] = ()) -> str:
    """The drawing as inline SVG (`svg.standalone` makes a file of it).

    The line is the hull of all options, the dashed one that without rank; marks are measured models, a shape a kind.

    Args:
        curves: of `pipelines.allocate.curves`.
        measured: of `pipelines.allocate.measured_points`.
    """
    solid, dashed = (_drawable(curves, key) for key in ("all", CONTROL))
    points = [row for row in measured if is_number(row.get("bytes")) and is_number(row.get("kl"))]
    if not solid:
        return ""
    everything = [*solid, *dashed, *((row["bytes"] / 1e6, row["kl"]) for row in points)]
    log = min(y for _, y in everything) > 0 and max(y for _, y in everything) > 8 * min(y for _, y in everything)
    plane = Plane.around([x for x, _ in everything], [y for _, y in everything], log_y=log, box=BOX)
    left, bottom = BOX[0], BOX[3]
    out = [
        *plane.grid(x_ticks=ticks(*plane.x, count=7)),
        *plane.titles("size of all matrices, MB", "KL from the original, nats a token"),
    ]
    if curves.get("all_counted") and curves.get("weights"):
        out += _bits_axis(plane, curves["weights"])
    out.append(line(((plane.px(x), plane.py(y)) for x, y in solid), "stroke:var(--allocated)"))
    if dashed:
        out.append(line(((plane.px(x), plane.py(y)) for x, y in dashed), "stroke:var(--rank0);stroke-dasharray:7 4"))
    points.sort(key=lambda row: list(MARKS).index(row["kind"]) if row.get("kind") in MARKS else -1)
    for row, at in zip(points, _label_heights(plane, points), strict=True):
        out += _point(plane, row, at)
    out.append(line([(left, bottom + 58), (left + 26, bottom + 58)], "stroke:var(--allocated)"))
    out.append(label("predicted, rank and bits", left + 32, bottom + 62))
    if dashed:
        out.append(line([(left + 206, bottom + 58), (left + 232, bottom + 58)], "stroke:var(--rank0);stroke-dasharray:7 4"))
        out.append(label("predicted, bits alone", left + 238, bottom + 62))
    if points:
        texts = sorted({str(row["on"]) for row in points if row.get("on")})
        legend = "marks: measured" + (f" on {' and '.join(texts)} text" if texts else "")
        out.append(label(legend, left, bottom + 76, "start", ""))
    return svg(out, "Predicted damage against size", WIDE, HIGH + 4)


def _drawable(curves: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    """(MB, damage) of a curve, as far down as damage can be seen."""
    corners = [(row["bytes"] / 1e6, row["damage"]) for row in rows_of(curves, key)]
    most = max((damage for _, damage in corners), default=0.0)
    return [(x, y) for x, y in corners if y >= FAINT * most]


def _bits_axis(plane: Plane, weights: int) -> list[str]:
    """Bits per weight along the top, which only a table of counted rows has."""
    left, top, right, _ = plane.box
    low, high = (8e6 * end / weights for end in plane.x)
    out = [label("bits per weight", (left + right) / 2, top - 24, "middle", "")]
    for value in ticks(low, high, count=7):
        x = plane.px(value * weights / 8e6)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 5}" y2="{top}"/>')
        out.append(label(f"{value:g}", x, top - 9, "middle", ""))
    return out


def _label_heights(plane: Plane, points: Sequence[Mapping[str, Any]]) -> list[float]:
    return apart([plane.py(row["kl"]) for row in points], 15, plane.box[1] + 8, plane.box[3] - 6)


def _point(plane: Plane, row: Mapping[str, Any], at: float) -> list[str]:
    """A mark, its label beside it at the height `at`, and a thin line between them where they are apart."""
    kind, x, y = str(row.get("kind")), plane.px(row["bytes"] / 1e6), plane.py(row["kl"])
    name = point_name(row)
    shown = name if len(name) <= 24 else name[:23] + "…"
    text, beside = f"{shown} {number(row['kl'])}", 11
    room = plane.box[2] - x - beside
    leftward = LETTER * 1.1 * len(text) > room and x - plane.box[0] > room
    text_x, anchor = (x - beside, "end") if leftward else (x + beside, "start")
    title = f"{name}: {size(row['bytes'])}, {bits(row.get('bits_per_weight'))} bits a weight, KL {number(row['kl'])}"
    out = [line([(x, y), (text_x, at)], "stroke-width:.8")] if abs(at - y) > 6 else []
    out.append(marker(MARKS.get(kind, "diamond"), x, y, kind if kind in MARKS else "other", RADIUS.get(kind, 6), title))
    return [*out, label(text, text_x, at + 4, anchor)]
