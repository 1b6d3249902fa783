"""Integers with a scale a group: `int-4g32`, `int-3g128a`; whole rows where no group is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from qlr_jax.core.quantizers.base import Arrays, QParams
from qlr_jax.core.quantizers.scalar import ScalarGrid, check_group, divided, grid_name, group_count, parse_grid_name
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError
from qlr_jax.native.product import Format, Kind


@dataclass(frozen=True)
class Integer(ScalarGrid):
    """`int-b[g<group>][a]`: value = scale · q, q in [−2^(b−1), 2^(b−1)), or scale · (u − zero), u in [0, 2^b), asymmetric.

    At one symmetric bit the two values are ± scale / 2. Scales are fp16 and searched for the least squared error, zeros uint8.

    Attributes:
        width: b, 1 to 8.
        group: weights that share a scale, 16 to 256; 0: a row.
        asymmetric: whether a zero point is stored beside each scale.

    Raises:
        QLRError: a width or group that is not offered.

    Example:
        >>> from qlr_jax.core.quantizers.base import stored_bytes
        >>> stored_bytes(Integer(4, 32), 2, 64)   # 64 bytes of codes, 4 scales
        72
    """

    width: int
    group: int = 0
    asymmetric: bool = False

    examples = ("int-1", "int-3", "int-4g16", "int-5g32a", "int-8a")
    usage = "int-<1..8>[g<group>][a]"

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 8:
            raise QLRError(f"int-{self.width} is not offered; pass 1 to 8 bits, e.g. int-4g32")
        check_group(self.group)

    @classmethod
    def parse(cls, text: str) -> Integer | None:
        parts = parse_grid_name(text)
        return cls(*parts) if parts else None

    @property
    def name(self) -> str:
        return grid_name("int", self.width, self.group, self.asymmetric)

    @property
    def middle(self) -> float:
        return 0.5 if self.width == 1 else float(2 ** (self.width - 1))

    @property
    def top(self) -> float:
        return max(self.middle - 0.5, 0.5)

    @property
    def shrinks(self) -> np.ndarray:
        shrinks = super().shrinks
        if not self.asymmetric and self.width > 1:  # up to where the largest weight is met exactly, though it be positive
            top = (self.middle - 0.5) / (self.middle - 1.0)
            shrinks = np.append(shrinks, [(1 + top) / 2, top])
        return shrinks

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        zeros = {"zeros": ((rows, group_count(cols, self.group)), np.dtype(np.uint8))} if self.asymmetric else {}
        return super().stored(rows, cols) | zeros

    def candidates(self, parts: Array) -> tuple[QParams, Callable[[Array], QParams]]:
        if not self.asymmetric:
            (full,), scale_at = super().candidates(parts)
            middle = jnp.full_like(full, self.middle)
            return (full, middle), lambda shrink: (*scale_at(shrink), middle)
        low, high = jnp.minimum(parts.min(-1), 0.0), jnp.maximum(parts.max(-1), 0.0)
        full, last = (high - low) / (2**self.width - 1), 2**self.width - 1

        def at(shrink: Array) -> QParams:
            scale = self.cast_scales(full * shrink).astype(jnp.float32)
            return scale, jnp.clip(jnp.round(divided(-low * shrink, scale)), 0, last)

        return (full, jnp.full_like(full, self.middle)), at

    def covering_radius(self, qparams: QParams, cols: int) -> Array:
        """Half a step, (rows, cols): what rounding to nearest can miss inside the grid."""
        return self.broadcast_qparams(qparams, cols)[0] / 2

    def to_codes(self, x: Array, scale: Array, zero: Array) -> Array:
        return jnp.clip(jnp.round(divided(x, scale) + zero), 0, 2**self.width - 1)

    def from_codes(self, codes: Array, scale: Array, zero: Array) -> Array:
        return (codes.astype(jnp.float32) - zero) * scale

    def native_format(self, rows: int, cols: int) -> Format | None:
        return self.grouped_format(Kind.INTEGER, cols, zero=self.middle)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        zeros = {"zeros": np.asarray(qparams[1]).astype(np.uint8)} if self.asymmetric else {}
        return super().pack(codes, qparams) | zeros

    def stored_qparams(self, arrays: Arrays, shape: tuple[int, int]) -> QParams:
        (scale,) = super().stored_qparams(arrays, shape)
        return scale, jnp.asarray(arrays["zeros"]).astype(jnp.float32) if self.asymmetric else jnp.full_like(scale, self.middle)
