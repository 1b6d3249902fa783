"""The losses of an adaptation over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlr_jax.report.content.adapted import points_of
from qlr_jax.report.html.drawings.svg import Plane, label, line, marker, svg
from qlr_jax.report.words import number

POINTS = 160  # of the training's line; more than that is averaged, since a single step is mostly noise


def loss_curve(report: Mapping[str, Any]) -> str:
    """The loss of the training as a line, held-out losses as marks, over the steps of all phases; empty where there is none."""
    trained, held_out, starts = points_of(report)
    trained = _averaged(trained)
    xs, ys = [x for x, _ in trained + held_out], [y for _, y in trained + held_out]
    if len(set(xs)) < 2:
        return ""
    plane = Plane.around(xs, ys, log_y=min(ys) > 0 and max(ys) > 8 * min(ys))
    out = [*plane.grid(), *plane.titles("steps", "loss")]
    names = []  # drawn last, over the line
    for at, name in starts if len(starts) > 1 else []:
        x = plane.px(at)
        out.append(line([(x, plane.box[1]), (x, plane.box[3])], "stroke-dasharray:2 4;stroke-width:1"))
        text = name if len(name) * 7 < plane.box[2] - x - 4 else ""
        names.append(label(text, x + 4, plane.box[1] + 10))
    if len(trained) > 1:
        out.append(line(((plane.px(x), plane.py(y)) for x, y in trained), "stroke:var(--allocated)", "training"))
    for x, y in held_out:
        out.append(marker("diamond", plane.px(x), plane.py(y), "uniform", 4.5, f"held out, step {x}: {number(y)}"))
    return svg(out + names, "Loss on the training text and on held-out text")


def steps_a_point(points: Sequence[tuple[float, float]]) -> int:
    """How many steps of the training are averaged to one point of its line."""
    return math.ceil(len(points) / POINTS) or 1


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    each = steps_a_point(points)
    groups = [points[at : at + each] for at in range(0, len(points), each)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
