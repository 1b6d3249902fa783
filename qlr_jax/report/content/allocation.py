"""Where bits and rank went and why: ranks by kind, how sensitive the matrices are, how low-rank they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from qlr_jax.report.words import (
    MISSING,
    bits,
    is_number,
    kind_of,
    kind_order,
    number,
    part_of,
    percent,
    rank_of,
    rows_of,
    shape_of,
    size,
)

LEADING = 8  # components that the text speaks of: about the rank that an allocation gives where it gives any
KIND_HEADS = ("kind", "bits per weight", "rank", "relative error", "upper bound", "sensitivity", f"share of {LEADING} components")
ERRORS = ("relative error", "upper bound", "predicted error", "predicted damage")
MATRIX_HEADS = ("matrix", "shape", "spec", "stored", "bits per weight", *ERRORS)
REASONS = 3  # that a line names, the most frequent ones
FULL = 12.0  # matrices of so many bits a weight and more were left as they are: they do not stretch the scales


def rank_line(matrices: Iterable[Mapping[str, Any]]) -> str:
    """Where the ranks went, in one line.

    >>> rank_line([{"kind": "q", "spec": "trellis-2+r8@trellis-4"}, {"kind": "v", "spec": "trellis-3"}])
    'ranks: 1 of 2 matrices: q 1 of 1 (r8); none for v'
    """
    matrices = [matrix for matrix in matrices if matrix.get("spec")]
    counts = Counter(kind_of(matrix) for matrix in matrices)
    ranked = Counter((kind_of(matrix), rank_of(matrix["spec"])) for matrix in matrices if rank_of(matrix["spec"]))
    if not matrices:
        return "ranks: not known"
    if not ranked:
        return f"ranks: none; all {len(matrices)} matrices are stored without L R"
    with_rank, without = [], []
    for kind in kind_order(counts):
        ranks = sorted(rank for name, rank in ranked if name == kind)
        if not ranks:
            without.append(kind)
            continue
        which = ", ".join(f"r{rank}" + (f" ×{ranked[kind, rank]}" if len(ranks) > 1 else "") for rank in ranks)
        with_rank.append(f"{kind} {sum(ranked[kind, rank] for rank in ranks)} of {counts[kind]} ({which})")
    line = f"ranks: {sum(ranked.values())} of {len(matrices)} matrices: {', '.join(with_rank)}"
    return line + (f"; none for {', '.join(without)}" if without else "")


def vocabulary_line(matrices: Iterable[Mapping[str, Any]]) -> str:
    """How embedding and head are stored, in one line; empty where the budget did not count them.

    >>> vocabulary_line([{"kind": "embedding", "spec": "int-4g32", "bits": 4.5, "bytes": 36900}, {"kind": "q", "spec": "int-3"}])
    'embedding: int-4g32, 4.50 bits per weight, 36.9 kB'
    """
    own = [matrix for matrix in matrices if kind_of(matrix) in ("embedding", "head") and matrix.get("spec")]
    return "; ".join(f"{kind_of(m)}: {m['spec']}, {bits(m.get('bits'))} bits per weight, {size(m.get('bytes'))}" for m in own)


def cumulative_shares(shares: Any) -> list[float]:
    """The part of the whole that 0, 1, 2, … leading components take; empty where the shares are not known.

    >>> cumulative_shares([0.5, 0.25])
    [0.0, 0.5, 0.75]
    """
    if not isinstance(shares, list | tuple) or not shares or not all(is_number(share) for share in shares):
        return []
    return [min(part, 1.0) for part in accumulate(shares, initial=0.0)]


def shares_by_kind(report: Mapping[str, Any]) -> dict[str, list[float]]:
    """The median of `cumulative_shares` over the layers, for every kind of matrix."""
    kinds = {str(row.get("name")): kind_of(row) for row in rows_of(report, "matrices")}
    found: dict[str, list[list[float]]] = {}
    for name, shares in part_of(report, "spectra").items():
        if curve := cumulative_shares(shares):
            found.setdefault(kinds.get(name) or kind_of({"name": name}), []).append(curve)
    return {kind: [median(values) for values in zip(*found[kind], strict=False)] for kind in kind_order(found)}


def spectra_line(report: Mapping[str, Any]) -> str:
    """The share of the leading components in the energy of each kind, in a sentence; empty where no spectrum is known."""
    curves = shares_by_kind(report)
    if not curves:
        return ""
    at = min(LEADING, *(len(curve) - 1 for curve in curves.values()))
    shares = ", ".join(f"{kind} {percent(curve[at])}" for kind, curve in curves.items())
    many = "the leading component makes up" if at == 1 else f"{at} leading components make up"
    return f"Of a matrix's energy in its metric, {many} (median over layers): {shares}."


def specified_matrices(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The matrices whose spec is known."""
    return [matrix for matrix in rows_of(report, "matrices") if matrix.get("spec")]


def by_layer_and_kind(
    matrices: Iterable[Mapping[str, Any]],
) -> tuple[list[int], list[str], dict[tuple[int, str], Mapping[str, Any]]]:
    """Layers and kinds in their order, and (layer, kind) -> the matrix; those whose layer is not known are left out."""
    placed = {(matrix["layer"], kind_of(matrix)): matrix for matrix in matrices if isinstance(matrix.get("layer"), int)}
    return sorted({layer for layer, _ in placed}), kind_order(kind for _, kind in placed), placed


def matrix_rows(matrices: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Every matrix with all its figures, under `MATRIX_HEADS`."""
    return [
        [
            str(matrix.get("name") or kind_of(matrix)),
            shape_of(matrix),
            str(matrix["spec"]),
            size(matrix.get("bytes")),
            bits(matrix.get("bits")),
            number(matrix.get("relative_error")),
            bound_text(matrix),
            *[number(matrix.get(key)) for key in ("predicted_error", "predicted_damage")],
        ]
        for matrix in matrices
    ]


def bound_text(matrix: Mapping[str, Any]) -> str:
    """What theory says that the relative error cannot exceed; where it says nothing, why.

    >>> bound_text({"bound": 0.21}), bound_text({"bound": None, "bound_note": "trellis"}), bound_text({})
    ('0.210', 'trellis', '–')
    """
    return number(matrix["bound"]) if is_number(matrix.get("bound")) else str(matrix.get("bound_note") or MISSING)


def bound_line(matrices: Iterable[Mapping[str, Any]]) -> str:
    """How many matrices have an upper bound of their error, and why the others have none; empty where nothing of it is known.

    >>> bound_line([{"bound": 0.2}, {"bound": None, "bound_note": "trellis"}])
    'upper bounds of the relative error: 1 of 2 matrices; none for 1: trellis'
    """
    matrices = list(matrices)
    without = [matrix for matrix in matrices if not is_number(matrix.get("bound"))]
    why = Counter(str(matrix["bound_note"]) for matrix in without if matrix.get("bound_note"))
    if len(without) == len(matrices) and not why:
        return ""
    line = f"upper bounds of the relative error: {len(matrices) - len(without)} of {len(matrices)} matrices"
    common = why.most_common(REASONS)
    line += "".join(f"; none for {count}: {note}" for note, count in common)
    rest = why.total() - sum(count for _, count in common)
    return line + (f"; none for {rest} for reasons of their own" if rest else "")


def kind_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Kind, bits per weight, ranks, medians of error, its bound and sensitivity, share of the leading components in the energy."""
    matrices, curves = rows_of(report, "matrices"), shares_by_kind(report)
    rows = []
    for kind in kind_order([kind_of(row) for row in matrices if row.get("spec")]):
        here = [row for row in matrices if kind_of(row) == kind and row.get("spec")]
        curve = curves.get(kind, [])
        share = percent(curve[min(LEADING, len(curve) - 1)] if curve else None)
        ranks = sorted(rank_of(row["spec"]) for row in here)
        rank = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        medians = [number(_median([row.get(key) for row in here])) for key in ("relative_error", "bound", "sensitivity")]
        rows.append((kind, number(_mean_bits(here)), rank, *medians, share))
    return rows


def _mean_bits(matrices: Sequence[Mapping[str, Any]]) -> float | None:
    """Bits per weight of these matrices together, as many of them as say both; of one kind all are of one shape."""
    known = [row["bits"] for row in matrices if is_number(row.get("bits"))]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return median(known) if known else None
