"""How a report writes numbers, sizes and specs; a value that is missing is a dash everywhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from allocators.strategies import CONTROL, DEFAULT, STRATEGIES, Strategy, solved_strategies
from qlr_jax.models.sites import KINDS

MODELS = ("original", *solved_strategies())
MISSING = "–"
NEAR = 0.01  # KLs that differ by less are called equal: seeds alone make them differ by more


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number that can be shown or drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, never in exponential form between 1e-4 and 1e6.

    >>> number(0.11523), number(5.2), number(12345.6), number(None), number(0.0000312)
    ('0.115', '5.20', '12346', '–', '3.12e-05')
    """
    if not is_number(value):
        return MISSING
    size = abs(value)
    if size and (size < 1e-4 or size >= 1e6):
        return f"{value:.{digits - 1}e}"
    before = math.floor(math.log10(size)) + 1 if size else 1
    return f"{value:.{max(digits - before, 0)}f}"


def bits(value: Any) -> str:
    """Bits per weight: two decimals at least, four where they say something.

    >>> bits(2.25), bits(2.2491)
    ('2.25', '2.2491')
    """
    if not is_number(value):
        return MISSING
    text = f"{value:.4f}"
    return text[:-2] if text.endswith("00") else text


def size(value: Any) -> str:
    """Bytes in units of 1000, three digits.

    >>> size(10_500_000), size(512), size(1_240_000_000)
    ('10.5 MB', '512 B', '1.24 GB')
    """
    if not is_number(value):
        return MISSING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            return f"{number(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: Any) -> str:
    """A share in percent.

    >>> percent(0.9123)
    '91.2 %'
    """
    return f"{100 * value:.1f} %" if is_number(value) else MISSING


def times(value: Any, base: Any) -> str:
    """A ratio, `×1.17`."""
    return f"×{number(value / base)}" if is_number(value) and is_number(base) and base else MISSING


def short_spec(spec: Any) -> str:
    """A spec as short as a cell of the heat map: the trellis' name and the factors' grid are left out.

    >>> short_spec("trellis-2.25"), short_spec("trellis-1.5+r8@trellis-4"), short_spec("int-4g32/rot+r16@bf16")
    ('2.25', '1.5+r8', 'int-4g32/rot+r16')
    """
    return str(spec).removeprefix("trellis-").split("@")[0] if spec else MISSING


def rank_of(spec: Any) -> int:
    """The rank that a spec names, 0 where it names none.

    >>> rank_of("trellis-1.5+r8@trellis-4"), rank_of("bf16")
    (8, 0)
    """
    head = str(spec).split("@")[0]
    tail = head.rpartition("+r")[2] if "+r" in head else ""
    return int(tail) if tail.isdigit() else 0


def kind_of(matrix: Mapping[str, Any]) -> str:
    """The kind of a matrix: its own `kind`, else the last part of its name, without `_proj`."""
    return str(matrix.get("kind") or str(matrix.get("name", "")).removesuffix(".weight").rpartition(".")[2]).removesuffix("_proj")


def kind_order(kinds: Iterable[str]) -> list[str]:
    """Kinds in the order in which data flow through a layer, unknown ones last."""
    return sorted(set(kinds), key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))


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


def rank_verdict(with_rank: Any, without: Any) -> tuple[str, str]:
    """Whether rank paid, and by how much: two damages in words; both empty where one is not known.

    >>> rank_verdict(0.0308, 0.0335), rank_verdict(0.0310, 0.0311), rank_verdict(0.035, 0.0335)
    (('paid', '8.1 % less'), ('made no difference', '0.3 % less'), ('did not pay', '4.5 % more'))
    """
    if not (is_number(with_rank) and is_number(without) and without > 0):
        return "", ""
    less = 1 - with_rank / without
    how = f"{percent(abs(less))} {'less' if less > 0 else 'more'}" if less else "the same"
    return "made no difference" if abs(less) < NEAR else "paid" if less > 0 else "did not pay", how


def rank_paid(report: Mapping[str, Any]) -> str:
    """Whether low-rank terms paid at the bytes of a finished job, in a sentence; empty where it was not measured.

    >>> rank_paid({"kl": {"allocated": 0.0308, "rank0": 0.0335}})
    'At these bytes rank paid: KL 0.0308 against 0.0335 without, 8.1 % less (held-out).'
    """
    for name, where in (("kl", "held-out"), ("calibration_kl", "calibration text")):
        found = [part_of(report, name).get(key) for key in (DEFAULT, CONTROL)]
        verdict, how = rank_verdict(*found)
        if verdict and strategy_of(report, DEFAULT).ranks:
            start = f"At these bytes rank {verdict}" if verdict == "paid" else f"Rank {verdict}"
            return f"{start}: KL {number(found[0])} against {number(found[1])} without, {how} ({where})."
    return ""


def predicted(report: Mapping[str, Any], key: str) -> Any:
    """The KL on the calibration text that was predicted of a model before it was solved; None where that is not known."""
    value = part_of(report, "points", key).get("damage")
    if value is None and key == report.get("delivered"):
        value = part_of(report, "allocation").get("damage")
    return value


def refined_line(report: Mapping[str, Any]) -> str:
    """What refining by measuring other allocations brought, in a line; empty where the job did none.

    >>> refined_line({"refined": {"start": 0.025, "measured": 0.0246, "tried": 24, "accepted": 5}})
    'refined: 5 of 24 proposals accepted, calibration KL 1.6 % lower'
    >>> refined_line({"refined": {"start": 0.025, "measured": 0.025, "tried": 3, "accepted": 0}})
    'refined: nothing gained, other allocations built and measured: 3'
    """
    found = part_of(report, "refined")
    if not is_number(found.get("tried")):
        return ""
    if not found.get("accepted"):
        return f"refined: nothing gained, other allocations built and measured: {found['tried']}"
    line = f"refined: {found.get('accepted', MISSING)} of {found['tried']} proposals accepted"
    start, share, measured = (found.get(key) for key in ("start", "gained", "measured"))
    if is_number(start) and start > 0 and is_number(measured):
        share = 1 - measured / start
    return f"{line}, calibration KL {percent(max(share, 0.0))} lower" if is_number(share) else line


def model_label(key: str, report: Mapping[str, Any]) -> str:
    """How a model of the comparison is called in tables: uniform carries its spec, a strategy that was asked for says so.

    >>> model_label("uniform", {"uniform_spec": "trellis-2"}), model_label("allocated", {"recipe": {"strategy": "greedy"}})
    ('uniform (2)', 'greedy, as asked')
    """
    if key not in STRATEGIES:
        return key
    strategy = strategy_of(report, key)
    spec = f" ({short_spec(report['uniform_spec'])})" if not strategy.per_matrix and report.get("uniform_spec") else ""
    return f"{strategy.label}{spec}" + (", as asked" if key == DEFAULT and was_asked(report) else "")


def strategy_of(report: Mapping[str, Any], key: str) -> Strategy:
    """The strategy whose allocation a model of the comparison has: of the first candidate, that of the recipe."""
    name = str(part_of(report, "recipe").get("strategy") or DEFAULT) if key == DEFAULT else key
    return STRATEGIES.get(name, STRATEGIES[DEFAULT])


def was_asked(report: Mapping[str, Any]) -> bool:
    """Whether a strategy other than the default was asked for by name."""
    return strategy_of(report, DEFAULT).name != DEFAULT


def delivered_key(report: Mapping[str, Any]) -> str:
    """Which model of the comparison was delivered; the first candidate where the report does not say."""
    key = report.get("delivered")
    return str(key) if key in STRATEGIES else DEFAULT


def listed(value: Any) -> Any:
    """`value` with tuples as lists and unknown things as text, as YAML writes them safely."""
    if isinstance(value, Mapping):
        return {str(key): listed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [listed(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def model_name(report: Mapping[str, Any]) -> str:
    """What the model is called: of a folder, its own name."""
    name = str(report.get("model") or "Llama model").rstrip("/")
    return name.rpartition("/")[2] if name.startswith("/") else name


def part_of(report: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A nested mapping of a report, empty where anything on the way is missing or null."""
    value: Any = report
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def rows_of(report: Mapping[str, Any], *names: str) -> list[Mapping[str, Any]]:
    """A nested list of mappings of a report, empty where it is missing or null."""
    value = part_of(report, *names[:-1]).get(names[-1])
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def final_error(matrix: Mapping[str, Any]) -> Any:
    """The relative error that was predicted of a matrix, as its solve left it: as the outputs feel it where they were weighed."""
    felt = matrix.get("felt_error")
    return matrix.get("relative_error") if felt is None else felt


def median_ratio(matrices: Iterable[Mapping[str, Any]]) -> float | None:
    """The median over matrices of final relative error over predicted, None where neither is known."""
    ratios = sorted(
        final_error(matrix) / matrix["predicted_error"]
        for matrix in matrices
        if is_number(final_error(matrix)) and is_number(matrix.get("predicted_error")) and matrix["predicted_error"] > 0
    )
    half = len(ratios) // 2
    return (ratios[half] if len(ratios) % 2 else (ratios[half - 1] + ratios[half]) / 2) if ratios else None
