"""Size before and after, by part: two stacked bars at one scale, and the numbers under them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.models.sites import SITES
from qlr_jax.report.words import MISSING, is_number, part_of, percent, rows_of, size

COLOURS = {**{site.kind: site.sublayer for site in SITES}, "embeddings": "other", "head": "other"}
ADAPTER = "low-rank factors are counted as an adapter in bf16 beside them."
NOTES = {
    "gguf": f"Bytes are those of GGUF blocks, as llama.cpp reads them; {ADAPTER}",
    "compressed-tensors": f"Bytes are those of compressed-tensors, packed integer codes and their scales; {ADAPTER}",
    "adapter": "Bits per weight count the factors L and R alone: the backbone was given, and its bytes are its maker's. "
    "In the sizes of the whole model 16 bits a weight stand for it.",
}


def target_note(report: Mapping[str, Any]) -> str:
    """What the bytes mean where they are not those of the packed folder; else empty.

    >>> target_note({"target": "qlr"}), target_note({"target": "new"})
    ('', 'Bytes are those of the target new.')
    """
    target = str(report.get("target") or "qlr")
    return "" if target == "qlr" else NOTES.get(target, f"Bytes are those of the target {target}.")


def size_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Part, before, after, after over before; the total last. Empty where the report holds no sizes."""
    total, parts = part_of(report, "bytes"), _parts(report)
    rows = [*parts, {"part": "total", **total}] if parts or any(is_number(total.get(key)) for key in ("before", "after")) else []
    return [(str(row.get("part")), size(row.get("before")), size(row.get("after")), _ratio(row)) for row in rows]


def size_section(report: Mapping[str, Any]) -> str:
    """The section of sizes; empty where the report holds no parts."""
    parts, total = _parts(report), part_of(report, "bytes")
    if not parts:
        return ""
    full = max(sum(part[key] for part in parts if is_number(part.get(key))) for key in ("before", "after")) or 1
    out = ['<section id="size"><h2>How much memory is saved</h2>']
    for key in ("before", "after"):
        out.append(f"<small>{key}: {size(total.get(key))}</small>")
        out.append(f'<div class="stack" role="img" aria-label="{key}: {size(total.get(key))}">')
        out += [_segment(part, key, full) for part in parts]
        out.append("</div>")
    heads = "".join(f"<th>{head}</th>" for head in ("part", "before", "after", "after / before"))
    out.append(f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>')
    for name, before, after, ratio in size_rows(report):
        key = f'<i class="key" style="background:var(--{_family(name)})"></i>' if name != "total" else ""
        row = ' class="chosen"' if name == "total" else ""
        out.append(f"<tr{row}><td>{key}{escape(name)}</td><td>{before}</td><td>{after}</td><td>{ratio}</td></tr>")
    out.append("</tbody></table></div>")
    if note := target_note(report):
        out.append(f'<p class="note">{escape(note)}</p>')
    return "".join(out) + "</section>"


def _parts(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in rows_of(report, "bytes", "parts") if any(is_number(part.get(key)) for key in ("before", "after"))]


def _ratio(row: Mapping[str, Any]) -> str:
    before, after = row.get("before"), row.get("after")
    return percent(after / before) if is_number(before) and is_number(after) and before else MISSING


def _family(name: str) -> str:
    return COLOURS.get(name.removesuffix("_proj"), "rest")


def _segment(part: Mapping[str, Any], key: str, full: float) -> str:
    value = part.get(key)
    if not is_number(value) or value <= 0:
        return ""
    name, share = str(part.get("part")), 100 * value / full
    label = escape(name) if share > 2 * len(name) + 1.2 else ""  # as a phone's width has room for
    title = escape(f"{name}: {size(value)}")
    return f'<i style="width:{share:.2f}%;background:var(--{_family(name)})" title="{title}">{label}</i>'
