"""Size before and after, by part: two stacked bars at one scale, and the numbers under them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.report.words import KINDS, MISSING, is_number, part_of, percent, rows_of, size

FAMILIES = {**dict.fromkeys(KINDS[:4], "attention"), **dict.fromkeys(KINDS[4:], "mlp"), "embeddings": "other", "head": "other"}


def size_section(report: Mapping[str, Any]) -> str:
    """The section of sizes; empty where the report holds no parts."""
    parts = [part for part in rows_of(report, "bytes", "parts") if any(is_number(part.get(key)) for key in ("before", "after"))]
    total = part_of(report, "bytes")
    if not parts:
        return ""
    full = max(sum(part[key] for part in parts if is_number(part.get(key))) for key in ("before", "after")) or 1
    out = ['<section id="size"><h2>Size before and after</h2>']
    for key in ("before", "after"):
        out.append(f"<small>{key}: {size(total.get(key))}</small>")
        out.append(f'<div class="stack" role="img" aria-label="{key}: {size(total.get(key))}">')
        out += [_segment(part, key, full) for part in parts]
        out.append("</div>")
    heads = "".join(f"<th>{head}</th>" for head in ("part", "before", "after", "after / before"))
    out.append(f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>')
    for part in [*parts, {"part": "total", **total}]:
        before, after = part.get("before"), part.get("after")
        ratio = percent(after / before) if is_number(before) and is_number(after) and before else MISSING
        name = str(part.get("part"))
        key = f'<i class="key" style="background:var(--{_family(name)})"></i>' if name != "total" else ""
        row = ' class="chosen"' if name == "total" else ""
        out.append(f"<tr{row}><td>{key}{escape(name)}</td><td>{size(before)}</td><td>{size(after)}</td><td>{ratio}</td></tr>")
    out.append("</tbody></table></div></section>")
    return "".join(out)


def _family(name: str) -> str:
    return FAMILIES.get(name.removesuffix("_proj"), "rest")


def _segment(part: Mapping[str, Any], key: str, full: float) -> str:
    value = part.get(key)
    if not is_number(value) or value <= 0:
        return ""
    name, share = str(part.get("part")), 100 * value / full
    label = escape(name) if share > 2 * len(name) + 1.2 else ""  # as a phone's width has room for
    title = escape(f"{name}: {size(value)}")
    return f'<i style="width:{share:.2f}%;background:var(--{_family(name)})" title="{title}">{label}</i>'
