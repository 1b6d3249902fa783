"""The section of what the job cost: time by stage, peak memory, device."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.content.running import machine_line, stage_rows
from qlr_jax.report.html.elements import meter, table
from qlr_jax.report.words import sentence


def running_section(report: Mapping[str, Any]) -> str:
    """The section; empty where nothing of it is known."""
    rows, machine = stage_rows(report), sentence(machine_line(report))
    if not rows and not machine:
        return ""
    out = ['<section id="cost"><h2>What it cost</h2>' + (f"<p>{escape(machine)}</p>" if machine else "")]
    if rows:
        longest = max(value for _, value in rows) or 1
        cells = [(escape(name), duration(value), meter(value, longest, "rest")) for name, value in rows]
        out.append(table(("stage", "time", ""), cells))
    return "".join(out) + "</section>"
