"""NVFP4: floats of 4 bits (e2m1), one float8 (e4m3) scale for 16 of them, one scale for all: what Blackwell GPUs multiply.

Source: the Open Compute Project's Microscaling Formats, version 1.0, section 5.3.3 (e2m1). That the largest weight of a group often
does better on 4 than on 6: Four Over Six, arXiv 2512.02010; here a search among 43 scales does that and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qlr_jax.core.quantizers.base import root_mean_square
from qlr_jax.core.quantizers.scalar import ScalarGrid, divided, nearest_level
from qlr_jax.core.typing import Array
from qlr_jax.native.product import Format, Kind

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of codes 0 to 7; bit 3 is the sign
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
LARGEST = 448.0  # of e4m3
COVERING = 256.0  # the largest scale that just covers its group: 1.55 times as much is within e4m3, too


@dataclass(frozen=True)
class NVFP4(ScalarGrid):
    """`nvfp4`: value = scale · e2m1, scales e4m3 in units of one scale of the whole, searched for the least squared error.

    Example:
        >>> from qlr_jax.core.quantizers.base import stored_bytes
        >>> stored_bytes(NVFP4(), 2, 64)   # 64 bytes of codes, 8 scales
        72
    """

    width = 4
    group = 16
    examples = ("nvfp4",)
    usage = "nvfp4"
    unit_scale = True
    runtime_version = 6
    scale_dtype = ml_dtypes.float8_e4m3fn

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def top(self) -> float:
        return 6.0

    @property
    def shrinks(self) -> np.ndarray:
        """At 1.5 the largest weight falls on 4 instead of 6, where steps are finer: a sixth less error on a Gaussian."""
        return np.linspace(0.5, 1.55, 43)

    @classmethod
    def parse(cls, text: str) -> NVFP4 | None:
        return cls() if text == "nvfp4" else None

    def unit_of(self, x: Array, per_row: bool) -> Array:
        """A matrix's scales fill e4m3's range, with room for the largest shrink; a row, which is a component, has unit size."""
        if per_row:
            return root_mean_square(x, True)
        return jnp.abs(x).max((-2, -1), keepdims=True) * np.float32(1 / (self.top * COVERING))  # rounds alike in any batch

    def cast_scales(self, scales: Array) -> Array:
        return scales.clip(-LARGEST, LARGEST).astype(self.scale_dtype)  # beyond its range e4m3 has NaN

    def native_format(self, rows: int, cols: int) -> Format | None:
        return self.grouped_format(Kind.LEVELS, cols, levels=tuple(VALUES.tolist()))

    def to_codes(self, x: Array, scale: Array) -> Array:
        scaled = divided(x, scale)
        size = nearest_level(jnp.abs(scaled), MAGNITUDES)
        return jnp.where((scaled < 0) & (size > 0), size + 8, size)  # no negative zero

    def from_codes(self, codes: Array, scale: Array) -> Array:
        return jnp.asarray(VALUES)[codes] * scale
