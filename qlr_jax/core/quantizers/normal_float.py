"""Normal floats with a scale a group: `nf-4g64`; levels at the quantiles of a Gaussian, zero among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np

from qlr_jax.core.packing import pack_stream, stream_bytes, unpack_stream
from qlr_jax.core.quantizers.base import Arrays, QParams, Traced
from qlr_jax.core.quantizers.groups import check_group, group_count, least_error, split, spread
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError


@lru_cache
def levels(bits: int) -> np.ndarray:
    """The 2^bits levels in [−1, 1]: equally likely quantiles of a Gaussian, 0 exactly, one more above it than below.

    With p = 1 − (1/2^(b+1) + 1/(2^(b+1) − 2)) / 2 the positive levels are Φ⁻¹ at 2^(b−1) + 1 equal steps from ½ to p, the
    negative ones at 2^(b−1) steps from ½ to 1 − p, all over the largest (NF4 of QLoRA, arXiv 2305.14314, section 3, any width).

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
class NormalFloat:
    """`nf-b[g<group>]`: value = scale · level, b from 2 to 4; fp16 scales searched for the least squared error.

    Example:
        >>> from qlr_jax.core.quantizers.base import stored_bytes
        >>> stored_bytes(NormalFloat(4, 64), 2, 64)   # 64 bytes of codes, 2 scales
        68
    """

    width: int
    group: int = 0  # 0: one scale a row

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 4:
            raise QLRError(f"nf-{self.width} is not offered; pass 2 to 4 bits, e.g. nf-4g64")
        check_group(self.group)

    @property
    def name(self) -> str:
        return f"nf-{self.width}" + (f"g{self.group}" if self.group else "")

    @property
    def bits(self) -> float:
        return float(self.width)

    unit_scale = False
    tile = (1, 1)

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {
            "codes": ((rows, stream_bytes(cols, self.width)), np.dtype(np.uint8)),
            "scales": ((rows, group_count(cols, self.group)), np.dtype(np.float16)),
        }

    def _round(self, x: Array, scale: Array) -> Array:
        table = levels(self.width)
        scaled = x / jnp.where(scale > 0, scale, 1.0)
        return jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), scaled, method="compare_all")

    def _values(self, codes: Array, scale: Array) -> Array:
        return jnp.asarray(levels(self.width))[codes] * scale

    def fit_qparams(self, x: Float[Array, "*b rows cols"], per_row: bool) -> QParams:
        parts = split(x, self.group)
        full = jnp.max(jnp.abs(parts), axis=-1)

        def attempt(shrink: Array) -> tuple[Array, QParams]:
            scale = (full * shrink).astype(jnp.float16).astype(jnp.float32)
            return self._values(self._round(parts, scale[..., None]), scale[..., None]), (scale,)

        return least_error(parts, (full,), np.linspace(0.35, 1.0, 27), attempt)

    def broadcast_qparams(self, scales: QParams, cols: int) -> QParams:
        return (spread(scales[0], self.group, cols),)

    def covering_radius(self, scales: QParams, cols: int) -> Array:
        """Half of the widest gap, (rows, cols): what rounding to nearest can miss inside the grid."""
        return self.broadcast_qparams(scales, cols)[0] * float(np.diff(levels(self.width)).max() / 2)

    def static(self) -> NormalFloat:
        return self

    def traced(self) -> Traced:
        return ()

    def round_block(self, x: Array, qparams: QParams, traced: Traced, transposed: bool) -> tuple[Array, Array]:
        codes = self._round(x, qparams[0])
        return self._values(codes, qparams[0]), codes.astype(jnp.uint8)

    def pack(self, codes: np.ndarray, scales: QParams) -> dict[str, np.ndarray]:
        return {
            "codes": pack_stream(np.asarray(codes), self.width),
            "scales": np.asarray(scales[0]).astype(np.float16),
        }

    def stored_qparams(self, arrays: Arrays) -> QParams:
        return (jnp.asarray(arrays["scales"]).astype(jnp.float32),)

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        codes = unpack_stream(arrays["codes"], self.width, cols)
        return self._values(codes, spread(self.stored_qparams(arrays)[0], self.group, cols))
