"""Why bits and rank went where they went: how sensitive every matrix is, and how low-rank the matrices really are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from qlr_jax.models.sites import sublayer_of
from qlr_jax.report.html.draw import HEIGHT, WIDTH, Plane, apart, figure, label, line, pair, svg
from qlr_jax.report.html.sensitivity_figures import RANKS, coefficient_map
from qlr_jax.report.words import is_number, kind_of, kind_order, number, part_of, percent, rank_of, rows_of

# A line of its own for every kind, so that they are told apart without colour.
DASHES = {"q": "none", "k": "8 3", "v": "2 3", "o": "10 3 2 3", "gate": "none", "up": "6 2", "down": "1 3"}
OTHERS = "12 3 2 3 2 3"
LEADING = 8  # components that the text speaks of: about the rank that an allocation gives where it gives any


def held(shares: Any) -> list[float]:
    """What 0, 1, 2, … leading components hold of the whole; empty where the shares are not known.

    >>> held([0.5, 0.25])
    [0.0, 0.5, 0.75]
    """
    if not isinstance(shares, list | tuple) or not shares or not all(is_number(share) for share in shares):
        return []
    return [min(part, 1.0) for part in accumulate(shares, initial=0.0)]


def held_by_kind(report: Mapping[str, Any]) -> dict[str, list[float]]:
    """The median of `held` over the layers, for every kind of matrix."""
    kinds = {str(row.get("name")): kind_of(row) for row in rows_of(report, "matrices")}
    found: dict[str, list[list[float]]] = {}
    for name, shares in part_of(report, "spectra").items():
        if curve := held(shares):
            found.setdefault(kinds.get(name) or kind_of({"name": name}), []).append(curve)
    return {kind: [median(values) for values in zip(*found[kind], strict=False)] for kind in kind_order(found)}


def spectra_line(report: Mapping[str, Any]) -> str:
    """How much the leading components of each kind hold, in a sentence; empty where no spectrum is known."""
    curves = held_by_kind(report)
    if not curves:
        return ""
    at = min(LEADING, *(len(curve) - 1 for curve in curves.values()))
    told = ", ".join(f"{kind} {percent(curve[at])}" for kind, curve in curves.items())
    many = "the leading component holds" if at == 1 else f"{at} leading components hold"
    return f"Of the energy that the data feel, {many} (median over layers): {told}."


def decay(report: Mapping[str, Any]) -> str:
    """Share of the energy that so many leading components hold, a line a kind; empty where no spectrum is known."""
    curves = held_by_kind(report)
    if not curves:
        return ""
    most = max(len(curve) for curve in curves.values())
    plane = Plane((1, most), (0.0, 1.0), log_x=True, box=(52, 14, WIDTH - 54, HEIGHT - 44))
    ranks = [rank + 1 for rank in RANKS if rank < most]
    out = plane.grid(lambda x: f"{x - 1:g}", lambda share: f"{100 * share:.0f}%", ranks)
    out += plane.titles("leading components", "share of the energy held")
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
    return svg(out, "Share of the energy held by the leading components, by kind of matrix", height=height)


def sensitivity_map(report: Mapping[str, Any]) -> str:
    """Layers × kinds: predicted KL per unit of squared relative error; empty where it is not known."""
    facts = {
        str(row.get("name")): {"layer": row.get("layer"), "kind": kind_of(row), "coefficient": row.get("sensitivity")}
        for row in rows_of(report, "matrices")
    }
    return coefficient_map({"matrices": facts})


def why_section(report: Mapping[str, Any]) -> str:
    """Sensitivity and decay side by side where there is room; empty where neither is known."""
    sensitive = "The KL for each unit of squared relative error: where it is large, an error costs most, so bits belong there."
    low = (
        f"{spectra_line(report)} Where a line rises at once, a few components carry the matrix and rank is cheap; "
        "a line that rises slowly leaves L R little to take."
    )
    return pair(
        [
            figure("sensitivity", "Why: how sensitive every matrix is", sensitivity_map(report), sensitive),
            figure("spectra", "Why: how low-rank the matrices are", decay(report), low),
        ]
    )


def kind_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Kind, bits per weight, largest rank, median sensitivity, share held by the leading components: the figures in numbers."""
    matrices, curves = rows_of(report, "matrices"), held_by_kind(report)
    rows = []
    for kind in kind_order([kind_of(row) for row in matrices if row.get("spec")]):
        here = [row for row in matrices if kind_of(row) == kind and row.get("spec")]
        curve = curves.get(kind, [])
        share = percent(curve[min(LEADING, len(curve) - 1)] if curve else None)
        ranks = sorted(rank_of(row["spec"]) for row in here)
        rank = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        rows.append((kind, number(_mean_bits(here)), rank, number(_median([row.get("sensitivity") for row in here])), share))
    return rows


def _mean_bits(matrices: Sequence[Mapping[str, Any]]) -> float | None:
    """Bits per weight of these matrices together, as many of them as say both; of one kind all are of one shape."""
    known = [row["bits"] for row in matrices if is_number(row.get("bits"))]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return median(known) if known else None
