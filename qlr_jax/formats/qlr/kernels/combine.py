"""Partial sums to y: L diag(s) R v added, times g, the rotations' factors, signs and bias."""

from __future__ import annotations

import triton

from qlr_jax.formats.qlr.kernels.decode import decode_weights
from qlr_jax.formats.qlr.kernels.language import constant, tl

MOST_SPLITS = constant(16)  # programs that share a row: their sums are read at once


@triton.jit
def store_output(y, values, at, size, token, signs, bias, live):
    """values, times signs and plus bias where there are any, into y (tokens, size), in its type.

    Args:
        y: the output, (tokens, size).
        values: float32 elements `at` of one token.
        signs, bias: (size,), or None.
        live: which of the places exist.
    """
    if signs is not None:
        values = values * tl.load(signs + at, mask=live, other=0).to(tl.float32)
    if bias is not None:
        values = values + tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
    tl.store(y + token * size + at, values.to(y.dtype.element_ty), mask=live)


@triton.jit
def apply_factor(
    x, factor, enter, y, signs, bias, size, LENGTH: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr
):
    """A symmetric factor (LENGTH, LENGTH) times vectors whose elements are STRIDE apart, one a program and token.

    Args:
        x, y: (tokens, size), input and output.
        factor: (LENGTH, LENGTH), symmetric.
        enter, signs, bias: (size,) or None: `enter` multiplies x, `signs` the product, `bias` is added.
        LENGTH, SIDE: of a vector, and the power of two that covers it.
        STRIDE: between the elements of a vector.
        CHUNK: elements that are read at a time.
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
    store_output(y, total, start + out * STRIDE, size, token, signs, bias, out < LENGTH)


@triton.jit
def sum_splits(sums, token, at, size, live, SPLITS: tl.constexpr, TOKENS: tl.constexpr):
    """Elements `at` of one token of sums (splits, tokens, size), added over the splits.

    Args:
        sums: (SPLITS, TOKENS, size), float32.
        token: which token; `live` says which of the elements exist.
    """
    split = tl.arange(0, MOST_SPLITS)
    here = (split < SPLITS)[:, None] & live[None, :]
    return tl.sum(tl.load(sums + (split * TOKENS + token)[:, None] * size + at[None, :], mask=here, other=0.0), 0)


@triton.jit
def finish(
    q_sums, r_sums, l_codes, l_scales, l_zeros, component, scale, factor, signs, bias, y, size, rank, L: tl.constexpr,
    GAIN: tl.constexpr, Q_SPLITS: tl.constexpr, R_SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    LENGTH: tl.constexpr, SIDE: tl.constexpr, CHUNK: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """g (Q v + L diag(s) R v) from the sums, times a symmetric factor (LENGTH, LENGTH) where there is one.

    Args:
        q_sums, r_sums: Q v (Q_SPLITS, TOKENS, size) and R v (R_SPLITS, TOKENS, rank).
        l_codes, l_scales, l_zeros: the stored arrays of Lᵀ (rank, size), L its format; None at rank 0.
        component, scale: s (rank,) and g (1,), or None.
        factor: of the rotation, (LENGTH, LENGTH), or None; SIDE is the power of two that covers LENGTH.
        signs, bias: (size,), or None, as `store_output` takes them.
        y: the output, (TOKENS, size).
        GAIN: of Q's code.
        CHUNK: components that are read at a time.
        DP4A: whether the device adds four bytes in one instruction.
    """
    which, token = tl.program_id(0), tl.program_id(1)
    out = tl.arange(0, SIDE)
    at = which * LENGTH + out
    live = (out < LENGTH) & (at < size)
    total = GAIN * sum_splits(q_sums, token, at, size, live, Q_SPLITS, TOKENS)
    if L is not None:
        for first in range(0, rank, CHUNK):
            k = first + tl.arange(0, CHUNK)
            z = sum_splits(r_sums, token, k, rank, k < rank, R_SPLITS, TOKENS)
            if component is not None:
                z = z * tl.load(component + k, mask=k < rank, other=0.0).to(tl.float32)
            here = (k < rank)[:, None] & live[None, :]
            total += tl.sum(z[:, None] * decode_weights(l_codes, l_scales, l_zeros, k[:, None], at[None, :], here, L, DP4A), 0)
    if scale is not None:
        total = total * tl.load(scale)
    if factor is not None:
        square = (out < LENGTH)[:, None] & (out < LENGTH)[None, :]
        wide = tl.load(factor + out[:, None] * LENGTH + out[None, :], mask=square, other=0.0)
        total = tl.sum(total[:, None] * wide, 0)  # the factor is symmetric
    store_output(y, total, at, size, token, signs, bias, live)
