"""Bit-shift trellis codes with computed values, tail-biting, any rate in sixteenths of a bit.

256 weights are one closed walk through 2^L states: state t is the L bits that end at bit ⌊(t + 1) b⌋ of a circular stream
of 256 b bits, so b bits a weight are stored, nothing else, and any weight is read from three bytes. The value of a state
is a hash of it (a sum of four bytes of an affine map, near Gaussian), so there is no table. A Viterbi search finds the
walk that is nearest to the weights. Trellis quantization with computed codes: QTIP, arXiv 2406.11235, section 3; here the
number of new bits may change from weight to weight (2, 2, 2, 3, … gives 2.25).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qlr_jax.core.quantizers.base import Arrays, QParams, Traced
from qlr_jax.core.typing import Array, Float, Int
from qlr_jax.errors import QLRError

LENGTH = 256  # weights a walk
MULTIPLIER, ADDEND = 2847382671, 1201005453  # of the hash: the best of 130 random pairs by error at 12 state bits
DEFAULT_STATE_BITS = 12
HEIGHTS = (64, 32, 16)  # rows of a walk in a backbone


def walk_height(rows: int, cols: int) -> int:
    """Rows that a walk of a (rows, cols) backbone covers: the tallest that pads at most a thirty-second more than the best.

    Columns of a walk are rounded together, with no feedback between them: the fewer, the more of it. 64 × 4 weights leave 5 % less
    error than 16 × 16 on the bundled model's matrices (1 to 16 % by kind).

    Example:
        >>> walk_height(4096, 4096), walk_height(1000, 256), walk_height(37, 53)
        (64, 64, 16)
    """
    walks = {height: -(-rows // height) * -(-cols * height // LENGTH) for height in HEIGHTS}
    return next(height for height in HEIGHTS if 32 * walks[height] <= 33 * min(walks.values()))


@dataclass(frozen=True)
class Trellis:
    """`trellis-b`: b bits a weight from 1 to 4 in sixteenths; `tile_rows` × 256 / `tile_rows` weights a walk.

    Example:
        >>> Trellis(Fraction(9, 4)).shifts[:4].tolist()
        [2, 2, 2, 3]
    """

    rate: Fraction
    tile_rows: int = 16
    state_bits: int = DEFAULT_STATE_BITS

    def __post_init__(self) -> None:
        if not 1 <= self.rate <= 4 or (self.rate * 16).denominator != 1:
            raise QLRError(f"trellis-{float(self.rate):g} is not a rate; pass 1 to 4 bits in sixteenths, e.g. trellis-2.25")
        if not 6 <= self.state_bits <= 16:
            raise QLRError(f"a trellis with {self.state_bits} state bits is not offered; pass 6 to 16")

    @property
    def name(self) -> str:
        return f"trellis-{float(self.rate):g}"

    @property
    def bits(self) -> float:
        return float(self.rate)

    @property
    def unit_scale(self) -> bool:
        return True

    @property
    def tile(self) -> tuple[int, int]:
        return self.tile_rows, LENGTH // self.tile_rows

    @property
    def ends(self) -> np.ndarray:
        """⌊t b⌋ for t = 0 … 256: where the bits of each weight begin and end."""
        return np.array([t * self.rate.numerator // self.rate.denominator for t in range(LENGTH + 1)])

    @property
    def shifts(self) -> np.ndarray:
        return np.diff(self.ends)

    @property
    def gain(self) -> float:
        """Scale of the code for a unit Gaussian: at high rates its tails must reach further."""
        return 1.0 + 0.1 * min(max(self.bits - 2.0, 0.0), 1.0)

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        height, width = self.tile
        return -(-rows // height), -(-cols // width)

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"codes": ((*self.tiles(rows, cols), int(LENGTH * self.rate) // 8), np.dtype(np.uint8))}

    def fit_qparams(self, x: Array, per_row: bool) -> QParams:
        axes = (-1,) if per_row else (-2, -1)
        return (jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True)),)

    def broadcast_qparams(self, scales: QParams, cols: int) -> QParams:
        return scales

    def static(self) -> Trellis:
        return replace(self, rate=Fraction(2))

    def traced(self) -> Traced:
        return jnp.asarray(self.shifts, jnp.int32), jnp.float32(self.gain)

    def round_block(self, x: Float[Array, "*b m c"], qparams: QParams, traced: Traced, transposed: bool) -> tuple[Array, Array]:
        """As every quantizer; after the scale `qparams` may hold the tail-biting state of each weight's sequence: see `search`."""
        height, width = self.tile[::-1] if transposed else self.tile
        (scale, *seams), (shifts, gain) = qparams, traced
        lead, rows = x.shape[:-2], x.shape[-2]
        blocks = (x / jnp.where(scale > 0, scale, 1.0)).reshape(*lead, rows // height, height, width)
        blocks = jnp.swapaxes(blocks, -1, -2) if transposed else blocks
        closing = jnp.broadcast_to(seams[0], x.shape)[..., ::height, 0].reshape(-1) if seams else None
        states = search(blocks.reshape(-1, LENGTH), shifts, self.state_bits, gain, closing)
        values = code_values(states, gain).reshape(blocks.shape)
        values = jnp.swapaxes(values, -1, -2) if transposed else values
        return values.reshape(x.shape) * scale, states.astype(jnp.uint16).reshape(*lead, rows // height, LENGTH)

    def pack(self, codes: np.ndarray, scales: QParams) -> dict[str, np.ndarray]:
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

    def stored_qparams(self, arrays: Arrays) -> QParams:
        return ()

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        height, width = self.tile
        down, across = self.tiles(rows, cols)
        stream = arrays["codes"]

        def of(part: slice) -> Array:
            values = code_values(read_states(stream[part], self.ends, self.state_bits), self.gain)
            return jnp.swapaxes(values.reshape(-1, across, height, width), 1, 2).reshape(-1, across * width)

        if isinstance(stream, jax.core.Tracer):
            return of(slice(None))[:rows, :cols]
        return jnp.concatenate([of(part) for part in slabs((down, across, LENGTH))])[:rows, :cols]


def slabs(shape: tuple[int, ...]) -> list[slice]:
    """Parts of the first axis of walks, of about a million weights each: what is computed op by op needs several times its size."""
    step = max(1, 2**20 // math.prod(shape[1:]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def read_states(stream: Array, ends: np.ndarray, state_bits: int) -> Int[Array, "*b 256"]:
    """The states of walks from their packed streams (…, bytes): each is L bits, found in three bytes."""
    total = int(ends[-1])
    if not isinstance(stream, jax.core.Tracer):
        stream = np.asarray(stream)  # outside jit numpy gathers the bytes: compiling for every rate would take longer than the work
    start = (ends[1:] - state_bits) % total
    first, offset = start // 8, start % 8
    count = total // 8
    word = jnp.zeros((), jnp.int32)
    for k in range(3):
        word = (word << 8) | jnp.asarray(stream[..., (first + k) % count]).astype(jnp.int32)
    return (word >> (24 - offset - state_bits)) & (2**state_bits - 1)


def code_values(states: Array, gain: float | Array) -> Array:
    """gain · (sum of the four bytes of (a · state + c) mod 2³² − 510) / 147.8: mean 0 and variance near 1 over states."""
    word = states.astype(jnp.uint32) * jnp.uint32(MULTIPLIER) + jnp.uint32(ADDEND)
    total = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24)
    return (total.astype(jnp.float32) - 510.0) * (jnp.float32(gain) / 147.8)


def _batch(walks: int, state_bits: int) -> int:
    """Walks searched at once: what suits a CPU's vectors and cache, or an accelerator with at most 1 GiB of predecessors."""
    if jax.default_backend() == "cpu":
        # measured: 16 or 64 take two to three times as long a walk, 4 and 8 a third longer; of few walks 4 leave the fewest idle
        return 32 if walks > 16 else 4 if walks > 2 else walks
    return min(2048, 2 ** (23 - state_bits), -(-walks // 16) * 16)


def search(
    x: Float[Array, "walks 256"],
    shifts: Int[Array, "256"],
    state_bits: int,
    gain: float | Array,
    seams: Int[Array, "walks"] | None = None,
) -> Int[Array, "walks 256"]:
    """States of the nearest closed walk for each row of x: two Viterbi passes.

    The first pass starts half a turn away and leaves its ends free; the state that it passes at the seam is imposed on both
    ends of the second. The shifts are data, so one compilation serves every rate.

    Args:
        seams: the last state of each walk, where it is known, which saves the first pass (half of the time); negative: it is not.
    """
    walks = x.shape[0]
    size = _batch(walks, state_bits)
    more = -walks % size
    padded = jnp.pad(x, ((0, more), (0, 0))).reshape(-1, size, LENGTH)
    closing = jnp.zeros((walks,), jnp.int32) if seams is None else seams
    first = 0 if seams is None else jnp.all(seams >= 0).astype(jnp.int32)  # of the two passes
    parts = (padded, jnp.pad(closing, (0, more)).reshape(-1, size))
    states = lax.map(lambda part: _closed_walk(part[0].T, shifts, state_bits, gain, part[1], first).T, parts)
    return states.reshape(-1, LENGTH)[:walks]


def _closed_walk(x: Array, shifts: Array, state_bits: int, gain: float | Array, seam: Array, first: int | Array) -> Array:
    """`first`: which pass is the first, 1 where the walks are known to close in `seam`."""
    values = code_values(jnp.arange(2**state_bits), 1.0) * gain
    half = LENGTH // 2
    states = jnp.arange(2**state_bits)[:, None]

    def sweep(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        (seam, _), (weights, steps, closing) = carry, jax.tree.map(lambda a: a[i], turned)
        start = jnp.where(closing & (states != seam), jnp.float32(1e30), 0.0)
        cost, back = _forward(weights, steps, values, start, state_bits)
        found = _trace(jnp.where(closing, seam, jnp.argmin(cost, axis=0)), back, steps, state_bits)
        return found[half - 1], found

    # one loop of two sweeps rather than two calls: the search is compiled once
    turned = (
        jnp.stack([jnp.roll(x, -half, axis=0), x]),
        jnp.stack([jnp.roll(shifts, -half), shifts]),
        jnp.array([False, True]),
    )
    return lax.fori_loop(first, 2, sweep, (seam, jnp.zeros(x.shape, jnp.int32)))[1]


def _forward(x: Array, shifts: Array, values: Array, cost: Array, state_bits: int) -> tuple[Array, Array]:
    """Least cost to reach every state after every weight, and which predecessor gave it (its oldest bits)."""

    def branch(shift: int):
        def advance(cost: Array, weight: Array) -> tuple[Array, Array]:
            walks = cost.shape[1]
            best, oldest = _tournament(cost.reshape(2**shift, -1, walks))
            distance = jnp.square(weight[None, :] - values[:, None]).reshape(-1, 2**shift, walks)
            grown = (best[:, None, :] + distance).reshape(cost.shape)
            return grown, jnp.pad(oldest, ((0, 2 ** (state_bits - 1) - oldest.shape[0]), (0, 0)))

        return advance

    branches = [branch(shift) for shift in (1, 2, 3, 4)]
    return lax.scan(lambda c, step: lax.switch(step[1] - 1, branches, c, step[0]), cost, (x, shifts))


def _tournament(costs: Array) -> tuple[Array, Array]:
    """Minimum and its index over the leading axis, pairwise: argmin does not vectorise on a CPU."""
    value, index = list(costs), [jnp.uint8(i) for i in range(costs.shape[0])]
    while len(value) > 1:
        later = [b < a for a, b in zip(value[::2], value[1::2], strict=True)]
        index = [jnp.where(w, b, a) for w, a, b in zip(later, index[::2], index[1::2], strict=True)]
        value = [jnp.where(w, b, a) for w, a, b in zip(later, value[::2], value[1::2], strict=True)]
    return value[0], index[0]


def _trace(last: Array, back: Array, shifts: Array, state_bits: int) -> Array:
    def retreat(state: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        oldest, shift = step
        rest = state >> shift
        top = jnp.take_along_axis(oldest, rest[None, :], axis=0)[0].astype(state.dtype)
        return rest | (top << (state_bits - shift)), state

    return lax.scan(retreat, last.astype(jnp.int32), (back, shifts.astype(jnp.int32)), reverse=True)[1]


@lru_cache
def gaussian_error(rate: Fraction, state_bits: int) -> float:
    """Mean squared error on a unit Gaussian, measured here on 16,384 samples (a standard error of about 1 %)."""
    x = np.random.default_rng(0).standard_normal((64, LENGTH), np.float32)
    code = Trellis(rate, state_bits=state_bits)
    states = _search_jit(jnp.asarray(x), jnp.asarray(code.shifts), state_bits, code.gain)
    return float(jnp.mean(jnp.square(code_values(states, code.gain) - x)) / np.mean(np.square(x)))


_search_jit = partial(jax.jit, static_argnames=("state_bits",))(search)
