"""Seconds of each kind of work: those of one CPU fitted to real jobs, those of GPU and TPU scaled and not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


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
        compiled: functions.
        steps: that must run one after another, on an accelerator each at the price of a launch.
    """

    products: float = 0.0
    factored: float = 0.0
    checked: float = 0.0
    searched: float = 0.0
    alone: float = 0.0
    placed: float = 0.0
    passed: float = 0.0
    compiled: float = 0.0
    steps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Rates:
    """Seconds of one unit of each kind of work, of one core of a CPU or of a whole accelerator.

    Attributes:
        per: by the names of `Work`.
        shared: the part of each that runs on all cores.
        measured: whether they were compared with real jobs; if not, they are scaled.
        error: factor within which the seconds of a whole job have been found (`measured`), or are guessed to lie.
    """

    per: Mapping[str, float]
    shared: Mapping[str, float]
    measured: bool
    error: float
    says: str

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
            "products": 1 / 145e9,
            "factored": 1 / 36e9,
            "checked": 1 / 35e9,
            "searched": 3.6e-6,
            "alone": 3.6e-6,
            "placed": 0.15e-6,
            "passed": 0.22e-9,
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
            "compiled": 1.0,
            "steps": 5e-6,
        },
        {},
        False,
        5.0,
        "scaled from the published figures of a v5e, not measured",
    ),
}
