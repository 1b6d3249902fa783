"""The section of sizes: before and after by part, as two stacked bars at one scale and in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.models.sites import SITES
from qlr_jax.report.content.sizes import HEADS, known_parts, size_rows, target_note
from qlr_jax.report.html.elements import table
from qlr_jax.report.words import is_number, part_of, size

COLOURS = {**{site.kind: site.sublayer for site in SITES}, "embeddings": "other", "head": "other"}


def size_section(report: Mapping[str, Any]) -> str:
    """The section; empty where the report has no parts."""
    parts, total = known_parts(report), part_of(report, "bytes")
    if not parts:
        return ""
    full = max(sum(part[key] for part in parts if is_number(part.get(key))) for key in ("before", "after")) or 1
    out = ['<section id="size"><h2>How much memory is saved</h2>']
    for key in ("before", "after"):
        out.append(f"<small>{key}: {size(total.get(key))}</small>")
        out.append(f'<div class="stack" role="img" aria-label="{key}: {size(total.get(key))}">')
        out += [_segment(part, key, full) for part in parts]
        out.append("</div>")
    found = size_rows(report)
    out.append(table(HEADS, [(_key(name) + escape(name), *cells) for name, *cells in found], chosen=[len(found) - 1]))
    if note := target_note(report):
        out.append(f'<p class="note">{escape(note)}</p>')
    return "".join(out) + "</section>"


def _key(name: str) -> str:
    return "" if name == "total" else f'<i class="key" style="background:var(--{_colour(name)})"></i>'


def _colour(name: str) -> str:
    return COLOURS.get(name.removesuffix("_proj"), "rest")


def _segment(part: Mapping[str, Any], key: str, full: float) -> str:
    value = part.get(key)
    if not is_number(value) or value <= 0:
        return ""
    name, share = str(part.get("part")), 100 * value / full
    label = escape(name) if share > 2 * len(name) + 1.2 else ""  # as a phone's width has room for
    title = escape(f"{name}: {size(value)}")
    return f'<i style="width:{share:.2f}%;background:var(--{_colour(name)})" title="{title}">{label}</i>'
