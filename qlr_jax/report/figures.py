"""The two drawings of a report as inline SVG: damage against size, and predicted against final error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from qlr_jax.report.words import is_number, kind_of, model_label, number, part_of, rows_of, short_spec, size

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
MARKS = {"allocated": "circle", "uniform": "square", "rank0": "triangle"}


def marker(shape: str, x: float, y: float, colour: str, radius: float = 5.5, title: str = "") -> str:
    """A mark with the page's colour as outline; shapes differ so that they are told apart without colour."""
    style = f'class="mark" style="fill:var(--{colour})"'
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {style}>{inner}</circle>'
    if shape == "square":
        side = 1.8 * radius
        return f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}" {style}>{inner}</rect>'
    points = ((0, -1.2), (1.1, 0.85), (-1.1, 0.85)) if shape == "triangle" else ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))
    path = " ".join(f"{x + a * radius:.1f},{y + b * radius:.1f}" for a, b in points)
    return f'<polygon points="{path}" {style}>{inner}</polygon>'


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers within [low, high]; on a log scale 1, 2, 5 times powers of ten.

    >>> ticks(0.0, 10.0), ticks(0.01, 1.0, log=True)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.01, 0.1, 1.0])
    """
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            values = (float(f"{step}e{power}") for power in powers for step in steps)
            found = [value for value in values if low <= value <= high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 8)]
    slack = 1e-9 * (high - low)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [round(at * step, 12) for at in range(math.ceil((low - slack) / step), math.floor((high + slack) / step) + 1)]


class _Plane:
    """Data to pixels, with gridlines, ticks and axis titles."""

    def __init__(self, x: Sequence[float], y: Sequence[float], log_x: bool = False, log_y: bool = False):
        self.x, self.y, self.log_x, self.log_y = self._range(x, log_x), self._range(y, log_y), log_x, log_y

    @staticmethod
    def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
        low, high = min(values), max(values)
        if log:
            stretch = max((high / low) ** 0.06, 1.08)
            return low / stretch, high * stretch
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin

    @staticmethod
    def _at(value: float, ends: tuple[float, float], log: bool) -> float:
        low, high = ends
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    def px(self, value: float) -> float:
        return LEFT + self._at(value, self.x, self.log_x) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - self._at(value, self.y, self.log_y) * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_title: str, y_title: str, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> list[str]:
        out = []
        for value in ticks(*self.y, log=self.log_y):
            y = self.py(value)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(y_text(value))}</text>')
        for value in ticks(*self.x, log=self.log_x):
            x = self.px(value)
            out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(x_text(value))}</text>')
        out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        out.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
        return out


def _svg(parts: list[str], says: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(says)}">{"".join(parts)}</svg>'


def size_damage(report: Mapping[str, Any]) -> str:
    """The frontier's curve with the allocated, uniform and rank-0 models as marks; empty where nothing is known."""
    curve = sorted((row["bytes"], row["damage"]) for row in rows_of(report, "frontier") if _drawable(row))
    points = {key: row for key in MARKS if _drawable(row := part_of(report, "points", key))}
    if points and len(near := _near(curve, [row["bytes"] for row in points.values()])) > 1:
        curve = near
    if len(curve) + len(points) < 2:
        return ""
    xs = [x / 1e6 for x, _ in curve] + [row["bytes"] / 1e6 for row in points.values()]
    ys = [y for _, y in curve] + [row["damage"] for row in points.values()]
    log = min(ys) > 0 and max(ys) > 8 * min(ys)
    plane = _Plane(xs, ys, log_y=log)
    out = plane.frame("size of all compressed matrices, MB", "predicted damage", lambda v: f"{v:g}", lambda v: f"{v:g}")
    if curve:
        path = " ".join(f"{plane.px(x / 1e6):.1f},{plane.py(y):.1f}" for x, y in curve)
        out.append(f'<polyline class="curve" points="{path}"/>')
    placed: list[float] = []
    for key, row in sorted(points.items(), key=lambda item: item[1]["damage"]):
        x, y = plane.px(row["bytes"] / 1e6), plane.py(row["damage"])
        title = f"{model_label(key, report)}: {size(row['bytes'])}, damage {number(row['damage'])}"
        at = min([y + 4, *[other - 16 for other in placed]])  # labels keep 16 pixels apart, upward in order of damage
        placed.append(at)
        left = x > 0.62 * WIDTH
        text_x, anchor = (x - 11, "end") if left else (x + 11, "start")
        label = f"{model_label(key, report)} {number(row['damage'])}"
        out.append(marker(MARKS[key], x, y, key, 6, title))
        out.append(f'<text class="label" x="{text_x:.1f}" y="{at:.1f}" text-anchor="{anchor}">{escape(label)}</text>')
    return _svg(out, "Predicted damage against size")


def predicted_final(report: Mapping[str, Any]) -> str:
    """Final against predicted relative error, one mark a matrix, with the line where both are equal; empty where not known."""
    found = []
    for matrix in rows_of(report, "matrices"):
        pair = matrix.get("predicted_error"), matrix.get("relative_error")
        if all(is_number(value) and value > 0 for value in pair):
            found.append((*pair, matrix))
    if not found:
        return ""
    both = [value for predicted, final, _ in found for value in (predicted, final)]
    plane = _Plane(both, both, log_x=True, log_y=True)
    out = plane.frame("predicted relative error", "final relative error", lambda v: f"{v:g}", lambda v: f"{v:g}")
    low, high = plane.x
    line = f'x1="{plane.px(low):.1f}" y1="{plane.py(low):.1f}" x2="{plane.px(high):.1f}" y2="{plane.py(high):.1f}"'
    out.append(f'<line class="curve" style="stroke-dasharray:5 4;stroke-width:1.5" {line}/>')
    for predicted, final, matrix in found:
        shape, colour = ("circle", "attention") if kind_of(matrix) in "qkvo" else ("square", "mlp")
        name = f"{matrix.get('name', kind_of(matrix))} {short_spec(matrix.get('spec'))}"
        title = f"{name}: predicted {number(predicted)}, final {number(final)}"
        out.append(marker(shape, plane.px(predicted), plane.py(final), colour, 4.5, title))
    return _svg(out, "Final against predicted relative error")


def _near(curve: list[tuple[float, float]], sizes: Sequence[float]) -> list[tuple[float, float]]:
    """The part of the curve where the marks can still be told apart: from 0.75 to 1.5 times their sizes."""
    return [(x, y) for x, y in curve if 0.75 * min(sizes) <= x <= 1.5 * max(sizes)]


def _drawable(row: Mapping[str, Any]) -> bool:
    return is_number(row.get("bytes")) and is_number(row.get("damage"))
