"""A trellis whose rate changes along the columns of a matrix: more bits where, by the metric of the inputs, errors cost more.

With feedback a rounding leaves Σ_j tr(D_j) σ² e(b_j), D_j the blocks of the LDLᵀ factor of H and e(b) ≈ 4^−b the error of the code
on a unit Gaussian. For a mean rate, the bits of segments of columns follow by giving each sixteenth of a bit to where it takes most
off (reverse water-filling; Cover and Thomas, Elements of Information Theory, section 10.3.3). A segment is a backbone of its own
rate; the rates are stored, a byte each.

Rates that follow G along the rows as well lose a tenth less by tr(G E H Eᵀ), and raised the KL of a real model
(benchmarks/RESULTS.md): G is too coarsely known for it.
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

SEGMENTS = 8  # of columns, at most: more of them gain next to nothing
LEAST, MOST = 16, 16 * MOST_BITS  # rates, in sixteenths of a bit
_NAME = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)w")
_RATES = np.arange(LEAST, MOST + 1)
_SHIFTS = np.diff(np.arange(LENGTH + 1) * _RATES[:, None] // 16).astype(np.int32)
GAINS = np.array([rate_gain(r / 16) for r in _RATES], np.float32)


def bounds(tiles: int) -> np.ndarray:
    """Where the segments of so many columns of tiles begin and end.

    Example:
        >>> bounds(20).tolist(), bounds(3).tolist()
        ([0, 2, 5, 7, 10, 12, 15, 17, 20], [0, 1, 2, 3])
    """
    count = min(SEGMENTS, tiles)
    return np.arange(count + 1) * tiles // count


def water_filled(costs: Float[np.ndarray, "segments"], sizes: np.ndarray, mean: int, state_bits: int) -> np.ndarray:
    """Rates, in sixteenths of a bit, that minimise Σ cost e(rate) under Σ size · rate ≤ Σ size · mean.

    Args:
        costs: of each segment what a unit error in all of it costs.
        sizes: tiles of each.
        mean: rate, in sixteenths.
        state_bits: of the trellis.

    Example:
        >>> water_filled(np.array([4.0, 1.0]), np.array([2, 2]), 32, 8).tolist()
        [41, 23]
    """
    return LEAST + _path(tuple(costs.tolist()), tuple(sizes.tolist()), state_bits)[mean - LEAST].astype(np.int32)


@lru_cache(maxsize=1024)
def _path(costs: tuple[float, ...], sizes: tuple[int, ...], state_bits: int) -> np.ndarray:
    """Sixteenths above the least rate for every mean rate, (means, segments): each goes to where a tile gains most by it."""
    wide = np.array(sizes)
    # the curve was measured, and is convex but for noise: a step is taken no later than those after it
    falls = np.minimum.accumulate(-np.diff(_errors(state_bits)))
    gains = np.array(costs)[:, None] * falls / wide[:, None]
    segment = np.argsort(-gains, axis=None, kind="stable") // len(falls)
    taken = np.cumsum(wide[segment])
    counts = np.searchsorted(taken, np.arange(MOST - LEAST + 1) * wide.sum(), side="right")
    return np.array([np.bincount(segment[:count], minlength=len(wide)) for count in counts], np.uint8)


@lru_cache
def _errors(state_bits: int) -> np.ndarray:
    """The code's error on a unit Gaussian at every rate from LEAST to MOST."""
    return np.array([Trellis(Fraction(int(r), 16), state_bits=state_bits).gaussian_error() for r in _RATES])


@dataclass(frozen=True)
class Segment:
    """Some columns of tiles, which share a rate.

    Attributes:
        rate: in sixteenths of a bit.
        cols: which columns of tiles.
        bytes: which of those that a row of tiles takes.
    """

    rate: int
    cols: slice
    bytes: slice


def segments(rates: np.ndarray, across: int) -> list[Segment]:
    """Of a matrix of so many columns of tiles, with rates in sixteenths of a bit.

    Example:
        >>> segments(np.array([32, 16]), 2)[1]
        Segment(rate=16, cols=slice(1, 2, None), bytes=slice(64, 96, None))
    """
    edges, found, start = bounds(across).tolist(), [], 0
    for rate, left, right in zip(rates.tolist(), edges[:-1], edges[1:], strict=True):
        stop = start + 2 * rate * (right - left)
        found.append(Segment(rate, slice(left, right), slice(start, stop)))
        start = stop
    return found


@dataclass(frozen=True)
class SegmentedTrellis(Trellis):
    """`trellis-<b>w`: as `trellis-<b>`, b the mean of the rates of at most 8 segments of columns.

    Example:
        >>> SegmentedTrellis(Fraction(9, 4)).name
        'trellis-2.25w'
    """

    examples = ("trellis-1w", "trellis-2.25w", "trellis-4w")
    follows_metric = True
    runtime_version = 12

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
        return {"codes": ((down, 2 * across * self.sixteenths), byte), "rates": ((min(SEGMENTS, across),), byte)}

    def traced(self) -> Traced:
        return ()

    def fit_qparams(self, x: Array, per_row: bool, unit: Array | None = None) -> QParams:
        """The scale of the whole, and the mean rate everywhere: where H is known, `metric_qparams` takes its place."""
        cols = self.tiles(*x.shape[-2:])[1] * self.tile[1]
        return (*super().fit_qparams(x, per_row, unit), jnp.full((*x.shape[:-2], 1, cols), self.sixteenths, jnp.uint8))

    def metric_qparams(self, spread: np.ndarray) -> QParams:
        each: Any = np.stack([self._of_columns(self._rates(own), len(own)) for own in spread])
        return (each,)

    def relative_gain(self, spread: np.ndarray) -> float:
        costs, errors = self._costs(spread), _errors(self.state_bits)
        return float(np.sum(costs * errors[self._rates(spread) - LEAST]) / costs.sum() / errors[self.sixteenths - LEAST])

    def _costs(self, spread: np.ndarray) -> np.ndarray:
        """What a unit error in each segment costs by H."""
        return np.maximum(np.add.reduceat(spread.astype(np.float64), bounds(len(spread))[:-1]), 1e-30)

    def _rates(self, spread: np.ndarray) -> np.ndarray:
        """Of the segments, by tr(D_j) of every column of tiles."""
        return water_filled(self._costs(spread), np.diff(bounds(len(spread))), self.sixteenths, self.state_bits)

    def _of_columns(self, rates: np.ndarray, across: int) -> np.ndarray:
        """The rate of every column of so many columns of tiles, (1, cols)."""
        return np.repeat(rates.astype(np.uint8), np.diff(bounds(across)) * self.tile[1])[None]

    def round_block(
        self, x: Float[Array, "*b m c"], qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        height = self.tile_rows
        (scale, rates), (*lead, rows, _) = qparams, x.shape
        blocks = (x / jnp.where(scale > 0, scale, 1.0)).reshape(-1, LENGTH)
        ends = None if warm is None else jnp.broadcast_to(warm, x.shape)[..., ::height, 0].reshape(-1)
        # a block of columns has one rate in each matrix
        codes = jnp.broadcast_to(rates[..., 0, 0], tuple(lead)).reshape(-1).astype(jnp.int32) - LEAST
        gains = jnp.asarray(GAINS)
        states = search(blocks, jnp.asarray(_SHIFTS), self.state_bits, gains, ends, codes)
        values = code_values(states, jnp.repeat(gains[codes], rows // height)[:, None]).reshape(x.shape)
        return values * scale, states.astype(jnp.uint16).reshape(*lead, rows // height, LENGTH)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        codes = np.asarray(codes)
        down, across = codes.shape[:2]
        rates = np.asarray(qparams[0]).reshape(-1)[:: self.tile[1]][bounds(across)[:-1]].astype(np.uint8)
        packed = np.zeros((down, 2 * across * self.sixteenths), np.uint8)  # what the rates leave over is zero
        for segment in segments(rates, across):
            packed[:, segment.bytes] = self._grid(segment.rate).pack(codes[:, segment.cols], ())["codes"].reshape(down, -1)
        return {"codes": packed, "rates": rates}

    def _grid(self, rate: int) -> Trellis:
        return Trellis(Fraction(rate, 16), self.tile_rows, self.state_bits)

    def stored_qparams(self, arrays: Arrays, shape: tuple[int, int]) -> QParams:
        return (jnp.asarray(self._of_columns(np.asarray(arrays["rates"]), self.tiles(*shape)[1])),)

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        stream: Any = arrays["codes"]
        (height, width), (down, across) = self.tile, self.tiles(rows, cols)
        own: Any
        if isinstance(stream, Tracer) or isinstance(arrays["rates"], Tracer):
            return self._decode_traced(jnp.asarray(stream), jnp.asarray(arrays["rates"]), down, across)[:rows, :cols]
        host, rates, found = np.asarray(stream), np.asarray(arrays["rates"]), np.empty((down * height, across * width), np.float32)
        for segment in segments(rates, across):
            left, right = segment.cols.start * width, segment.cols.stop * width
            own = host[:, segment.bytes].reshape(down, -1, 2 * segment.rate)
            found[:, left:right] = self._grid(segment.rate).decode({"codes": own}, down * height, right - left)
        whole: Any = found[:rows, :cols]
        return whole if host is stream else jnp.asarray(whole)

    def _decode_traced(self, stream: Array, rates: Array, down: int, across: int) -> Array:
        """The same where rates are not known while compiling: every weight looks its three bytes up."""
        height, width = self.tile
        rate = jnp.repeat(rates.astype(jnp.int32), np.diff(bounds(across)), total_repeat_length=across)  # of every column of tiles
        sizes = 2 * rate
        first = jnp.cumsum(sizes) - sizes
        start = ((np.arange(LENGTH) + 1) * rate[..., None] // 16 - self.state_bits) % (16 * rate[..., None])
        word = jnp.zeros((down, *start.shape), jnp.int32)
        for k in range(3):
            at = first[..., None] + (start // 8 + k) % sizes[..., None]
            word = word << 8 | stream[:, at].astype(jnp.int32)
        states = word >> (24 - start % 8 - self.state_bits) & (2**self.state_bits - 1)
        values = code_values(states, jnp.asarray(GAINS)[rate - LEAST][..., None])
        return values.reshape(down, across, height, width).swapaxes(1, 2).reshape(down * height, across * width)


__all__ = ["SEGMENTS", "Segment", "SegmentedTrellis", "bounds", "segments", "water_filled"]
