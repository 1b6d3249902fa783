"""How a report writes numbers, sizes and specs; a value that is missing is a dash everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from allocators.strategies import DEFAULT, STRATEGIES, Strategy, solved_strategies
from qlr_jax.models.sites import KINDS

MODELS = ("original", *solved_strategies())
MISSING = "–"
STAGES = {"judge": "select"}  # under which names report.json has them -> how they are called


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


def sentence(text: str) -> str:
    """A line as a sentence of its own; empty for an empty one.

    >>> sentence("measured on 5 tokens"), sentence("")
    ('Measured on 5 tokens.', '')
    """
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def stage_label(name: str) -> str:
    """What a stage of a job is called for people.

    >>> stage_label("judge"), stage_label("solve")
    ('select', 'solve')
    """
    return STAGES.get(name, name)


def shape_of(matrix: Mapping[str, Any]) -> str:
    """A matrix's shape as people write it, `64 × 32`; a dash where it is not known."""
    shape = matrix.get("shape")
    return " × ".join(str(side) for side in shape) if isinstance(shape, list | tuple) and shape else MISSING


def model_label(key: str, report: Mapping[str, Any]) -> str:
    """How a model of the comparison is called in tables: uniform carries its spec, what was asked for and what was quick say so.

    >>> model_label("uniform", {"uniform_spec": "trellis-2"}), model_label("allocated", {"recipe": {"strategy": "greedy"}})
    ('uniform (2)', 'greedy, as asked')
    """
    if key not in STRATEGIES:
        return key
    strategy = strategy_of(report, key)
    spec = f" ({short_spec(report['uniform_spec'])})" if not strategy.per_matrix and report.get("uniform_spec") else ""
    asked, quick = key == DEFAULT and was_asked(report), key != DEFAULT and quick_state_bits(report)
    return f"{strategy.label}{spec}" + (", as asked" if asked else ", quick" if quick else "")


def quick_state_bits(report: Mapping[str, Any]) -> int:
    """The state bits at which uniform and rank 0 were solved, where they were fewer than those of what is delivered; else 0.

    >>> quick_state_bits({"controls": {"mode": "quick", "state_bits": 8}, "recipe": {"state_bits": 12}})
    8
    """
    bits, full = part_of(report, "controls").get("state_bits"), part_of(report, "recipe").get("state_bits")
    return int(bits) if is_number(bits) and is_number(full) and bits < full else 0


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


def model_name(facts: Mapping[str, Any]) -> str:
    """What the model of a report or of a table's notes is called: of a folder, its own name."""
    name = str(facts.get("model") or "Llama model").rstrip("/")
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
