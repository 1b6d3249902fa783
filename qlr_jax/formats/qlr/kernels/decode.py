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
        codes, scales, zeros: the stored arrays; scales and zeros only where the kind has them.
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
    else:
        BYTES: tl.constexpr = 2 * FORMAT.rate
        sequence = codes + ((row // FORMAT.tile_rows) * FORMAT.across + col // FORMAT.tile_cols) * BYTES
        end = ((row % FORMAT.tile_rows) * FORMAT.tile_cols + col % FORMAT.tile_cols + 1) * FORMAT.rate // 16
        begin = (end - FORMAT.state_bits + 8 * BYTES) % (8 * BYTES)
        window = tl.zeros_like(begin).to(tl.uint32)
        for i in tl.static_range(3):
            byte = tl.load(sequence + (begin // 8 + i) % BYTES, mask=live, other=0)
            window = (window << 8) | byte.to(tl.uint32)
        state = (window >> (24 - FORMAT.state_bits - begin % 8).to(tl.uint32)) & ((1 << FORMAT.state_bits) - 1)
        value = state_value(state, DP4A) * FORMAT.gain
    return tl.where(live, value, 0.0)


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
