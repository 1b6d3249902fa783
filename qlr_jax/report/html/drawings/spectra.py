"""How low-rank the matrices are, as pictures: shares of the leading components by kind, and by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from qlr_jax.models.sites import sublayer_of
from qlr_jax.report.content.allocation import cumulative_shares, shares_by_kind
from qlr_jax.report.content.sensitivity import measured_matrices
from qlr_jax.report.html.drawings.svg import HEIGHT, WIDTH, Plane, apart, label, line, svg
from qlr_jax.report.html.style import RAMP
from qlr_jax.report.words import (
    kind_order,
)

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 196, 150, 2
RANKS = (0, 1, 4, 16, 64, 256, 1024)  # ticks on an axis of log(1 + rank)
# A line of its own for every kind, so that they can be distinguished without colour.
DASHES = {"q": "none", "k": "8 3", "v": "2 3", "o": "10 3 2 3", "gate": "none", "up": "6 2", "down": "1 3"}
OTHERS = "12 3 2 3 2 3"


def leading_shares(report: Mapping[str, Any]) -> str:
    """Share of the leading components in the energy, a line a kind; empty where no spectrum is known."""
    curves = shares_by_kind(report)
    if not curves:
        return ""
    most = max(len(curve) for curve in curves.values())
    plane = Plane((1, most), (0.0, 1.0), log_x=True, box=(52, 14, WIDTH - 54, HEIGHT - 44))
    ranks = [rank + 1 for rank in RANKS if rank < most]
    out = plane.grid(lambda x: f"{x - 1:g}", lambda share: f"{100 * share:.0f}%", ranks)
    out += plane.titles("leading components", "share of the energy")
    places = apart([plane.py(curve[-1]) for curve in curves.values()], 13, 18, HEIGHT - 50)
    below = HEIGHT + 14
    for at, ((kind, curve), y) in enumerate(zip(curves.items(), places, strict=True)):
        style = f"stroke:var(--{sublayer_of(kind)});stroke-dasharray:{DASHES.get(kind, OTHERS)}"
        style += ";stroke-width:3.5" if kind == "gate" else ""
        pixels = [(plane.px(rank + 1), plane.py(share)) for rank, share in enumerate(curve)]
        out.append(line(pixels, style, kind))
        out.append(line([pixels[-1], (plane.box[2] + 10, y)], "stroke-width:.7"))
        out.append(label(kind, plane.box[2] + 12, y + 4))
        x, row = 52 + 90 * (at % 4), below + 20 * (at // 4)  # which line is which, where many end close to each other
        out.append(line([(x, row), (x + 42, row)], style))
        out.append(label(kind, x + 48, row + 4, kind=""))
    height = below + 20 * ((len(curves) - 1) // 4) + 12
    return svg(out, "Share of the leading components in the energy, by kind of matrix", height=height)


def spectra(notes: Mapping[str, Any]) -> str:
    """Small multiples by kind: the share of tr(G W H Wᵀ) that r components leave, a line a layer; empty if unknown.

    The dashed line is the plain spectrum's, median over layers: the effect of the metric lies between.
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
    text = f"layers {layers[0]} to {layers[-1]}, in their metrics" if len(layers) > 1 else "in its metric"
    out.append(label(text, 42 + 14 * len(steps) + 6, bottom + 38, "start", ""))
    if any(plain.values()):
        out.append(line([(42, bottom + 54), (42 + 14 * len(steps), bottom + 54)], "stroke:var(--ink);stroke-dasharray:4 3"))
        out.append(label("of W alone, median of the layers", 42 + 14 * len(steps) + 6, bottom + 58, "start", ""))
    return svg(out, "Share left against rank, by kind of matrix", PANEL_WIDTH * COLUMNS, bottom + 68)


def _left(shares: Any) -> list[float]:
    """What 0, 1, 2, … components leave of the whole."""
    return [1 - taken for taken in cumulative_shares(shares)]


def _median_left(spectra_of: Sequence[Any]) -> list[float]:
    curves = [curve for curve in map(_left, spectra_of) if len(curve) > 1]
    return [median(values) for values in zip(*curves, strict=False)] if curves else []


def _along(plane: Plane, curve: Sequence[float]) -> list[tuple[float, float]]:
    """Pixels of a curve over log(1 + rank); of many ranks, those that can be distinguished."""
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
