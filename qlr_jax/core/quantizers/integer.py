"""Integers with a scale a group: `int-4g32`, `int-3g128a`; whole rows where no group is written."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from qlr_jax.core.packing import pack_stream, stream_bytes, unpack_stream
from qlr_jax.core.quantizers.base import Arrays, QParams, Traced
from qlr_jax.core.quantizers.groups import check_group, group_count, least_error, split, spread
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError


@dataclass(frozen=True)
class Integer:
    """`int-b[g<group>][a]`: value = scale · q, q in [−2^(b−1), 2^(b−1)), or scale · (u − zero), u in [0, 2^b), asymmetric.

    At one symmetric bit the two values are ± scale / 2. Scales are fp16 and searched for the least squared error, zeros uint8.

    Example:
        >>> from qlr_jax.core.quantizers.base import stored_bytes
        >>> stored_bytes(Integer(4, 32), 2, 64)   # 64 bytes of codes, 4 scales
        72
    """

    width: int
    group: int = 0  # 0: one scale a row
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 8:
            raise QLRError(f"int-{self.width} is not offered; pass 1 to 8 bits, e.g. int-4g32")
        check_group(self.group)

    @property
    def name(self) -> str:
        return f"int-{self.width}" + (f"g{self.group}" if self.group else "") + ("a" if self.asymmetric else "")

    @property
    def bits(self) -> float:
        return float(self.width)

    @property
    def unit_scale(self) -> bool:
        return False

    @property
    def tile(self) -> tuple[int, int]:
        return 1, 1

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        groups = group_count(cols, self.group)
        arrays = {
            "codes": ((rows, stream_bytes(cols, self.width)), np.dtype(np.uint8)),
            "scales": ((rows, groups), np.dtype(np.float16)),
        }
        return arrays | ({"zeros": ((rows, groups), np.dtype(np.uint8))} if self.asymmetric else {})

    def _round(self, x: Array, scale: Array, zero: Array) -> Array:
        safe = jnp.where(scale > 0, scale, 1.0)
        return jnp.clip(jnp.round(x / safe + zero), 0, 2**self.width - 1)

    @property
    def _middle(self) -> float:
        return 0.5 if self.width == 1 else float(2 ** (self.width - 1))

    def fit_qparams(self, x: Float[Array, "*b rows cols"], per_row: bool) -> QParams:
        parts = split(x, self.group)
        if self.asymmetric:
            low, high = jnp.minimum(parts.min(-1), 0.0), jnp.maximum(parts.max(-1), 0.0)
            full, zero_at = (high - low) / (2**self.width - 1), -low
        else:
            low = high = None
            full, zero_at = jnp.abs(parts).max(-1) / max(self._middle - 0.5, 0.5), None
        shrinks = np.linspace(0.35, 1.0, 27)
        if zero_at is None and self.width > 1:  # up to where the largest weight is met exactly, though it be positive
            top = (self._middle - 0.5) / (self._middle - 1.0)
            shrinks = np.append(shrinks, [(1 + top) / 2, top])

        def attempt(shrink: Array) -> tuple[Array, QParams]:
            scale = (full * shrink).astype(jnp.float16).astype(jnp.float32)
            if zero_at is None:
                zero = jnp.full_like(full, self._middle)
            else:
                safe = jnp.where(scale > 0, scale, 1.0)
                zero = jnp.clip(jnp.round(zero_at * shrink / safe), 0, 2**self.width - 1)
            q = self._round(parts, scale[..., None], zero[..., None])
            return (q - zero[..., None]) * scale[..., None], (scale, zero)

        return least_error(parts, (full, jnp.full_like(full, self._middle)), shrinks, attempt)

    def broadcast_qparams(self, scales: QParams, cols: int) -> QParams:
        return tuple(spread(s, self.group, cols) for s in scales)

    def covering_radius(self, scales: QParams, cols: int) -> Array:
        """Half a step, (rows, cols): what rounding to nearest can miss inside the grid."""
        return self.broadcast_qparams(scales, cols)[0] / 2

    def static(self) -> Integer:
        return self

    def traced(self) -> Traced:
        return ()

    def round_block(self, x: Array, qparams: QParams, traced: Traced, transposed: bool) -> tuple[Array, Array]:
        scale, zero = qparams
        q = self._round(x, scale, zero)
        return (q - zero) * scale, q.astype(jnp.uint8)

    def pack(self, codes: np.ndarray, scales: QParams) -> dict[str, np.ndarray]:
        scale, zero = (np.asarray(s) for s in scales)
        arrays = {"codes": pack_stream(np.asarray(codes), self.width), "scales": scale.astype(np.float16)}
        return arrays | ({"zeros": zero.astype(np.uint8)} if self.asymmetric else {})

    def stored_qparams(self, arrays: Arrays) -> QParams:
        scale = jnp.asarray(arrays["scales"]).astype(jnp.float32)
        return scale, jnp.asarray(arrays["zeros"]).astype(jnp.float32) if self.asymmetric else jnp.full_like(scale, self._middle)

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        q = unpack_stream(arrays["codes"], self.width, cols).astype(jnp.float32)
        scale, zero = self.broadcast_qparams(self.stored_qparams(arrays), cols)
        return (q - zero) * scale
