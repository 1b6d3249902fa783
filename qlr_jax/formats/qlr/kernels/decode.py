"""Codes to weights in registers: what every kernel reads packed parts with."""

# ruff: noqa: SIM108  Triton's language has not all of Python's; and a branch that is not taken is not compiled

from __future__ import annotations

import triton

from qlr_jax.formats.qlr.kernels.language import constant, tl
from qlr_jax.formats.qlr.modeling_qlr import TRELLIS

MULTIPLIER, ADDEND = constant(TRELLIS["multiplier"]), constant(TRELLIS["addend"])


@triton.jit
def state_value(state, DP4A: tl.constexpr):
    """The sum of the four bytes of a hash of the state, less 510: near Gaussian, of standard deviation 147.8.

    The sum becomes a float without a conversion, which costs as much as four additions: it is put below the exponent of 2²³.
    """
    word = state * MULTIPLIER + ADDEND
    if DP4A:  # one instruction adds the bytes
        asm: tl.constexpr = "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;"
        bits = tl.inline_asm_elementwise(asm, "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
        bits = ((pairs + (pairs >> 16)) & 0xFFFF) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8389118.0


@triton.jit
def big_endian(loaded, BITS: tl.constexpr):
    """16 or 32 bits with the byte that comes first on top: uint64."""
    word = loaded.to(tl.uint32)
    if BITS == 16:
        word = ((word & 0xFF) << 8) | ((word >> 8) & 0xFF)
    else:
        word = (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)
    return word.to(tl.uint64)


@triton.jit
def decode_weights(codes, scales, zeros, row, col, live, FORMAT: tl.constexpr, DP4A: tl.constexpr):
    """Single weights of a part of any kind, each decoded by itself: fast enough for L and R. Codes are bytes here.

    Args:
        codes, scales, zeros: the stored arrays; scales and zeros only where the kind has them; rates of segments as scales.
        row, col: places, broadcast against each other; `live` says which exist.
        FORMAT: of the stored part.
        DP4A: whether the device adds four bytes in one instruction.

    Returns:
        float32 values of the shape of `live`.
    """
    if FORMAT.kind == "bf16":
        value = tl.load(codes + row * FORMAT.cols + col, mask=live, other=0.0).to(tl.float32)
    elif FORMAT.kind == "integer":
        bit = col * FORMAT.bits
        at = codes + row * FORMAT.stride + bit // 8
        bit = bit % 8
        low = tl.load(at, mask=live, other=0).to(tl.uint32)
        high = tl.load(at + 1, mask=live & (bit + FORMAT.bits > 8), other=0).to(tl.uint32)
        code = ((low | (high << 8)) >> bit.to(tl.uint32)) & ((1 << FORMAT.bits) - 1)
        group = row * FORMAT.groups
        if FORMAT.group:
            group = group + col // FORMAT.group
        value = code.to(tl.float32) - zero_point(zeros, group, live, FORMAT)
        value = value * tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
    elif FORMAT.kind == "segmented":
        tile = col // FORMAT.tile_cols
        rate, start, before = tl.zeros_like(tile), tl.zeros_like(tile), 0  # bytes of the segments before
        for i in tl.static_range(FORMAT.segments):
            left = i * FORMAT.across // FORMAT.segments
            right = (i + 1) * FORMAT.across // FORMAT.segments
            own = tl.load(scales + i).to(tl.int32)
            inside = (tile >= left) & (tile < right)
            rate = tl.where(inside, own, rate)
            start = tl.where(inside, before + 2 * own * (tile - left), start)
            before += 2 * own * (right - left)
        rate = tl.where(rate > 0, rate, 16)  # of columns that there are not
        sequence = codes + (row // FORMAT.tile_rows) * FORMAT.stride + start
        value = state_value(state_at(sequence, row, col, rate, live, FORMAT), DP4A) * gain_of_rate(rate)
    else:
        sequence = codes + ((row // FORMAT.tile_rows) * FORMAT.across + col // FORMAT.tile_cols) * (2 * FORMAT.rate)
        value = state_value(state_at(sequence, row, col, FORMAT.rate, live, FORMAT), DP4A) * FORMAT.gain
    return tl.where(live, value, 0.0)


@triton.jit
def state_at(sequence, row, col, rate, live, FORMAT: tl.constexpr):
    """The states of single weights, each from three bytes of its sequence, which is a ring.

    Args:
        sequence: where each weight's begins.
        row, col: places, broadcast against each other; `live` says which exist.
        rate: of each sequence, in sixteenths of a bit.
        FORMAT: of the stored part.
    """
    end = ((row % FORMAT.tile_rows) * FORMAT.tile_cols + col % FORMAT.tile_cols + 1) * rate // 16
    begin = (end - FORMAT.state_bits + 16 * rate) % (16 * rate)
    window = tl.zeros_like(begin).to(tl.uint32)
    for i in tl.static_range(3):
        byte = tl.load(sequence + (begin // 8 + i) % (2 * rate), mask=live, other=0)
        window = (window << 8) | byte.to(tl.uint32)
    return (window >> (24 - FORMAT.state_bits - begin % 8).to(tl.uint32)) & ((1 << FORMAT.state_bits) - 1)


@triton.jit
def gain_of_rate(rate):
    """What the sum of a state's bytes is multiplied by, of a rate in sixteenths (`modeling_qlr.state_gain`)."""
    bits = rate.to(tl.float32) / 16
    steeper = 0.1 * tl.minimum(tl.maximum(bits - 2.0, 0.0), 1.0) + 0.075 * tl.minimum(tl.maximum(bits - 4.0, 0.0), 2.0)
    return (1.0 + steeper) / 147.8


@triton.jit
def zero_point(zeros, group, live, FORMAT: tl.constexpr):
    """Zero points of groups of integers: stored where asymmetric, else the middle of the codes.

    Args:
        zeros: the stored array, None where symmetric.
        group: index of each group in it; `live` says which exist.
        FORMAT: of the stored part.
    """
    if FORMAT.asymmetric:
        return tl.load(zeros + group, mask=live, other=0).to(tl.float32)
    else:
        return 2.0 ** (FORMAT.bits - 1)
