"""The section of quality: perplexity, KL and agreement of the four models side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from allocators.strategies import DEFAULT, STRATEGIES
from qlr_jax.report.content.quality import (
    KL_UNIT,
    NOT_EVALUATED,
    controls_note,
    delivery_note,
    evaluated_on,
    figures,
    rank_paid,
    refined_line,
)
from qlr_jax.report.html.elements import meter, table
from qlr_jax.report.words import is_number, model_label, number, part_of, percent, sentence, times

HEADS = ("model", "perplexity", "KL held out", "KL cali\u00adbration", "same top token")


def quality_section(report: Mapping[str, Any]) -> str:
    """The section; KL also as bars, so that the models compare at a glance."""
    found = figures(report)
    heading = '<section id="quality"><h2>What quality was lost</h2>'
    if not found:
        return f'{heading}<p class="note">{NOT_EVALUATED}</p></section>'
    worst = max([value for row in found.values() for value in (row["kl"], row["calibration_kl"]) if is_number(value)], default=0)
    original = part_of(report, "perplexity").get("original")
    rows = [_row(key, row, report, original, worst or 1) for key, row in found.items()]
    out = [heading, table(HEADS, rows, chosen=[at for at, key in enumerate(found) if key == report.get("delivered")])]
    if verdict := rank_paid(report):
        out.append(f"<p><b>{escape(verdict)}</b></p>")
    if refined := refined_line(report):
        out.append(f"<p>{escape(sentence(refined))}</p>")
    out += [f'<p class="note">{escape(note)}</p>' for note in (delivery_note(report), controls_note(report)) if note]
    beside = [STRATEGIES[key] for key in found if key in STRATEGIES and key != DEFAULT]
    compared = " ".join(f"<i>{escape(strategy.label)}</i>: {escape(strategy.text)}." for strategy in beside)
    where = sentence(evaluated_on(report))
    out.append(f'<p class="soft">{escape(where)}{" " if where else ""}{KL_UNIT} {compared}</p></section>')
    return "".join(out)


def _row(key: str, row: Mapping[str, Any], report: Mapping[str, Any], original: Any, worst: float) -> list[str]:
    tag = ' <span class="tag">delivered</span>' if key == report.get("delivered") else ""
    cells = [f"{_breakable(model_label(key, report))}{tag}", number(row["perplexity"], 4)]
    if key == "original":
        return [*cells, "", "", ""]
    cells[1] += f" <small>{times(row['perplexity'], original)}</small>"
    bars = [f"{number(value)}{meter(value, worst, key)}" for value in (row["kl"], row["calibration_kl"])]
    return [*cells, *bars, percent(row["agreement"])]


def _breakable(label: str) -> str:
    """A model's name that may break between the parts of its spec, so that a phone's table has room for a long one."""
    return re.sub(r"([+/@])", r"<wbr>\1", escape(label))
