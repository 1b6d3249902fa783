"""Products with packed matrices by the C++ library: its structures, as ctypes has them, and its two calls."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from qlr_jax import native

MOST_TOKENS = 64  # of a product: for more, a library of dense products does better on rows that are decoded once


class Kind(IntEnum):
    """How a part is stored."""

    NONE, TRELLIS, INTEGER, LEVELS, LATTICE, BFLOAT16 = range(6)


class Type(IntEnum):
    """Of inputs and outputs."""

    FLOAT32, BFLOAT16, FLOAT16 = range(3)


@dataclass(frozen=True)
class Format:
    """How the arrays of a part lie in memory.

    Attributes:
        kind: which arrays there are, and what their codes mean.
        bits: of a code; of a trellis, of a state.
        count: bytes of a row, or of a trellis sequence.
        group: weights of a row that share a scale; 0: all of it, or there is no scale.
        height: rows of a trellis sequence.
        gain: what values are multiplied by.
        zero: the zero point where none is stored.
        levels: values of the codes of `LEVELS`, at most 16.
    """

    kind: Kind
    bits: int = 0
    count: int = 0
    group: int = 0
    height: int = 1
    gain: float = 1.0
    zero: float = 0.0
    levels: tuple[float, ...] = ()

    def numbers(self, rows: int, cols: int) -> list[int]:
        """As the custom calls take them."""
        return [int(self.kind), self.bits, self.group, self.height, rows, cols, self.count]

    def floats(self) -> list[float]:
        """As the custom calls take them."""
        return [self.gain, 0.0, self.zero, *self.levels, *[0.0] * (16 - len(self.levels))]


_int, _long, _at, _float = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Part(ctypes.Structure):
    """Q (out, in), Lᵀ (rank, out) or R (rank, in) as it is stored; `product.h` says what the fields are."""

    _fields_ = (
        *((name, _int) for name in ("kind", "bits", "group", "height")),
        *((name, _long) for name in ("rows", "cols", "count")),
        *((name, _at) for name in ("codes", "scales", "small_scales", "zeros", "levels", "points", "roots")),
        ("gains", _float * 2),
        ("zero", _float),
        ("stride", _long),
        ("tail", _at),
        ("tail_row", _long),
    )


class Layer(ctypes.Structure):
    """y = W x, W = scale · Uᵀ (Q + L diag(s) R) V or diag(row_scales) Q V; `product.h` says what the fields are."""

    _fields_ = (
        *((name, _long) for name in ("outputs", "inputs")),
        *((name, _int) for name in ("rank", "seed", "turned_inputs", "turned_outputs", "input_block", "output_block")),
        *((name, Part) for name in ("backbone", "left", "right")),
        *((name, _at) for name in ("component_scale", "scale", "row_scales", "input_signs", "output_signs")),
    )


@lru_cache
def library() -> ctypes.CDLL | None:
    """The library with its products, or None where there is none that fits."""
    found = native.library()
    if found is None:
        return None
    found.qlr_multiply.restype = found.qlr_decode.restype = found.qlr_product_set.restype = ctypes.c_char_p
    found.qlr_multiply.argtypes = (ctypes.c_char_p, _at, _at, _long, _int, _int, _at, _int, _at)
    found.qlr_decode.argtypes = (ctypes.c_char_p, _at, _long, _long, _at, _int, _at)
    found.qlr_sizes.restype, found.qlr_sizes.argtypes = _long, (_int,)
    same = [found.qlr_sizes(i) == ctypes.sizeof(structure) for i, structure in enumerate((Part, Layer))]
    return found if all(same) else None


def instruction_set() -> str:
    """The widest that this machine's products are written for: avx512, avx2, neon or portable; empty without the library."""
    found = library()
    return found.qlr_product_set().decode() if found else ""


def multiply(
    layer: Layer,
    x: int,
    y: int,
    tokens: int,
    kind: Type,
    threads: int = 1,
    team: int | None = None,
    by: str | None = None,
    exact: bool = True,
) -> str:
    """y = W x for some tokens.

    Args:
        layer: W.
        x, y: addresses of (tokens, inputs) and (tokens, outputs).
        tokens: how many.
        kind: type of both.
        threads: that share the rows.
        team: address of OpenMP's GOMP_parallel, whose threads are then used; None: the library's own.
        by: an instruction set by name; None: the widest.
        exact: float32 throughout; else activations of at most 8 tokens are rounded to 16 bits where that is faster, which adds
            2e-5 of y's norm to its error.

    Returns:
        What the library would need in place of what it was given; empty where y is there.
    """
    found = library()
    assert found is not None, "there is a library"
    return (found.qlr_multiply(by and by.encode(), ctypes.byref(layer), x, tokens, kind, exact, y, threads, team) or b"").decode()


def decode(part: Part, first: int, last: int, out: int, threads: int = 1, team: int | None = None, by: str | None = None) -> str:
    """Rows of a part in float32.

    Args:
        part: what is stored.
        first, last: rows first … last − 1; `first` is a multiple of its height.
        out: address of (last − first, cols).
        threads, team, by: as of `multiply`.

    Returns:
        As `multiply`.
    """
    found = library()
    assert found is not None, "there is a library"
    return (found.qlr_decode(by and by.encode(), ctypes.byref(part), first, last, out, threads, team) or b"").decode()
