"""A finished job as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.content.allocation import rank_line, vocabulary_line
from qlr_jax.report.content.quality import controls_note, delivery_note, evaluated_on, predicted, rank_paid, refined_line
from qlr_jax.report.content.reproduce import import_notes
from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import (
    MODELS,
    bits,
    is_number,
    model_label,
    number,
    part_of,
    percent,
    rows_of,
    size,
    times,
)


def summary(report: Mapping[str, Any]) -> str:
    """What a finished job did, in about fifteen lines: bits as stored, sizes, perplexities, KL, where the ranks went."""
    before, after = (part_of(report, "bytes").get(key) for key in ("before", "after"))
    matrices = rows_of(report, "matrices")
    lines = [
        f"{bits(report.get('bits_per_weight'))} bits per weight as stored"
        + (f", of a budget of {report['budget']}" if report.get("budget") else "")
        + f"; the whole model {bits(report.get('whole_model_bits_per_weight'))}",
        f"size: {size(before)} before, {size(after)} after"
        + (f" ({before / after:.2f} times smaller)" if is_number(before) and is_number(after) and after else ""),
        "",
        comparison(report),
        "",
        *[line for line in (rank_paid(report), refined_line(report), vocabulary_line(matrices)) if line],
        rank_line(matrices),
        *import_notes(report),
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
    lines += [note for note in (delivery_note(report), controls_note(report)) if note]
    return "\n".join(lines)
