"""Heat maps, layers × kinds of matrices: the damage at the probe, and the damage per squared relative error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qlr_jax.report.content.sensitivity import measured_matrices
from qlr_jax.report.html.drawings.svg import LETTER, label, svg
from qlr_jax.report.html.style import RAMP
from qlr_jax.report.words import (
    is_number,
    kind_of,
    kind_order,
    number,
    part_of,
    rows_of,
)

CELL_WIDTH, CELL_HEIGHT, SIDE, NARROW = 50, 23, 36, 392  # pixels; a phone shows so narrow a drawing at nearly its own size


def damage_map(notes: Mapping[str, Any]) -> str:
    """Layers × kinds: the damage at the probe; empty where none is known."""
    rows = measured_matrices(notes)
    specs = {str(part_of(row, "probe").get("spec")) for row in rows if part_of(row, "probe").get("spec")}
    return _heat(rows, "damage", f"damage at {specs.pop() if len(specs) == 1 else 'the probe'}", "nats a token")


def coefficient_map(notes: Mapping[str, Any]) -> str:
    """Layers × kinds: the damage of a whole relative error, which is what a solve's error² is multiplied by."""
    return _heat(measured_matrices(notes), "coefficient", "damage per squared relative error", "nats a token")


def sensitivity_map(report: Mapping[str, Any]) -> str:
    """Layers × kinds: predicted KL per unit of squared relative error; empty where it is not known."""
    facts = {
        str(row.get("name")): {"layer": row.get("layer"), "kind": kind_of(row), "coefficient": row.get("sensitivity")}
        for row in rows_of(report, "matrices")
    }
    return coefficient_map({"matrices": facts})


def _heat(rows: Sequence[Mapping[str, Any]], key: str, what: str, unit: str) -> str:
    placed = {(row["layer"], row["kind"]): row for row in rows if isinstance(row.get("layer"), int) and is_number(row.get(key))}
    if not placed:
        return ""
    kinds, layers = kind_order(kind for _, kind in placed), sorted({layer for layer, _ in placed})
    above = [row[key] for row in placed.values() if row[key] > 0] or [1.0]
    low, high = min(above), max(above)
    power = 3 * math.floor(math.log10(high) / 3)
    scale = f"· 10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))} " if power else ""
    out = [label(what, 0, 14), label("layer", 0, 38, "start", "")]
    out += [label(kind, SIDE + CELL_WIDTH * (at + 0.5), 38, "middle", "") for at, kind in enumerate(kinds)]
    for row, layer in enumerate(layers):
        top = 46 + CELL_HEIGHT * row
        out.append(label(str(layer), SIDE - 8, top + 15, "end", ""))
        for column, kind in enumerate(kinds):
            if (layer, kind) in placed:
                out.append(_cell(placed[layer, kind], key, SIDE + CELL_WIDTH * column, top, (low, high), 10.0**power))
    bottom = 46 + CELL_HEIGHT * len(layers) + 8
    ends_of = [_short(value / 10**power) for value in (low, high)]
    start = SIDE + LETTER * len(ends_of[0]) + 8
    out.append(label(ends_of[0], SIDE, bottom + 12, "start", ""))
    for at in range(len(RAMP)):
        out.append(f'<rect x="{start + 20 * at:.1f}" y="{bottom}" width="20" height="15" style="fill:var(--step{at})"/>')
    out.append(label(f"{ends_of[1]} {scale}{unit}", start + 20 * len(RAMP) + 8, bottom + 12, "start", ""))
    return svg(out, f"{what}, layers by kinds of matrices", max(SIDE + CELL_WIDTH * len(kinds) + 4, NARROW), bottom + 22)


def _cell(row: Mapping[str, Any], key: str, x: float, y: float, between: tuple[float, float], scale: float) -> str:
    at, title = _shade(row[key], *between), f"{row['name']}: {number(row[key])}"
    box = f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" rx="3" style="fill:var(--step{at})"/>'
    text = f'<text x="{x + CELL_WIDTH / 2}" y="{y + 15.5}" text-anchor="middle" style="fill:var(--letters{at})">'
    return f"<g><title>{escape(title)}</title>{box}{text}{escape(_short(row[key] / scale))}</text></g>"


def _shade(value: float, low: float, high: float) -> int:
    """The step of the ramp, by the logarithm where the values differ by much; what is not positive gets the first.

    >>> _shade(0.0, 1.0, 100.0), _shade(1.0, 1.0, 100.0), _shade(10.0, 1.0, 100.0), _shade(100.0, 1.0, 100.0)
    (0, 0, 3, 6)
    """
    if value <= 0 or high <= low:
        return 0 if value <= 0 else len(RAMP) // 2
    part = math.log(value / low) / math.log(high / low) if high > 8 * low else (value - low) / (high - low)
    return min(max(int(part * len(RAMP)), 0), len(RAMP) - 1)


def _short(value: float) -> str:
    """A number in the six letters that a cell has room for.

    >>> [_short(value) for value in (123.4, 12.34, 1.234, 0.1234, 0.00123, 0.0000123, 0.0, -1.5)]
    ['123', '12.3', '1.23', '0.12', '0.001', '<0.001', '0', '-1.50']
    """
    size = abs(value)
    if not value or size >= 0.0005:
        digits = 0 if size >= 100 or not value else 1 if size >= 10 else 2 if size >= 0.01 else 3
        return f"{value:.{digits}f}"
    return "<0.001" if value > 0 else "-0.000"
