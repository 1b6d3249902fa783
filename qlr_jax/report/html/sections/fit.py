"""The section of memory: whether the model fits the device or the bytes named, as bars and in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.report.content.fit import FIXED, HEADS, Need, advice, fit_rows, fit_sentence, needs
from qlr_jax.report.html.elements import table
from qlr_jax.report.words import size

CLASSES = {"weights": "weights", "key-value cache": "cache", "working allowance": "work"}  # their patterns in the style sheet
SHORT = {"key-value cache": "cache", "working allowance": "allowance"}


def fit_section(report: Mapping[str, Any]) -> str:
    """The section: a sentence, a bar before and after at one scale, the numbers. For bits per weight, a line of advice."""
    found = needs(report)
    if not found:
        return f'<p class="soft" id="fit">{escape(text)}</p>' if (text := advice(report)) else ""
    out = ['<section id="fit"><h2>Does it fit?</h2>']
    if sentence := fit_sentence(report):
        out.append(f"<p><b>{escape(sentence)}</b></p>")
    full = max([need.total for need in found.values()] + [need.limit for need in found.values()])
    for key, need in found.items():
        text = f"{key}: {size(need.total)} of {size(need.limit)}, {'fits' if need.fits else 'does not fit'}"
        out.append(f'<small>{escape(text)}</small><div class="fit" role="img" aria-label="{escape(text)}">{_bar(need, full)}</div>')
    if any(need.total > need.limit for need in found.values()):
        limit = size(next(iter(found.values())).limit)
        out.append(f'<p class="soft">The dashed line is where the memory ends, at {limit}.</p>')
    rows = fit_rows(report)
    chosen = [at for at, row in enumerate(rows) if row[0] in ("needed", "free")]
    out.append(table(HEADS, [(_key(name) + escape(name), *cells) for name, *cells in rows], chosen))
    out.append(f'<p class="soft">Weights are all that is stored, {FIXED} too.{_allowance(found)}</p></section>')
    return "".join(out)


def _key(name: str) -> str:
    kind = CLASSES.get(name) or ("free" if name == "free" else "")
    return f'<i class="key {kind}"></i>' if kind else ""


def _allowance(found: Mapping[str, Need]) -> str:
    shown = any("working allowance" in need.parts for need in found.values())
    return " The working allowance is for activations, buffers and the runtime: an assumption, not measured." if shown else ""


def _bar(need: Need, full: float) -> str:
    """The parts from left to right, then what is free, and where the memory ends."""
    out, at = [], 0.0
    for name, value in [*need.parts.items(), ("free", max(need.free, 0.0))]:
        share = 100 * value / full
        if share > 0:
            kind, short = CLASSES.get(name, "free" if name == "free" else "work"), SHORT.get(name, name)
            room = (share - 1.2) / 2  # letters that a phone's width has room for
            text = next((text for text in (f"{short} {size(value)}", short) if len(text) <= room), "")
            title = escape(f"{name}: {size(value)}")
            out.append(f'<i class="{kind}" style="left:{at:.2f}%;width:{share:.2f}%" title="{title}">{escape(text)}</i>')
        at += share
    if full > need.limit:
        out.append(f'<b style="left:{100 * need.limit / full:.2f}%"></b>')
    return "".join(out)
