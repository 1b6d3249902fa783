"""Settings of the solver, and the presets that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qlr_jax.core.quantizers import DEFAULT_STATE_BITS
from qlr_jax.errors import QLRError

CHOICES = {
    "start": ("race", "weight", "low-rank", "outliers", "backbone"),
    "factor_rounding": ("feedback", "plain"),
    "factor_scales": ("component", "matrix"),
    "backbone_scale": ("fitted", "rms"),
}


@dataclass(frozen=True)
class SolverConfig:
    """Settings of the alternation.

    Attributes:
        iterations: outer alternations at most (Q, then the factors).
        inner: alternations between L and R inside one fit of the factors.
        subspace_steps: power steps of the subspace iteration, first fit; later fits start warm and take two.
        warm_start: whether they do; otherwise every fit starts from the same random basis and takes `subspace_steps`.
        start: what comes first: "race" (one iteration each from "weight" and from "backbone", and each matrix goes on with the
            better; without an output Hessian "backbone" rarely wins, and "weight" is taken), "weight" (factors of W itself,
            whatever H: what they leave to Q then has the least size, and Q's error is a multiple of that), "low-rank" (factors of
            W in the metric H), "outliers" (those in the metric of as many input channels as the rank, of the largest mean square:
            ODLRI, arXiv 2506.02077), or "backbone" (Q of W).
        damping: fraction of H's mean diagonal added before it is factored.
        downdate: τ of H − τ H Rᵀ(R H Rᵀ)⁻¹R H, the metric in which Q is rounded; None: after the factors' precision.
        factor_rounding: "feedback" in each factor's own metric, or "plain".
        factor_scales: one for every "component" or one for the "matrix", where the factors' grid has none of its own.
        backbone_scale: of a grid without scales of its own: "fitted" to what feedback adds and to the result, or the "rms" of
            what is rounded.
        tolerance: stop when an iteration improves the error by less than this fraction; 0 runs all iterations.
        state_bits: of trellis codes, 6 to 16: time grows as 2^state_bits.
        alternation_bits: of a trellis backbone while Q and L R are improved in turn, where `state_bits` are at least 4 more; the
            best pair is then made once more with all of them, in one iteration beyond those.
        rotation_block: 0 for full-width rotations, or a power of two for block-diagonal ones.
    """

    iterations: int = 4
    inner: int = 2
    subspace_steps: int = 4
    warm_start: bool = True
    start: str = "race"
    damping: float = 1e-2
    downdate: float | None = None
    factor_rounding: str = "feedback"
    factor_scales: str = "component"
    backbone_scale: str = "fitted"
    tolerance: float = 3e-3
    state_bits: int = DEFAULT_STATE_BITS
    alternation_bits: int = 8
    rotation_block: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "inner", "subspace_steps"):
            if getattr(self, name) < 1:
                raise QLRError(f"{name}={getattr(self, name)} does nothing; pass at least 1")
        if not 6 <= self.alternation_bits <= 16:
            raise QLRError(f"alternation_bits={self.alternation_bits} is no number of state bits; pass 6 to 16")
        if self.downdate is not None and not 0 <= self.downdate <= 1:
            raise QLRError(f"downdate={self.downdate} is outside [0, 1]; pass a strength from 0 to 1, or None")
        if not 0 <= self.damping < float("inf"):
            raise QLRError(f"damping={self.damping} is no fraction; pass 0 or more, e.g. 0.01")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise QLRError(f"{name}={getattr(self, name)!r} is not known; pass {' or '.join(map(repr, allowed))}")

    @property
    def first_bits(self) -> int:
        """State bits of the alternation: fewer than `state_bits` where that spares much.

        Example:
            >>> SolverConfig(state_bits=12).first_bits, SolverConfig(state_bits=10).first_bits
            (8, 10)
        """
        return self.alternation_bits if self.state_bits >= self.alternation_bits + 4 else self.state_bits

    @classmethod
    def make(cls, options: Mapping[str, Any], preset: str | None = None) -> SolverConfig:
        """From keyword options, over those of a preset; what is unknown is refused by name.

        Example:
            >>> SolverConfig.make({"inner": 50}, preset="paper").iterations
            15
        """
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise QLRError(f"{name!r} is not a solver option; pass one of {', '.join(sorted(known))}")
        if preset is not None and preset not in PRESETS:
            raise QLRError(f"preset {preset!r} is not known; pass one of {', '.join(map(repr, PRESETS))}, or leave it out")
        return cls(**{**(PRESETS[preset] if preset else {}), **options})


# "paper": CALDERA as published (arXiv 2405.18886, algorithms 1 and 2 and section 5): low-rank first, LDLQ on the residual,
# 15 outer and 10 inner iterations, plain rounding with one scale a matrix, damping 1e-2, best iterate kept, all iterations run.
# Only the full SVD is replaced, by the subspace iteration. Its quantizers are e8-2 and e8-4; downdate=1 is its Hessian update.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "iterations": 15,
        "inner": 10,
        "subspace_steps": 8,
        "start": "low-rank",
        "damping": 1e-2,
        "downdate": 0.0,
        "factor_rounding": "plain",
        "factor_scales": "matrix",
        "backbone_scale": "rms",
        "tolerance": 0.0,
        "alternation_bits": 16,
    }
}
