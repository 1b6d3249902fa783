"""Bit-shift trellis codes with computed values, tail-biting, any rate in sixteenths of a bit.

256 weights are one closed sequence of 2^L states: state t is the L bits that end at bit ⌊(t + 1) b⌋ of a circular stream
of 256 b bits, so b bits a weight are stored, nothing else, and any weight is read from three bytes. The value of a state
is a hash of it (a sum of four bytes of an affine map, near Gaussian), so there is no table. A Viterbi search finds the
sequence that is nearest to the weights. The number of new bits may change from weight to weight (2, 2, 2, 3, … gives 2.25).

Source: QTIP, arXiv 2406.11235, section 3 (trellis quantization with computed codes); the changing number of bits is ours.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlr_jax.core.quantizers.base import DEFAULT_STATE_BITS, Arrays, QParams, Quantizer, SearchCost, Traced
from qlr_jax.core.quantizers.search import LENGTH, MOST_BITS, code_values, search, search_jit
from qlr_jax.core.quantizers.trellis_errors import ERRORS
from qlr_jax.core.typing import Array, Float, Int
from qlr_jax.errors import QLRError
from qlr_jax.native.product import Format, Kind

TILE_ROWS = (64, 32, 16)  # rows of a sequence in a backbone
FACTOR_ROWS = 4  # at most, in a factor
_RATE = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
# By state bits: time of a search in a solve, over that with 12, and the part of it that all cores work at.
SEARCH = {6: 0.03, 8: 0.07, 10: 0.3, 12: 1.0, 14: 4.0, 16: 18.0}
SHARED = {6: 0.0, 8: 0.0, 10: 0.3, 12: 0.9, 14: 0.95, 16: 0.95}


def backbone_rows(rows: int, cols: int) -> int:
    """Tile rows of a (rows, cols) backbone: the most that pad at most a thirty-second more than the best.

    Columns of a tile are rounded together, with no feedback between them: the fewer, the more of it. 64 × 4 weights leave 5 % less
    error than 16 × 16 on the bundled model's matrices (1 to 16 % by kind).

    Example:
        >>> backbone_rows(4096, 4096), backbone_rows(1000, 256), backbone_rows(37, 53)
        (64, 64, 16)
    """
    tiles = {height: -(-rows // height) * -(-cols * height // LENGTH) for height in TILE_ROWS}
    return next(height for height in TILE_ROWS if 32 * tiles[height] <= 33 * min(tiles.values()))


def rate_gain(bits: float) -> float:
    """`Trellis.gain` at a rate."""
    return 1.0 + 0.1 * min(max(bits - 2.0, 0.0), 1.0) + 0.075 * min(max(bits - 4.0, 0.0), 2.0)


@dataclass(frozen=True)
class Trellis(Quantizer):
    """`trellis-b`: b bits a weight from 1 to 6 in sixteenths, 256 weights a sequence.

    Attributes:
        rate: b.
        tile_rows: rows that a sequence covers, 256 / `tile_rows` columns of each.
        state_bits: L.

    Raises:
        QLRError: a rate or a number of state bits that is not offered.

    Example:
        >>> Trellis(Fraction(9, 4)).shifts[:4].tolist()
        [2, 2, 2, 3]
    """

    rate: Fraction
    tile_rows: int = 16
    state_bits: int = DEFAULT_STATE_BITS

    examples = ("trellis-1", "trellis-2.25", "trellis-3.5", "trellis-4", "trellis-5.5625")
    usage = f"trellis-<1..{MOST_BITS} in sixteenths>[w]"
    unit_scale = True
    always_rotated = True
    decodes_on_host = True

    def __post_init__(self) -> None:
        if not 1 <= self.rate <= MOST_BITS or (self.rate * 16).denominator != 1:
            raise QLRError(
                f"trellis-{float(self.rate):g} is not a rate; pass 1 to {MOST_BITS} bits in sixteenths, e.g. trellis-2.25"
            )
        if not 6 <= self.state_bits <= 16:
            raise QLRError(f"a trellis with {self.state_bits} state bits is not offered; pass 6 to 16")

    @classmethod
    def parse(cls, text: str) -> Trellis | None:
        bits = text.partition("-")[2]
        return cls(Fraction(bits)) if _RATE.fullmatch(bits) else None

    @property
    def name(self) -> str:
        return f"trellis-{self.bits:g}"

    @property
    def bits(self) -> float:
        return self.rate.numerator / self.rate.denominator  # float(rate) goes by way of `numbers`: ten times as long

    @property
    def tile(self) -> tuple[int, int]:
        return self.tile_rows, LENGTH // self.tile_rows

    def with_settings(self, tile_rows: int | None = None, state_bits: int = DEFAULT_STATE_BITS) -> Trellis:
        if (tile_rows or self.tile_rows, state_bits) == (self.tile_rows, self.state_bits):
            return self
        return replace(self, tile_rows=tile_rows or self.tile_rows, state_bits=state_bits)

    def for_backbone(self, shape: tuple[int, int] | None = None, state_bits: int = DEFAULT_STATE_BITS) -> Trellis:
        return self.with_settings(backbone_rows(*shape) if shape else TILE_ROWS[0], state_bits)

    def for_factor(self, rank: int, state_bits: int = DEFAULT_STATE_BITS) -> Trellis:
        return self.with_settings(math.gcd(rank, FACTOR_ROWS), state_bits)

    @property
    def ends(self) -> np.ndarray:
        """⌊t b⌋ for t = 0 … 256: where the bits of each weight begin and end."""
        return np.arange(LENGTH + 1) * self.rate.numerator // self.rate.denominator

    @property
    def shifts(self) -> np.ndarray:
        return np.diff(self.ends)

    @property
    def gain(self) -> float:
        """Scale of the code for a unit Gaussian: at high rates its tails must reach further."""
        return rate_gain(self.bits)

    @property
    def needs_runtime(self) -> int:
        """Earlier runtimes know no gain beyond that of 4 bits."""
        return 7 if self.rate > 4 else self.runtime_version

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        height, width = self.tile
        return -(-rows // height), -(-cols // width)

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"codes": ((*self.tiles(rows, cols), int(LENGTH * self.rate) // 8), np.dtype(np.uint8))}

    def static(self) -> Trellis:
        return replace(self, rate=Fraction(2))

    def traced(self) -> Traced:
        shifts: Any = self.shifts.astype(np.int32)
        gain: Any = np.float32(self.gain)
        return shifts, gain

    def round_block(
        self, x: Float[Array, "*b m c"], qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        height, width = self.tile[::-1] if transposed else self.tile
        (scale,), (shifts, gain) = qparams, traced
        lead, rows = x.shape[:-2], x.shape[-2]
        blocks = (x / jnp.where(scale > 0, scale, 1.0)).reshape(*lead, rows // height, height, width)
        blocks = jnp.swapaxes(blocks, -1, -2) if transposed else blocks
        ends = None if warm is None else jnp.broadcast_to(warm, x.shape)[..., ::height, 0].reshape(-1)
        states = search(blocks.reshape(-1, LENGTH), shifts, self.state_bits, gain, ends)
        values = code_values(states, gain).reshape(blocks.shape)
        values = jnp.swapaxes(values, -1, -2) if transposed else values
        return values.reshape(x.shape) * scale, states.astype(jnp.uint16).reshape(*lead, rows // height, LENGTH)

    def warm_start(self, rows: int, cols: int, codes: Array | None = None) -> np.ndarray:
        """The tail-biting state of every sequence: its last one. −1 where it is not known.

        Args:
            rows, cols: of the matrix.
            codes: the states of a rounding before, (down, across, 256); None: not known.
        """
        return np.full(self.tiles(rows, cols), -1, np.int32) if codes is None else np.asarray(codes[..., -1], np.int32)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        step, place = self._bits_of()
        codes = np.asarray(codes)
        packed = np.empty((*codes.shape[:-1], len(step) // 8), np.uint8)
        for part in slabs(codes.shape):  # a bit takes two bytes before it is packed
            packed[part] = np.packbits(((codes[part][..., step] >> place) & 1).astype(np.uint8), axis=-1)
        return {"codes": packed}

    def _bits_of(self) -> tuple[np.ndarray, np.ndarray]:
        """For every bit of the stream: the weight it belongs to, and its place in that weight's state (0 is the newest)."""
        step = np.repeat(np.arange(LENGTH), self.shifts)
        return step, (self.ends[step + 1] - 1 - np.arange(len(step))).astype(np.uint16)

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        height, width = self.tile
        down, across = self.tiles(rows, cols)
        stream: Any = arrays["codes"]

        def of(stream: Any) -> Any:
            values = code_values(read_states(stream, self.ends, self.state_bits), self.gain)
            return values.reshape(-1, across, height, width).swapaxes(1, 2).reshape(-1, across * width)

        if isinstance(stream, Tracer):
            return of(stream)[:rows, :cols]
        # outside jit numpy decodes: compiling for every rate and shape would take longer than the work
        host = np.asarray(stream)
        found: Any = np.concatenate([of(host[part]) for part in slabs((down, across, LENGTH))])[:rows, :cols]
        return found if host is stream else jnp.asarray(found)

    def native_format(self, rows: int, cols: int) -> Format:
        gain = float(np.float32(self.gain) / np.float32(147.8))
        return Format(Kind.TRELLIS, self.state_bits, int(LENGTH * self.rate) // 8, height=self.tile_rows, gain=gain)

    @property
    def search_cost(self) -> SearchCost:
        bits = min(16, self.state_bits + self.state_bits % 2)
        return SearchCost(SEARCH[bits], SHARED[bits], 2.0 * LENGTH / self.tile[1], 2**self.state_bits)

    def gaussian_error(self) -> float:
        """Between quarters of a bit, from 4 bits on between halves, interpolated in the logarithm."""
        parts = 4 if self.rate < 4 else 2
        low, high = Fraction(math.floor(self.rate * parts), parts), Fraction(math.ceil(self.rate * parts), parts)
        if low == high:
            return gaussian_error(low, self.state_bits)
        part = float((self.rate - low) / (high - low))
        return gaussian_error(low, self.state_bits) ** (1 - part) * gaussian_error(high, self.state_bits) ** part


def slabs(shape: tuple[int, ...]) -> list[slice]:
    """Parts of the first axis of sequences, about a million weights each: op by op a computation needs several times its size."""
    step = max(1, 2**20 // math.prod(shape[1:]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def read_states(stream: Array, ends: np.ndarray, state_bits: int) -> Int[Array, "*b 256"]:
    """The states of sequences from their packed streams: each is L bits, found in three bytes.

    Args:
        stream: uint8 (*b, bytes of a sequence).
        ends: ⌊t b⌋ for t = 0 … 256, `Trellis.ends`.
        state_bits: L.
    """
    total, packed = int(ends[-1]), stream
    start = (ends[1:] - state_bits) % total
    first, offset = start // 8, start % 8
    count = total // 8
    high, middle, low = (packed[..., (first + k) % count].astype(np.int32) for k in range(3))
    return (high << 16 | middle << 8 | low) >> (24 - offset - state_bits).astype(np.int32) & (2**state_bits - 1)


def gaussian_error(rate: Fraction, state_bits: int) -> float:
    """Mean squared error on a unit Gaussian: of the table, or measured where that has none."""
    return ERRORS.get((rate, state_bits)) or measured_error(rate, state_bits)


@lru_cache
def measured_error(rate: Fraction, state_bits: int) -> float:
    """Mean squared error on a unit Gaussian, measured here on 16,384 samples (a standard error of about 1 %)."""
    x = np.random.default_rng(0).standard_normal((64, LENGTH), np.float32)
    code = Trellis(rate, state_bits=state_bits)
    states: Any = np.asarray(search_jit(x, code.shifts, state_bits, code.gain))
    return float(np.mean(np.square(code_values(states, code.gain) - x)) / np.mean(np.square(x)))
