"""What is proved of the allocation and what is not, and how well its predictions were met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qlr_jax.report.content.quality import predicted
from qlr_jax.report.words import (
    MODELS,
    delivered_key,
    is_number,
    model_label,
    number,
    part_of,
)


def certificate(report: Mapping[str, Any]) -> list[str]:
    """What is proved of the allocation and what is not, a sentence each; empty where its predicted damage is not known.

    >>> certificate({"allocation": {"damage": 0.1, "bound": 0.0999, "gap": 0.001}})[0]
    'Proved: no choice among the options offered within these bytes does less predicted damage by more than 0.1 %.'
    """
    found = part_of(report, "allocation")
    damage, bound, gap = (found.get(key) for key in ("damage", "bound", "gap"))
    if not is_number(damage):
        return []
    if not is_number(gap):
        return [
            f"Nothing is proved of what was delivered: its predicted damage is {number(damage)}, and no bound was computed for it."
        ]
    out = [
        "Proved: no choice among the options offered within these bytes does less predicted damage by more than "
        f"{100 * max(gap, 1e-6):.2g} %."  # the solver's own arithmetic is no finer
    ]
    if is_number(bound):
        out.append(f"Predicted damage {number(damage, 4)}, lower bound {number(bound, 4)}.")
    measured = part_of(report, "calibration_kl").get(delivered_key(report))
    found_at = f": measured on the calibration text it is {number(measured)}" if is_number(measured) else ""
    out.append(
        f"Not proved: that the damage is what was predicted{found_at}. A prediction adds up a term for each matrix and is not a "
        "measurement; and options that were not offered may be better."
    )
    return out


def predictions_line(report: Mapping[str, Any]) -> str:
    """KL on the calibration text, predicted and measured, of every model of which both are known; empty where none is."""
    measured = part_of(report, "calibration_kl")
    pairs = [
        f"{model_label(key, report)} {number(predicted(report, key))} → {number(measured[key])}"
        for key in MODELS
        if is_number(predicted(report, key)) and is_number(measured.get(key))
    ]
    return f"KL on the calibration text, predicted before any solve → measured: {', '.join(pairs)}." if pairs else ""


def final_error(matrix: Mapping[str, Any]) -> Any:
    """The relative error of a solve in the metric in which it was predicted: weighted by the outputs where they were weighted."""
    weighted = matrix.get("felt_error")
    return matrix.get("relative_error") if weighted is None else weighted


def median_ratio(matrices: Iterable[Mapping[str, Any]]) -> float | None:
    """The median over matrices of final relative error over predicted, None where neither is known."""
    ratios = sorted(
        final_error(matrix) / matrix["predicted_error"]
        for matrix in matrices
        if is_number(final_error(matrix)) and is_number(matrix.get("predicted_error")) and matrix["predicted_error"] > 0
    )
    half = len(ratios) // 2
    return (ratios[half] if len(ratios) % 2 else (ratios[half - 1] + ratios[half]) / 2) if ratios else None
