"""Whether the model fits the device or the bytes named: what takes how much, before and after, as bars and as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from qlr_jax.report.words import MISSING, is_number, part_of, size

FIXED = "norms and other fixed tensors"  # stored with the weights and counted there
CLASSES = {"weights": "weights", "key-value cache": "cache", "working allowance": "work"}  # their patterns in the style sheet
SHORT = {"key-value cache": "cache", "working allowance": "allowance"}
ADVICE = (
    "The budget was in bits per weight, so nothing here says whether the model fits a device: "
    "--budget device:8GiB,context=8192 would count weights, key-value cache and working memory against one."
)


@dataclass(frozen=True)
class Need:
    """What one model takes of the memory named.

    parts   name -> bytes, the weights first
    limit   bytes that there are
    fits    whether they suffice
    """

    parts: Mapping[str, float]
    limit: float
    fits: bool

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def free(self) -> float:
        return self.limit - self.total


def needs(report: Mapping[str, Any]) -> dict[str, Need]:
    """What the original ("before") and the compressed model ("after") take; empty where no device or size was named.

    >>> found = needs({"fit": {"items": {"device": 100, "key-value cache": -30}, "weights": 20}, "bytes": {"before": 80}})
    >>> [(key, need.total, need.free, need.fits) for key, need in found.items()]
    [('before', 110, -10, False), ('after', 50, 50, True)]
    """
    fit, items = part_of(report, "fit"), part_of(report, "fit", "items")
    limit = next((items[key] for key in ("device", "budget") if is_number(items.get(key))), None)
    if limit is None or limit <= 0:
        return {}
    taken = {name: -value for name, value in items.items() if name not in ("device", "budget", FIXED) and is_number(value)}
    stored_now = fit.get("weights") if is_number(fit.get("weights")) else part_of(report, "bytes").get("after")
    weights = {"before": part_of(report, "bytes").get("before"), "after": stored_now}
    found = {}
    for key, stored in weights.items():
        if is_number(stored):
            parts = {"weights": stored} | taken
            told = fit.get("fits") if key == "after" else None
            found[key] = Need(parts, limit, told if isinstance(told, bool) else sum(parts.values()) <= limit)
    return found


def memory_named(report: Mapping[str, Any]) -> str:
    """The memory that was named, in words; empty where none was.

    >>> memory_named({"fit": {"budget": "device:8GiB,context=8192,batch=1,kv=bf16", "items": {"device": 2**33}}})
    'the device of 8GiB (8.59 GB), with a context of 8,192 tokens, batch 1, cache in bf16'
    """
    items, budget = part_of(report, "fit", "items"), str(part_of(report, "fit").get("budget") or "")
    if not is_number(items.get("device")):
        return f"the budget of {size(items['budget'])}" if is_number(items.get("budget")) else ""
    named, *settings = budget.removeprefix("device:").split(",")
    given = {}
    for setting in settings:
        name, _, value = setting.strip().partition("=")
        given[name] = value
    context = given.get("context", "")
    words = [f"a context of {int(context):,} tokens"] if context.isdecimal() else []
    words += [f"batch {given['batch']}"] if given.get("batch") else []
    words += [f"cache in {given['kv']}"] if given.get("kv") else []
    device = f"the device of {named} ({size(items['device'])})" if named else f"the device of {size(items['device'])}"
    return device + (f", with {', '.join(words)}" if words else "")


def fit_sentence(report: Mapping[str, Any]) -> str:
    """Whether it fits, by how much, and whether the original would; empty where nothing was named to fit into."""
    found, named = needs(report), memory_named(report)
    if "after" not in found:
        return ""
    after, before = found["after"], found.get("before")
    spare = f"{size(after.free)} stay free" if after.free >= 0 else f"{size(-after.free)} too many"
    out = f"It {'fits' if after.fits else 'does not fit'} {named}: {size(after.total)} are needed, {spare}."
    if before:
        says = "fits as well" if before.fits and after.fits else "fits" if before.fits else "does not fit"
        out += f" The original needs {size(before.total)} and {says}."
    if report.get("target") == "adapter":
        out += " The given backbone is not among these weights: its bytes, which its maker knows, come on top."
    return out


def fit_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Part, before, after: what is needed, what there is, what stays free (below 0: too many bytes)."""
    found = needs(report)
    names = list(dict.fromkeys(name for need in found.values() for name in need.parts))
    cells = {name: {key: size(need.parts.get(name)) for key, need in found.items()} for name in names}
    if len(names) > 1:
        cells["needed"] = {key: size(need.total) for key, need in found.items()}
    cells["there is"] = {key: size(need.limit) for key, need in found.items()}
    cells["free"] = {key: size(need.free) if need.free >= 0 else f"−{size(-need.free)}" for key, need in found.items()}
    return [(name, row.get("before", MISSING), row.get("after", MISSING)) for name, row in cells.items()] if found else []


def fit_section(report: Mapping[str, Any]) -> str:
    """The section: a sentence, a bar before and after at one scale, the numbers. For bits per weight, a line of advice."""
    found = needs(report)
    if not found:
        is_bits = str(report.get("budget") or "").strip().lower().endswith("bpw")
        return f'<p class="soft" id="fit">{escape(ADVICE)}</p>' if is_bits else ""
    out = ['<section id="fit"><h2>Does it fit?</h2>']
    if sentence := fit_sentence(report):
        out.append(f"<p><b>{escape(sentence)}</b></p>")
    full = max([need.total for need in found.values()] + [need.limit for need in found.values()])
    for key, need in found.items():
        says = f"{key}: {size(need.total)} of {size(need.limit)}, {'fits' if need.fits else 'does not fit'}"
        out.append(f'<small>{escape(says)}</small><div class="fit" role="img" aria-label="{escape(says)}">{_bar(need, full)}</div>')
    over = any(need.total > need.limit for need in found.values())
    if over:
        limit = size(next(iter(found.values())).limit)
        out.append(f'<p class="soft">The dashed line is where the memory ends, at {limit}.</p>')
    heads = "".join(f"<th>{head}</th>" for head in ("", "before", "after"))
    out.append(f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>')
    for name, before, after in fit_rows(report):
        kind = CLASSES.get(name) or ("free" if name == "free" else "")
        key = f'<i class="key {kind}"></i>' if kind else ""
        row = ' class="chosen"' if name in ("needed", "free") else ""
        out.append(f"<tr{row}><td>{key}{escape(name)}</td><td>{before}</td><td>{after}</td></tr>")
    out.append("</tbody></table></div>")
    out.append(f'<p class="soft">Weights are all that is stored, {FIXED} too.{_allowance(found)}</p></section>')
    return "".join(out)


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
