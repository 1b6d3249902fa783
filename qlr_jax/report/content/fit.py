"""Whether the model fits the device or the bytes named: what takes how much, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allocators.budget import FIXED
from qlr_jax.report.words import (
    MISSING,
    is_number,
    part_of,
    size,
)

HEADS = ("", "before", "after")
ADVICE = (
    "The budget was in bits per weight, so nothing here says whether the model fits a device: "
    "--budget device:8GiB,context=8192 would count weights, key-value cache and working memory against one."
)


@dataclass(frozen=True)
class Need:
    """What one model takes of the memory named.

    Attributes:
        parts: name -> bytes, the weights first.
        limit: bytes that there are.
        fits: whether they suffice.
    """

    parts: Mapping[str, float]
    limit: float
    fits: bool

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def free(self) -> float:
        """Bytes that stay free, below 0 where there are too few."""
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
            recorded = fit.get("fits") if key == "after" else None
            found[key] = Need(parts, limit, recorded if isinstance(recorded, bool) else sum(parts.values()) <= limit)
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


def advice(report: Mapping[str, Any]) -> str:
    """How to learn whether it fits a device, where the budget was in bits per weight; else empty."""
    return ADVICE if str(report.get("budget") or "").strip().lower().endswith("bpw") else ""


def fit_sentence(report: Mapping[str, Any]) -> str:
    """Whether it fits, by how much, and whether the original would; empty where nothing was named to fit into."""
    found, named = needs(report), memory_named(report)
    if "after" not in found:
        return ""
    after, before = found["after"], found.get("before")
    spare = f"{size(after.free)} stay free" if after.free >= 0 else f"{size(-after.free)} too many"
    out = f"It {'fits' if after.fits else 'does not fit'} {named}: {size(after.total)} are needed, {spare}."
    if before:
        verdict = "fits as well" if before.fits and after.fits else "fits" if before.fits else "does not fit"
        out += f" The original needs {size(before.total)} and {verdict}."
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
