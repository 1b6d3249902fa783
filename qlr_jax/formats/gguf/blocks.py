"""Integers as GGUF blocks, to the bit: codes and one fp16 scale a block of Q4_0, Q8_0, Q2_K or Q3_K.

The K types have a small scale for every 16 weights beside the block's own d; here it is 1 everywhere, so that d is the scale.
Layouts: ggml's `block_q4_0`, `block_q8_0`, `block_q2_K`, `block_q3_K` (github.com/ggml-org/ggml, src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qlr_jax.errors import QLRError


def pack_blocks(kind: str, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks whose dequantization is scale · (code − 2^(bits − 1)), exactly.

    Args:
        kind: "Q4_0", "Q8_0", "Q2_K" or "Q3_K".
        codes: unsigned, (rows, cols); cols a multiple of the type's block, 32 or 256.
        scales: float16, (rows, cols / block).

    Returns:
        uint8 (rows, bytes of a row).

    Example:
        >>> pack_blocks("Q8_0", np.full((1, 32), 129), np.ones((1, 1), np.float16))[0, :4].tolist()   # fp16 1.0, then 1, 1, …
        [0, 60, 1, 1]
    """
    rows, blocks = scales.shape
    flat = codes.astype(np.uint8).reshape(rows * blocks, -1)
    d = np.ascontiguousarray(scales, np.dtype("<f2")).reshape(-1, 1).view(np.uint8)
    return _PACKERS[kind](flat, d).reshape(rows, -1)


def fold_scale(name: str, scales: np.ndarray, scale: float) -> np.ndarray:
    """g · scales in float16, exactly.

    Args:
        name: of the matrix, for the error.
        scales: float16, any shape.
        scale: g, a power of two in whatever the solver makes of integers.

    Raises:
        QLRError: naming a product that is no float16 (below 2^-14 its spacing is coarser than the scale's own).

    Example:
        >>> fold_scale("q_proj", np.array([1.5], np.float16), 0.25).tolist()
        [0.375]
    """
    wanted = scales.astype(np.float64) * float(scale)
    with np.errstate(over="ignore"):
        folded = wanted.astype(np.float16)
    wrong = folded.astype(np.float64) != wanted
    if wrong.any():
        value = float(wanted[wrong].flat[0])
        raise QLRError(
            f"{name}: the scale g·s = {value:.6g} of a block is no fp16 number, the only kind that GGUF blocks have, "
            f"{int(wrong.sum())} of {wrong.size} blocks being so; keep this matrix as bf16, or with a coarser grid such as int-4g32"
        )
    return folded


def _q4_0(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """d, then 16 bytes: weight i in the low half of byte i, weight i + 16 in its high half."""
    return np.concatenate([d, codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _q8_0(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """d, then 32 signed bytes: code − 128 is the code with its top bit flipped."""
    return np.concatenate([d, codes ^ 0x80], axis=1)


def _q2_k(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """16 bytes of two 4-bit numbers (scale, minimum), 64 bytes of codes, d, dmin: d · scale · code − dmin · minimum.

    With scale 1, minimum 2 and dmin = d that is d · (code − 2).
    """
    small = np.full((len(codes), 16), 1 | 2 << 4, np.uint8)
    return np.concatenate([small, _low_pairs(codes), d, d], axis=1)


def _q3_k(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """32 bytes of the codes' top bits, 64 bytes of their low two, 12 bytes of 6-bit scales (plus 32), d.

    Top bit 32 j + l (j < 8) is bit j of byte l. The scales' low halves fill 8 bytes, their top pairs 4; each is 33 here, for 1.
    """
    high = (codes >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    small = np.broadcast_to(np.array([0x11] * 8 + [0b10101010] * 4, np.uint8), (len(codes), 12))
    return np.concatenate([np.bitwise_or.reduce(high, axis=1), _low_pairs(codes & 3), small, d], axis=1)


def _low_pairs(codes: np.ndarray) -> np.ndarray:
    """256 two-bit codes in 64 bytes: weight 128 h + 32 j + l is pair j of byte 32 h + l."""
    spread = codes.reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(spread, axis=2).reshape(len(codes), 64)


_PACKERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k}
