"""Budgets: bits per weight, bytes, or a device's memory at a context length."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction

from allocators.errors import AllocationError, Infeasible
from allocators.options import ModelFacts
from allocators.table import OptionTable

UNITS = {"B": 1} | {
    prefix + unit: base**power for power, prefix in enumerate("KMGT", start=1) for unit, base in (("B", 1000), ("iB", 1024))
}
KV_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1, "int8": 1}
EXAMPLES = "'2.25bpw', '900MB', 'device:8GiB,context=8192', or '2.5bpw:all' for embedding and head too"
FIXED = "norms and other fixed tensors"


def parse_size(text: str) -> int:
    """Bytes of a size with its unit, rounded down: MB = 10⁶, MiB = 2²⁰.

    Raises:
        AllocationError: for a text that is no positive size with a unit.

    Example:
        >>> parse_size("900MB"), parse_size("1.5GiB")
        (900000000, 1610612736)
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)", text.strip())
    unit = {name.lower(): size for name, size in UNITS.items()}.get(found[2].lower()) if found else None
    if not found or unit is None:
        raise AllocationError(
            f"size {text!r} is not a number with a unit; pass for example '900MB' (10⁶ bytes each) or '900MiB' (2²⁰)"
        )
    size = int(Fraction(Decimal(found[1])) * unit)
    if size <= 0:
        raise AllocationError(f"size {text!r} is nothing; pass a positive size such as '900MB'")
    return size


def format_size(size: int) -> str:
    """The shortest exact way of writing a number of bytes.

    Example:
        >>> format_size(1_500_000_000), format_size(8 * 2**30), format_size(1001)
        ('1.5GB', '8GiB', '1001B')
    """
    exact = [f"{_plain(Decimal(size) / unit)}{name}" for name, unit in reversed(UNITS.items()) if size >= unit]
    return min((text for text in exact if parse_size(text) == size), key=len)


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _digits(number: Fraction, up: bool) -> str:
    """Four significant digits, rounded up or down, so that the printed end is itself acceptable."""
    value = Decimal(number.numerator) / Decimal(number.denominator)
    step = Decimal(1).scaleb(value.adjusted() - 3)
    return _plain((value / step).to_integral_value(ROUND_CEILING if up else ROUND_FLOOR) * step)


def _about(size: int, up: bool = True) -> str:
    name = next((n for n in ("TB", "GB", "MB", "KB") if abs(size) >= UNITS[n]), "B")
    return _digits(Fraction(size, UNITS[name]), up) + name if size else "0B"


@dataclass(frozen=True)
class Problem:
    """A budget put to a table: what the solvers take.

    Args:
        budget: as it was given.
        table: the table to allocate; under a bpw budget its uncounted rows have one option each (bf16 where offered).
        limit: bytes that all rows of this table may take together.
        items: where the limit comes from, in bytes: they add up to it.
        keeps_original: True where the rows fit at 16 bits a weight, so that nothing need be compressed at all.
        everything_fits: True where even the largest option of every row fits.
    """

    budget: Budget
    table: OptionTable
    limit: int
    items: dict[str, int]
    keeps_original: bool
    everything_fits: bool


@dataclass(frozen=True)
class Budget:
    """How much may be stored.

        bpw      Σ bytes of counted rows ≤ bits · weights / 8
        bpw:all  Σ bytes of all rows + fixed tensors ≤ bits · weights of the whole model / 8
        bytes    Σ bytes of all rows + fixed tensors ≤ size
        device   the same + 2 · layers · kv_heads · head_dim · context · batch · bytes(kv) + working allowance ≤ size

    Args:
        bits: per weight, of a bpw budget; None of another.
        whole: of a bpw budget: embedding, head and fixed tensors count as the rest does.
        size: bytes, of a byte or device budget.
        context: tokens in the key-value cache, of a device budget.
        batch: sequences at once, of a device budget.
        kv: type of the cache's numbers, one of KV_BYTES.
        work: working allowance in bytes (activations, buffers, the runtime); a tenth of the device where None.

    Example:
        >>> str(Budget.parse("2.250 bpw")), str(Budget.parse("1500MB")), str(Budget.parse("device:8GiB,context=8192"))
        ('2.25bpw', '1.5GB', 'device:8GiB,context=8192,batch=1,kv=bf16')
    """

    bits: Decimal | None = None
    whole: bool = False
    size: int | None = None
    context: int | None = None
    batch: int = 1
    kv: str = "bf16"
    work: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from its text.

        Args:
            text: `2.25bpw`, `2.5bpw:all`, `900MB`, `900MiB` or `device:8GiB,context=8192[,batch=1][,kv=bf16][,work=1GiB]`.

        Raises:
            AllocationError: for a text that is none of these, naming what is wrong with it.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise AllocationError(f"budget {text!r} is not a text; pass for example {EXAMPLES}")
        plain = text.strip()
        if found := re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*bpw(\s*:\s*all)?", plain, re.IGNORECASE):
            if not Decimal(found[1]):
                raise AllocationError(f"budget {text!r} is nothing; pass a positive number of bits per weight such as '2.25bpw'")
            return cls(bits=Decimal(found[1]), whole=bool(found[2]))
        if plain.lower().startswith("device:"):
            return cls._device(plain[len("device:") :])
        if not re.search(r"\d\s*[kmgt]?i?b$", plain, re.IGNORECASE):
            raise AllocationError(f"budget {text!r} is not understood; pass for example {EXAMPLES}")
        return cls(size=parse_size(plain))

    @classmethod
    def _device(cls, text: str) -> Budget:
        size, *settings = (part.strip() for part in text.split(","))
        given: dict[str, str] = {}
        for setting in settings:
            name, equals, value = (part.strip() for part in setting.partition("="))
            if not equals or name not in ("context", "batch", "kv", "work") or name in given:
                raise AllocationError(
                    f"device budget: {setting!r} is not understood; pass context=, batch=, kv= or work=, each once"
                )
            given[name] = value
        if "context" not in given:
            raise AllocationError(f"device budget: the context length is missing; pass for example 'device:{size},context=8192'")
        for name in ("context", "batch"):
            if name in given and not re.fullmatch(r"0*[1-9]\d*", given[name]):
                raise AllocationError(f"device budget: {name}={given[name]} is not a whole number of at least 1")
        kv = given.get("kv", "bf16").lower()
        if kv not in KV_BYTES:
            raise AllocationError(f"device budget: kv={given['kv']} is unknown; pass one of {', '.join(KV_BYTES)}")
        work = parse_size(given["work"]) if "work" in given else None
        return cls(size=parse_size(size), context=int(given["context"]), batch=int(given.get("batch", 1)), kv=kv, work=work)

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{_plain(self.bits)}bpw" + (":all" if self.whole else "")
        assert self.size is not None
        if self.context is None:
            return format_size(self.size)
        work = "" if self.work is None else f",work={format_size(self.work)}"
        return f"device:{format_size(self.size)},context={self.context},batch={self.batch},kv={self.kv}{work}"

    @property
    def counts_all(self) -> bool:
        """Whether all of the model counts, embedding and head among it, and not the linear layers alone."""
        return self.whole or self.bits is None

    def on(self, table: OptionTable, model: ModelFacts | None = None) -> Problem:
        """Put the budget to a table.

        Args:
            table: every row of the model that may change.
            model: facts of the model; the table's own where not given.

        Raises:
            AllocationError: below the table's least, naming both ends; under a bpw budget above its most as well.

        Example:
            >>> from allocators.options import Option, Row
            >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 3.0), Option("int-4", 32, 1.0))),))
            >>> Budget.parse("3bpw").on(table).limit
            24
            >>> Budget.parse("1bpw").on(table)
            Traceback (most recent call last):
            allocators.errors.Infeasible: budget 1bpw is below the table's range; pass 2bpw to 4bpw
        """
        if self.bits is None:
            return self._size_on(table, model or table.model)
        return self._whole_on(table, model or table.model) if self.whole else self._bits_on(table)

    def _whole_on(self, table: OptionTable, model: ModelFacts) -> Problem:
        assert self.bits is not None
        weights = table.weights() + model.fixed_bytes // 2  # fixed tensors are stored in bf16
        size = int(Fraction(self.bits) * weights / 8)
        limit, least, most = size - model.fixed_bytes, table.least_bytes, table.most_bytes
        keeps = limit >= 2 * table.weights()
        if limit < least or (limit > most and not keeps):
            ends = (
                _digits(Fraction(8 * (least + model.fixed_bytes), weights), True),
                _digits(Fraction(8 * (most + model.fixed_bytes), weights), False),
            )
            side = "below" if limit < least else "above"
            raise Infeasible(f"budget {self} is {side} the table's range; pass {ends[0]}bpw:all to {ends[1]}bpw:all")
        return Problem(self, table, limit, {"budget": size, FIXED: -model.fixed_bytes}, keeps, limit >= most)

    def _bits_on(self, table: OptionTable) -> Problem:
        counted = table.select(lambda row: row.counted)
        if counted is None:
            raise AllocationError(f"budget {self}: no row of the table counts toward bits per weight; pass a budget in bytes")
        weights = counted.weights()
        assert self.bits is not None
        limit = int(Fraction(self.bits) * weights / 8)
        if not counted.least_bytes <= limit <= counted.most_bytes:
            ends = (
                _digits(Fraction(8 * counted.least_bytes, weights), True),
                _digits(Fraction(8 * counted.most_bytes, weights), False),
            )
            side = "below" if limit < counted.least_bytes else "above"
            raise Infeasible(f"budget {self} is {side} the table's range; pass {ends[0]}bpw to {ends[1]}bpw")
        kept = {}
        for row in table.rows:
            if not row.counted:
                kept[row.name] = min(row.options, key=lambda o: (o.spec != "bf16", o.damage, o.bytes)).spec
        if kept:
            table = table.restrict(lambda row, option: kept.get(row.name, option.spec) == option.spec, "keeping uncounted rows")
        uncounted = sum(row.options[0].bytes for row in table.rows if not row.counted)
        items = {"counted rows": limit} | ({"uncounted rows": uncounted} if kept else {})
        return Problem(self, table, limit + uncounted, items, False, limit == counted.most_bytes)

    def _size_on(self, table: OptionTable, model: ModelFacts) -> Problem:
        assert self.size is not None
        items = {"device" if self.context else "budget": self.size, FIXED: -model.fixed_bytes}
        if self.context:
            numbers = 2 * model.layers * model.kv_heads * model.head_dim
            if not numbers:
                raise AllocationError(
                    f"budget {self} needs the model's layers, kv_heads and head_dim for its cache; pass ModelFacts"
                )
            items["key-value cache"] = -numbers * self.context * self.batch * KV_BYTES[self.kv]
            items["working allowance"] = -(self.size // 10 if self.work is None else self.work)
        limit, least, most = sum(items.values()), table.least_bytes, table.most_bytes
        if limit < least and not self.context:
            ends = _about(least + model.fixed_bytes), _about(most + model.fixed_bytes)
            raise Infeasible(f"budget {self} is below what this model can be stored in; pass {ends[0]} to {ends[1]}")
        if limit < least:
            taken = ", ".join(f"{name} {_about(-size)}" for name, size in list(items.items())[1:] if size)
            left = f"leaves {_about(max(limit, 0), up=False)} for the matrices (after {taken})"
            hint = "a larger device, a shorter context or a smaller cache"
            raise Infeasible(f"budget {self} {left}; they take {_about(least)} to {_about(most)}; pass {hint}")
        return Problem(self, table, limit, items, limit >= 2 * table.weights(), limit >= most)
