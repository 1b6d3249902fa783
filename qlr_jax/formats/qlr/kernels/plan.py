"""How a part is stored, as a kernel is compiled for it, and how its products are shared out among programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from qlr_jax.formats.qlr.kernels.combine import MOST_SPLITS
from qlr_jax.formats.qlr.modeling_qlr import LENGTH, SEGMENTS, state_gain

PROGRAMS = 1024  # of `products`: several for each of a GPU's processors
SEQUENCES = 32  # that a program decodes at a time
ROWS, UNITS = 64, 32  # of integers that a program decodes at a time; a unit is four bytes, or eight codes
COLUMNS = 128  # of R, or of L and a factor of a rotation, that a program decodes at a time


@dataclass(frozen=True)
class Format:
    """How a part is stored: what a kernel is compiled for."""

    kind: str  # "trellis", "segmented" (a trellis whose rate changes along the columns), "integer" or "bf16"
    rows: int
    cols: int
    stride: int = 0  # integer: bytes a row; segmented: of a row of sequences
    bits: int = 0  # integer
    group: int = 0  # integer: columns that share a scale, or 0
    groups: int = 1  # integer: a row
    asymmetric: bool = False
    words: bool = False  # integer: a unit is a word of four bytes, not the bytes of eight codes
    per_unit: int = 8  # integer: codes of a unit
    segments: int = 0  # segmented: how many
    rate: int = 0  # trellis: bits a weight, in sixteenths, so that a sequence is 2 · rate bytes
    state_bits: int = 0  # trellis
    tile_rows: int = 1  # trellis: rows that a sequence covers
    tile_cols: int = LENGTH  # trellis: columns that it covers
    across: int = 0  # trellis: sequences beside each other
    load_bits: int = 16  # trellis: bits that are loaded at a time
    per_window: int = 16  # trellis: consecutive weights that are decoded from one window of 64 bits
    loads: int = 0  # trellis: loads that fill a window
    gain: float = 1.0  # trellis: factor of the hashed value of a state


def format_of(part: Any) -> Format | None:
    """What a kernel has to know of a `Part`, of this runtime or of a folder's own; None where there is no kernel for it."""
    kind, rows, cols = type(part).__name__, part.rows, part.cols  # by name: a folder's own runtime has classes of its own
    if kind == "BFloat16Part":
        return Format("bf16", rows, cols)
    if kind == "IntegerPart" and part.bits in (2, 3, 4, 8):
        stride = part.codes.shape[1]
        words = part.bits != 3 and stride % 4 == 0
        per_unit = 32 // part.bits if words else 8
        if part.group % per_unit:
            return None  # a scale would change within a unit
        return Format("integer", rows, cols, stride, part.bits, part.group, part.groups, part.asymmetric, words, per_unit)
    if kind == "TrellisPart":
        rate = part.codes.shape[2] // 2
        load_bits = 32 if rate % 32 == 0 else 16
        per_window = 16
        while (bits := window_bits(rate, part.state_bits, load_bits, per_window)) > 64:
            per_window //= 2
        return Format(
            "trellis", rows, cols, rate=rate, state_bits=part.state_bits, tile_rows=part.height, tile_cols=part.width,
            across=part.across, load_bits=load_bits, per_window=per_window, loads=-(-bits // load_bits), gain=state_gain(2 * rate),
        )  # fmt: skip
    if kind == "SegmentedTrellisPart":
        return Format(
            "segmented", rows, cols, part.codes.shape[1], segments=min(SEGMENTS, part.across), state_bits=part.state_bits,
            tile_rows=part.height, tile_cols=part.width, across=part.across,
        )  # fmt: skip
    return None


def window_bits(rate: int, state_bits: int, load_bits: int, per_window: int) -> int:
    """Bits that a window of a trellis sequence has to have.

    Args:
        rate: bits a weight, in sixteenths.
        state_bits: of the state before the first weight.
        load_bits: bits of a load; where a window may end inside one, up to all but one of them come along.
        per_window: weights of the window.
    """
    unaligned = per_window * rate % (16 * load_bits) != 0
    return -(-(per_window - 1) * rate // 16) + state_bits + (load_bits - 1 if unaligned else 0)


@dataclass(frozen=True)
class Split:
    """How the sums of a part are shared out: programs = bands · splits, each with `share` columns, sequences or units."""

    programs: int
    splits: int
    share: int


def split(rows: int, band: int, across: int, step: int) -> Split:
    """Enough programs to keep a GPU busy, but none with less than a step.

    Args:
        rows: of the part.
        band: rows a program.
        across: columns, sequences or units of a row.
        step: how many of them a program decodes at a time.
    """
    bands = -(-rows // band)
    splits = max(1, min(-(-PROGRAMS // bands), -(-across // step), MOST_SPLITS.value))
    share = -(-across // (splits * step)) * step
    splits = -(-across // share)
    return Split(bands * splits, splits, share)


@dataclass(frozen=True)
class Tiles:
    """What a program decodes at a time."""

    sequences: int  # trellis
    rows: int  # integers
    units: int  # integers
    generic_rows: int  # what has no kernel of its own, R and L among it
    columns: int  # of that


def tiles_of(tokens: int) -> Tiles:
    """Smaller for more tokens, because each adds sums for every weight, and a thread has at most 256 registers."""
    small = {1: 1, 2: 1, 4: 2, 8: 4}[tokens]
    return Tiles(SEQUENCES // min(small, 2), ROWS // small, UNITS, 4 // min(small, 2), COLUMNS)


@cache
def split_q(format: Format | None, tiles: Tiles) -> Split:
    """How Q's products are shared out; no programs where there is no Q."""
    if format is None:
        return Split(0, 0, 1)
    if format.kind == "trellis":
        return split(format.rows, format.tile_rows, format.across, tiles.sequences)
    if format.kind == "integer":
        return split(format.rows, tiles.rows, -(-format.cols // format.per_unit), tiles.units)
    return split(format.rows, tiles.generic_rows, format.cols, tiles.columns)


@cache
def split_r(format: Format | None, tiles: Tiles) -> Split:
    """The same for R."""
    return Split(0, 0, 1) if format is None else split(format.rows, tiles.generic_rows, format.cols, tiles.columns)
