"""report.html: one self-contained page of a finished job, its figures drawn here, no script and nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.content.adapted import won_back
from qlr_jax.report.content.fit import needs
from qlr_jax.report.content.reproduce import compressed_as
from qlr_jax.report.html.elements import document, header
from qlr_jax.report.html.sections.adapted import adapted_section
from qlr_jax.report.html.sections.allocation import allocation_section
from qlr_jax.report.html.sections.fit import fit_section
from qlr_jax.report.html.sections.proof import proof_section
from qlr_jax.report.html.sections.quality import quality_section
from qlr_jax.report.html.sections.reproduce import again_sections
from qlr_jax.report.html.sections.running import running_section
from qlr_jax.report.html.sections.sizes import size_section
from qlr_jax.report.html.sections.why import why_section
from qlr_jax.report.words import bits, delivered_key, is_number, model_name, number, part_of, percent, size, times


def report_html(report: Mapping[str, Any]) -> str:
    """A page of `report` (the content of report.json), in the order in which one who decides asks.

    Memory saved, whether it fits, quality lost, what adaptation won back, what it cost, where bits and rank went and why, what is
    proved, how to make it again and load it. Whatever is missing or null is left out or shown as a dash.

    Example:
        >>> report_html({"bits_per_weight": 2.25}).startswith("<!doctype html>")
        True
    """
    sections = [
        _header(report),
        size_section(report),
        fit_section(report),
        quality_section(report),
        adapted_section(report),
        running_section(report),
        allocation_section(report),
        why_section(report),
        proof_section(report),
        again_sections(report),
    ]
    return document(f"{model_name(report)} at {bits(report.get('bits_per_weight'))} bits per weight", sections)


def _header(report: Mapping[str, Any]) -> str:
    budget = f" Budget: {report['budget']}." if report.get("budget") else ""
    text = f"Compressed by qlr-jax as W ≈ Q + L R, {compressed_as(report)}.{budget}"
    return header(model_name(report), text, [*_size_tiles(report), *_quality_tiles(report)])


def _size_tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after = (part_of(report, "bytes").get(key) for key in ("before", "after"))
    smaller = f", {before / after:.2f} times smaller" if is_number(before) and is_number(after) and after else ""
    counted = "of the factors alone" if report.get("target") == "adapter" else "as stored"
    whole = f"bits per weight {counted}; whole model {bits(report.get('whole_model_bits_per_weight'))}"
    tiles = [(size(after), f"before: {size(before)}{smaller}"), (bits(report.get("bits_per_weight")), whole)]
    if need := needs(report).get("after"):
        tiles.append(("fits" if need.fits else "too large", f"{size(need.total)} needed of {size(need.limit)}"))
    return tiles


def _quality_tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    chosen, perplexities = delivered_key(report), part_of(report, "perplexity")
    original, perplexity = perplexities.get("original"), perplexities.get(chosen)
    compared = "perplexity: no held-out text was given"
    if is_number(original):
        compared = f"perplexity; original {number(original, 4)}, {times(perplexity, original)}"
    kl, text = part_of(report, "kl").get(chosen), "held out"
    if not is_number(kl):
        kl, text = part_of(report, "calibration_kl").get(chosen), "on the calibration text"
    tiles = [(number(perplexity, 4), compared), (number(kl), f"KL from the original, nats a token, {text}")]
    if is_number(share := won_back(report)):
        tiles.append((percent(max(share, 0.0)), "of its KL won back by adaptation"))
    return tiles
