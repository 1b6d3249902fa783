"""A finished job and a folder's inside as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allocators.strategies import BASELINE, DEFAULT, solved_strategies
from qlr_jax.progress import duration
from qlr_jax.report.words import (
    MISSING,
    MODELS,
    bits,
    is_number,
    kind_of,
    model_label,
    number,
    part_of,
    percent,
    predicted,
    rank_line,
    rank_paid,
    refined_line,
    rows_of,
    size,
    strategy_of,
    times,
    was_asked,
)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text columns: the first to the left, the others to the right.

    >>> print(columns(["model", "KL"], [["uniform", "0.2"]]))
    model     KL
    uniform  0.2
    """
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]])
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def summary(report: Mapping[str, Any]) -> str:
    """What a finished job did, in about fifteen lines: bits as stored, sizes, perplexities, KL, where the ranks went."""
    before, after = (part_of(report, "bytes").get(key) for key in ("before", "after"))
    lines = [
        f"{bits(report.get('bits_per_weight'))} bits per weight as stored"
        + (f", of a budget of {report['budget']}" if report.get("budget") else "")
        + f"; the whole model {bits(report.get('whole_model_bits_per_weight'))}",
        f"size: {size(before)} before, {size(after)} after"
        + (f" ({before / after:.2f} times smaller)" if is_number(before) and is_number(after) and after else ""),
        "",
        comparison(report),
        "",
        *[line for line in (rank_paid(report), refined_line(report)) if line],
        rank_line(rows_of(report, "matrices")),
    ]
    seconds, memory = part_of(report, "seconds").get("total"), report.get("peak_rss_bytes")
    if is_number(seconds):
        lines.append(f"time: {duration(seconds)}" + (f"; peak memory {size(memory)}" if is_number(memory) else ""))
    return "\n".join(lines)


def comparison(report: Mapping[str, Any]) -> str:
    """Perplexity, its ratio to the original's, KL measured and predicted, agreement of all models of a job, one row each."""
    rows, delivered = [], report.get("delivered")
    original = part_of(report, "perplexity").get("original")
    for key in MODELS:
        here = [part_of(report, name).get(key) for name in ("perplexity", "kl", "calibration_kl", "agreement")]
        if all(value is None for value in here):
            continue
        base = key == "original"
        rows.append(
            [
                model_label(key, report) + (" *" if key == delivered else ""),
                number(here[0], 4),
                "" if base else times(here[0], original),
                "" if base else number(here[1]),
                "" if base else number(here[2]),
                "" if base else number(predicted(report, key)),
                "" if base else percent(here[3]),
            ]
        )
    if not rows:
        return "not evaluated: perplexity and KL are not known"
    lines = [columns(["model", "perplexity", "ratio", "KL", "calib. KL", "predicted", "same top"], rows)]
    if delivered:
        lines.append(f"* delivered{', ' + evaluated_on(report) if evaluated_on(report) else ''}")
    lines.append("KL in nats a token, held out and on the calibration text; predicted: of the latter, before anything was solved")
    if note := delivery_note(report):
        lines.append(note)
    return "\n".join(lines)


def delivery_note(report: Mapping[str, Any]) -> str:
    """A sentence where a strategy was asked for, or another model than the allocated one was delivered; else empty."""
    key, kl = report.get("delivered"), part_of(report, "calibration_kl")
    if key == DEFAULT and was_asked(report):
        strategy, found = strategy_of(report, key), [kl.get(name) for name in (DEFAULT, BASELINE)]
        above = all(map(is_number, found)) and found[0] > found[1]
        more = f"; its KL on the calibration text is above that of {model_label(BASELINE, report)}" if above else ""
        return f"Delivered as asked for: {strategy.label}, {strategy.text}{more}."
    if key not in solved_strategies() or key == DEFAULT:
        return ""
    name = model_label(key, report)
    return f"The allocation's KL on the calibration text was above that of {name}, so {name} is what was delivered."


def evaluated_on(report: Mapping[str, Any]) -> str:
    """What a job was evaluated on, in a few words; empty where that is not known."""
    about = part_of(report, "evaluation")
    words = []
    if is_number(about.get("tokens")):
        words.append(f"{about['tokens']:,} tokens")
    if about.get("text"):
        words.append(f"of {about['text']}")
    if is_number(about.get("window")):
        words.append(f"in windows of {about['window']}")
    return "measured on " + " ".join(words) if words else ""


def inspection(result: Mapping[str, Any]) -> str:
    """What is inside a compressed folder: one line a matrix, then the totals."""
    matrices = rows_of(result, "matrices")
    rows = [
        [
            str(matrix.get("name") or kind_of(matrix)),
            str(matrix.get("spec") or MISSING),
            " × ".join(str(side) for side in matrix.get("shape") or ()) or MISSING,
            size(matrix.get("bytes")),
            bits(matrix.get("bits")),
        ]
        for matrix in matrices
    ]
    lines = [columns(["matrix", "spec", "shape", "stored", "bits a weight"], rows)] if rows else ["no compressed matrix"]
    if rows:
        lines.append(rank_line(matrices))
    for key, value in {**result, **part_of(result, "totals")}.items():
        if is_number(value):
            shown = size(value) if "bytes" in key else bits(value) if "bits" in key else f"{value:,}"
            lines.append(f"{key.replace('_', ' ')}: {shown}")
        elif isinstance(value, str):
            lines.append(f"{key.replace('_', ' ')}: {value}")
    return "\n".join(lines)
