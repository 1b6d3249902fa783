"""What every quantizer offers; the solver and the matrix know no more than this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from qlr_jax.core.typing import Array

Arrays = Mapping[str, Array]
QParams = tuple[Array, ...]  # scale, and zero point where there is one
Traced = tuple[Array, ...]


class Quantizer(Protocol):
    """A grid for matrices (rows, cols), with its codes, its scales and its stored bytes.

    `fit_qparams` chooses scales for a batch (*b, rows, cols); `broadcast_qparams` spreads them so that they broadcast against
    it and can be sliced along columns; `round_block` rounds some columns; `pack` turns one matrix's codes and scales into the
    arrays that are stored, `decode` reads them. A `unit_scale` quantizer stores no scale of its own: it decodes to unit
    variance and the matrix that holds it keeps the scale. Factors are stored one row a component, so L is rounded as the
    transpose of what is stored: there `round_block` is given transposed=True and transposed qparams. Where a code has a covering
    radius, `covering_radius(scales, cols)` says how far a tile's nearest value can be, and solutions carry a bound.
    """

    @property
    def name(self) -> str:
        """As a spec writes it, e.g. `int-4g32`."""
        ...

    @property
    def bits(self) -> float:
        """Bits a weight, side data not counted."""
        ...

    @property
    def unit_scale(self) -> bool: ...

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, cols) that are rounded together; whole tiles are stored, so edges are padded."""
        ...

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, dtype) of every array that is stored for a matrix: its exact bytes."""
        ...

    def fit_qparams(self, x: Array, per_row: bool) -> QParams:
        """Scales for (*b, rows, cols); `per_row` asks a unit quantizer for one a row instead of one a matrix."""
        ...

    def broadcast_qparams(self, scales: QParams, cols: int) -> QParams: ...

    def static(self) -> Quantizer:
        """The quantizer less what `traced` carries: hashable, a static argument of the compiled functions."""
        ...

    def traced(self) -> Traced:
        """The parameters that differ where `static` agrees, as arrays: one compilation serves all their values."""
        ...

    def round_block(self, x: Array, qparams: QParams, traced: Traced, transposed: bool) -> tuple[Array, Array]:
        """Round columns (*b, rows, c) on their part of the grid: (values (*b, rows, c), codes)."""
        ...

    def pack(self, codes: np.ndarray, scales: QParams) -> dict[str, np.ndarray]: ...

    def stored_qparams(self, arrays: Arrays) -> QParams:
        """The scales of what is stored, as `fit` gives them; none for a unit quantizer."""
        ...

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        """The float32 matrix (rows, cols) that the stored arrays mean."""
        ...


def stored_bytes(quantizer: Quantizer, rows: int, cols: int) -> int:
    """Bytes of everything that is stored for a (rows, cols) matrix."""
    return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in quantizer.stored(rows, cols).values())
