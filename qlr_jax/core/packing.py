"""Codes to bytes and back, exactly: the bit streams that are stored and counted."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlr_jax.core.typing import Array


def stream_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes, padded to a whole byte.

    Example:
        >>> stream_bytes(13, 3)
        5
    """
    return -(-count * bits // 8)


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes (rows, count) into a little-endian bit stream a row.

    Bit j of code i is bit i·bits + j of the row's stream; bit k of the stream is bit k % 8 of byte k // 8.

    Args:
        codes: integers in [0, 2^bits), shape (rows, count).
        bits: 1 to 8.

    Returns:
        uint8 (rows, ceil(count · bits / 8)).

    Example:
        >>> pack_stream(np.array([[1, 2, 3]]), 4).tolist()
        [[33, 3]]
    """
    codes = np.asarray(codes)
    spread = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(spread.reshape(codes.shape[0], -1), axis=1, bitorder="little")


def unpack_stream(packed: Array, bits: int, count: int) -> Array:
    """Undo `pack_stream`: uint8 (rows, bytes) to int32 codes (rows, count).

    Args:
        packed: uint8 (rows, ceil(count · bits / 8)).
        bits: of a code, 1 to 8.
        count: codes a row; the bits that fill the last byte are left out.

    Returns:
        int32 (rows, count).

    Example:
        >>> unpack_stream(jnp.array([[33, 3]], jnp.uint8), 4, 3).tolist()
        [[1, 2, 3]]
    """
    # outside jit numpy reads the bytes: op by op, JAX takes several times as long
    stream: Any = packed if isinstance(packed, Tracer) else np.asarray(packed)
    start = np.arange(count) * bits
    first, offset = start // 8, start % 8
    second = np.minimum(first + 1, stream.shape[1] - 1)  # a code spans two bytes at most
    wide = stream[:, first].astype(np.int32) | (stream[:, second].astype(np.int32) << 8)
    return jnp.asarray((wide >> offset) & (2**bits - 1), jnp.int32)
