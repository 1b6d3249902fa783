"""The section on what is proved and what is not, with the predictions as drawings."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from allocators.strategies import STRATEGIES
from qlr_jax.report.content.proof import certificate, median_ratio, predictions_line
from qlr_jax.report.html.drawings.predictions import MARKS, predicted_final, size_damage
from qlr_jax.report.html.elements import figure, pair
from qlr_jax.report.words import (
    number,
    rows_of,
)


def proof_section(report: Mapping[str, Any]) -> str:
    """The certificate; under it damage against size, and predicted against final error, side by side where there is room."""
    out = []
    proved, predictions = certificate(report), predictions_line(report)
    if proved or predictions:
        first, rest = "".join(proved[:1]), " ".join(proved[1:])
        lines = [f"<p><b>{escape(first)}</b></p>" if first else ""]
        lines += [f"<p>{escape(text)}</p>" for text in (rest, predictions) if text]
        out.append(f'<section id="certificate"><h2>What is proved</h2>{"".join(lines)}</section>')
    marks = ", ".join(f"{MARKS[name]} {STRATEGIES[name].label}" for name in reversed(MARKS))
    damage = f"Line: the least predicted damage at every size. Marks: {marks}."
    errors = (
        "One mark a matrix (circle attention, square MLP); on the dashed line the prediction was exact. "
        f"Final over predicted, median: {number(median_ratio(rows_of(report, 'matrices')))}."
    )
    drawings = [
        figure("frontier", "Damage against size", size_damage(report), damage),
        figure("prediction", "Predicted and final error", predicted_final(report), errors),
    ]
    return "".join([*out, pair(drawings)])
