"""Settings of the solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qlr_jax.errors import QLRError


@dataclass(frozen=True)
class SolverConfig:
    """Settings of the alternation.

    Attributes:
        iterations: outer alternations at most (Q, then the factors).
        inner: alternations between L and R inside one fit of the factors.
        subspace_steps: power steps of the subspace iteration, first fit; later fits start warm and take two.
        damping: fraction of H's mean diagonal added before it is factored.
        downdate: τ of H − τ H Rᵀ(R H Rᵀ)⁻¹R H, the metric in which Q is rounded; None: 0.9 for factors of 8 bits and more, else 0.
        tolerance: stop when an iteration improves the error by less than this fraction.
        state_bits: of trellis codes, 6 to 16: time grows as 2^state_bits.
        rotation_block: 0 for full-width rotations, or a power of two for block-diagonal ones.
    """

    iterations: int = 4
    inner: int = 2
    subspace_steps: int = 4
    damping: float = 1e-2
    downdate: float | None = None
    tolerance: float = 3e-3
    state_bits: int = 12
    rotation_block: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "inner", "subspace_steps"):
            if getattr(self, name) < 1:
                raise QLRError(f"{name}={getattr(self, name)} does nothing; pass at least 1")
        if self.downdate is not None and not 0 <= self.downdate <= 1:
            raise QLRError(f"downdate={self.downdate} is outside [0, 1]; pass a strength from 0 to 1, or None")

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> SolverConfig:
        """From keyword options; an unknown one is refused by name."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise QLRError(f"{name!r} is not a solver option; pass one of {', '.join(sorted(known))}")
        return cls(**options)
