"""The section of an adaptation: what it won back, and its losses as a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.report.content.adapted import HEADS, adapted_rows, how_line, points_of, won_sentence
from qlr_jax.report.html.drawings.loss import loss_curve, steps_a_point
from qlr_jax.report.html.elements import captioned, table
from qlr_jax.report.words import part_of, sentence


def adapted_section(report: Mapping[str, Any]) -> str:
    """The section; empty where the model was not adapted."""
    found, rows, drawing = part_of(report, "adapted"), adapted_rows(report), loss_curve(report)
    if not found:
        return ""
    out = ['<section id="adapted"><h2>What adaptation won back</h2>']
    if won := won_sentence(report):
        out.append(f"<p><b>{escape(won)}</b></p>")
    if rows:
        out.append(table(HEADS, [[escape(cell) for cell in row] for row in rows]))
    if found.get("verdict"):
        out.append(f"<p>{escape(str(found['verdict']))}</p>")
    if how := how_line(report):
        out.append(f'<p class="soft">{escape(sentence(how))}</p>')
    if drawing:
        trained, _, starts = points_of(report)
        averaged = f"; a point is the mean of {each} steps" if (each := steps_a_point(trained)) > 1 else ""
        caption = f"Line: loss on the text trained on{averaged}. Marks: loss on held-out text; the best state there was kept."
        if len(starts) > 1:
            caption += f" Dotted: where a phase begins ({', then '.join(name for _, name in starts)})."
        out.append(captioned(drawing, caption))
    return "".join(out) + "</section>"
