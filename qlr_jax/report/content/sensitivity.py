"""What `qlr sensitivity` found of every matrix, in figures and sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.words import (
    MISSING,
    is_number,
    kind_of,
    kind_order,
    number,
    part_of,
    percent,
)

UNIT = "nats of KL a token"


def measured_matrices(notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices that a table's notes describe, each with its name, kind and the damage at its probe where that is known.

    >>> measured_matrices({"matrices": {"a.q_proj": {"layer": 0, "coefficient": 2.0, "probe": {"error": 0.1}}}})[0]["damage"]
    0.020000000000000004
    """
    found = []
    for name, facts in part_of(notes, "matrices").items():
        if isinstance(facts, Mapping):
            row = {"name": name} | dict(facts)
            found.append(row | {"kind": kind_of(row), "damage": _at_probe(row)})
    return found


def worst_matrix(notes: Mapping[str, Any]) -> str | None:
    """The name of the matrix with the largest damage at its probe; None where no damage is known."""
    known = [row for row in measured_matrices(notes) if is_number(row["damage"])]
    return max(known, key=lambda row: row["damage"])["name"] if known else None


def _at_probe(matrix: Mapping[str, Any]) -> float | None:
    """KL at the probe as it was measured, else coefficient · error²."""
    probe, coefficient = part_of(matrix, "probe"), matrix.get("coefficient")
    if is_number(probe.get("kl")):
        return probe["kl"]
    return coefficient * probe["error"] ** 2 if is_number(coefficient) and is_number(probe.get("error")) else None


def totals(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, float]]:
    """Summed damage by kind, in the order of a layer, or by layer, in the order of the model."""
    found: dict[Any, float] = defaultdict(float)
    for row in rows:
        if row.get(key) is not None:
            found[row[key]] += row["damage"]
    order = kind_order(found) if key == "kind" else sorted(found)
    return [(str(name), found[name]) for name in order]


def share(part: float, total: float) -> str:
    """A part of a damage in percent; a dash where there is no damage."""
    return percent(part / total) if total > 0 else MISSING


def probe_cells(row: Mapping[str, Any]) -> list[str]:
    """A matrix's probe, the error there, and its coefficient."""
    probe = part_of(row, "probe")
    return [str(probe.get("spec") or MISSING), number(probe.get("error")), number(row.get("coefficient"))]


def how_measured(notes: Mapping[str, Any], seconds: Any = None) -> list[str]:
    """How it was measured, how exact the predictions were, how long it took: a line each."""
    lines = [f"attribution: {notes['attribution']}"] if notes.get("attribution") else []
    quality = part_of(notes, "prediction")
    if is_number(quality.get("median")):
        spread = f", 10th to 90th percentile {number(quality.get('p10'))} to {number(quality.get('p90'))}"
        many = f", {quality['count']} solves" if is_number(quality.get("count")) else ""
        lines.append(f"solved error over predicted: median {number(quality['median'])}{spread}{many}")
    stages = {name: value for name, value in part_of(notes, "seconds").items() if is_number(value) and name != "total"}
    total = seconds if is_number(seconds) else part_of(notes, "seconds").get("total", sum(stages.values()) if stages else None)
    if is_number(total):
        spent = "; ".join(f"{name} {duration(value)}" for name, value in stages.items())
        lines.append(f"time: {duration(total)}" + (f" ({spent})" if spent else ""))
    return lines
