"""Locks, floors and ties of a command line, put on an option table. Nothing here needs JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from allocators import OptionTable
from qlr_jax.errors import QLRError


@dataclass(frozen=True)
class Constraints:
    """What a user demands of some rows of a table; a pattern is a row's name with `*` for any text.

    Args:
        lock: (pattern, spec) pairs: such rows keep this spec.
        at_least: (pattern, bits) pairs: such rows store at least so many bits per weight.
        tie: groups of patterns whose rows take the same backbone.
        tie_spec: groups of patterns whose rows take the same spec, with its rank.
    """

    lock: tuple[tuple[str, str], ...] = ()
    at_least: tuple[tuple[str, float], ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    tie_spec: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def parse(
        cls,
        lock: Sequence[str] | None = None,
        at_least: Sequence[str] | None = None,
        tie: Sequence[str] | None = None,
        tie_spec: Sequence[str] | None = None,
    ) -> Constraints:
        """The constraints of a command line.

        Args:
            lock: `PATTERN=SPEC` each.
            at_least: `PATTERN=BITS` each.
            tie: `PATTERN,PATTERN[,...]` each.
            tie_spec: as tie.

        Raises:
            QLRError: for a text that is not of that form.

        Example:
            >>> Constraints.parse(lock=["*v_proj=trellis-4"], tie=["*q_proj,*k_proj"])
            Constraints(lock=(('*v_proj', 'trellis-4'),), at_least=(), tie=(('*q_proj', '*k_proj'),), tie_spec=())
        """
        return cls(
            tuple(_setting("lock", text, "*v_proj=trellis-4") for text in lock or ()),
            tuple((pattern, _bits(pattern, value)) for pattern, value in (_floor(text) for text in at_least or ())),
            tuple(_group("tie", text) for text in tie or ()),
            tuple(_group("tie-spec", text) for text in tie_spec or ()),
        )

    def on(self, table: OptionTable) -> OptionTable:
        """The table under these constraints.

        Raises:
            AllocationError: where a pattern matches no row, or leaves one without an option.
        """
        for pattern, spec in self.lock:
            table = table.lock(pattern, spec)
        for pattern, bits in self.at_least:
            table = table.at_least(pattern, bits)
        for patterns in self.tie:
            table = table.tie(*patterns)
        for patterns in self.tie_spec:
            table = table.tie(*patterns, on="spec")
        return table


def _setting(option: str, text: str, example: str) -> tuple[str, str]:
    pattern, equals, value = (part.strip() for part in text.partition("="))
    if not (equals and pattern and value):
        wanted = "SPEC" if option == "lock" else "BITS"
        raise QLRError(f"--{option} {text!r} is not PATTERN={wanted}; pass for example --{option} '{example}'")
    return pattern, value


def _floor(text: str) -> tuple[str, str]:
    return _setting("at-least", text, "*down_proj=2.5")


def _bits(pattern: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise QLRError(f"--at-least '{pattern}={text}': {text!r} is no number of bits; pass for example 2.5") from None


def _group(option: str, text: str) -> tuple[str, ...]:
    patterns = tuple(part.strip() for part in text.split(","))
    if len(patterns) < 2 or not all(patterns):
        raise QLRError(f"--{option} {text!r} is not two or more patterns; pass for example --{option} '*q_proj,*k_proj'")
    return patterns
