"""The two grids that round nothing: `bf16` keeps the weights in bfloat16, `none` keeps nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qlr_jax.core.quantizers.base import Arrays, QParams, Quantizer, Traced
from qlr_jax.core.typing import Array
from qlr_jax.native.product import Format, Kind


@dataclass(frozen=True)
class BFloat16(Quantizer):
    """`bf16`: 16 bits a weight, no scale.

    Example:
        >>> values, codes = BFloat16().round_block(jnp.array([[1.001]]), (), (), False)
        >>> values.tolist(), codes.dtype.name
        ([[1.0]], 'bfloat16')
    """

    examples = ("bf16",)
    usage = "bf16"
    plain = True

    @classmethod
    def parse(cls, text: str) -> BFloat16 | None:
        return cls() if text == "bf16" else None

    @property
    def name(self) -> str:
        return "bf16"

    @property
    def bits(self) -> float:
        return 16.0

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"codes": ((rows, cols), np.dtype(ml_dtypes.bfloat16))}

    def round_block(
        self, x: Array, qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        codes = x.astype(jnp.bfloat16)
        return codes.astype(jnp.float32), codes

    def native_format(self, rows: int, cols: int) -> Format:
        return Format(Kind.BFLOAT16, count=2 * cols)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        return {"codes": np.ascontiguousarray(np.asarray(codes))}

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        return jnp.asarray(arrays["codes"]).astype(jnp.float32)


@dataclass(frozen=True)
class Nothing(Quantizer):
    """`none`: no backbone; the factors carry everything.

    Example:
        >>> Nothing().stored(4, 8), Nothing().decode({}, 1, 2).tolist()
        ({}, [[0.0, 0.0]])
    """

    examples = ("none",)
    usage = "none"
    empty = True

    @classmethod
    def parse(cls, text: str) -> Nothing | None:
        return cls() if text == "none" else None

    @property
    def name(self) -> str:
        return "none"

    @property
    def bits(self) -> float:
        return 0.0

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {}

    def round_block(
        self, x: Array, qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        return jnp.zeros_like(x), jnp.zeros(x.shape, jnp.uint8)

    def native_format(self, rows: int, cols: int) -> Format:
        return Format(Kind.NONE)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        return {}

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        zeros: Any = np.zeros((rows, cols), np.float32)
        return zeros
