"""A trellis whose rate changes along the columns of a matrix: more bits where, by the metric of the inputs, errors cost more.

With feedback a rounding leaves Σ_j tr(D_j) σ² e(b_j), D_j the blocks of the LDLᵀ factor of H and e(b) ≈ 4^−b the error of the code
on a unit Gaussian. For a mean rate, the bits of segments of columns follow by giving each sixteenth of a bit to where it takes most
off (reverse water-filling; Cover and Thomas, Elements of Information Theory, section 10.3.3). What is stored are cells of rows and
columns, each a backbone of its own rate, so that one decoder serves; a rate is a byte.

Rates that follow G along the rows as well lose a tenth less by tr(G E H Eᵀ) and more by KL: on a real model 8 % more than one rate,
where columns alone lose 5 % less (benchmarks/RESULTS.md): G is too coarsely known for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlr_jax.core.quantizers.base import Arrays, QParams, Traced
from qlr_jax.core.quantizers.search import LENGTH, MOST_BITS, code_values, search
from qlr_jax.core.quantizers.trellis import Trellis, rate_gain
from qlr_jax.core.typing import Array, Float

SEGMENTS = 8  # of rows, and of columns, at most: more of them gain next to nothing
LEAST, MOST = 16, 16 * MOST_BITS  # rates, in sixteenths of a bit
_NAME = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)w")
_RATES = np.arange(LEAST, MOST + 1)
_SHIFTS = np.diff(np.arange(LENGTH + 1) * _RATES[:, None] // 16).astype(np.int32)
_GAINS = np.array([rate_gain(r / 16) for r in _RATES], np.float32)


def bounds(tiles: int) -> np.ndarray:
    """Where the segments of so many rows or columns of tiles begin and end.

    Example:
        >>> bounds(20).tolist(), bounds(3).tolist()
        ([0, 2, 5, 7, 10, 12, 15, 17, 20], [0, 1, 2, 3])
    """
    count = min(SEGMENTS, tiles)
    return np.arange(count + 1) * tiles // count


def cell_rates(costs: Float[np.ndarray, "cells"], sizes: np.ndarray, mean: int, state_bits: int) -> np.ndarray:
    """Rates, in sixteenths of a bit, that minimise Σ cost e(rate) under Σ size · rate ≤ Σ size · mean.

    Args:
        costs: of each cell what a unit error in all of it costs.
        sizes: tiles of each.
        mean: rate, in sixteenths.
        state_bits: of the trellis.

    Example:
        >>> cell_rates(np.array([4.0, 1.0]), np.array([2, 2]), 32, 8).tolist()
        [41, 23]
    """
    return LEAST + _path(tuple(costs.tolist()), tuple(sizes.tolist()), state_bits)[mean - LEAST].astype(np.int32)


@lru_cache(maxsize=1024)
def _path(costs: tuple[float, ...], sizes: tuple[int, ...], state_bits: int) -> np.ndarray:
    """Sixteenths above the least rate for every mean rate, (means, cells): each goes to where a tile gains most by it."""
    wide = np.array(sizes)
    # the curve was measured, and is convex but for noise: a step is taken no later than those after it
    falls = np.minimum.accumulate(-np.diff(_errors(state_bits)))
    gains = np.array(costs)[:, None] * falls / wide[:, None]
    cell = np.argsort(-gains, axis=None, kind="stable") // len(falls)
    taken = np.cumsum(wide[cell])
    counts = np.searchsorted(taken, np.arange(MOST - LEAST + 1) * wide.sum(), side="right")
    return np.array([np.bincount(cell[:count], minlength=len(wide)) for count in counts], np.uint8)


@lru_cache
def _errors(state_bits: int) -> np.ndarray:
    """The code's error on a unit Gaussian at every rate from LEAST to MOST."""
    return np.array([Trellis(Fraction(int(r), 16), state_bits=state_bits).gaussian_error() for r in _RATES])


@dataclass(frozen=True)
class Cell:
    """Some rows and columns of tiles, which share a rate.

    Attributes:
        rate: in sixteenths of a bit.
        rows, cols: which tiles.
        start: where its bytes begin in those of each row of tiles; row: where the first of these begins.
        stride: bytes of all cells' tiles in such a row.
    """

    rate: int
    rows: slice
    cols: slice
    row: int
    start: int
    stride: int


def cells(rates: np.ndarray, down: int, across: int) -> list[Cell]:
    """The cells of a matrix of so many tiles, in the order in which they are stored: row of tiles by row of tiles.

    Args:
        rates: in sixteenths, (segments of rows, segments of columns).
        down, across: rows and columns of tiles.
    """
    tall, wide, row, found = bounds(down), bounds(across), 0, []
    for own, top, bottom in zip(rates.tolist(), tall[:-1].tolist(), tall[1:].tolist(), strict=True):
        sizes = 2 * np.array(own) * np.diff(wide)
        starts, stride = np.cumsum(sizes) - sizes, int(sizes.sum())
        for rate, left, right, start in zip(own, wide[:-1].tolist(), wide[1:].tolist(), starts.tolist(), strict=True):
            found.append(Cell(rate, slice(top, bottom), slice(left, right), row, start, stride))
        row += (bottom - top) * stride
    return found


@dataclass(frozen=True)
class SegmentedTrellis(Trellis):
    """`trellis-<b>w`: as `trellis-<b>`, b the mean of the rates of at most 8 × 8 cells.

    Example:
        >>> SegmentedTrellis(Fraction(9, 4)).name
        'trellis-2.25w'
    """

    examples = ("trellis-1w", "trellis-2.25w", "trellis-4w")
    follows_metric = True
    runtime_version = 11

    @classmethod
    def parse(cls, text: str) -> SegmentedTrellis | None:
        match = _NAME.fullmatch(text.partition("-")[2])
        return cls(Fraction(match[1])) if match else None

    @property
    def name(self) -> str:
        return f"{super().name}w"

    @property
    def needs_runtime(self) -> int:
        return self.runtime_version

    @property
    def sixteenths(self) -> int:
        """The mean rate."""
        return int(self.rate * 16)

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        (down, across), byte = self.tiles(rows, cols), np.dtype(np.uint8)
        segments = min(SEGMENTS, down), min(SEGMENTS, across)
        return {"codes": ((2 * down * across * self.sixteenths,), byte), "rates": (segments, byte)}

    def traced(self) -> Traced:
        return ()

    def fit_qparams(self, x: Array, per_row: bool, unit: Array | None = None) -> QParams:
        """The scale of the whole, and the mean rate everywhere: where metrics are known, `metric_qparams` takes its place."""
        rows, cols = (-(-size // unit) * unit for size, unit in zip(x.shape[-2:], self.tile, strict=True))
        return (*super().fit_qparams(x, per_row, unit), jnp.full((*x.shape[:-2], rows, cols), self.sixteenths, jnp.uint8))

    def metric_qparams(self, inputs: np.ndarray, outputs: np.ndarray) -> QParams:
        height, width = self.tile
        found = [self._rates(*own) for own in zip(inputs, outputs, strict=True)]
        tall, wide = (np.diff(bounds(spread.shape[1])) for spread in (outputs, inputs))
        each: Any = np.array([np.repeat(np.repeat(r, tall * height, axis=0), wide * width, axis=1) for r in found], np.uint8)
        return (each,)

    def relative_gain(self, inputs: np.ndarray, outputs: np.ndarray) -> float:
        rates, errors = self._rates(inputs, outputs), _errors(self.state_bits)
        costs = self._costs(inputs, outputs)
        return float(np.sum(costs * errors[rates - LEAST]) / costs.sum() / errors[self.sixteenths - LEAST])

    def _costs(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """What a unit error in each cell costs by H, (segments of rows, segments of columns); rows cost alike."""
        of_columns = np.add.reduceat(inputs.astype(np.float64), bounds(len(inputs))[:-1])
        return np.maximum(np.outer(np.diff(bounds(len(outputs))), of_columns), 1e-30)

    def _rates(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Of the cells, (segments of rows, segments of columns), by tr(D_H) of every column of tiles."""
        costs = self._costs(inputs, outputs)
        sizes = np.outer(np.diff(bounds(len(outputs))), np.diff(bounds(len(inputs))))
        return cell_rates(costs.ravel(), sizes.ravel(), self.sixteenths, self.state_bits).reshape(costs.shape)

    def round_block(
        self, x: Float[Array, "*b m c"], qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        height = self.tile_rows
        scale, rates = qparams
        lead, rows = x.shape[:-2], x.shape[-2]

        def of_tiles(array: Array) -> Array:
            return jnp.broadcast_to(array, x.shape)[..., ::height, 0].reshape(-1)

        blocks = (x / jnp.where(scale > 0, scale, 1.0)).reshape(-1, LENGTH)
        own = of_tiles(rates).astype(jnp.int32) - LEAST
        shifts, gains = jnp.asarray(_SHIFTS), jnp.asarray(_GAINS)
        states = search(blocks, shifts, self.state_bits, gains, None if warm is None else of_tiles(warm), own)
        values = code_values(states, gains[own][:, None]).reshape(x.shape)
        return values * scale, states.astype(jnp.uint16).reshape(*lead, rows // height, LENGTH)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        codes, rates = np.asarray(codes), self.segments(np.asarray(qparams[0]))
        down, across = codes.shape[:2]
        packed = np.zeros(2 * down * across * self.sixteenths, np.uint8)
        for cell in cells(rates, down, across):
            own = self._grid(cell.rate).pack(codes[cell.rows, cell.cols], ())["codes"]
            self._bytes(packed, cell)[:] = own.reshape(len(own), -1)
        return {"codes": packed, "rates": rates}

    def segments(self, rates: np.ndarray) -> np.ndarray:
        """The rates as they are stored, one a cell, of those of every weight, (1, rows, cols) or (rows, cols) in whole tiles."""
        each = rates.reshape(rates.shape[-2:])[:: self.tile[0], :: self.tile[1]]
        return each[np.ix_(*(bounds(count)[:-1] for count in each.shape))].astype(np.uint8)

    def _grid(self, rate: int) -> Trellis:
        return Trellis(Fraction(rate, 16), self.tile_rows, self.state_bits)

    def _bytes(self, stream: np.ndarray, cell: Cell) -> np.ndarray:
        """A view of a cell's bytes, (rows of tiles, bytes)."""
        count, size = cell.rows.stop - cell.rows.start, 2 * cell.rate * (cell.cols.stop - cell.cols.start)
        own = stream[cell.row : cell.row + count * cell.stride].reshape(count, cell.stride)
        return own[:, cell.start : cell.start + size]

    def stored_qparams(self, arrays: Arrays, shape: tuple[int, int]) -> QParams:
        down, across = self.tiles(*shape)
        tall, wide = (np.diff(bounds(count)) * unit for count, unit in zip((down, across), self.tile, strict=True))
        return (jnp.asarray(np.repeat(np.repeat(np.asarray(arrays["rates"]), tall, axis=0), wide, axis=1)),)

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        stream: Any = arrays["codes"]
        (height, width), (down, across) = self.tile, self.tiles(rows, cols)
        own: Any
        if isinstance(stream, Tracer) or isinstance(arrays["rates"], Tracer):
            return self._decode_traced(jnp.asarray(stream), jnp.asarray(arrays["rates"]), down, across)[:rows, :cols]
        host, found = np.asarray(stream), np.empty((down * height, across * width), np.float32)
        for cell in cells(np.asarray(arrays["rates"]), down, across):
            own = self._bytes(host, cell).reshape(cell.rows.stop - cell.rows.start, -1, 2 * cell.rate)
            rows_of, cols_of = (
                slice(part.start * unit, part.stop * unit) for part, unit in ((cell.rows, height), (cell.cols, width))
            )
            size = rows_of.stop - rows_of.start, cols_of.stop - cols_of.start
            found[rows_of, cols_of] = self._grid(cell.rate).decode({"codes": own}, *size)
        whole: Any = found[:rows, :cols]
        return whole if host is stream else jnp.asarray(whole)

    def _decode_traced(self, stream: Array, rates: Array, down: int, across: int) -> Array:
        """The same where rates are not known while compiling: every weight looks its three bytes up."""
        (height, width), rates = self.tile, rates.astype(jnp.int32)
        segment = [np.repeat(np.arange(len(b) - 1), np.diff(b)) for b in (bounds(down), bounds(across))]
        rate = rates[segment[0]][:, segment[1]]  # of every tile
        sizes = (2 * rate).reshape(-1)
        first = (jnp.cumsum(sizes) - sizes).reshape(rate.shape)
        start = ((np.arange(LENGTH) + 1) * rate[..., None] // 16 - self.state_bits) % (16 * rate[..., None])
        word = jnp.zeros(start.shape, jnp.int32)
        for k in range(3):
            at = first[..., None] + (start // 8 + k) % (2 * rate[..., None])
            word = word << 8 | stream[at].astype(jnp.int32)
        states = word >> (24 - start % 8 - self.state_bits) & (2**self.state_bits - 1)
        values = code_values(states, jnp.asarray(_GAINS)[rate - LEAST][..., None])
        return values.reshape(down, across, height, width).swapaxes(1, 2).reshape(down * height, across * width)


__all__ = ["SEGMENTS", "SegmentedTrellis", "bounds", "cell_rates", "cells"]
