"""Seconds of each kind of work: those of one CPU fitted to real jobs, those of GPU and TPU scaled and not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from qlr_jax.core.quantizers.base import SearchCost


@dataclass(frozen=True)
class Work:
    """Amounts of work, by what they take.

    Attributes:
        products: operations of float32 matrix products.
        factored: of float32 factorizations and triangular solves, which run on one thread.
        checked: of float64 factorizations in numpy, on one thread.
        searched: weights through the two sweeps of a trellis search, in units of one with 12 state bits, which all cores share.
        alone: the same on one core: with few state bits a step of a search is too short to be shared.
        placed: weights through all of a rounding that is not the search itself: slices, scans, scales.
        passed: array elements through an elementwise pass.
        decoded: weights of compressed matrices that are decoded.
        compiled: functions.
        steps: that must run one after another, on an accelerator each at the price of a launch.
        spread: seconds, by what was measured here, that all cores share.
        single: the same on one core.
    """

    products: float = 0.0
    factored: float = 0.0
    checked: float = 0.0
    searched: float = 0.0
    alone: float = 0.0
    placed: float = 0.0
    passed: float = 0.0
    decoded: float = 0.0
    compiled: float = 0.0
    steps: float = 0.0
    spread: float = 0.0
    single: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(self)))


SEARCHED = ("searched", "alone")


@dataclass(frozen=True)
class Search:
    """What a search of codes was measured to take.

    Attributes:
        points: (sequences of a call, seconds of one weight), few and many.
        shared: the part of it that runs on all cores.

    Example:
        >>> search = Search(((4, 2e-6), (32, 1e-6)), 1.0)
        >>> [round(1e6 * search.seconds(count), 3) for count in (1, 4, 18, 32, 500)]
        [2.0, 2.0, 1.111, 1.0, 1.0]
    """

    points: tuple[tuple[int, float], ...]
    shared: float

    def seconds(self, sequences: float) -> float:
        """Of the processor, a weight, where a call has so many sequences: calls between the measured ones lie on a line."""
        (few, first), *_, (many, last) = self.points
        if not few < sequences < many:
            return first if sequences <= few else last
        part = (sequences - few) / (many - few)
        return ((1 - part) * few * first + part * many * last) / sequences


@dataclass(frozen=True)
class Rates:
    """Seconds of one unit of each kind of work, of one core of a CPU or of a whole accelerator.

    Attributes:
        per: by the names of `Work`.
        shared: the part of each that runs on all cores.
        measured: whether they were compared with real jobs; if not, they are scaled.
        error: factor within which the seconds of a whole job have been found (`measured`), or are guessed to lie.
        says: where they come from.
        searches: by the states of the code, where searches were measured on this machine.
    """

    per: Mapping[str, float]
    shared: Mapping[str, float]
    measured: bool
    error: float
    says: str
    searches: Mapping[int, Search] = field(default_factory=dict)

    def search(self, cost: SearchCost, weights: float, sequences: float, filled: float) -> Work:
        """The work of searching the codes of so many weights.

        Args:
            cost: of the quantizer.
            weights: all of them.
            sequences: of a call.
            filled: sequences searched over those asked for, which a measurement knows by itself.
        """
        if known := self.searches.get(cost.states):
            seconds = weights * known.seconds(sequences)
            return Work(spread=known.shared * seconds, single=(1 - known.shared) * seconds)
        return Work(searched=cost.shared * cost.time, alone=(1 - cost.shared) * cost.time) * (weights * filled)

    def cpu(self, work: Work) -> float:
        """Seconds of all cores together; on an accelerator, of it."""
        return sum(seconds * getattr(work, name) for name, seconds in self.per.items())

    def wall(self, work: Work, cores: int) -> float:
        """Seconds that pass on otherwise idle cores (Amdahl)."""
        shared = {name: self.shared.get(name, 0.0) for name in self.per}
        return sum(s * getattr(work, n) * (1 - shared[n] + shared[n] / cores) for n, s in self.per.items())


RATES = {
    "cpu": Rates(
        {
            "products": 1 / 95e9,
            "factored": 1 / 36e9,
            "checked": 1 / 35e9,
            "searched": 0.7e-6,
            "alone": 0.7e-6,
            "placed": 0.15e-6,
            "passed": 0.22e-9,
            "decoded": 8.8e-9,
            "compiled": 0.18,
        },
        {"products": 0.9, "searched": 1.0, "passed": 0.5},
        True,
        1.5,
        "fitted to jobs on two cores of an AMD EPYC with AVX-512",
    ),
    # One H100: float32 products at half of 60e12 a second, 3.3e12 bytes a second; every step of a search a few launches.
    "gpu": Rates(
        {
            "products": 1 / 30e12,
            "factored": 1 / 3e12,
            "checked": 1 / 28e9,
            "searched": 60e-9,
            "alone": 60e-9,
            "placed": 1e-9,
            "passed": 10e-12,
            "decoded": 0.4e-9,
            "compiled": 0.5,
            "steps": 30e-6,
        },
        {},
        False,
        5.0,
        "scaled from the published figures of an H100, not measured",
    ),
    # One v5e: highest precision is six passes of 197e12 a second, 0.8e12 bytes a second; loops stay on the device.
    "tpu": Rates(
        {
            "products": 1 / 25e12,
            "factored": 1 / 0.3e12,
            "checked": 1 / 28e9,
            "searched": 200e-9,
            "alone": 200e-9,
            "placed": 4e-9,
            "passed": 40e-12,
            "decoded": 1.6e-9,
            "compiled": 1.0,
            "steps": 5e-6,
        },
        {},
        False,
        5.0,
        "scaled from the published figures of a v5e, not measured",
    ),
}
