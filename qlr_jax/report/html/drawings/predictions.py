"""Predictions as pictures: damage against size with the models that were built, final against predicted error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allocators.strategies import solved_strategies
from qlr_jax.models.sites import sublayer_of
from qlr_jax.report.content.proof import final_error
from qlr_jax.report.html.drawings.svg import WIDTH, Plane, label, line, marker, svg
from qlr_jax.report.words import (
    is_number,
    kind_of,
    model_label,
    number,
    part_of,
    rows_of,
    short_spec,
    size,
)

_SHAPES = zip(solved_strategies(), ("circle", "square", "triangle", "diamond"), (4.5, 6, 8.5, 11), strict=False)
_DRAWN = list(_SHAPES)[::-1]  # the first candidate last, on top
MARKS = {name: shape for name, shape, _ in _DRAWN}
RADIUS = {name: radius for name, _, radius in _DRAWN}  # they differ, so that one on the other is seen to be two


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
    plane = Plane.around(xs, ys, log_y=min(ys) > 0 and max(ys) > 8 * min(ys))
    out = [*plane.grid(), *plane.titles("size of all compressed matrices, MB", "predicted damage")]
    if curve:
        out.append(line((plane.px(x / 1e6), plane.py(y)) for x, y in curve))
    placed: list[float] = []
    for key, row in points.items():
        title = f"{model_label(key, report)}: {size(row['bytes'])}, damage {number(row['damage'])}"
        out.append(marker(MARKS[key], plane.px(row["bytes"] / 1e6), plane.py(row["damage"]), key, RADIUS[key], title))
    for key, row in sorted(points.items(), key=lambda item: item[1]["damage"]):
        x, y = plane.px(row["bytes"] / 1e6), plane.py(row["damage"])
        at = min([y + 4, *[other - 16 for other in placed]])  # labels keep 16 pixels apart, upward in order of damage
        placed.append(at)
        text_x, anchor = (x - 11, "end") if x > 0.62 * WIDTH else (x + 11, "start")
        out.append(label(f"{model_label(key, report)} {number(row['damage'])}", text_x, at, anchor))
    return svg(out, "Predicted damage against size")


def predicted_final(report: Mapping[str, Any]) -> str:
    """Final against predicted relative error, one mark a matrix, with the line where both are equal; empty where not known."""
    found = []
    for matrix in rows_of(report, "matrices"):
        errors = matrix.get("predicted_error"), final_error(matrix)
        if all(is_number(value) and value > 0 for value in errors):
            found.append((*errors, matrix))
    if not found:
        return ""
    both = [value for guess, final, _ in found for value in (guess, final)]
    plane = Plane.around(both, both, log_x=True, log_y=True)
    out = [*plane.grid(), *plane.titles("predicted relative error", "final relative error")]
    out.append(line([(plane.px(end), plane.py(end)) for end in plane.x], "stroke-dasharray:5 4;stroke-width:1.5"))
    for guess, final, matrix in found:
        colour = sublayer_of(kind_of(matrix))
        shape = "circle" if colour == "attention" else "square"
        name = f"{matrix.get('name', kind_of(matrix))} {short_spec(matrix.get('spec'))}"
        title = f"{name}: predicted {number(guess)}, final {number(final)}"
        out.append(marker(shape, plane.px(guess), plane.py(final), colour, 4.5, title))
    return svg(out, "Final against predicted relative error")


def _near(curve: list[tuple[float, float]], sizes: Sequence[float]) -> list[tuple[float, float]]:
    """The part of the curve where the marks can still be distinguished: from 0.75 to 1.5 times their sizes."""
    return [(x, y) for x, y in curve if 0.75 * min(sizes) <= x <= 1.5 * max(sizes)]


def _drawable(row: Mapping[str, Any]) -> bool:
    return is_number(row.get("bytes")) and is_number(row.get("damage"))
