"""How much memory is saved: sizes by part, and what the bytes mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.words import MISSING, is_number, part_of, percent, rows_of, size

HEADS = ("part", "before", "after", "after / before")
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
    """Part, before, after, after over before; the total last. Empty where the report has no sizes."""
    total, parts = part_of(report, "bytes"), known_parts(report)
    rows = [*parts, {"part": "total", **total}] if parts or any(is_number(total.get(key)) for key in ("before", "after")) else []
    return [(str(row.get("part")), size(row.get("before")), size(row.get("after")), _ratio(row)) for row in rows]


def known_parts(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of the model whose size before or after is known."""
    return [part for part in rows_of(report, "bytes", "parts") if any(is_number(part.get(key)) for key in ("before", "after"))]


def _ratio(row: Mapping[str, Any]) -> str:
    before, after = row.get("before"), row.get("after")
    return percent(after / before) if is_number(before) and is_number(after) and before else MISSING
