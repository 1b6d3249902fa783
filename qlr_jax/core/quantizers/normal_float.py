"""Normal floats with a scale a group: `nf-4g64`; levels at the quantiles of a Gaussian, zero among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np

from qlr_jax.core.quantizers.base import QParams
from qlr_jax.core.quantizers.scalar import ScalarGrid, check_group, divided, grid_name, nearest_level, parse_grid_name
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError
from qlr_jax.native.product import Format, Kind


@lru_cache
def levels(bits: int) -> np.ndarray:
    """The 2^bits levels in [−1, 1]: equally likely quantiles of a Gaussian, 0 exactly, one more above it than below.

    With p = 1 − (1/2^(b+1) + 1/(2^(b+1) − 2)) / 2 the positive levels are Φ⁻¹ at 2^(b−1) + 1 equal steps from ½ to p, the
    negative ones at 2^(b−1) steps from ½ to 1 − p, all over the largest.

    Source: NF4 of QLoRA, arXiv 2305.14314, section 3; here for any width.

    Example:
        >>> [round(level, 4) for level in levels(2).tolist()]
        [-1.0, 0.0, 0.4358, 1.0]
    """
    half, full = 2 ** (bits - 1), 2**bits
    top = 1.0 - (1 / (2 * full) + 1 / (2 * (full - 1))) / 2

    def quantiles(count: int) -> np.ndarray:
        return np.array([NormalDist().inv_cdf(p) for p in np.linspace(0.5, top, count)])

    above, below = quantiles(half + 1), quantiles(half)
    return np.concatenate([-below[:0:-1], above]).astype(np.float32) / np.float32(above[-1])


@dataclass(frozen=True)
class NormalFloat(ScalarGrid):
    """`nf-b[g<group>]`: value = scale · level, b from 2 to 4; fp16 scales searched for the least squared error.

    Attributes:
        width: b.
        group: weights that share a scale, 16 to 256; 0: a row.

    Raises:
        QLRError: a width or group that is not offered.

    Example:
        >>> from qlr_jax.core.quantizers.base import stored_bytes
        >>> stored_bytes(NormalFloat(4, 64), 2, 64)   # 64 bytes of codes, 2 scales
        68
    """

    width: int
    group: int = 0

    examples = ("nf-2", "nf-3g16", "nf-4g32")
    usage = "nf-<2..4>[g<group>]"

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 4:
            raise QLRError(f"nf-{self.width} is not offered; pass 2 to 4 bits, e.g. nf-4g64")
        check_group(self.group)

    @classmethod
    def parse(cls, text: str) -> NormalFloat | None:
        width, group, asymmetric = parse_grid_name(text) or (0, 0, True)
        return None if asymmetric else cls(width, group)

    @property
    def name(self) -> str:
        return grid_name("nf", self.width, self.group)

    def covering_radius(self, qparams: QParams, cols: int) -> Array:
        """Half of the widest gap, (rows, cols): what rounding to nearest can miss inside the grid."""
        return self.broadcast_qparams(qparams, cols)[0] * float(np.diff(levels(self.width)).max() / 2)

    def native_format(self, rows: int, cols: int) -> Format | None:
        return self.grouped_format(Kind.LEVELS, cols, levels=tuple(levels(self.width).tolist()))

    def to_codes(self, x: Array, scale: Array) -> Array:
        return nearest_level(divided(x, scale), levels(self.width))

    def from_codes(self, codes: Array, scale: Array) -> Array:
        return jnp.asarray(levels(self.width))[codes] * scale
