"""Triton kernels for one to eight tokens: y = g · Uᵀ (Q + L diag(s) R) V x, straight from the packed codes.

    from qlr_jax.formats.qlr.torch_runtime import use_kernels
    use_kernels(model)

These kernels never ran on a GPU. They were checked against `QLRLinear.forward` in Triton's interpreter, on a processor, and
compiled for compute capability 9.0; how fast they are is not known, so nothing uses them unless `use_kernels` is called.

A layer takes five launches, or two where nothing is rotated; all work in float32, whatever the type of x and y.

    turn        twice: v = V x, by the two factors of a Hadamard-like matrix; the signs are taken along
    products    a program takes a band of rows of Q and a share of the columns, and more of them take R; each decodes its codes in
                registers, once for all tokens, and leaves sums, so that the order of additions is always the same
    finish      adds those sums, adds L diag(s) R v, multiplies by g and does the first half of Uᵀ
    turn        the other half, with signs and bias

Shapes alone decide what is allocated and launched, and nothing is read back, so CUDA graphs can record it.
"""

# ruff: noqa: RUF005, SIM108  Triton's language has not all of Python's; and a branch that is not taken is not compiled

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import nn

from qlr_jax.formats.qlr.modeling_qlr import INPUT, LENGTH, OUTPUT, TRELLIS, _hartley, _walsh, block_size, constant, state_gain

MOST_TOKENS = 8
PROGRAMS = 1024  # of `products`: several for each of a GPU's processors
MOST_SPLITS = tl.constexpr(16)  # programs that share a row: their sums are read together
WALKS = 32  # that a program decodes at a time
ROWS, UNITS = 64, 32  # of integers that a program decodes at a time; a unit is four bytes, or eight codes
COLUMNS = 128  # of R, or of L and a factor of a rotation, that a program decodes at a time
CHUNK = 16  # rows of a factor, or of L, that are in registers at a time

MULTIPLIER, ADDEND = tl.constexpr(TRELLIS["multiplier"]), tl.constexpr(TRELLIS["addend"])


@dataclass(frozen=True)
class Form:
    """How a part is stored: what a kernel is compiled for."""

    kind: str  # "trellis", "integer" or "bf16"
    rows: int
    cols: int
    stride: int = 0  # integer: bytes a row
    bits: int = 0  # integer
    group: int = 0  # integer: columns that share a scale, or 0
    groups: int = 1  # integer: a row
    asymmetric: bool = False
    words: bool = False  # integer: a unit is a word of four bytes, not the bytes of eight codes
    each: int = 8  # integer: codes of a unit
    rate: int = 0  # trellis: bits a weight, in sixteenths, so that a walk is 2 · rate bytes
    state: int = 0  # trellis: bits
    height: int = 1  # trellis: rows of a walk
    width: int = LENGTH  # trellis: its columns
    across: int = 0  # trellis: walks beside each other
    unit: int = 16  # trellis: bits that are loaded at a time
    together: int = 16  # trellis: weights that follow each other and are decoded from one window of 64 bits
    loads: int = 0  # trellis: units of a window
    gain: float = 1.0  # trellis: of what a state's hash gives


# ------------------------------------------------------------------------------------------------------- decoding


@triton.jit
def state_value(state, DP4A: tl.constexpr):
    """The sum of the four bytes of a hash of the state, less 510: near Gaussian, 147.8 wide.

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
def in_order(loaded, BITS: tl.constexpr):
    """16 or 32 bits with the byte that comes first on top: uint64."""
    word = loaded.to(tl.uint32)
    if BITS == 16:
        word = ((word & 0xFF) << 8) | ((word >> 8) & 0xFF)
    else:
        word = (word << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | (word >> 24)
    return word.to(tl.uint64)


@triton.jit
def weights(codes, scales, zeros, row, col, live, FORM: tl.constexpr, DP4A: tl.constexpr):
    """Single weights of a part of any kind, each by itself: good enough for L and R. Codes are bytes here."""
    if FORM.kind == "bf16":
        value = tl.load(codes + row * FORM.cols + col, mask=live, other=0.0).to(tl.float32)
    elif FORM.kind == "integer":
        bit = col * FORM.bits
        at = codes + row * FORM.stride + bit // 8
        bit = bit % 8
        low = tl.load(at, mask=live, other=0).to(tl.uint32)
        high = tl.load(at + 1, mask=live & (bit + FORM.bits > 8), other=0).to(tl.uint32)
        code = ((low | (high << 8)) >> bit.to(tl.uint32)) & ((1 << FORM.bits) - 1)
        group = row * FORM.groups
        if FORM.group:
            group = group + col // FORM.group
        value = code.to(tl.float32) - zero_point(zeros, group, live, FORM)
        value = value * tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
    else:
        BYTES: tl.constexpr = 2 * FORM.rate
        walk = codes + ((row // FORM.height) * FORM.across + col // FORM.width) * BYTES
        end = ((row % FORM.height) * FORM.width + col % FORM.width + 1) * FORM.rate // 16
        begin = (end - FORM.state + 8 * BYTES) % (8 * BYTES)
        window = tl.zeros_like(begin).to(tl.uint32)
        for i in tl.static_range(3):
            byte = tl.load(walk + (begin // 8 + i) % BYTES, mask=live, other=0)
            window = (window << 8) | byte.to(tl.uint32)
        state = (window >> (24 - FORM.state - begin % 8).to(tl.uint32)) & ((1 << FORM.state) - 1)
        value = state_value(state, DP4A) * FORM.gain
    return tl.where(live, value, 0.0)


@triton.jit
def zero_point(zeros, group, live, FORM: tl.constexpr):
    if FORM.asymmetric:
        return tl.load(zeros + group, mask=live, other=0).to(tl.float32)
    else:
        return 2.0 ** (FORM.bits - 1)


# ------------------------------------------------------------------------------------------------------- products


@triton.jit
def trellis_band(
    v, codes, sums, band, split, SHARE: tl.constexpr, TOKENS: tl.constexpr, WALKS: tl.constexpr, FORM: tl.constexpr,
    DP4A: tl.constexpr,
):  # fmt: skip
    """Sums of the rows of a band of walks over the columns of SHARE walks, for all tokens.

    TOGETHER weights that follow each other lie, with the state before them, in 64 bits. A thread loads those of some places, and
    what follows is arithmetic in registers, with shifts that are known when it is compiled.
    """
    WIDTH: tl.constexpr = FORM.width
    TOGETHER: tl.constexpr = FORM.together
    PLACES: tl.constexpr = FORM.height * WIDTH // TOGETHER
    TALL: tl.constexpr = TOGETHER // WIDTH if TOGETHER > WIDTH else 1  # rows and columns that they cover
    WIDE: tl.constexpr = TOGETHER // TALL
    BITS: tl.constexpr = TOGETHER * FORM.rate // 16  # that they take, where it is a whole number
    WHOLE: tl.constexpr = TOGETHER * FORM.rate % 16 == 0
    ALIGNED: tl.constexpr = TOGETHER * FORM.rate % (16 * FORM.unit) == 0
    UNITS: tl.constexpr = 16 * FORM.rate // FORM.unit  # of a walk
    LOADS: tl.constexpr = FORM.loads
    ROWS: tl.constexpr = FORM.height // TALL

    place = tl.arange(0, PLACES)
    end = (place + 1) * TOGETHER * FORM.rate // 16
    if ALIGNED:
        last = place * (BITS // FORM.unit) + (BITS // FORM.unit - 1)  # one after the other, as the compiler can see
    else:
        last = (end + FORM.unit - 1) // FORM.unit - 1
    slack = (last + 1) * FORM.unit - end
    zero = tl.zeros((WALKS, PLACES), tl.float32)
    totals = ()  # one for each row of a place and each token: as more axes of one array they would move between threads
    for _ in tl.static_range(TALL * TOKENS):
        totals = totals + (zero,)
    stop = tl.minimum((split + 1) * SHARE, FORM.across)
    for start in range(split * SHARE, stop, WALKS):
        walk = start + tl.arange(0, WALKS)
        inside = walk < stop
        at = codes + (band * FORM.across + walk)[:, None] * UNITS
        window = in_order(tl.load(at + last[None, :], mask=inside[:, None], other=0), FORM.unit)
        for i in tl.static_range(1, LOADS):
            before = tl.where(last >= i, last - i, last - i + UNITS)  # a walk is closed
            window |= in_order(tl.load(at + before[None, :], mask=inside[:, None], other=0), FORM.unit) << (FORM.unit * i)
        if not ALIGNED:
            window = window >> slack[None, :].to(tl.uint64)
        for i in tl.static_range(WIDE):
            values = ()
            for down in tl.static_range(TALL):
                if WHOLE:
                    state = window >> (BITS - (WIDE * down + i + 1) * FORM.rate // 16)
                else:
                    shift = end - (TOGETHER * place + WIDE * down + i + 1) * FORM.rate // 16
                    state = window >> shift[None, :].to(tl.uint64)
                values = values + (state_value(state.to(tl.uint32) & ((1 << FORM.state) - 1), DP4A),)
            sums_now = ()
            for token in tl.static_range(TOKENS):
                if WIDTH <= TOGETHER:
                    col = walk * WIDTH + i
                    x = tl.load(v + token * FORM.cols + col, mask=inside & (col < FORM.cols), other=0.0)[:, None]
                else:
                    col = walk[:, None] * WIDTH + (TOGETHER * place % WIDTH)[None, :] + i
                    x = tl.load(v + token * FORM.cols + col, mask=inside[:, None] & (col < FORM.cols), other=0.0)
                for down in tl.static_range(TALL):
                    sums_now = sums_now + (tl.fma(values[down], x.to(tl.float32), totals[token * TALL + down]),)
            totals = sums_now
    for token in tl.static_range(TOKENS):
        for down in tl.static_range(TALL):
            rows = tl.sum(totals[token * TALL + down], 0)
            rows = tl.sum(tl.reshape(rows, (ROWS, PLACES // ROWS)), 1)
            row = band * FORM.height + tl.arange(0, ROWS) * TALL + down
            tl.store(sums + (split * TOKENS + token) * FORM.rows + row, rows, mask=(row < FORM.rows))


@triton.jit
def integer_band(
    v, codes, scales, zeros, sums, band, split, SHARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows over the columns of SHARE units, for all tokens: Σ (u − zero) · v, scaled once a unit.

    A code u of b bits is put below the exponent of 1, so that it is 1 + u / 2^b without a conversion; Σ v is taken off later.
    """
    BITS: tl.constexpr = FORM.bits
    EACH: tl.constexpr = FORM.each
    ACROSS: tl.constexpr = (FORM.cols + EACH - 1) // EACH
    FIELD: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    row = band * ROWS + tl.arange(0, ROWS)
    nothing, none = tl.zeros((ROWS, UNITS), tl.float32), tl.zeros((UNITS,), tl.float32)
    totals, products, plains = (), (), ()  # one for each token
    for _ in tl.static_range(TOKENS):
        totals, products, plains = totals + (nothing,), products + (nothing,), plains + (none,)
    fresh, empty = products, plains
    stop = tl.minimum((split + 1) * SHARE, ACROSS)
    for start in range(split * SHARE, stop, UNITS):
        unit = start + tl.arange(0, UNITS)
        live = (row < FORM.rows)[:, None] & (unit < stop)[None, :]
        if FORM.words:
            word = tl.load(codes + row[:, None] * (FORM.stride // 4) + unit[None, :], mask=live, other=0).to(tl.uint32)
        else:
            word = tl.zeros((ROWS, UNITS), tl.uint64)
            for i in tl.static_range(BITS):
                at = (unit * BITS + i)[None, :]
                byte = tl.load(codes + row[:, None] * FORM.stride + at, mask=live & (at < FORM.stride), other=0)
                word |= byte.to(tl.uint64) << (8 * i)
        products, plains = fresh, empty
        for i in tl.static_range(EACH):
            if BITS * (i + 1) > 23:
                placed = word >> (BITS * (i + 1) - 23)
            else:
                placed = word << (23 - BITS * (i + 1))
            value = ((placed.to(tl.uint32) & FIELD) | 0x3F800000).to(tl.float32, bitcast=True)
            col = unit * EACH + i
            after, after_plain = (), ()
            for token in tl.static_range(TOKENS):
                x = tl.load(v + token * FORM.cols + col, mask=(unit < stop) & (col < FORM.cols), other=0.0).to(tl.float32)
                after = after + (tl.fma(value, x[None, :], products[token]),)
                after_plain = after_plain + (plains[token] + x,)
            products, plains = after, after_plain
        group = row[:, None] * FORM.groups + (unit * EACH // FORM.group if FORM.group else unit * 0)[None, :]
        scale = tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
        offset = zero_point(zeros, group, live, FORM) + 2.0**BITS
        after = ()
        for token in tl.static_range(TOKENS):
            after = after + (tl.fma(products[token] * 2.0**BITS - plains[token][None, :] * offset, scale, totals[token]),)
        totals = after
    for token in tl.static_range(TOKENS):
        at = sums + (split * TOKENS + token) * FORM.rows + row
        tl.store(at, tl.sum(totals[token], 1), mask=row < FORM.rows)


@triton.jit
def any_band(
    v, codes, scales, zeros, sums, band, split, SHARE: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, FORM: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows over SHARE columns, for all tokens, of a part of any kind."""
    row = band * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, SIDE)
    total = tl.zeros((SIDE, ROWS, COLUMNS), tl.float32)
    stop = tl.minimum((split + 1) * SHARE, FORM.cols)
    for start in range(split * SHARE, stop, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        live = (row < FORM.rows)[:, None] & (col < stop)[None, :]
        value = weights(codes, scales, zeros, row[:, None], col[None, :], live, FORM, DP4A)
        here = (token < TOKENS)[:, None] & (col < stop)[None, :]
        x = tl.load(v + token[:, None] * FORM.cols + col[None, :], mask=here, other=0.0).to(tl.float32)
        total = tl.fma(x[:, None, :], value[None, :, :], total)
    store(sums, tl.sum(total, 2), split, row, TOKENS, SIDE, FORM)


@triton.jit
def store(sums, values, split, row, TOKENS: tl.constexpr, SIDE: tl.constexpr, FORM: tl.constexpr):
    """values (SIDE, rows) into sums (splits, tokens, all rows)."""
    token = tl.arange(0, SIDE)
    live = (token < TOKENS)[:, None] & (row < FORM.rows)[None, :]
    tl.store(sums + ((split * TOKENS + token) * FORM.rows)[:, None] + row[None, :], values, mask=live)


@triton.jit
def products(
    v, q_codes, q_scales, q_zeros, q_sums, r_codes, r_scales, r_zeros, r_sums, Q: tl.constexpr, R: tl.constexpr,
    Q_SPLITS: tl.constexpr, Q_SHARE: tl.constexpr, Q_PROGRAMS: tl.constexpr, R_SPLITS: tl.constexpr, R_SHARE: tl.constexpr,
    TOKENS: tl.constexpr, SIDE: tl.constexpr, WALKS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, FEW: tl.constexpr,
    COLUMNS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """q_sums (splits of Q, tokens, out) and r_sums (splits of R, tokens, rank) of v (tokens, in)."""
    program = tl.program_id(0)
    if program < Q_PROGRAMS:
        band, split = program // Q_SPLITS, program % Q_SPLITS
        if Q is None:
            pass
        elif Q.kind == "trellis":
            trellis_band(v, q_codes, q_sums, band, split, Q_SHARE, TOKENS, WALKS, Q, DP4A)
        elif Q.kind == "integer":
            integer_band(v, q_codes, q_scales, q_zeros, q_sums, band, split, Q_SHARE, TOKENS, ROWS, UNITS, Q)
        else:
            any_band(v, q_codes, q_scales, q_zeros, q_sums, band, split, Q_SHARE, TOKENS, SIDE, FEW, COLUMNS, Q, DP4A)
    elif R is not None:
        band, split = (program - Q_PROGRAMS) // R_SPLITS, (program - Q_PROGRAMS) % R_SPLITS
        any_band(v, r_codes, r_scales, r_zeros, r_sums, band, split, R_SHARE, TOKENS, SIDE, FEW, COLUMNS, R, DP4A)


# ------------------------------------------------------------------------------------------------------ rotations


@triton.jit
def leave(y, values, at, size, token, signs, bias, live):
    """values, times signs and plus bias where there are any, into y (tokens, size), in its type."""
    if signs is not None:
        values = values * tl.load(signs + at, mask=live, other=0).to(tl.float32)
    if bias is not None:
        values = values + tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
    tl.store(y + token * size + at, values.to(y.dtype.element_ty), mask=live)


@triton.jit
def turn(
    x, factor, enter, y, signs, bias, size, LENGTH: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr
):
    """A symmetric factor (LENGTH, LENGTH) times vectors whose elements are STRIDE apart, one a program and token.

    `enter` are signs of what comes in, `signs` those of what goes out; any of the three vectors may be None.
    """
    which, token = tl.program_id(0), tl.program_id(1)
    start = which // STRIDE * (STRIDE * LENGTH) + which % STRIDE
    out = tl.arange(0, SIDE)
    total = tl.zeros((SIDE,), tl.float32)
    for first in range(0, LENGTH, CHUNK):
        i = first + tl.arange(0, CHUNK)
        at = start + i * STRIDE
        value = tl.load(x + token * size + at, mask=i < LENGTH, other=0.0).to(tl.float32)
        if enter is not None:
            value = value * tl.load(enter + at, mask=i < LENGTH, other=0).to(tl.float32)
        live = (i < LENGTH)[:, None] & (out < LENGTH)[None, :]
        total += tl.sum(value[:, None] * tl.load(factor + i[:, None] * LENGTH + out[None, :], mask=live, other=0.0), 0)
    leave(y, total, start + out * STRIDE, size, token, signs, bias, out < LENGTH)


@triton.jit
def summed(sums, token, at, size, live, SPLITS: tl.constexpr, TOKENS: tl.constexpr):
    """Elements `at` of one token of sums (splits, tokens, size), added up."""
    split = tl.arange(0, MOST_SPLITS)
    here = (split < SPLITS)[:, None] & live[None, :]
    return tl.sum(tl.load(sums + (split * TOKENS + token)[:, None] * size + at[None, :], mask=here, other=0.0), 0)


@triton.jit
def finish(
    q_sums, r_sums, l_codes, l_scales, l_zeros, component, scale, factor, signs, bias, y, size, rank, L: tl.constexpr,
    GAIN: tl.constexpr, Q_SPLITS: tl.constexpr, R_SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    LENGTH: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """g (Q v + L diag(s) R v) from the sums, times a symmetric factor (LENGTH, LENGTH) where there is one."""
    which, token = tl.program_id(0), tl.program_id(1)
    out = tl.arange(0, SIDE)
    at = which * LENGTH + out
    live = (out < LENGTH) & (at < size)
    total = GAIN * summed(q_sums, token, at, size, live, Q_SPLITS, TOKENS)
    if L is not None:
        for first in range(0, rank, CHUNK):
            k = first + tl.arange(0, CHUNK)
            z = summed(r_sums, token, k, rank, k < rank, R_SPLITS, TOKENS)
            if component is not None:
                z = z * tl.load(component + k, mask=k < rank, other=0.0).to(tl.float32)
            here = (k < rank)[:, None] & live[None, :]
            total += tl.sum(z[:, None] * weights(l_codes, l_scales, l_zeros, k[:, None], at[None, :], here, L, DP4A), 0)
    if scale is not None:
        total = total * tl.load(scale)
    if factor is not None:
        square = (out < LENGTH)[:, None] & (out < LENGTH)[None, :]
        wide = tl.load(factor + out[:, None] * LENGTH + out[None, :], mask=square, other=0.0)
        total = tl.sum(total[:, None] * wide, 0)  # the factor is symmetric
    leave(y, total, at, size, token, signs, bias, live)


# -------------------------------------------------------------------------------------------------- linear layers


def form_of(part: nn.Module) -> Form | None:
    """What a kernel has to know of a part; None where there is no kernel for it."""
    kind, rows, cols = type(part).__name__, part.rows, part.cols  # by name: a folder's own runtime has classes of its own
    if kind == "BFloat16Part":
        return Form("bf16", rows, cols)
    if kind == "IntegerPart" and part.bits in (2, 3, 4, 8):
        stride = part.codes.shape[1]
        words = part.bits != 3 and stride % 4 == 0
        each = 32 // part.bits if words else 8
        if part.group % each:
            return None  # a scale would change within a unit
        return Form("integer", rows, cols, stride, part.bits, part.group, part.groups, part.asymmetric, words, each)
    if kind == "TrellisPart":
        rate = part.codes.shape[2] // 2
        unit = 32 if rate % 32 == 0 else 16
        together = 16
        while (bits := window_bits(rate, part.state_bits, unit, together)) > 64:
            together //= 2
        return Form(
            "trellis", rows, cols, rate=rate, state=part.state_bits, height=part.height, width=part.width, across=part.across,
            unit=unit, together=together, loads=-(-bits // unit), gain=state_gain(2 * rate),
        )  # fmt: skip
    return None


def window_bits(rate: int, state: int, unit: int, together: int) -> int:
    """Bits of `together` weights and the state before them, and of what is loaded after them where they may end anywhere."""
    return -(-(together - 1) * rate // 16) + state + (0 if together * rate % (16 * unit) == 0 else unit - 1)


@constant
def factors(block: int, device: torch.device) -> list[torch.Tensor]:
    """Of a rotation over `block`, as `modeling_qlr.rotation`, but two of about the same width, or one of at most 128."""
    power = block & -block
    odd = block // power
    inner = power if block <= 128 else min(power, 2 ** max(round(math.log2(block**0.5 / odd)), 0))
    first = torch.kron(_walsh(inner, device), _hartley(odd, device)) * power**-0.5
    return [first.contiguous()] + ([_walsh(power // inner, device)] if power > inner else [])


@dataclass(frozen=True)
class Split:
    """How the sums of a part are shared out: programs = bands · splits, each with `share` columns, walks or units."""

    programs: int
    splits: int
    share: int


def split(rows: int, tall: int, across: int, step: int) -> Split:
    """Enough programs of `tall` rows to keep a GPU busy, but none with less than a step."""
    bands = -(-rows // tall)
    splits = max(1, min(-(-PROGRAMS // bands), -(-across // step), MOST_SPLITS.value))
    share = -(-across // (splits * step)) * step
    splits = -(-across // share)
    return Split(bands * splits, splits, share)


@dataclass(frozen=True)
class Tiles:
    """What a program decodes at a time."""

    walks: int  # of a band
    rows: int  # of integers
    few: int  # rows of what has no faster way


def tiles_of(tokens: int) -> Tiles:
    """The more tokens, the more sums there are for a weight: no more than 256 registers a thread are to be had."""
    small = {1: 1, 2: 1, 4: 2, 8: 4}[tokens]
    return Tiles(WALKS // min(small, 2), ROWS // small, 4 // min(small, 2))


@cache
def split_q(form: Form | None, tiles: Tiles) -> Split:
    if form is None:
        return Split(0, 0, 1)
    if form.kind == "trellis":
        return split(form.rows, form.height, form.across, tiles.walks)
    if form.kind == "integer":
        return split(form.rows, tiles.rows, -(-form.cols // form.each), UNITS)
    return split(form.rows, tiles.few, form.cols, COLUMNS)


@cache
def split_r(form: Form | None, tiles: Tiles) -> Split:
    return Split(0, 0, 1) if form is None else split(form.rows, tiles.few, form.cols, COLUMNS)


class Kernel:
    """`QLRLinear.forward` for a few tokens, by Triton kernels: y = g · Uᵀ (Q + L diag(s) R) V x.

    Args:
        linear: a QLRLinear with trellis, bf16, or integers of 2, 3, 4 or 8 bits in each of Q, L and R. It keeps its tensors: they
            are read where they are at every call, except that signs are read once.

    Raises:
        NotImplementedError: for another quantizer, or groups that end within a unit of codes.

    >>> from qlr_jax.formats.qlr.modeling_qlr import QLRLinear
    >>> y = Kernel(QLRLinear("int-4g32+r4@bf16", (48, 64)).cuda())(torch.ones(1, 64).cuda())  # doctest: +SKIP
    """

    def __init__(self, linear: nn.Module):
        self.linear = linear
        parts = [linear.backbone, linear.left, linear.right] if linear.rank else [linear.backbone, None, None]
        self.q, self.left, self.right = (None if part is None else form_of(part) for part in parts)
        if [part is None for part in parts] != [form is None for form in (self.q, self.left, self.right)]:
            raise NotImplementedError(f"there is no kernel for {linear.spec}")
        self.device = next(linear.buffers()).device
        self.rotations, self.signs = [[], []], [None, None]
        if linear.rotated:
            sizes = linear.in_features, linear.out_features
            self.rotations = [factors(block_size(size, linear.rotation_block), self.device) for size in sizes]
            self.signs = [narrow(linear._signs(salt, self.device)) for salt in (INPUT, OUTPUT)]
        self.dp4a = self.device.type == "cuda" and torch.version.hip is None and not triton.knobs.runtime.interpret

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in), from 1 to MOST_TOKENS tokens -> (…, out), in x's type."""
        linear, size = self.linear, self.linear.out_features
        v = x.reshape(-1, linear.in_features).contiguous()
        tokens = len(v)
        v = rotate(v, self.rotations[INPUT], torch.float32, enter=self.signs[INPUT])
        side = triton.next_power_of_2(tokens)
        tiles = tiles_of(side)
        q, r = split_q(self.q, tiles), split_r(self.right, tiles)
        q_sums = v.new_empty(q.splits, tokens, size, dtype=torch.float32)
        r_sums = v.new_empty(r.splits, tokens, linear.rank, dtype=torch.float32)
        products[(q.programs + r.programs,)](
            v, *arrays(linear.backbone, self.q), q_sums, *arrays(linear.right if linear.rank else None), r_sums,
            self.q, self.right, q.splits, q.share, q.programs, r.splits, r.share, tokens, side, tiles.walks, tiles.rows,
            UNITS, tiles.few, COLUMNS, self.dp4a,
            num_warps=4,
        )  # fmt: skip

        first, *others = self.rotations[OUTPUT] or [None]
        if first is not None and len(first) > COLUMNS:
            first, others = None, self.rotations[OUTPUT]  # too large for the registers
        length = COLUMNS if first is None else len(first)
        signs, bias = self.signs[OUTPUT], linear.bias
        ends = dict(signs=None, bias=None) if others else dict(signs=signs, bias=bias)
        y = x.new_empty(tokens, size, dtype=torch.float32 if others else x.dtype)
        finish[(-(-size // length), tokens)](
            q_sums, r_sums, *arrays(linear.left if linear.rank else None), linear._buffers.get("component_scale"),
            linear._buffers.get("scale"), first, ends["signs"], ends["bias"], y, size, linear.rank, self.left,
            self.q.gain if self.q else 1.0, q.splits, r.splits, tokens, length, triton.next_power_of_2(length), CHUNK, self.dp4a,
            num_warps=8,
        )  # fmt: skip
        stride = 1 if first is None else length
        y = rotate(y, others, x.dtype, stride=stride, signs=signs, bias=bias)
        return y.view(*x.shape[:-1], size)


def rotate(x, factors, dtype, *, stride=1, enter=None, signs=None, bias=None) -> torch.Tensor:
    """x (tokens, size) by the factors of a rotation, the first of which has elements that are `stride` apart."""
    for i, factor in enumerate(factors):
        length, last = len(factor), i == len(factors) - 1
        y = torch.empty_like(x, dtype=dtype if last else torch.float32)
        turn[(x.shape[1] // length, len(x))](
            x, factor, None if i else enter, y, signs if last else None, bias if last else None, x.shape[1], length,
            triton.next_power_of_2(length), stride, CHUNK, num_warps=4 if length <= 256 else 8,
        )  # fmt: skip
        x, stride = y, stride * length
    return x


def arrays(part: nn.Module | None, form: Form | None = None) -> tuple[torch.Tensor | None, ...]:
    """Codes, scales and zeros; the codes in the units of a form, where one is given."""
    if part is None:
        return None, None, None
    codes = part.codes
    if form is not None and form.kind != "bf16" and (form.kind == "trellis" or form.words):
        codes = codes.view(torch.int16 if form.kind == "trellis" and form.unit == 16 else torch.int32)
    return codes, part._buffers.get("scales"), part._buffers.get("zeros")


def narrow(signs: torch.Tensor) -> torch.Tensor:
    """In a byte each, where they are all whole."""
    small = signs.to(torch.int8)
    return small if torch.equal(small.to(signs.dtype), signs) else signs.contiguous()


def replace_forward(linear: nn.Module) -> None:
    """Let a layer's forward use kernels for 1 to MOST_TOKENS tokens, and do as before for more, and for gradients.

    Raises:
        NotImplementedError: for a layer that has no kernel.
    """
    name = "_old_forward" if hasattr(linear, "_old_forward") else "forward"  # where accelerate has put its own before it
    setattr(linear, name, partial(choose, Kernel(linear), type(linear).forward))


def choose(kernel: Kernel, ordinary: Callable, x: torch.Tensor) -> torch.Tensor:
    bias = kernel.linear.bias
    gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    if gradient or not few or x.device != kernel.device or torch.compiler.is_compiling():
        return ordinary(kernel.linear, x)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return kernel(x)
