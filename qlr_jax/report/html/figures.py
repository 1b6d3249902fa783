"""What is proved and what is not: the certificate, damage against size, predicted against final error (inline SVG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from allocators.strategies import STRATEGIES, solved_strategies
from qlr_jax.models.sites import sublayer_of
from qlr_jax.report.html.draw import WIDTH, Plane, figure, label, line, marker, pair, svg
from qlr_jax.report.words import (
    MODELS,
    delivered_key,
    final_error,
    is_number,
    kind_of,
    median_ratio,
    model_label,
    number,
    part_of,
    predicted,
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
        pair = matrix.get("predicted_error"), final_error(matrix)
        if all(is_number(value) and value > 0 for value in pair):
            found.append((*pair, matrix))
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


def certificate(report: Mapping[str, Any]) -> list[str]:
    """What is proved of the allocation and what is not, a sentence each; empty where its predicted damage is not known.

    >>> certificate({"allocation": {"damage": 0.1, "bound": 0.0999, "gap": 0.001}})[0]
    'Proved: no choice among the options offered within these bytes does less predicted damage by more than 0.1 %.'
    """
    found = part_of(report, "allocation")
    damage, bound, gap = (found.get(key) for key in ("damage", "bound", "gap"))
    if not is_number(damage):
        return []
    if not is_number(gap):
        return [
            f"Nothing is proved of what was delivered: its predicted damage is {number(damage)}, and no bound was computed for it."
        ]
    out = [
        "Proved: no choice among the options offered within these bytes does less predicted damage by more than "
        f"{100 * max(gap, 1e-6):.2g} %."  # the solver's own arithmetic is no finer
    ]
    if is_number(bound):
        out.append(f"Predicted damage {number(damage, 4)}, lower bound {number(bound, 4)}.")
    measured = part_of(report, "calibration_kl").get(delivered_key(report))
    told = f": measured on the calibration text it is {number(measured)}" if is_number(measured) else ""
    out.append(
        f"Not proved: that the damage is what was predicted{told}. A prediction adds up a term for each matrix and is not a "
        "measurement; and options that were not offered may be better."
    )
    return out


def predictions_line(report: Mapping[str, Any]) -> str:
    """KL on the calibration text, predicted and measured, of every model of which both are known; empty where none is."""
    measured = part_of(report, "calibration_kl")
    pairs = [
        f"{model_label(key, report)} {number(predicted(report, key))} → {number(measured[key])}"
        for key in MODELS
        if is_number(predicted(report, key)) and is_number(measured.get(key))
    ]
    return f"KL on the calibration text, predicted before any solve → measured: {', '.join(pairs)}." if pairs else ""


def proof_section(report: Mapping[str, Any]) -> str:
    """The certificate; under it damage against size, and predicted against final error, side by side where there is room."""
    out = []
    said, told = certificate(report), predictions_line(report)
    if said or told:
        lines = [f"<p><b>{escape(said[0])}</b></p>" if said else "", f"<p>{escape(' '.join(said[1:]))}</p>" if said[1:] else ""]
        lines.append(f"<p>{escape(told)}</p>" if told else "")
        out.append(f'<section id="certificate"><h2>What is proved</h2>{"".join(lines)}</section>')
    marks = ", ".join(f"{MARKS[name]} {STRATEGIES[name].label}" for name in reversed(MARKS))
    damage = f"Line: the least predicted damage at every size. Marks: {marks}."
    errors = (
        "One mark a matrix (circle attention, square MLP); on the dashed line the prediction was exact. "
        f"Final over predicted, median: {number(median_ratio(rows_of(report, 'matrices')))}."
    )
    drawn = [
        figure("frontier", "Damage against size", size_damage(report), damage),
        figure("prediction", "Predicted and final error", predicted_final(report), errors),
    ]
    return "".join([*out, pair(drawn)])


def _near(curve: list[tuple[float, float]], sizes: Sequence[float]) -> list[tuple[float, float]]:
    """The part of the curve where the marks can still be told apart: from 0.75 to 1.5 times their sizes."""
    return [(x, y) for x, y in curve if 0.75 * min(sizes) <= x <= 1.5 * max(sizes)]


def _drawable(row: Mapping[str, Any]) -> bool:
    return is_number(row.get("bytes")) and is_number(row.get("damage"))
