"""What was measured of every matrix, as inline SVG: heat maps of damage, decay of spectra, error against bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any

from qlr_jax.report.html.allocation import FULL
from qlr_jax.report.html.draw import LETTER, Plane, apart, label, line, marker, svg
from qlr_jax.report.html.style import RAMP
from qlr_jax.report.words import is_number, kind_of, kind_order, number, part_of

if TYPE_CHECKING:
    from allocators import OptionTable, Row

CELL_WIDTH, CELL_HEIGHT, SIDE, NARROW = 50, 23, 36, 392  # pixels; a phone shows so narrow a drawing at nearly its own size
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 196, 150, 2
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")  # lines that lie close are told apart by them
RANKS = (0, 1, 4, 16, 64, 256, 1024)  # ticks on an axis of log(1 + rank)


def measured_matrices(notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices that a table's notes tell of, each with its name, kind and the damage at its probe where that is known.

    >>> measured_matrices({"matrices": {"a.q_proj": {"layer": 0, "coefficient": 2.0, "probe": {"error": 0.1}}}})[0]["damage"]
    0.020000000000000004
    """
    found = []
    for name, facts in part_of(notes, "matrices").items():
        if isinstance(facts, Mapping):
            row = {"name": name} | dict(facts)
            found.append(row | {"kind": kind_of(row), "damage": _at_probe(row)})
    return found


def _at_probe(matrix: Mapping[str, Any]) -> float | None:
    """KL at the probe as it was measured, else coefficient · error²."""
    probe, coefficient = part_of(matrix, "probe"), matrix.get("coefficient")
    if is_number(probe.get("kl")):
        return probe["kl"]
    return coefficient * probe["error"] ** 2 if is_number(coefficient) and is_number(probe.get("error")) else None


def worst_matrix(notes: Mapping[str, Any]) -> str | None:
    """The name of the matrix with the largest damage at its probe; None where no damage is known."""
    known = [row for row in measured_matrices(notes) if is_number(row["damage"])]
    return max(known, key=lambda row: row["damage"])["name"] if known else None


def damage_map(notes: Mapping[str, Any]) -> str:
    """Layers × kinds: the damage at the probe; empty where none is known."""
    rows = measured_matrices(notes)
    specs = {str(part_of(row, "probe").get("spec")) for row in rows if part_of(row, "probe").get("spec")}
    return _heat(rows, "damage", f"damage at {specs.pop() if len(specs) == 1 else 'the probe'}", "nats a token")


def coefficient_map(notes: Mapping[str, Any]) -> str:
    """Layers × kinds: the damage of a whole relative error, which is what a solve's error² is multiplied by."""
    return _heat(measured_matrices(notes), "coefficient", "damage per squared relative error", "nats a token")


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


def spectra(notes: Mapping[str, Any]) -> str:
    """Small multiples by kind: the share of ‖W‖² in the data's metric that r components leave, a line a layer; empty if unknown.

    The dashed line is the plain spectrum's, median over layers: what data-awareness adds lies between.
    """
    rows = [row for row in measured_matrices(notes) if len(_left(row.get("spectrum"))) > 1]
    if not rows:
        return ""
    kinds = kind_order(row["kind"] for row in rows)
    layers = sorted({row["layer"] for row in rows if isinstance(row.get("layer"), int)})
    plain = {kind: _median_left([row.get("plain_spectrum") for row in rows if row["kind"] == kind]) for kind in kinds}
    curves = [_left(row["spectrum"]) for row in rows] + [curve for curve in plain.values() if curve]
    least = math.floor(10 * min(curve[-1] for curve in curves) + 1e-9) / 10
    most = max(len(curve) for curve in curves)
    out = []
    for at, kind in enumerate(kinds):
        left, top = PANEL_WIDTH * (at % COLUMNS), PANEL_HEIGHT * (at // COLUMNS)
        box = (left + 42, top + 24, left + PANEL_WIDTH - 8, top + PANEL_HEIGHT - 22)
        plane = Plane((1, most), (min(least, 0.9), 1.0), log_x=True, box=box)
        out.append(label(kind, left + 42, top + 15))
        ranks = [rank + 1 for rank in RANKS if rank < most]
        shares = [low / 10 for low in range(round(10 * plane.y[0]), 11, 1 if plane.y[0] > 0.55 else 2)]
        out += plane.grid(lambda value: f"{value - 1:g}", lambda value: f"{100 * value:.0f}%", ranks, shares)
        for row in sorted((row for row in rows if row["kind"] == kind), key=lambda row: str(row.get("layer")).zfill(6)):
            style = f"stroke:var(--step{_layer_step(row.get('layer'), layers)});stroke-width:1.5"
            out.append(line(_along(plane, _left(row["spectrum"])), style, f"{row['name']}: {_half(row['spectrum'])}"))
        if plain[kind]:
            out.append(line(_along(plane, plain[kind]), "stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3"))
    bottom = PANEL_HEIGHT * math.ceil(len(kinds) / COLUMNS)
    out.append(label("share left (up) after so many components (across)", 42, bottom + 16, "start", ""))
    steps = sorted({_layer_step(layer, layers) for layer in layers}) or [4]
    for at, step in enumerate(steps):
        out.append(f'<rect x="{42 + 14 * at}" y="{bottom + 31}" width="14" height="4" style="fill:var(--step{step})"/>')
    said = f"layers {layers[0]} to {layers[-1]}, felt by the data" if len(layers) > 1 else "felt by the data"
    out.append(label(said, 42 + 14 * len(steps) + 6, bottom + 38, "start", ""))
    if any(plain.values()):
        out.append(line([(42, bottom + 54), (42 + 14 * len(steps), bottom + 54)], "stroke:var(--ink);stroke-dasharray:4 3"))
        out.append(label("of W alone, median of the layers", 42 + 14 * len(steps) + 6, bottom + 58, "start", ""))
    return svg(out, "Share left against rank, by kind of matrix", PANEL_WIDTH * COLUMNS, bottom + 68)


def _left(shares: Any) -> list[float]:
    """What 0, 1, 2, … components leave of the whole."""
    if not isinstance(shares, Sequence) or isinstance(shares, str) or not all(is_number(share) for share in shares):
        return []
    return [max(1 - taken, 0.0) for taken in accumulate(shares, initial=0.0)]


def _median_left(spectra_of: Sequence[Any]) -> list[float]:
    curves = [curve for curve in map(_left, spectra_of) if len(curve) > 1]
    return [median(values) for values in zip(*curves, strict=False)] if curves else []


def _along(plane: Plane, curve: Sequence[float]) -> list[tuple[float, float]]:
    """Pixels of a curve over log(1 + rank); of many ranks, those that can be told apart."""
    ranks = [rank for rank in range(len(curve)) if rank < 24 or rank % math.ceil(rank / 24) == 0 or rank == len(curve) - 1]
    return [(plane.px(rank + 1), plane.py(curve[rank])) for rank in ranks]


def _half(shares: Sequence[float]) -> str:
    """The rank that takes half of the whole, in words."""
    curve = _left(shares)
    rank = next((rank for rank, left in enumerate(curve) if left <= 0.5), None)
    return f"{len(curve) - 1} components leave {100 * curve[-1]:.0f} %" if rank is None else f"half is in {rank} components"


def _layer_step(layer: Any, layers: Sequence[int]) -> int:
    """Early layers lighter, late ones darker; the palest steps, which vanish on the page, are left out."""
    if layer not in layers or len(layers) < 2:
        return 4
    return 2 + round((len(RAMP) - 3) * layers.index(layer) / (len(layers) - 1))


def error_bits(table: OptionTable, matrix: str | None = None) -> str:
    """Relative error against stored bits per weight of one matrix, a line a rank; empty where its coefficient is not known.

        error(option) = √(damage(option) / coefficient)

    Of options of the same rank (backbones, grids of the factors) the line is the least error at so many bits.

    table   with ``notes["matrices"][name]["coefficient"]``
    matrix  the matrix's name; the one of the largest damage at its probe where not given
    """
    name = matrix or worst_matrix(table.notes)
    coefficient = part_of(table.notes, "matrices", name or "").get("coefficient")
    if name is None or name not in table.index or not is_number(coefficient) or coefficient <= 0:
        return ""
    lines = {rank: curve for rank, curve in _by_rank(table[name], coefficient).items() if curve}
    if not lines:
        return ""
    width, height, right = 460, 320, 50
    xs = [bits for curve in lines.values() for bits, _, _ in curve]
    ys = [error for curve in lines.values() for _, error, _ in curve]
    log = max(ys) > 4 * min(ys)
    plane = Plane.around(xs, ys, log_y=log, box=(52, 28, width - right, height - 44))
    out = [label(_ending(name, width - 56), 52, 16), *plane.grid(), *plane.titles("bits per weight, as stored", "relative error")]
    where = apart([plane.py(curve[-1][1]) for curve in lines.values()], 13, 34, height - 50)
    for at, ((rank, curve), y) in enumerate(zip(lines.items(), where, strict=True)):
        shade = 2 + round(4 * at / max(len(lines) - 1, 1))
        style = f"stroke:var(--step{shade});stroke-width:1.8;stroke-dasharray:{DASHES[at % len(DASHES)] or 'none'}"
        pixels = [(plane.px(x), plane.py(error)) for x, error, _ in curve]
        out.append(line(pixels, style, f"rank {rank}"))
        out.append(line([pixels[-1], (width - right + 4, y)], "stroke-width:.7"))
        out.append(label(f"rank {rank}" if at == 0 and rank == 0 else f"r{rank}", width - right + 6, y + 4))
        for x, error, spec in curve:
            if spec:
                said = f"{spec}: {number(x)} bits, error {number(error)}, measured"
                out.append(marker("circle", plane.px(x), plane.py(error), "uniform", 4, said))
    return svg(out, f"Relative error against bits per weight of {name}", width, height)


def _by_rank(row: Row, coefficient: float) -> dict[int, list[tuple[float, float, str]]]:
    """Rank -> (bits, least error so far, spec if measured), bits rising; what is stored as it was is left out."""
    best: dict[int, list[tuple[float, float, str]]] = {}
    for option in sorted(row.options, key=lambda option: (option.rank or 0, option.bytes, option.damage)):
        if option.damage <= 0 or row.bits(option) >= FULL:
            continue
        curve = best.setdefault(option.rank or 0, [])
        error = math.sqrt(option.damage / coefficient)
        if not curve or error < curve[-1][1]:
            curve.append((row.bits(option), error, option.spec if option.measured else ""))
    return best


def _ending(name: str, width: float) -> str:
    """The end of a name, as much as so many pixels hold."""
    letters = int(width / LETTER / 1.1)
    return name if len(name) <= letters else "…" + name[-letters + 1 :]
