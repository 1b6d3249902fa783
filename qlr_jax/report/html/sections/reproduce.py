"""The sections on how to make the same model again, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.report.content.reproduce import FOLDER, LOADING, commands, import_notes, recipe_text, recipe_title, versions


def again_sections(report: Mapping[str, Any]) -> str:
    """Commands, recipe and versions; under them the code that loads the folder."""
    out = []
    if typed := commands(report):
        out.append(f"<h3>Command</h3><pre>{escape(typed)}</pre>")
    if notes := import_notes(report):
        out.append("<h3>How the original was read</h3>" + "".join(f"<p>{escape(line)}</p>" for line in notes))
    if recipe := recipe_text(report):
        out.append(f"<h3>{escape(recipe_title(report))}</h3><pre>{escape(recipe)}</pre>")
    if found := versions(report):
        out.append(f"<h3>Versions</h3><p>{escape(found)}</p>")
    again = f'<section id="again"><h2>Do it again</h2>{"".join(out)}</section>' if out else ""
    loading = "".join(f"<h3>{escape(where)}</h3><pre>{escape(code)}</pre>" for where, code in LOADING)
    return f'{again}<section id="load"><h2>Load it</h2><p class="soft">{FOLDER}</p>{loading}</section>'
