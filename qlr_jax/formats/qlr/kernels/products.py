"""Q v and R v for a few tokens, as partial sums: each program decodes a band of rows over a share of the columns."""

# ruff: noqa: RUF005, SIM108  Triton's language has not all of Python's; and a branch that is not taken is not compiled

from __future__ import annotations

import triton

from qlr_jax.formats.qlr.kernels.decode import big_endian, decode_weights, state_value, zero_point
from qlr_jax.formats.qlr.kernels.language import tl


# In one piece: Triton inlines it whole, and state kept in registers cannot be handed between functions cheaply.
@triton.jit
def trellis_band(
    v, codes, sums, band, split, SHARE: tl.constexpr, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, FORMAT: tl.constexpr,
    DP4A: tl.constexpr,
):  # fmt: skip
    """Sums of the rows of a band of sequences over the columns of SHARE sequences, for all tokens.

    PER_WINDOW consecutive weights and the state before them fit in 64 bits. A thread loads those of some places; the rest is
    arithmetic in registers, with shifts that are known at compile time.

    Args:
        v: (TOKENS, in), rotated.
        codes: the packed sequences of the part.
        sums: the result, (splits, TOKENS, rows).
        band, split: which rows, and which share of the columns.
        SHARE: sequences of a split; SEQUENCES: of them, how many at a time.
        FORMAT: of the stored part.
        DP4A: whether the device adds four bytes in one instruction.
    """
    WIDTH: tl.constexpr = FORMAT.tile_cols
    PER_WINDOW: tl.constexpr = FORMAT.per_window
    PLACES: tl.constexpr = FORMAT.tile_rows * WIDTH // PER_WINDOW
    TALL: tl.constexpr = PER_WINDOW // WIDTH if PER_WINDOW > WIDTH else 1  # rows and columns that they cover
    WIDE: tl.constexpr = PER_WINDOW // TALL
    BITS: tl.constexpr = PER_WINDOW * FORMAT.rate // 16  # that they take, where it is a whole number
    WHOLE: tl.constexpr = PER_WINDOW * FORMAT.rate % 16 == 0
    ALIGNED: tl.constexpr = PER_WINDOW * FORMAT.rate % (16 * FORMAT.load_bits) == 0
    COUNT: tl.constexpr = 16 * FORMAT.rate // FORMAT.load_bits  # loads that a whole sequence takes
    LOADS: tl.constexpr = FORMAT.loads
    ROWS: tl.constexpr = FORMAT.tile_rows // TALL

    place = tl.arange(0, PLACES)
    end = (place + 1) * PER_WINDOW * FORMAT.rate // 16
    if ALIGNED:
        last = place * (BITS // FORMAT.load_bits) + (BITS // FORMAT.load_bits - 1)  # one after the other, as the compiler can see
    else:
        last = (end + FORMAT.load_bits - 1) // FORMAT.load_bits - 1
    slack = (last + 1) * FORMAT.load_bits - end
    zero = tl.zeros((SEQUENCES, PLACES), tl.float32)
    totals = ()  # one for each row of a place and each token: as more axes of one array they would move between threads
    for _ in tl.static_range(TALL * TOKENS):
        totals = totals + (zero,)
    stop = tl.minimum((split + 1) * SHARE, FORMAT.across)
    for start in range(split * SHARE, stop, SEQUENCES):
        sequence = start + tl.arange(0, SEQUENCES)
        inside = sequence < stop
        at = codes + (band * FORMAT.across + sequence)[:, None] * COUNT
        window = big_endian(tl.load(at + last[None, :], mask=inside[:, None], other=0), FORMAT.load_bits)
        for i in tl.static_range(1, LOADS):
            before = tl.where(last >= i, last - i, last - i + COUNT)  # the sequence is circular
            loaded = tl.load(at + before[None, :], mask=inside[:, None], other=0)
            window |= big_endian(loaded, FORMAT.load_bits) << (FORMAT.load_bits * i)
        if not ALIGNED:
            window = window >> slack[None, :].to(tl.uint64)
        for i in tl.static_range(WIDE):
            values = ()
            for down in tl.static_range(TALL):
                if WHOLE:
                    state = window >> (BITS - (WIDE * down + i + 1) * FORMAT.rate // 16)
                else:
                    shift = end - (PER_WINDOW * place + WIDE * down + i + 1) * FORMAT.rate // 16
                    state = window >> shift[None, :].to(tl.uint64)
                values = values + (state_value(state.to(tl.uint32) & ((1 << FORMAT.state_bits) - 1), DP4A),)
            sums_now = ()
            for token in tl.static_range(TOKENS):
                if WIDTH <= PER_WINDOW:
                    col = sequence * WIDTH + i
                    x = tl.load(v + token * FORMAT.cols + col, mask=inside & (col < FORMAT.cols), other=0.0)[:, None]
                else:
                    col = sequence[:, None] * WIDTH + (PER_WINDOW * place % WIDTH)[None, :] + i
                    x = tl.load(v + token * FORMAT.cols + col, mask=inside[:, None] & (col < FORMAT.cols), other=0.0)
                for down in tl.static_range(TALL):
                    sums_now = sums_now + (tl.fma(values[down], x.to(tl.float32), totals[token * TALL + down]),)
            totals = sums_now
    for token in tl.static_range(TOKENS):
        for down in tl.static_range(TALL):
            rows = tl.sum(totals[token * TALL + down], 0)
            rows = tl.sum(tl.reshape(rows, (ROWS, PLACES // ROWS)), 1)
            row = band * FORMAT.tile_rows + tl.arange(0, ROWS) * TALL + down
            tl.store(sums + (split * TOKENS + token) * FORMAT.rows + row, rows, mask=(row < FORMAT.rows))


# one loop whose registers are shared: Triton has no cheaper way to cut it
@triton.jit
def integer_band(
    v, codes, scales, zeros, sums, band, split, SHARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows over the columns of SHARE units, for all tokens: Σ (u − zero) · v, scaled once a unit.

    A code u of b bits is put below the exponent of 1, so that it is 1 + u / 2^b without a conversion; Σ v is subtracted afterwards.

    Args:
        v: (TOKENS, in), rotated where the part is.
        codes, scales, zeros: the stored arrays.
        sums: the result, (splits, TOKENS, rows).
        band, split: which rows, and which share of the columns.
        SHARE: units of a split; UNITS: of them, how many at a time.
        FORMAT: of the stored part.
    """
    BITS: tl.constexpr = FORMAT.bits
    PER_UNIT: tl.constexpr = FORMAT.per_unit
    ACROSS: tl.constexpr = (FORMAT.cols + PER_UNIT - 1) // PER_UNIT
    FIELD: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    row = band * ROWS + tl.arange(0, ROWS)
    nothing, none = tl.zeros((ROWS, UNITS), tl.float32), tl.zeros((UNITS,), tl.float32)
    totals, products, plains = (), (), ()  # one for each token
    for _ in tl.static_range(TOKENS):
        totals, products, plains = totals + (nothing,), products + (nothing,), plains + (none,)
    no_products, no_plains = products, plains
    stop = tl.minimum((split + 1) * SHARE, ACROSS)
    for start in range(split * SHARE, stop, UNITS):
        unit = start + tl.arange(0, UNITS)
        live = (row < FORMAT.rows)[:, None] & (unit < stop)[None, :]
        if FORMAT.words:
            word = tl.load(codes + row[:, None] * (FORMAT.stride // 4) + unit[None, :], mask=live, other=0).to(tl.uint32)
        else:
            word = tl.zeros((ROWS, UNITS), tl.uint64)
            for i in tl.static_range(BITS):
                at = (unit * BITS + i)[None, :]
                byte = tl.load(codes + row[:, None] * FORMAT.stride + at, mask=live & (at < FORMAT.stride), other=0)
                word |= byte.to(tl.uint64) << (8 * i)
        products, plains = no_products, no_plains
        for i in tl.static_range(PER_UNIT):
            if BITS * (i + 1) > 23:
                placed = word >> (BITS * (i + 1) - 23)
            else:
                placed = word << (23 - BITS * (i + 1))
            value = ((placed.to(tl.uint32) & FIELD) | 0x3F800000).to(tl.float32, bitcast=True)
            col = unit * PER_UNIT + i
            after, after_plain = (), ()
            for token in tl.static_range(TOKENS):
                x = tl.load(v + token * FORMAT.cols + col, mask=(unit < stop) & (col < FORMAT.cols), other=0.0).to(tl.float32)
                after = after + (tl.fma(value, x[None, :], products[token]),)
                after_plain = after_plain + (plains[token] + x,)
            products, plains = after, after_plain
        group = row[:, None] * FORMAT.groups + (unit * PER_UNIT // FORMAT.group if FORMAT.group else unit * 0)[None, :]
        scale = tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
        offset = zero_point(zeros, group, live, FORMAT) + 2.0**BITS
        after = ()
        for token in tl.static_range(TOKENS):
            after = after + (tl.fma(products[token] * 2.0**BITS - plains[token][None, :] * offset, scale, totals[token]),)
        totals = after
    for token in tl.static_range(TOKENS):
        at = sums + (split * TOKENS + token) * FORMAT.rows + row
        tl.store(at, tl.sum(totals[token], 1), mask=row < FORMAT.rows)


@triton.jit
def generic_band(
    v, codes, scales, zeros, sums, band, split, SHARE: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, FORMAT: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows over SHARE columns, for all tokens, of a part of any kind.

    Args:
        v: (TOKENS, in), rotated where the part is.
        codes, scales, zeros: the stored arrays.
        sums: the result, (splits, TOKENS, rows).
        band, split: which rows, and which share of the columns; COLUMNS of them at a time.
        SIDE: the power of two that covers TOKENS.
        FORMAT: of the stored part.
        DP4A: whether the device adds four bytes in one instruction.
    """
    row = band * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, SIDE)
    total = tl.zeros((SIDE, ROWS, COLUMNS), tl.float32)
    stop = tl.minimum((split + 1) * SHARE, FORMAT.cols)
    for start in range(split * SHARE, stop, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        live = (row < FORMAT.rows)[:, None] & (col < stop)[None, :]
        value = decode_weights(codes, scales, zeros, row[:, None], col[None, :], live, FORMAT, DP4A)
        here = (token < TOKENS)[:, None] & (col < stop)[None, :]
        x = tl.load(v + token[:, None] * FORMAT.cols + col[None, :], mask=here, other=0.0).to(tl.float32)
        total = tl.fma(x[:, None, :], value[None, :, :], total)
    store_sums(sums, tl.sum(total, 2), split, row, TOKENS, SIDE, FORMAT)


@triton.jit
def store_sums(sums, values, split, row, TOKENS: tl.constexpr, SIDE: tl.constexpr, FORMAT: tl.constexpr):
    """values (SIDE, rows) into sums (splits, tokens, all rows).

    Args:
        sums: (splits, TOKENS, all rows), float32.
        values: (SIDE, rows), SIDE the power of two that covers TOKENS.
        split, row: where they belong.
        FORMAT: of the stored part.
    """
    token = tl.arange(0, SIDE)
    live = (token < TOKENS)[:, None] & (row < FORMAT.rows)[None, :]
    tl.store(sums + ((split * TOKENS + token) * FORMAT.rows)[:, None] + row[None, :], values, mask=live)


@triton.jit
def products(
    v, q_codes, q_scales, q_zeros, q_sums, r_codes, r_scales, r_zeros, r_sums, Q: tl.constexpr, R: tl.constexpr,
    Q_SPLITS: tl.constexpr, Q_SHARE: tl.constexpr, Q_PROGRAMS: tl.constexpr, R_SPLITS: tl.constexpr, R_SHARE: tl.constexpr,
    TOKENS: tl.constexpr, SIDE: tl.constexpr, SEQUENCES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    GENERIC_ROWS: tl.constexpr, COLUMNS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """q_sums (splits of Q, tokens, out) and r_sums (splits of R, tokens, rank) of v (tokens, in).

    Args:
        v: (TOKENS, in), rotated where the layer is.
        q_codes … q_zeros, r_codes … r_zeros: the stored arrays of Q and R; None where they have none.
        q_sums, r_sums: the results, (splits, TOKENS, rows).
        Q, R: formats; None where there is no backbone, no factors.
        Q_SPLITS, Q_SHARE, R_SPLITS, R_SHARE: how many splits of the columns, and what of them one has.
        Q_PROGRAMS: how many programs are Q's; the others are R's.
        SIDE: the power of two that covers TOKENS.
        SEQUENCES, ROWS, UNITS, GENERIC_ROWS, COLUMNS: tiles, by kind of part (`plan`).
        DP4A: whether the device adds four bytes in one instruction.
    """
    program = tl.program_id(0)
    if program < Q_PROGRAMS:
        band, split = program // Q_SPLITS, program % Q_SPLITS
        if Q is None:
            pass
        elif Q.kind == "trellis":
            trellis_band(v, q_codes, q_sums, band, split, Q_SHARE, TOKENS, SEQUENCES, Q, DP4A)
        elif Q.kind == "integer":
            integer_band(v, q_codes, q_scales, q_zeros, q_sums, band, split, Q_SHARE, TOKENS, ROWS, UNITS, Q)
        else:
            generic_band(v, q_codes, q_scales, q_zeros, q_sums, band, split, Q_SHARE, TOKENS, SIDE, GENERIC_ROWS, COLUMNS, Q, DP4A)
    elif R is not None:
        band, split = (program - Q_PROGRAMS) // R_SPLITS, (program - Q_PROGRAMS) % R_SPLITS
        generic_band(v, r_codes, r_scales, r_zeros, r_sums, band, split, R_SHARE, TOKENS, SIDE, GENERIC_ROWS, COLUMNS, R, DP4A)
