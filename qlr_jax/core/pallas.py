"""x Qᵀ + z Lᵀ from packed codes in one Pallas kernel, for TPUs and, by Triton, for NVIDIA GPUs; run and measured on neither so far.

A program of the kernel makes a band of outputs: it decodes the tile rows of Q that hold them, a chunk of columns at a time, and
multiplies at once, then does the same with their part of L. Reading codes is a product, too: where the bytes lie that hold a code
is the same in all tiles, so bytes @ selection gives every code with bits of its neighbours above it and, as a fraction, below it.
All are exact: bytes and powers of two are in bfloat16, and at most 24 bits, which no two bytes share, are summed in float32. So
nothing is gathered, and no code crosses lanes. Scales of groups, the 11 bits of each as a sum of two in bfloat16, come to their
weights by a product with a 0/1 matrix, as exactly.

What was seen is the arithmetic, interpreted on a CPU, and that compilers take the kernel: libtpu 0.0.42 for v4, v5e and v6e; and
triton 3.9, given what JAX hands to XLA's own Triton, for compute capabilities 8.0, 8.6, 8.9 and 9.0.

`Code` and its arrays describe a part, Q or L, the same for all quantizers: blocks of (tiles, components or rows) × bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.quantizers import NVFP4, BFloat16, Integer, NormalFloat, Quantizer, ScalarGrid, Trellis
from qlr_jax.core.quantizers.normal_float import levels
from qlr_jax.core.quantizers.nvfp4 import VALUES
from qlr_jax.core.quantizers.search import ADDEND, LENGTH, MULTIPLIER
from qlr_jax.core.quantizers.segmented import GAINS, LEAST, MOST, SegmentedTrellis, bounds
from qlr_jax.core.typing import Array, Float

BAND = 64  # outputs of a program where Q is no trellis, whose tiles say how many
TOKENS = 32  # rows of x of a program, at most
SMALLEST = 16  # side of a product in Triton; its other sides are powers of two
POWERS = np.exp2(np.arange(-32.0, 32.0)).astype(np.float32)
_FACTOR, _ADDEND = (int(np.uint32(number).astype(np.int32)) for number in (MULTIPLIER, ADDEND))  # the product wraps around alike


class Blocking(NamedTuple):
    """What suits a device.

    Attributes:
        chunk: tiles, components or columns of a step, at most.
        programs: that should run; where there are fewer bands, columns are shared out among several for a band, and XLA adds up.
    """

    chunk: int
    programs: int = 1


TPU = Blocking(128)  # its lanes; its programs run one after another
GPU = Blocking(32, 512)  # more take more memory than all GPUs share among the threads of a program
INTERPRETED = TPU


@dataclass(frozen=True)
class Code:
    """What is static of a part, of which a step takes one block (a, bytes) of codes and gives y + Σ_c x_c @ values_c.

    Attributes:
        steps: blocks of a band.
        mask: of the bits of a code; 0: the blocks hold values.
        trellis: a value is the hash of a code.
        levels: the values of codes, where they are listed.
        zero: the code of value 0, where they are not, and no zeros are stored.
        width: c, columns of a tile.
        segment: steps that share a rate.
        split: bands that a block serves, each with a selection of its own.
        outputs_first: values are (outputs, inputs), and x @ values.T is meant.
    """

    steps: int
    mask: int = 0
    trellis: bool = False
    levels: tuple[float, ...] = ()
    zero: float = 0.0
    width: int = 1
    segment: int = 1
    split: int = 1
    outputs_first: bool = False


Part = tuple[Code, dict[str, Array]]
"""Its arrays: x (steps · width, tokens, a) and codes (bands, steps, a, bytes); select (split, segments · width, bytes, values); of
grids with scales those and zeros (bands, steps, groups, a), and expand (1 or bands, steps or 1, groups, values)."""


def rotated_product(x: Float[Array, "tokens n"], matrix: QLRMatrix) -> Float[Array, "tokens m"]:
    """y = x (Q + L diag(s) R)ᵀ: what lies between the rotations of `packed_matmul`, without g.

    Q and L are decoded in the kernel, but for e8, which XLA decodes to float32 before. R and z = x Rᵀ diag(s) are XLA's. Codes are
    laid out in whole blocks first, at every call; only those of Q are not copied for it where it is a trellis of 1, 2 or 4 bits and
    columns fill its steps (of 512 on a TPU, 128 on a GPU, where tiles have 64 rows). A TPU holds a band in VMEM.

    Args:
        x: rotated, float32 (tokens, n).
        matrix: (m, n).

    Example:
        >>> import qlr_jax as qlr
        >>> matrix = qlr.solve(np.eye(32, dtype=np.float32), None, "int-4g32").value
        >>> y = rotated_product(jnp.ones((1, 32)), matrix) * matrix.arrays["scale"]
        >>> bool(jnp.allclose(y, matrix.dense().sum(1), atol=1e-5))
        True
    """
    arrays = {name: jnp.asarray(array) for name, array in matrix.arrays.items()}
    # the default for GPUs, Mosaic, refuses products in a kernel; more than one stage takes more memory than some GPUs have
    to_triton = {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=1)}
    return lax.platform_dependent(
        x,
        arrays,
        tpu=partial(_product, layout=matrix.layout, blocking=TPU),
        cuda=partial(_product, layout=matrix.layout, blocking=GPU, **to_triton),
        default=partial(_product, layout=matrix.layout, blocking=INTERPRETED, interpret=True),
    )


def _product(x: Array, arrays: dict[str, Array], *, layout: Layout, blocking: Blocking, **options: Any) -> Array:
    matrix, tokens = QLRMatrix(arrays, layout), len(x)
    (m, n), spec = matrix.shape, matrix.spec
    block = min(TOKENS, _power(tokens))
    x = _padded(x, 0, -(-tokens // block) * block)
    grid = spec.quantizer(layout.state_bits, matrix.shape)
    band = grid.tile_rows if isinstance(grid, Trellis) else BAND
    own, parts = Side(band, blocking.chunk, left=False), []
    if not grid.empty:
        parts.append(_part(grid, matrix.part("backbone"), (m, n), x, own))
    if spec.rank:
        of_left, of_right = spec.factor_quantizers(layout.state_bits)
        z = jnp.matmul(x, jnp.asarray(of_right.decode(matrix.part("right"), spec.rank, n)).T, precision="highest")
        z = z * arrays["component_scale"].astype(jnp.float32) if spec.component_scales else z
        parts.append(_part(of_left, matrix.part("left"), (spec.rank, m), z, own._replace(left=True)))
    codes, inputs = zip(*parts, strict=True)
    bands = -(-m // band)
    shares = max(1, min(blocking.programs // bands, max(code.steps for code in codes)))
    y = _call(inputs, codes, (shares, bands, len(x), band), block, options).sum(0)
    return y.swapaxes(0, 1).reshape(len(x), -1)[:tokens, :m]


def _call(inputs: Any, codes: tuple[Code, ...], out: tuple[int, ...], block: int, options: dict[str, Any]) -> Array:
    """(shares, bands, tokens, outputs of a band); `block` tokens a program."""

    def spec(name: str, array: Array, split: int) -> pl.BlockSpec:
        if name == "x":
            return pl.BlockSpec((array.shape[0], block, array.shape[2]), lambda i, j, k: (0, j, 0))
        # nothing is below 0; `//` and `%` would ask for the sign, and on a TPU that for the kind of TPU
        of_band, by = (lax.rem, array.shape[0]) if name in ("select", "expand") else (lax.div, split)
        return pl.BlockSpec((None, *array.shape[1:]), lambda i, j, k: (of_band(i, np.int32(by)), 0, 0, 0))

    specs = tuple({k: spec(k, a, code.split) for k, a in own.items()} for code, own in zip(codes, inputs, strict=True))
    shares, bands, tokens, band = out
    return pl.pallas_call(
        partial(_kernel, codes=codes, shares=shares),
        grid=(bands, tokens // block, shares),
        in_specs=[specs],
        out_specs=pl.BlockSpec((None, None, block, band), lambda i, j, k: (k, i, j, 0)),
        out_shape=jax.ShapeDtypeStruct(out, jnp.float32),
        **options,
    )(inputs)


def _kernel(inputs: Any, y: Any, *, codes: tuple[Code, ...], shares: int) -> None:
    total = jnp.zeros(y.shape, jnp.float32)
    for code, refs in zip(codes, inputs, strict=True):
        start, stop = 0, code.steps
        if shares > 1:
            own = -(-code.steps // shares)
            start = pl.program_id(2) * own
            stop = jnp.minimum(start + own, code.steps)  # below `start` in the last shares, perhaps: nothing is left for them
        total = lax.fori_loop(start, stop, partial(_step, code, refs), total)
    y[...] = total


def _step(code: Code, refs: dict[str, Any], k: Array, total: Array) -> Array:
    block = refs["codes"][k]
    if code.mask:  # bytes have no way of their own to bfloat16
        block = block.astype(jnp.int32).astype(jnp.float32).astype(jnp.bfloat16)
    for c in range(code.width):
        values = _values(code, refs, block, k, c) if code.mask else block.astype(jnp.float32)
        total = total + _dot(refs["x"][k * code.width + c], values, of_b=int(code.outputs_first))
    return total


def _values(code: Code, refs: dict[str, Any], block: Array, k: Array, c: int) -> Array:
    """float32 (a, values of a row), in units of the trellis's gain."""
    # a selection that does not change is kept near the processor by Triton: those of more than 4 bits would not fit on all GPUs
    changes = refs["select"].shape[0] > code.width or refs["select"].shape[1] > 128
    at = lax.div(k, np.int32(code.segment)) * code.width + c if changes else c
    codes = _dot(block, refs["select"][at]).astype(jnp.int32) & code.mask
    if code.trellis:
        word = codes * _FACTOR + _ADDEND
        total = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + ((word >> 24) & 255)
        return (total - 510).astype(jnp.float32)
    expand = refs["expand"][k if refs["expand"].shape[0] > 1 else 0]
    zero = _dot(refs["zeros"][k], expand, 0, 0) if "zeros" in refs else code.zero
    values = codes.astype(jnp.float32) - zero
    if code.levels:
        values = jnp.full(codes.shape, code.levels[0], jnp.float32)
        for index, level in enumerate(code.levels[1:], 1):
            values = jnp.where(codes == index, level, values)
    return values * _dot(refs["scales"][k], expand, 0, 0)


def _dot(a: Array, b: Array, of_a: int = 1, of_b: int = 0) -> Array:
    """Σ over these axes of a and b."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


class Side(NamedTuple):
    """How a part lies.

    Attributes:
        band: outputs of a program.
        chunk: as `Blocking` has it.
        left: whether the part is Lᵀ.
    """

    band: int
    chunk: int
    left: bool


def _part(grid: Quantizer, arrays: Any, shape: tuple[int, int], x: Array, side: Side) -> Part:
    """A part as the kernel reads it.

    Args:
        grid: its quantizer.
        arrays: as they are stored: of Q (outputs, inputs), of Lᵀ (inputs, outputs).
        shape: of what is stored.
        x: (tokens, inputs).
        side: how it lies.
    """
    if isinstance(grid, Trellis):
        return _of_sequences(grid, arrays, shape, x, side)
    run = side.band if side.left else min(side.chunk, _power(shape[1]))
    if isinstance(grid, ScalarGrid):
        return _of_streams(grid, arrays, shape, x, run, side)
    values = arrays["codes"] if isinstance(grid, BFloat16) else grid.decode(arrays, *shape)
    runs = -(-shape[1] // run)
    blocks = _blocks(_padded(values, 1, runs * run).reshape(shape[0], runs, run), side)
    return Code(blocks.shape[1], outputs_first=not side.left), {"codes": blocks, "x": _steps_of(x, blocks, run, side)}


def _of_sequences(grid: Trellis, arrays: dict[str, Array], shape: tuple[int, int], x: Array, side: Side) -> Part:
    """Of a trellis: a block is tiles of a band, with a selection for every input of a tile and rate."""
    band, chunk, left = side
    order = np.arange(LENGTH).reshape(grid.tile)
    order = order if left else order.T  # (inputs, outputs) of a tile
    codes, rates, edges = _sequences(grid, arrays, shape)
    codes = codes.swapaxes(0, 1) if left else codes
    edges = np.array([0, codes.shape[1]]) if left else edges
    codes = _padded(codes, 2, _power(codes.shape[2]))
    chunk = min(chunk, _power(int(np.diff(edges).max())))
    of: Any = np if isinstance(rates, np.ndarray) else jnp
    wide, length = rates[:, None], codes.shape[2]
    start = ((np.arange(LENGTH, dtype=np.int32) + 1) * wide // 16 - grid.state_bits) % (16 * wide)
    # the first of the three bytes of a state is the highest; its last bit becomes the one of weight 1
    places = [((start // 8 + k) % (2 * wide), grid.state_bits - 8 - 8 * k + start % 8) for k in range(3)]
    inputs, split = len(order), order.shape[1] // band
    select = _selection(places, length)[:, :, order].reshape(len(rates), length, inputs, split, band)
    select = select.transpose(3, 0, 2, 1, 4).reshape(split, -1, length, band)
    gains = of.asarray(GAINS)[rates - LEAST] / np.float32(147.8)
    tiles = _padded(x, 1, codes.shape[1] * inputs).reshape(len(x), -1, inputs)
    tiles = tiles * jnp.repeat(jnp.asarray(gains), np.diff(edges), total_repeat_length=codes.shape[1])[:, None]
    tiles = _chunks(tiles, 1, edges, chunk).transpose(1, 3, 0, 2)
    blocks = _chunks(codes, 1, edges, chunk)
    steps = blocks.shape[1]
    code = Code(steps, 2**grid.state_bits - 1, trellis=True, width=inputs, segment=steps // len(rates), split=split)
    return code, {"codes": blocks, "select": jnp.asarray(select), "x": tiles.reshape(-1, *tiles.shape[2:])}


def _sequences(grid: Trellis, arrays: dict[str, Array], shape: tuple[int, int]) -> tuple[Array, Any, np.ndarray]:
    """Bytes of every tile (down, across, most bytes); rates of segments, in sixteenths; their bounds in columns of tiles."""
    across = grid.tiles(*shape)[1]
    if not isinstance(grid, SegmentedTrellis):
        return arrays["codes"], np.array([int(grid.rate * 16)], np.int32), np.array([0, across])
    edges, rates, stream = bounds(across), arrays["rates"].astype(jnp.int32), arrays["codes"]
    sizes = 2 * jnp.repeat(rates, np.diff(edges), total_repeat_length=across)
    index = (jnp.cumsum(sizes) - sizes)[:, None] + np.arange(2 * MOST, dtype=np.int32)
    # what lies behind a tile's own bytes is not selected
    return jnp.take(stream, jnp.minimum(index, stream.shape[1] - 1), axis=1), rates, edges


def _of_streams(grid: ScalarGrid, arrays: dict[str, Array], shape: tuple[int, int], x: Array, run: int, side: Side) -> Part:
    """Of a grid of single weights: a block is runs of codes of some rows."""
    rows, cols = shape
    runs, size = -(-cols // run), run * grid.width // 8
    bytes_of = _padded(arrays["codes"], 1, runs * size).reshape(rows, runs, size)
    blocks = _blocks(_padded(bytes_of, 2, _power(size)), side)
    start = np.arange(run)[None] * grid.width
    places = [(start // 8 + k, 8 * k - start % 8) for k in range(2)]
    own = {"codes": blocks, "select": jnp.asarray(_selection(places, blocks.shape[3])[None]), "x": _steps_of(x, blocks, run, side)}
    group = grid.group or cols
    first = np.arange(runs) * run // group
    touched = np.arange(8 if (run - 1) // group + 2 <= 8 or group == 16 else 16)  # groups of 17 and 18 can be 9 in a run of 128
    named = first[:, None] + touched
    expand = np.tile((np.arange(runs * run) // group).reshape(runs, 1, run) == named[:, :, None], (1, 2, 1))
    own["expand"] = jnp.asarray(expand[:, None] if side.left else expand[None], jnp.bfloat16)
    qparams = grid.stored_qparams(arrays, shape)
    names = ("scales", "zeros") if isinstance(grid, Integer) and grid.asymmetric else ("scales",)
    for name, qparam in zip(names, qparams, strict=False):
        each = qparam[:, np.minimum(named, qparam.shape[1] - 1)]
        high = lax.reduce_precision(each, 8, 7)  # a conversion there and back is left out by XLA
        both = jnp.concatenate([high, each - high], axis=2).astype(jnp.bfloat16)
        own[name] = _blocks(both, side).swapaxes(2, 3)
    listed = levels(grid.width) if isinstance(grid, NormalFloat) else VALUES if isinstance(grid, NVFP4) else np.zeros(0)
    zero = grid.middle if isinstance(grid, Integer) else 0.0
    code = Code(blocks.shape[1], 2**grid.width - 1, levels=tuple(listed.tolist()), zero=zero, outputs_first=not side.left)
    return code, own


def _selection(places: list[tuple[Any, Any]], length: int) -> Any:
    """bfloat16 (kinds, length, codes): 2^exponent at each place of a code, 0 elsewhere.

    Args:
        places: (byte, exponent), each (kinds, codes), of every byte of a code.
        length: of a row of bytes.
    """
    of: Any = np if all(isinstance(place, np.ndarray) for place, _ in places) else jnp
    rows = np.arange(length, dtype=np.int32)[:, None]
    found: Any = np.float32(0)
    for place, exponent in places:
        found = found + of.where(place[:, None] == rows, of.asarray(POWERS)[exponent + 32][:, None], np.float32(0))
    return found.astype(jnp.bfloat16)


def _blocks(array: Array, side: Side) -> Array:
    """(rows, runs, size) -> (bands, steps, a, size): a run is a step of Q, whose bands are rows, and a band of L."""
    chunk = min(side.chunk, _power(len(array))) if side.left else side.band
    found = _padded(array, 0, -(-len(array) // chunk) * chunk).reshape(-1, chunk, *array.shape[1:])
    return found.transpose(2, 0, 1, 3) if side.left else found.transpose(0, 2, 1, 3)


def _steps_of(x: Array, blocks: Array, run: int, side: Side) -> Array:
    """(tokens, inputs) -> (steps, tokens, inputs of a step)."""
    steps, size = blocks.shape[1], blocks.shape[2] if side.left else run
    return _padded(x, 1, steps * size).reshape(len(x), steps, size).swapaxes(0, 1)


def _chunks(array: Array, axis: int, edges: np.ndarray, chunk: int) -> Array:
    """An axis in chunks, (…, chunks, chunk, …), no chunk with a part of two segments, all segments of as many chunks."""
    most = -(-int(np.diff(edges).max()) // chunk) * chunk
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    parts = [_padded(lax.slice_in_dim(array, left, right, axis=axis), axis, most) for left, right in pairs]
    whole = jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    return whole.reshape(*array.shape[:axis], -1, chunk, *array.shape[axis + 1 :])


def _padded(array: Array, axis: int, size: int) -> Array:
    """With zeros behind, or cut, to `size` along an axis."""
    missing = size - array.shape[axis]
    return array if not missing else jnp.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])


def _power(size: int) -> int:
    """The least power of two that is not below a size, nor below what Triton multiplies."""
    return max(SMALLEST, 1 << (size - 1).bit_length())
