"""PyTorch runtime of qlr-jax folders: a Llama whose linear layers stay packed and are decoded as they are used.

    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Decoded once instead, while it loads: as large as any dense model and as fast, a plain LlamaForCausalLM from then on.

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True)

The same follows from `quantization_config=QLRConfig(dequantize=True)` where qlr-jax is installed, from `"dequantize": true`
under quantization_config in config.json, and for a model that is loaded already from `model.dequantize()`.

This one file needs torch, transformers and safetensors, nothing else, and travels with every folder; where qlr-jax is installed,
its C++ library takes products on a processor (`model.qlr_backend` says which does). A weight W (out, in)
is stored as

    W ≈ g · Uᵀ (Q + L diag(s) R) V,  or for an embedding, whose rows are read one by one,  W ≈ diag(g) Q V

with Q, L and R on quantized grids, and U, V orthogonal: random signs, which come from a seed, times a Hadamard-like matrix,
or the identity. A forward pass rotates x by V, multiplies by Q in tiles of rows and by R, then L, and rotates back by Uᵀ.
Rotations and scales are float32. So are the products with Q, L and R, unless x is bfloat16: then they are of bfloat16 values,
as in a dense bfloat16 model. The result has the type of x. At most `TILE_WEIGHTS` weights of Q and R are decoded at a time, and on
a processor no more values are rotated at a time, so beside L, and a copy each of its input and output in that type, a layer needs
about `TILE_BYTES` (5 MB), whatever its size.

LoRA of peft wraps packed layers as it does dense ones, once this file has loaded the model: `get_peft_model(model, LoraConfig(…))`
trains an adapter beside codes that stay as they are, a backward pass decodes them again, and nothing is merged into them.

Every load compares weights and config.json with checksums.json, where the folder has one; QLR_SKIP_CHECKSUMS=1 in the
environment leaves that out. `torch.compile` takes the model, or a layer, without graph breaks.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, wraps
from pathlib import Path
from statistics import NormalDist

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers import auto as known_methods
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

FORMAT_VERSION = 1  # of the folder: what this file reads
RUNTIME_VERSION = 12  # of this file: where several are imported, the newest serves all

TILE_WEIGHTS = 2**18  # so that what a tile is decoded by fits a processor's second cache
TILE_BYTES = 20 * TILE_WEIGHTS  # peak while a tile is decoded, its values and those of the tile before included

# A folder records the codes that it was made with, and others are refused.
# The trellis: weights a sequence, rows that a sequence may cover in Q and (at most) in a factor, constants of its hash.
TRELLIS = {"length": 256, "rows": [64, 32, 16], "factor_rows": 4, "multiplier": 2847382671, "addend": 1201005453}
LENGTH = TRELLIS["length"]
# The lattice: by bits, the scale of its first stage, and of the second relative to it; checksums of its tables (in quarters, int8).
LATTICE = {
    "scales": {"2": [0.96484375, 0.0], "3": [1.015625, 0.484375], "4": [1.125, 0.2578125]},
    "magnitudes": 2189498670,
    "roots": 1656410127,
}
CODES = {"trellis": TRELLIS, "lattice": LATTICE}

CHECKSUMS, INDEX = "checksums.json", "model.safetensors.index.json"
SKIP_CHECKSUMS = "QLR_SKIP_CHECKSUMS"


def constant(make):
    """Call `make` once for each combination of its (hashable) arguments, and return the same result afterwards."""
    cached = lru_cache(maxsize=None)(make)

    @wraps(make)
    def get(*arguments):
        if torch.compiler.is_compiling():
            return make(*arguments)
        with torch.inference_mode(False):  # the result may serve a backward pass later
            return cached(*arguments)

    return get


def opaque(decode):
    """Let torch.compile take `decode` as one operator: traced, its tables would be made at every call.

    Copies of this file of one version share an operator: to register it anew would take it from layers that were compiled with it.

    Args:
        decode: function of (codes, numbers, dtype) that returns an array (numbers[0], numbers[1]) of `dtype`.
    """
    name = f"{decode.__name__}_v{RUNTIME_VERSION}"  # another version of this file may be in the same process
    if not hasattr(torch.ops.qlr, name):

        @torch.library.custom_op(f"qlr::{name}", mutates_args=())
        def made(codes: torch.Tensor, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
            return decode(codes, numbers, dtype).contiguous()  # as `register_fake` promises

        made.register_fake(lambda codes, numbers, dtype: codes.new_empty((numbers[0], numbers[1]), dtype=dtype))
    operator = getattr(torch.ops.qlr, name).default

    @wraps(decode)
    def call(codes, numbers, dtype):
        return (operator if torch.compiler.is_compiling() else decode)(codes, numbers, dtype)

    return call


_library = None  # what `native_products` found, for torch.compile, which cannot look


def native_products():
    """The products of qlr-jax's C++ library where it is installed and built, else None, as with QLR_NATIVE=0."""
    return _library if torch.compiler.is_compiling() else _native_products()


@lru_cache
def _native_products():
    global _library
    try:
        from qlr_jax.formats.qlr import native_products as found
    except ImportError:
        return None
    if found.INTERFACE == 1 and found.backend():
        found.register_linear(QLRLinear)
        _library = found
    return _library


# ---------------------------------------------------------------------------------------------------- rotations

INPUT, OUTPUT = 0, 1


@constant
def signs(seed: int, salt: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """±1 from the top bit of an integer hash of (seed, salt, index), so that no signs are stored.

    Args:
        seed: of the matrix.
        salt: INPUT for those of V, OUTPUT for those of U.
        size: how many.
        device: of the result.

    Returns:
        int8 (size,).
    """
    mask = 0xFFFFFFFF
    word = (seed * 2 + salt) & mask
    offset = (word * 0x85EBCA6B + 0x27D4EB2F) & mask
    x = (_times(torch.arange(size, dtype=torch.int64, device=device), 0x9E3779B1) + offset) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _times(x ^ (x >> shift), factor)
    x = x ^ (x >> 16)
    return (1 - 2 * (x >> 31)).to(torch.int8)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x · factor mod 2³² for x, factor in [0, 2³²): in two halves, because the whole product overflows int64."""
    high, low = factor >> 16, factor & 0xFFFF
    return (((x * high) & 0xFFFF) * 0x10000 + x * low) & 0xFFFFFFFF


def block_size(size: int, block: int) -> int:
    """Width of the rotation's blocks: what `block` shares with `size`; all of `size` where `block` is 0 or shares < 32."""
    shared = math.gcd(size, block) if block else size
    return shared if shared >= 32 else size


def transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply the last axis by K = I ⊗ (H ⊗ O): Walsh-Hadamard H of size 2^k, Hartley O of the odd rest of `block`.

    K is symmetric and orthogonal, so it is its own inverse. H is split, H_a ⊗ (H_b ⊗ (H_c ⊗ O)), so that two or three small
    matrix products do all of it.
    """
    first, *others = rotation(block, x.device)
    width = len(first)
    y = x.reshape(-1, width) @ first
    for factor in others:
        y = factor @ y.view(-1, len(factor), width)
        width *= len(factor)
    return y.reshape(x.shape)


def transform_columns(x: torch.Tensor, block: int) -> torch.Tensor:
    """`transform` of the first of two axes."""
    width = x.shape[1]
    y = x
    for factor in rotation(block, x.device):
        y = factor @ y.reshape(-1, len(factor), width)
        width *= len(factor)
    return y.view(x.shape)


@constant
def rotation(block: int, device: torch.device) -> list[torch.Tensor]:
    """Float32 factors of K = H_a ⊗ (H_b ⊗ (H_c ⊗ O)), last one first: H_c ⊗ O, about 32 wide (or O) and scaled for all, then ±1.

    Narrow ones: a product costs the sum of their widths, while each more passes once over the values.
    """
    power = block & -block
    odd = block // power
    inner = min(power, 1 << max((32 // odd).bit_length() - 1, 0))
    factors = [torch.kron(_walsh(inner, device), _hartley(odd, device)) * power**-0.5]
    bits = (power // inner).bit_length() - 1
    count = -(-bits // 5)
    return factors + [_walsh(2 ** ((bits + i) // count), device) for i in range(count)]


def _walsh(size: int, device: torch.device) -> torch.Tensor:
    """±1 (size, size): the sign of entry (i, j) is the parity of the bits that i and j share."""
    h = torch.ones(1, 1, device=device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def _hartley(size: int, device: torch.device) -> torch.Tensor:
    """cas(2π jk / size) / √size: symmetric and orthogonal for any size."""
    index = torch.arange(size, device=device)
    angle = (index[:, None] * index % size).double() * (2 * math.pi / size)
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()


# ------------------------------------------------------------------------------------------------ packed arrays


class Stored(nn.Module):
    """Buffers that keep the type they were saved in: `.to(torch.bfloat16)` moves them, but never casts them."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def store(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Register a buffer of zeros.

        Args:
            name: of the buffer, as in the file.
            shape: of it.
            dtype: that it keeps.
        """
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))


class Part(Stored):
    """Q (out, in), Lᵀ (rank, out) or R (rank, in) as it is stored; `decode` gives any of its rows."""

    codes: torch.Tensor
    height = 1  # rows of a tile as it is stored: decoding starts at a multiple of it

    def __init__(self, rows: int, cols: int):
        super().__init__()
        self.rows, self.cols = rows, cols

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Some rows, decoded in float32 and rounded to `dtype`.

        Args:
            start, stop: rows start … stop − 1; `start` is a multiple of `height`.
            dtype: of the result.

        Returns:
            (stop − start, cols).
        """
        raise NotImplementedError

    def native(self) -> dict | None:
        """How qlr-jax's C++ library reads what is stored: fields of `Part` in qlr_jax/native/product.py; None where it cannot."""
        return None

    def taken(self, bands: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some bands of `height` rows, wherever they lie.

        Args:
            bands: their numbers, (b,).
            dtype: of the result.

        Returns:
            (b, height, cols).
        """
        part = copy.copy(self)
        # the first axis of all that is stored is that of rows, or of bands of them
        part._buffers = {name: array[bands] for name, array in self._buffers.items() if array is not None}
        part.rows = len(bands) * self.height
        return part.decode(0, part.rows, dtype).view(len(bands), self.height, self.cols)

    def tiles(self, dtype: torch.dtype = torch.float32, keep: bool = True):
        """(start, stop, rows start … stop − 1), at most TILE_WEIGHTS weights at a time.

        Args:
            dtype: of the rows.
            keep: whether rows are still needed when the next ones come; else they may lie where those before did.
        """
        step = max(TILE_WEIGHTS // self.cols // self.height, 1) * self.height
        library = native_products()
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            with torch.no_grad():
                rows = library.decoded(self, start, stop, dtype, keep) if library else None
                if rows is None:
                    rows = self.decode(start, stop, dtype)
            yield start, stop, rows  # outside, because no_grad would apply to the caller too

    def whole(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All of it: (rows, cols)."""
        return torch.cat([rows for _, _, rows in self.tiles(dtype)])


class BFloat16Part(Part):
    """`bf16`: the values themselves."""

    def __init__(self, rows: int, cols: int):
        super().__init__(rows, cols)
        self.store("codes", (rows, cols), torch.bfloat16)

    def native(self):
        return {"kind": "BFLOAT16", "count": 2 * self.cols}

    def decode(self, start, stop, dtype):
        return self.codes[start:stop].to(dtype)


class GroupedPart(Part):
    """A little-endian bit stream of `bits`-bit codes a row, and one scale a group of weights (or a row)."""

    scales: torch.Tensor

    def __init__(self, rows: int, cols: int, bits: int, group: int, scale_dtype: torch.dtype = torch.float16):
        super().__init__(rows, cols)
        self.bits, self.group = bits, group
        self.groups = -(-cols // group) if group else 1
        self.store("codes", (rows, -(-cols * bits // 8)), torch.uint8)
        self.store("scales", (rows, self.groups), scale_dtype)

    def native(self):
        if self.group % 16:
            return None
        scales = "small_scales" if self.scales.dtype == torch.float8_e4m3fn else "scales"
        return {"bits": self.bits, "group": self.group, "count": self.codes.shape[1], scales: self.scales}

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The codes of rows start … stop − 1: uint8 (stop − start, cols)."""
        return unpack(self.codes[start:stop], self.bits)[:, : self.cols]

    def scaled(self, values: torch.Tensor, start: int, stop: int, zeros: torch.Tensor | float | None = None) -> torch.Tensor:
        """(values − zeros) · scales.

        Args:
            values: float32 (stop − start, cols); overwritten.
            start, stop: rows that they are.
            zeros: zero point of every group (stop − start, groups, 1), one for all, or None for 0.

        Returns:
            float32 (stop − start, cols).
        """
        missing = self.groups * self.group - self.cols if self.group else 0
        grouped = nn.functional.pad(values, (0, missing)) if missing else values
        grouped = grouped.reshape(stop - start, self.groups, -1)
        if zeros is not None:
            grouped = grouped.sub_(zeros)
        return grouped.mul_(self.scales[start:stop, :, None].float()).view(stop - start, -1)[:, : self.cols]


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes from a little-endian bit stream a row.

    Args:
        codes: uint8 (rows, bytes).
        bits: of a code, 1 to 8.

    Returns:
        uint8 (rows, at least as many as there are codes): one code a byte.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), 4)[:, :3].tolist()
        [[1, 2, 3]]
    """
    if bits == 8:
        return codes
    # eight codes are `bits` bytes of one int64, and three halvings send each to a byte of its own
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % bits))
    if bits in _WHOLE:
        word = codes.view(_WHOLE[bits]).long()
    else:
        word = nn.functional.pad(codes.view(-1, bits), (0, 8 - bits)).view(torch.int64)
    word = word.view(-1)
    for lane in (32, 16, 8):
        half = bits * lane // 8
        low = sum((2**half - 1) << at for at in range(0, 64, 2 * lane))
        high = (word << (lane - half)).bitwise_and_(_signed(low << lane))
        word = word.bitwise_and(_signed(low)).bitwise_or_(high)
    return word.view(torch.uint8).view(len(codes), -1)


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word


class IntegerPart(GroupedPart):
    """`int-b[g<group>][a]`: (u − zero) · scale, u in [0, 2^b)."""

    zeros: torch.Tensor

    def __init__(self, rows: int, cols: int, bits: int, group: int, asymmetric: bool):
        super().__init__(rows, cols, bits, group)
        self.asymmetric = asymmetric
        self.middle = 0.5 if bits == 1 else float(2 ** (bits - 1))  # the zero point where none is stored
        if asymmetric:
            self.store("zeros", (rows, self.groups), torch.uint8)

    def native(self):
        found = super().native()
        return found and found | {"kind": "INTEGER", "zero": self.middle, "zeros": self._buffers.get("zeros")}

    def decode(self, start, stop, dtype):
        zeros = self.zeros[start:stop, :, None].float() if self.asymmetric else self.middle
        return self.scaled(self.read(start, stop).float(), start, stop, zeros).to(dtype)


class LevelPart(GroupedPart):
    """level · scale, a code the index of its level: `nf-b[g<group>]`, its levels at equally likely quantiles of a Gaussian."""

    def __init__(self, rows: int, cols: int, bits: int, group: int, levels: list[float], scale_dtype: torch.dtype = torch.float16):
        super().__init__(rows, cols, bits, group, scale_dtype)
        self.levels = levels

    def native(self):
        found = super().native()
        return found and found | {"kind": "LEVELS", "levels": torch.tensor(self.levels + [0.0] * (16 - len(self.levels)))}

    def decode(self, start, stop, dtype):
        codes = self.read(start, stop).int()
        levels = torch.tensor(self.levels, device=codes.device)
        return self.scaled(levels.index_select(0, codes.view(-1)).view(codes.shape), start, stop).to(dtype)


@lru_cache
def normal_levels(bits: int) -> list[float]:
    """2^bits levels in [−1, 1], float32: 2^(b−1) + 1 quantiles from ½ to p and 2^(b−1) from ½ to 1 − p, over the largest.

    Example:
        >>> [round(level, 3) for level in normal_levels(2)]
        [-1.0, 0.0, 0.436, 1.0]
    """
    half, full = 2 ** (bits - 1), 2**bits
    top = 1.0 - (1 / (2 * full) + 1 / (2 * (full - 1))) / 2

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(0.5 + i * ((top - 0.5) / (count - 1))) for i in range(count)]

    above, below = quantiles(half + 1), quantiles(half)
    table = torch.tensor([-x for x in below[:0:-1]] + above, device="cpu")
    return (table / table[-1]).tolist()


class LatticePart(Part):
    """`e8-b`: 8 weights of a row are a point of E8 + ¼ in two bytes; from 3 bits on a second stage adds a smaller point.

    All values are short binary fractions, so float32 holds them exactly.
    """

    def __init__(self, rows: int, cols: int, bits: int):
        super().__init__(rows, cols)
        self.bits = bits
        self.store("codes", (rows, -(-cols // 8), bits), torch.uint8)

    def native(self):
        gain, inner = LATTICE["scales"][str(self.bits)]
        points, roots = (lattice_words(small, torch.device("cpu")) for small in (False, True))
        sizes = {"bits": self.bits, "count": self.codes.shape[1] * self.bits}
        return {"kind": "LATTICE", **sizes, "gains": (gain / 4, gain * inner / 4), "points": points, "roots": roots}

    def decode(self, start, stop, dtype):
        return decode_lattice(self.codes[start:stop], [stop - start, self.cols], dtype)


@opaque
def decode_lattice(codes: torch.Tensor, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Weights from points of the lattice.

    Args:
        codes: uint8 (rows, points, bits): the bytes of every point.
        numbers: [rows, cols].
        dtype: of the result.

    Returns:
        (rows, cols).
    """
    rows, cols = numbers
    bits = codes.shape[2]
    gain, inner = LATTICE["scales"][str(bits)]
    stages = codes.reshape(-1, bits).int().unbind(1)
    values = _quarters(stages[0] | (stages[1] << 8), False).mul_(gain / 4)
    if bits > 2:
        second = _quarters(stages[2] if bits == 3 else stages[2] | (stages[3] << 8), bits == 3)
        values += second.mul_(gain * inner / 4)
    return values.view(rows, -1)[:, :cols].to(dtype)


def _quarters(index: torch.Tensor, roots: bool) -> torch.Tensor:
    """Points by their number, in quarters: float32 (n, 8)."""
    return lattice_words(roots, index.device).index_select(0, index).view(torch.int8).view(-1, 8).float()


@constant
def lattice_words(roots: bool, device: torch.device) -> torch.Tensor:
    """All points of the first stage, or the 256 roots, in quarters: eight int8 an int64, so that a point is one look-up."""
    code = torch.arange(2**16, device="cpu")
    points = lattice_tables()[3] if roots else shifted_points(code.byte(), (code >> 8).byte())
    return (4 * points).to(torch.int8).view(torch.int64).view(-1).to(device)


def shifted_points(name: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Points σ ∘ a ± ¼ of the first stage, float32 (n, 8).

    Args:
        name: uint8 (n,), number of the vector of magnitudes a.
        rest: uint8 (n,), seven signs and, in the top bit, the shift; the eighth sign follows from the parity.
    """
    magnitudes, odd, signs, _ = lattice_tables()
    name = name.int()
    pattern = ((rest & 127) << 1) | odd.index_select(0, name)
    points = magnitudes.index_select(0, name)
    points *= signs.index_select(0, pattern.int())
    points += ((rest >> 7).float() / 2 - 0.25)[:, None]
    return points


@constant
def lattice_tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tables of the E8 code, on the processor.

    Returns:
        magnitudes (256, 8); 1 where their sum is odd, (256,); signs by pattern and that parity, (256, 8); and the 256 roots that
        are the second stage at 3 bits, (256, 8).
    """
    inner = [v for v in itertools.product((1, 3, 5), repeat=8) if sum(x * x for x in v) <= 40]
    inner.sort(key=lambda v: (sum(x * x for x in v), v))
    outer = [v for v in itertools.product((1, 3), repeat=8) if sum(v) == 18]
    magnitudes = torch.tensor(inner + outer[::2] + outer[1:2], device="cpu") / 2
    odd = magnitudes.sum(1) % 2
    bits = torch.arange(128, device="cpu")[:, None] >> torch.arange(7, device="cpu") & 1
    last = torch.stack((bits.sum(1), bits.sum(1) + 1), 1) % 2  # an even number of signs is negative, or an odd one
    signs = 1.0 - 2.0 * torch.cat((bits[:, None].expand(-1, 2, -1), last[..., None]), 2).reshape(256, 8)
    one, pairs = torch.eye(8, device="cpu"), list(itertools.product((1, -1), repeat=2))
    roots = [torch.zeros(8, device="cpu")]
    roots += [a * one[i] + b * one[j] for i, j in itertools.combinations(range(8), 2) for a, b in pairs]
    roots += [torch.tensor(s, device="cpu") for s in itertools.product((0.5, -0.5), repeat=8) if sum(s) % 2 == 0]
    roots += [a * one[i] for i in range(8) for a in (2, -2)]
    return magnitudes, odd.byte(), signs, torch.stack(roots[:256])


class TrellisPart(Part):
    """`trellis-b`: 256 weights are a tail-biting sequence of 256 · b bits; a weight's value is a hash of the state it is in.

    The state of weight t is the `state_bits` bits that end at bit ⌊(t + 1) b⌋ of the circular stream; a sequence covers
    `height` rows and 256 / `height` columns, row by row.
    """

    def __init__(self, rows: int, cols: int, rate: Fraction, height: int, state_bits: int):
        super().__init__(rows, cols)
        self.height, self.width, self.state_bits = height, LENGTH // height, state_bits
        self.across = -(-cols // self.width)
        self.store("codes", (-(-rows // height), self.across, int(LENGTH * rate) // 8), torch.uint8)

    def native(self):
        count = self.codes.shape[2]
        return {"kind": "TRELLIS", "bits": self.state_bits, "count": count, "gains": (state_gain(count), 0.0)}

    def decode(self, start, stop, dtype):
        codes = self.codes[start // self.height : -(-stop // self.height)]
        return decode_trellis(codes, [stop - start, self.cols, self.height, self.state_bits], dtype)


@opaque
def decode_trellis(codes: torch.Tensor, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Weights from tail-biting trellis sequences.

    Args:
        codes: uint8 (bands of tile rows, sequences of a band, bytes of a sequence).
        numbers: [rows, cols, rows of a tile, state bits].
        dtype: of the result.

    Returns:
        (rows, cols).
    """
    rows, cols, height, state_bits = numbers
    bands, across, count = codes.shape
    table, first, shift, mask, base = trellis_windows(count, state_bits, dtype, codes.device)
    # bytes by their place in the sequence, so that what is done at a place is done for all sequences in a row
    codes = codes.reshape(-1, count).T.contiguous()
    codes = torch.cat((codes, codes[:2])).int()
    codes = (codes[:-2] << 16).bitwise_or_(codes[1:-1] << 8).bitwise_or_(codes[2:])
    index = codes.index_select(0, first).bitwise_right_shift_(shift).bitwise_and_(mask)
    if base is not None:
        index += base
    del codes
    values = table.index_select(0, index.view(-1)).view(height, -1, bands, across).permute(2, 0, 3, 1)
    values = values.reshape(bands * height, -1).contiguous()  # a single sequence of a single row is reshaped without a copy
    return values.view(dtype)[:rows, :cols]


SEGMENTS = 8  # of columns, at most, that have rates of their own


class SegmentedTrellisPart(Part):
    """`trellis-<b>w`: segments of columns, each a trellis with a rate of its own, in sixteenths of a bit.

    In each row of tiles a segment's sequences lie after those of the segment before; what is left over of it is zero.
    """

    rates: torch.Tensor

    def __init__(self, rows: int, cols: int, rate: Fraction, height: int, state_bits: int):
        super().__init__(rows, cols)
        self.height, self.width, self.state_bits = height, LENGTH // height, state_bits
        self.down, self.across, self.count = -(-rows // height), -(-cols // self.width), int(LENGTH * rate) // 8
        self.store("codes", (self.down, self.across * self.count), torch.uint8)
        self.store("rates", (min(SEGMENTS, self.across),), torch.uint8)

    def native(self):
        return {"kind": "TRELLIS", "bits": self.state_bits, "count": self.count, "zeros": self.rates}

    def decode(self, start, stop, dtype):
        codes = self.codes[start // self.height : -(-stop // self.height)]
        numbers = [stop - start, self.cols, self.height, self.state_bits, len(self.rates)]
        if torch.compiler.is_compiling():  # an operator sees one array
            return decode_segments(torch.cat((self.rates, codes.reshape(-1))), numbers, dtype)
        return _decoded_segments(codes, self.rates, numbers, dtype)


@opaque
def decode_segments(codes: torch.Tensor, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Weights from a trellis whose rate changes along its columns.

    Args:
        codes: uint8, the rates of all segments and then the codes of whole rows of tiles.
        numbers: [rows, cols, rows of a tile, state bits, segments].
        dtype: of the result.

    Returns:
        (rows, cols).
    """
    rows, height, count = numbers[0], numbers[2], numbers[-1]
    return _decoded_segments(codes[count:].view(-(-rows // height), -1), codes[:count], numbers, dtype)


def _decoded_segments(codes: torch.Tensor, rates: torch.Tensor, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    rows, cols, height, state_bits, count = numbers
    width = LENGTH // height
    found = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    edges, at = [j * -(-cols // width) // count for j in range(count + 1)], 0
    for rate, left, right in zip(rates.tolist(), edges[:-1], edges[1:], strict=True):
        size = 2 * rate * (right - left)
        segment = codes[:, at : at + size].reshape(len(codes), right - left, 2 * rate)
        shape = [rows, min(right * width, cols) - left * width, height, state_bits]
        found[:, left * width : right * width] = decode_trellis(segment, shape, dtype)
        at += size
    return found


def state_values(count: int, state_bits: int) -> torch.Tensor:
    """float32 (2^state_bits,): the value of every state, near Gaussian of unit variance, where a sequence has `count` bytes."""
    word = _times(torch.arange(2**state_bits, dtype=torch.int64, device="cpu"), TRELLIS["multiplier"])
    word = (word + TRELLIS["addend"]) & 0xFFFFFFFF
    total = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24)
    return (total - 510).float() * state_gain(count)


def state_gain(count: int) -> float:
    """What a state's hash is multiplied by where a sequence has `count` bytes, in float32 as the code is defined."""
    bits = 8 * count / LENGTH
    gain = 1.0 + 0.1 * min(max(bits - 2.0, 0.0), 1.0) + 0.075 * min(max(bits - 4.0, 0.0), 2.0)
    return (torch.tensor(gain, device="cpu") / torch.tensor(147.8, device="cpu")).item()


WINDOW_BITS = 16  # so a window lies in three bytes, and a table has at most 512 KB a pattern of shifts


@constant
def trellis_windows(count: int, state_bits: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """How to decode a sequence, several neighbouring weights at a time.

    One, two or four consecutive weights depend on one window of bits: the state of the first, and the bits that each further one
    shifts in. A table has the values of all of them, in one integer of their size.

    Args:
        count: bytes of a sequence.
        state_bits: of the trellis.
        dtype: of the values.
        device: of the tables.

    Returns:
        table: int16, int32 or int64, the values of every window; first, shift, mask, base: int (groups, 1), the byte at which
        a group's window begins, how far three bytes from there are shifted to the right, the mask of what is left, and where
        in the table its pattern of shifts begins (None if there is but one).
    """
    ends = [(t + 1) * 8 * count // LENGTH for t in range(LENGTH)]

    def patterns(size: int) -> list[tuple[int, ...]]:
        """Bits shifted in after a group's first weight, up to each of its weights."""
        return [tuple(ends[t + i] - ends[t] for i in range(size)) for t in range(0, LENGTH, size)]

    sizes = [size for size in (4, 2) if size * dtype.itemsize <= 8]
    fits = (size for size in sizes if state_bits + max(p[-1] for p in patterns(size)) <= WINDOW_BITS)
    size = next(fits, 1)
    values, tables, base = state_values(count, state_bits), [], {}
    for pattern in sorted(set(patterns(size))):
        base[pattern] = sum(map(len, tables))
        window = torch.arange(2 ** (state_bits + pattern[-1]), device="cpu")
        states = torch.stack([(window >> (pattern[-1] - bits)) % 2**state_bits for bits in pattern], 1)
        tables.append(values[states])
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size * dtype.itemsize]
    table = torch.cat(tables).to(dtype).view(whole).view(-1)
    rows = []
    for end, pattern in zip(ends[size - 1 :: size], patterns(size), strict=True):
        bits = state_bits + pattern[-1]
        first, offset = divmod((end - bits) % (8 * count), 8)
        rows.append((first, 24 - bits - offset, 2**bits - 1, base[pattern]))
    first, shift, mask, start = (column[:, None].int().to(device) for column in torch.tensor(rows, device="cpu").unbind(1))
    return table.to(device), first.view(-1), shift, mask, start if len(tables) > 1 else None


def tile_rows(rows: int, cols: int) -> int:
    """Rows that a trellis sequence of a backbone covers: the most that pad at most a thirty-second more than the best.

    Example:
        >>> tile_rows(64, 64), tile_rows(48, 64)
        (64, 16)
    """
    sequences = {height: -(-rows // height) * -(-cols * height // LENGTH) for height in TRELLIS["rows"]}
    return next(height for height in TRELLIS["rows"] if 32 * sequences[height] <= 33 * min(sequences.values()))


_GROUP = r"(?:g(?P<group>[0-9]+))?"


@dataclass(frozen=True)
class Row:
    """How a quantizer is stored and read.

    Attributes:
        pattern: of its names.
        part: (match of the name, rows, cols, tile rows, state bits) -> an empty part, which has the stored arrays and `decode`;
            None where nothing is stored.
        unit_scale: it decodes in units of one scale of the whole, which is the matrix's, or of a factor the component scales.
        always_rotated: a backbone of it is rotated, though its spec does not say so.
    """

    pattern: str
    part: Callable[[re.Match, int, int, int, int], Part | None]
    unit_scale: bool = False
    always_rotated: bool = False

    def match(self, name: str) -> re.Match | None:
        """The name taken apart; None where it is no name of this kind."""
        return re.fullmatch(self.pattern, name)


def _group(match: re.Match) -> int:
    return int(match["group"] or 0)


# By what a name begins with, up to the first "-", and with "-w" where it ends so.
QUANTIZERS = {
    "bf16": Row("bf16", lambda name, rows, cols, *_: BFloat16Part(rows, cols)),
    "none": Row("none", lambda *_: None),
    "int": Row(
        rf"int-(?P<bits>[1-8]){_GROUP}(?P<asymmetric>a)?",
        lambda name, rows, cols, *_: IntegerPart(rows, cols, int(name["bits"]), _group(name), bool(name["asymmetric"])),
    ),
    "nf": Row(
        rf"nf-(?P<bits>[2-4]){_GROUP}",
        lambda name, rows, cols, *_: LevelPart(rows, cols, int(name["bits"]), _group(name), normal_levels(int(name["bits"]))),
    ),
    "nvfp4": Row(
        "nvfp4",
        lambda name, rows, cols, *_: LevelPart(
            rows, cols, 4, 16, [s * x for s in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], torch.float8_e4m3fn
        ),
        True,
    ),
    "e8": Row("e8-(?P<bits>[2-4])", lambda name, rows, cols, *_: LatticePart(rows, cols, int(name["bits"])), True, True),
    "trellis": Row(
        r"trellis-(?P<bits>[0-9.]+)",
        lambda name, rows, cols, height, state_bits: TrellisPart(rows, cols, Fraction(name["bits"]), height, state_bits),
        True,
        True,
    ),
    "trellis-w": Row(
        r"trellis-(?P<bits>[0-9.]+)w",
        lambda name, rows, cols, height, bits: SegmentedTrellisPart(rows, cols, Fraction(name["bits"]), height, bits),
        True,
        True,
    ),
}


def find_row(quantizer: str) -> tuple[Row, re.Match]:
    """The row of the quantizer that a spec names, e.g. `trellis-2.25`, `int-4g32`, `bf16`, and its name taken apart."""
    row = QUANTIZERS.get(quantizer.partition("-")[0] + ("-w" if quantizer.endswith("w") else ""))
    match = row and row.match(quantizer)
    if row is None or match is None:
        raise ValueError(
            f"this qlr runtime does not know the quantizer {quantizer!r}; get a newer qlr-jax, or export the folder again"
        )
    return row, match


def make_part(quantizer: str, rows: int, cols: int, height: int, state_bits: int) -> Part | None:
    """An empty part for the quantizer that a spec names; None for `none`.

    Args:
        quantizer: e.g. `trellis-2.25`, `int-4g32`, `bf16`.
        rows, cols: of the matrix as it is stored.
        height: rows of a trellis sequence.
        state_bits: of a trellis.

    Raises:
        ValueError: a quantizer that this runtime does not know.
    """
    row, match = find_row(quantizer)
    return row.part(match, rows, cols, height, state_bits)


# -------------------------------------------------------------------------------------------------- linear layer

_SPEC = re.compile(
    r"(?P<backbone>[^/+@,]+)(?P<rot>/rot|/rows)?(?:\+r(?P<rank>[0-9]+)@(?P<left>[^/+@,]+)(?:,(?P<right>[^/+@,]+))?)?"
)


class QLRLinear(Stored):
    """y = W x with W packed.

    Args:
        spec, shape, seed, rotation_block, state_bits, signs: as config.json records them for each matrix.

    Buffers, named as the tensors in the file: backbone.codes, backbone.scales, backbone.zeros, left.*, right.*,
    component_scale (rank,) float16, scale (1,) float32 or row_scales (out,) float16, output_signs (out,) and input_signs (in,)
    float16; which of them are there follows from the spec, and the last two from `signs`: sign vectors trained as real numbers, in
    place of those of the seed.
    """

    scale: torch.Tensor
    row_scales: torch.Tensor
    component_scale: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: str,
        shape: tuple[int, int],
        seed: int = 0,
        rotation_block: int = 0,
        state_bits: int = 14,
        signs: bool = False,
        **_,
    ):
        super().__init__()
        match = _SPEC.fullmatch(spec)
        if not match:
            raise ValueError(f"{spec!r} is not a spec that this qlr runtime knows; get a newer qlr-jax")
        self.out_features, self.in_features = rows, cols = int(shape[0]), int(shape[1])
        self.register_parameter("bias", None)  # `replace_linears` keeps the one that was there
        self.spec, self.seed, self.rotation_block = spec, seed, rotation_block
        backbone, self.rank = match["backbone"], int(match["rank"] or 0)
        self.backbone = make_part(backbone, rows, cols, tile_rows(rows, cols), state_bits)
        self.by_rows = match["rot"] == "/rows"
        self.rotated = not self.by_rows and (bool(match["rot"]) or find_row(backbone)[0].always_rotated)
        if self.by_rows:
            self.store("row_scales", (rows,), torch.float16)
        elif backbone != "bf16" or self.rank:
            self.store("scale", (1,), torch.float32)
        if self.rank:
            left, right = match["left"], match["right"] or match["left"]
            height = math.gcd(self.rank, TRELLIS["factor_rows"])
            self.left = make_part(left, self.rank, rows, height, state_bits)
            self.right = make_part(right, self.rank, cols, height, state_bits)
            if any(find_row(quantizer)[0].unit_scale for quantizer in (left, right)):
                self.store("component_scale", (self.rank,), torch.float16)
        if signs:
            self.store("output_signs", (rows,), torch.float16)
            self.store("input_signs", (cols,), torch.float16)
        form = {"spec": spec, "shape": [rows, cols], "seed": seed, "rotation_block": rotation_block, "state_bits": state_bits}
        self.description = json.dumps(form | {"signs": signs})  # for a compiled program, which keeps no layers
        native_products()

    @property
    def qweight(self) -> torch.Tensor:
        """One of the packed arrays, by the name at which peft looks for where a layer lies."""
        return next(self.buffers())

    def extra_repr(self) -> str:
        return f"{self.out_features} × {self.in_features}, {self.spec}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) -> (…, out), in x's type."""
        library = native_products()
        if library is not None:
            found = library.multiplied(self, x if self.bias is None else x.float())
            if found is not None:
                return found if self.bias is None else (found + self.bias.float()).to(x.dtype)
        kind = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        if self.rotated or self.by_rows:
            input_signs, block = self._signs(INPUT, x.device), block_size(self.in_features, self.rotation_block)
            v = in_pieces(lambda x: transform(x.float() * input_signs, block).to(kind), x)
        else:
            v = x.to(kind)
        y = v.new_zeros(*v.shape[:-1], self.out_features) if self.backbone is None else multiply(v, self.backbone)
        products, left = [y], None
        if self.rank:
            z = multiply(v, self._factor("right"))
            if "component_scale" in self._buffers:
                z = (z * self.component_scale.float()).to(kind)
            products, left = [y, z], self._factor("left").whole(kind)
        output_signs = self._signs(OUTPUT, x.device) if self.rotated else None

        def finish(y: torch.Tensor, *z: torch.Tensor) -> torch.Tensor:
            y = y.float()
            if left is not None:
                y = y + z[0] @ left
            if "scale" in self._buffers:
                y = y * self.scale
            if self.by_rows:
                y = y * self.row_scales.float()
            if output_signs is not None:
                y = transform(y, block_size(self.out_features, self.rotation_block)) * output_signs
            if self.bias is not None:
                y = y + self.bias.float()
            return y.to(x.dtype)

        return in_pieces(finish, *products)

    def blocks(self) -> tuple[int, int]:
        """Widths of the rotations' blocks, of inputs and of outputs."""
        inputs, outputs = (block_size(size, self.rotation_block) for size in (self.in_features, self.out_features))
        return inputs, outputs

    def _factor(self, side: str) -> Part:
        part = getattr(self, side)
        if part is None:
            raise ValueError(f"{self.spec}: factors cannot be stored as none; export the folder again")
        return part

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W (out, in), decoded. Beside it and the factors, at most one float32 copy of it is in memory."""
        device = next(self.buffers()).device
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.float32 if self.rotated else dtype, device=device)
        for start, stop, rows in self._unrotated_rows():
            if self.rotated or self.by_rows:
                rows = self._unrotated(rows)
            if self.by_rows:
                rows = rows.mul_(self.row_scales[start:stop, None].float())
            weight[start:stop] = rows
        if self.rotated:
            step = max(TILE_WEIGHTS // self.out_features, 1)
            for columns in weight.split(step, dim=1):
                rotated = transform_columns(columns, block_size(self.out_features, self.rotation_block))
                columns.copy_(rotated.mul_(self._signs(OUTPUT, device)[:, None]))
        return weight.to(dtype)

    def _unrotated(self, rows: torch.Tensor) -> torch.Tensor:
        """rows V (…, in)."""
        return transform(rows, block_size(self.in_features, self.rotation_block)).mul_(self._signs(INPUT, rows.device))

    def _unrotated_rows(self):
        """(start, stop, rows start … stop − 1 of g (Q + L diag(s) R)) in float32."""
        left, right = (self._factor("left").whole(), self._factor("right").whole()) if self.rank else (None, None)
        if right is not None and "component_scale" in self._buffers:
            right = right * self.component_scale.float()[:, None]
        tiles = [(0, self.out_features, torch.zeros(()))] if self.backbone is None else self.backbone.tiles()
        for start, stop, rows in tiles:
            if left is not None and right is not None:
                rows = rows + left[:, start:stop].T @ right
            yield start, stop, rows * self.scale if "scale" in self._buffers else rows

    def _signs(self, salt: int, device: torch.device) -> torch.Tensor:
        stored = self._buffers.get("output_signs" if salt == OUTPUT else "input_signs")
        if stored is not None:
            return stored.float()
        # cached in int8, but multiplying two types takes a processor several times as long
        return signs(self.seed, salt, self.out_features if salt == OUTPUT else self.in_features, device).float()


class QLREmbedding(QLRLinear):
    """Rows of W by their number, of which no others are decoded but those of their tiles; W x for the head that is tied to it.

    Args:
        spec, shape, others: as of `QLRLinear`; without factors, and outputs not rotated.
        factor: what rows are multiplied by as they enter the model.
        dtype: of rows, until the model is cast.

    Raises:
        ValueError: a spec that single rows cannot be read from.
    """

    def __init__(self, spec: str, shape: tuple[int, int], factor: float = 1.0, dtype: torch.dtype = torch.float32, **others):
        super().__init__(spec, shape, **others)
        if self.rank or self.rotated or self.backbone is None:
            raise ValueError(f"single rows cannot be read from {spec}; export the folder again")
        self.factor = factor
        self.cast = nn.Module()  # `Stored` keeps the type of what is its own
        self.cast.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (…) -> (…, in), in the model's type."""
        dtype = next(self.cast.buffers()).dtype
        rows = self.rows(tokens).to(dtype)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=dtype, device=rows.device)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) -> W x (…, out), in x's type."""
        return super().forward(x)

    @torch.no_grad()
    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of W, float32 (…, in)."""
        part, flat = self.backbone, tokens.reshape(-1)
        assert part is not None, "checked when it was made"
        bands, where = torch.unique(flat // part.height, return_inverse=True)
        found = torch.empty(len(flat), self.in_features, device=flat.device)
        step = max(TILE_WEIGHTS // (part.height * part.cols), 1)
        for start in range(0, len(bands), step):
            tiles = part.taken(bands[start : start + step], torch.float32)
            here = ((where >= start) & (where < start + step)).nonzero().view(-1)
            found[here] = tiles[where[here] - start, flat[here] % part.height]
        if self.by_rows:
            found = self._unrotated(found).mul_(self.row_scales[flat, None].float())
        elif "scale" in self._buffers:
            found *= self.scale
        return found.view(*tokens.shape, -1)


class TiedHead(nn.Module):
    """y = W x with the W of an embedding, which alone stores it."""

    def __init__(self, embedding: QLREmbedding):
        super().__init__()
        self.embedding = (embedding,)  # no module of this one: it would be stored twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) -> (…, out), in x's type."""
        return self.embedding[0].project(x)


def in_pieces(work, *inputs: torch.Tensor) -> torch.Tensor:
    """Apply `work`, on a processor to a few tokens at a time, so that intermediate results stay in its cache.

    Fresh memory for them would cost more than the arithmetic. Compiled, or on a GPU, `work` gets all tokens at once.

    Args:
        work: function of arrays (tokens, features) that returns one.
        inputs: arrays (…, features) of the same leading axes.

    Returns:
        (…, features of the result).
    """
    first = inputs[0]
    step = max(TILE_WEIGHTS // first.shape[-1], 1)
    if torch.compiler.is_compiling() or first.device.type != "cpu" or first[..., 0].numel() <= step:
        return work(*inputs)
    pieces = zip(*(array.reshape(-1, array.shape[-1]).split(step) for array in inputs), strict=True)
    return torch.cat([work(*piece) for piece in pieces]).unflatten(0, first.shape[:-1])


def multiply(x: torch.Tensor, part: Part) -> torch.Tensor:
    """x (…, cols) times a part's transpose, in x's type: (…, rows)."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Product.apply(x, part)  # pyright: ignore[reportReturnType]
    return torch.cat([nn.functional.linear(x, rows) for _, _, rows in part.tiles(x.dtype, keep=False)], dim=-1)


class Product(torch.autograd.Function):
    """The product whose backward pass decodes the part again: kept until then, it would take what packing saves."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, part: Part) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.part = part
        return multiply(x.detach(), part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        found = gradient.new_zeros(*gradient.shape[:-1], ctx.part.cols, dtype=torch.float32)
        for start, stop, rows in ctx.part.tiles(gradient.dtype, keep=False):
            found += gradient[..., start:stop] @ rows
        return found.to(gradient.dtype), None


# -------------------------------------------------------------------------------------------------- transformers


class QLRConfig(QuantizationConfigMixin):
    """`quantization_config` of a qlr folder: how each matrix is stored, by the name of its linear layer.

    Args:
        dequantize: decode every matrix once, while the folder loads, into the model's type. This alone may be given to
            `from_pretrained(folder, quantization_config=QLRConfig(dequantize=True))`; the folder has the rest.
        format_version, runtime_version, matrices, others: as config.json has them.

    Raises:
        ValueError: for a format newer than this runtime reads, a folder that needs a newer runtime, or one made with another
            trellis or lattice code.
    """

    def __init__(
        self,
        dequantize: bool = False,
        format_version: int = FORMAT_VERSION,
        runtime_version: int = RUNTIME_VERSION,
        matrices: dict | None = None,
        **others,
    ):
        help = "install a newer qlr-jax, or load it with the folder's own runtime (trust_remote_code=True)"
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            has = f"this folder has qlr format version {format_version}"
            raise ValueError(f"{has}, but this runtime reads up to {FORMAT_VERSION}; {help}")
        if not isinstance(runtime_version, int) or runtime_version > RUNTIME_VERSION:
            needs = f"this folder needs qlr runtime version {runtime_version}"
            raise ValueError(f"{needs}, but this runtime is version {RUNTIME_VERSION}; {help}")
        for name, code in CODES.items():
            found = others.pop(name, None) or code
            if found != code:
                raise ValueError(f"this folder uses the {name} code {found}, but this runtime decodes {code}; get a matching one")
            setattr(self, name, dict(code))
        self.quant_method = "qlr"  # pyright: ignore[reportAttributeAccessIssue]  transformers' type lists its own methods only
        self.dequantize = bool(dequantize)
        self.format_version, self.runtime_version = format_version, runtime_version
        self.matrices = matrices or {}
        for name, value in others.items():  # as they are, so that saving loses nothing
            if name != "quant_method":
                setattr(self, name, value)

    def get_loading_attributes(self) -> dict:
        """Which settings of a config that a user passes to `from_pretrained` override the folder's."""
        return {"dequantize": self.dequantize}


class QLRQuantizer(HfQuantizer):
    """Puts `QLRLinear` where config.json says so, before weights are loaded, and checks that every tensor is there."""

    requires_calibration = True  # in transformers' words: it loads folders and does not write new ones
    runtime_version = RUNTIME_VERSION
    quantization_config: QLRConfig

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        plain = next((base for base in PACKED if isinstance(model, base)), None)
        if plain is None:
            known = ", ".join(base.__name__ for base in PACKED)
            raise ValueError(f"a qlr folder holds one of {known}, not a {type(model).__name__}; use AutoModelForCausalLM")
        if plain.config_class.model_type != model.config.model_type:
            raise ValueError(
                f"config.json has model_type {model.config.model_type!r}, but auto_map names a class for "
                f"{plain.config_class.model_type!r}; install qlr-jax, or export the folder again"
            )
        if type(model).__name__ in (plain.__name__, PACKED[plain].__name__):
            model.__class__ = PACKED[plain]  # same model, and save_pretrained then takes this file along
        replace_linears(model, self.quantization_config.matrices)
        check_tensors(model, checkpoint_files or [])
        check_sums(checkpoint_files or [])
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        return self._dequantize(model, model.dtype) if self.quantization_config.dequantize else model

    def _dequantize(self, model, dtype=None):
        # after save_pretrained, config.dtype is a name
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        for name in [name for name, module in model.named_modules() if isinstance(module, QLRLinear)]:
            linear = model.get_submodule(name)
            if any(buffer.is_meta for buffer in linear.buffers()):
                raise ValueError(f"{name} is offloaded, so it cannot be decoded; load the model with all of it on devices")
            if isinstance(linear, QLREmbedding):
                unpack_embedding(model, name, linear, dtype)
                continue
            dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(linear.dense(dtype), requires_grad=False)
            dense.bias = linear.bias
            model.set_submodule(name, dense)
            del linear  # its packed tensors are free before the next one is decoded
        plain = {packed: base for base, packed in PACKED.items()}.get(type(model))
        if plain is not None:  # nothing is packed any more, so what is saved needs no runtime
            model.__class__ = plain
            if hasattr(model.config, "auto_map"):
                del model.config.auto_map
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True  # adapters beside it


class QLRModelConfig(PreTrainedConfig):
    """What auto_map names as AutoConfig: it gives transformers' own configuration of the model's family.

    Tools that read the configuration first import this file thereby, and know `quant_method: "qlr"` from then on.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The configuration, of the class that `model_type` has in transformers; the arguments are those of any configuration."""
        found, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return CONFIG_MAPPING[found["model_type"]].from_pretrained(pretrained_model_name_or_path, **kwargs)


class Packed:
    """What packed models share; the class before it in each base list is transformers' own, with packed linear layers."""

    _auto_class = "AutoModelForCausalLM"

    @property
    def qlr_backend(self) -> str:
        """What multiplies by packed layers on a processor: `native (…)`, the instruction set of qlr-jax's C++, or `torch`."""
        library = native_products()
        return f"native ({library.backend()})" if library else "torch"

    def named_modules(self, *args, **kwargs):
        """As any module's; peft calls it before it wraps layers, and by then it is imported."""
        teach_peft()
        return super().named_modules(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  of the class after this one

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As any model's, and checksums.json is rewritten: with an earlier save's the new weights would be refused."""
        if is_main_process:
            for name in (CHECKSUMS, INDEX):
                Path(save_directory, name).unlink(missing_ok=True)
        save = super().save_pretrained  # pyright: ignore[reportAttributeAccessIssue]  of the class after this one
        save(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_sums(Path(save_directory))


# transformers' own classes, one a family; those that its installed version does not have are left out.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Olmo2ForCausalLM",
)


def packed_class(plain: type) -> type:
    """transformers' class with packed linear layers, under the name that auto_map has."""
    name = "QLRForCausalLM" if plain is LlamaForCausalLM else f"QLR{plain.__name__}"
    how = "`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`"
    doc = f"{plain.__name__} with packed linear layers: {how}."
    return type(name, (Packed, plain), {"__module__": __name__, "__doc__": doc})


_PLAIN = [getattr(transformers, name) for name in ARCHITECTURES if hasattr(transformers, name)]
PACKED = {plain: packed_class(plain) for plain in _PLAIN}
QLRForCausalLM = PACKED[LlamaForCausalLM]
globals().update({packed.__name__: packed for packed in PACKED.values()})


def teach_peft() -> None:
    """Let LoRA wrap `QLRLinear`, where peft is imported, whose dispatch knows its own kinds of layers only."""
    model = getattr(sys.modules.get("peft.tuners.lora.model"), "LoraModel", None)
    if model is None or QLRLinear in getattr(model, "qlr_layers", ()):  # several of this file may be in one process
        return
    utilities = sys.modules.get("peft.tuners.tuners_utils")
    create, allow = getattr(model, "_create_new_module", None), getattr(model, "_check_merge_allowed", None)
    include = getattr(utilities, "_maybe_include_all_linear_layers", None)
    if utilities is None or create is None or allow is None or include is None:  # peft says then that it knows no such layer
        return

    @wraps(create)
    def create_or_wrap(lora_config, adapter_name, target, **kwargs):
        if not isinstance(target, QLRLinear) or isinstance(target, QLREmbedding):
            return create(lora_config, adapter_name, target, **kwargs)
        start = getattr(lora_config, "init_lora_weights", True)
        if getattr(lora_config, "use_dora", False) or (isinstance(start, str) and start.lower() not in ("gaussian", "eva")):
            what = "use_dora" if getattr(lora_config, "use_dora", False) else f"init_lora_weights={start!r}"
            raise ValueError(f"{what} needs the dense weight of a layer that is packed; leave it out, or dequantize first")
        # peft makes its layer by the sizes alone, and the packed one takes the place of what it was made for
        stand_in = nn.Linear(1, 1, bias=target.bias is not None)
        stand_in.in_features, stand_in.out_features = target.in_features, target.out_features
        layer = create(lora_config, adapter_name, stand_in, **kwargs)
        layer.base_layer = target
        layer.__class__ = lora_class(type(layer))
        return layer

    @wraps(allow)
    def allow_unless_packed(self):
        if any(isinstance(getattr(module, "base_layer", None), QLRLinear) for module in self.model.modules()):
            raise ValueError(MERGE)
        return allow(self)

    @wraps(include)
    def include_packed(peft_config, model):
        everything = str(getattr(peft_config, "target_modules", None)).lower() == "all-linear"
        config = include(peft_config, model)
        if everything:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            packed = {name: module for name, module in model.named_modules() if isinstance(module, QLRLinear)}
            within = [name for name, module in packed.items() if module is not head and not isinstance(module, QLREmbedding)]
            config.target_modules = {*config.target_modules, *within}
        return config

    utilities._maybe_include_all_linear_layers = include_packed  # pyright: ignore[reportAttributeAccessIssue]
    model._create_new_module, model._check_merge_allowed = staticmethod(create_or_wrap), allow_unless_packed
    model.qlr_layers = (*getattr(model, "qlr_layers", ()), QLRLinear)


MERGE = (
    "an adapter cannot be merged into packed layers; load the folder with dequantize and the adapter on that, then merge, or keep "
    "the adapter beside the packed model"
)


@lru_cache
def lora_class(plain: type) -> type:
    """peft's LoRA layer with a packed base, which nothing is merged into."""

    def refuse(self, *args, **kwargs):
        raise ValueError(MERGE)

    return type("QLRLoraLinear", (plain,), {"__module__": __name__, "merge": refuse})


def replace_linears(model: PreTrainedModel, matrices: dict) -> None:
    """Swap every matrix that is stored packed; one whose spec is `bf16` is stored as a plain weight and stays."""
    for name, entry in matrices.items():
        if entry["spec"] == "bf16":
            continue
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"config.json describes {name}, which this model does not have; the folder is damaged") from None
        shape = list(entry["shape"])
        if isinstance(old, nn.Embedding):
            pack_embedding(model, name, old, entry)
            continue
        if not isinstance(old, nn.Linear) or [old.out_features, old.in_features] != shape:
            raise ValueError(f"config.json gives {name} the shape {shape}, but the model has {old}; the folder is damaged")
        with torch.device(old.weight.device):
            new = QLRLinear(**entry)
        new.bias = old.bias
        model.set_submodule(name, new)


def pack_embedding(model: PreTrainedModel, name: str, old: nn.Embedding, entry: dict) -> None:
    """Swap an embedding that is stored packed, and the head with it where the two are tied.

    Args:
        model: that it is in.
        name: of the embedding.
        old: the embedding as transformers made it.
        entry: how it is stored, as config.json has it.
    """
    shape = list(entry["shape"])
    if [old.num_embeddings, old.embedding_dim] != shape:
        raise ValueError(f"config.json gives {name} the shape {shape}, but the model has {old}; the folder is damaged")
    with torch.device(old.weight.device):
        new = QLREmbedding(**entry, factor=float(getattr(old, "scalar_embed_scale", 1.0)), dtype=old.weight.dtype)
    model.set_submodule(name, new)
    if model.config.tie_word_embeddings:
        model.lm_head = TiedHead(new)
        # there is no weight of either any more that transformers could tie
        model._tied_weights_keys = None  # pyright: ignore[reportAttributeAccessIssue]  as transformers' own classes without a head do
        model.all_tied_weights_keys = {}


def unpack_embedding(model: PreTrainedModel, name: str, packed: QLREmbedding, dtype: torch.dtype) -> None:
    """Put transformers' own embedding in the place of a packed one, and a head that shares its weight where the two are tied.

    Args:
        model: that it is in.
        name: of the embedding.
        packed: the embedding.
        dtype: of the decoded weight.
    """
    plain = type(model).__mro__[2] if isinstance(model, Packed) else type(model)
    with torch.device("meta"):
        blank = plain(copy.deepcopy(model.config)).get_submodule(name)
    blank.weight = nn.Parameter(packed.dense(dtype), requires_grad=False)
    if getattr(blank, "embed_scale", None) is not None:
        blank.embed_scale = torch.tensor(packed.factor)
    model.set_submodule(name, blank)
    if isinstance(getattr(model, "lm_head", None), TiedHead):
        head = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        head.weight = blank.weight
        model.lm_head = head
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


_TYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def check_tensors(model: nn.Module, files: list[str]) -> None:
    """Raise ValueError unless the files hold exactly the model's tensors: what is missing would load as random weights."""
    if not files:
        raise ValueError("a qlr model is loaded from its folder, and no safetensors files were found; pass the folder's path")
    found = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  safe_open is no mapping
                    part = handle.get_slice(name)
                    found[name] = (list(part.get_shape()), _TYPES.get(part.get_dtype()))
        except Exception as error:  # safetensors raises several kinds
            raise ValueError(f"{file} is missing, truncated or no safetensors file ({error}); get it again") from None
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    expected = model.state_dict()
    missing = sorted(set(expected) - set(found) - tied)
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which config.json does not describe"
        more = len(missing or extra) - 1
        raise ValueError(f"the folder {what}{f' (and {more} more)' if more else ''}; get its files again")
    for name, (shape, dtype) in found.items():
        wanted = expected[name]
        packed = not name.endswith((".weight", ".bias"))  # a plain weight may be cast, what is packed may not
        if shape != list(wanted.shape) or (packed and dtype != wanted.dtype):
            asked = f"{wanted.dtype} {list(wanted.shape)}"
            raise ValueError(f"{name} is {dtype} {shape}, but config.json asks for {asked}; get the folder's files again")


def check_sums(files: list[str]) -> None:
    """Raise ValueError if weights or config.json are not what checksums.json beside them says; without a list nothing is done."""
    folder = Path(files[0]).parent
    if os.environ.get(SKIP_CHECKSUMS) == "1" or not (folder / CHECKSUMS).is_file():
        return
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        sums, config = dict(listed["files"]), listed.get("config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / CHECKSUMS} is damaged; get the folder again") from None
    pairs = [(Path(file), sums.get(Path(file).name), file_sum) for file in files]
    pairs += [(folder / INDEX, sums.get(INDEX), file_sum), (folder / "config.json", config, config_sum)]
    for path, wanted, digest in pairs:
        if wanted and path.is_file() and digest(path) != wanted:
            again = f"get it again, or delete {CHECKSUMS} if the change is meant"
            raise ValueError(f"{path} has changed since it was written (its sha256 differs); {again}")


def write_sums(folder: Path) -> None:
    """Write checksums.json for what a load reads: the weights, their index and config.json."""
    files = [*folder.glob("*.safetensors"), *folder.glob(INDEX), *folder.glob("config.json")]
    sums = {path.name: file_sum(path) for path in sorted(files)}
    listed = {"algorithm": "sha256", "files": sums, "config": config_sum(folder / "config.json")}
    (folder / CHECKSUMS).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def file_sum(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def config_sum(path: Path) -> str:
    """sha256 of what config.json says, `dequantize` left out: that is for users to set."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("quantization_config"), dict):
        config["quantization_config"].pop("dequantize", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def register() -> None:
    """Make transformers know `quant_method: "qlr"` in this process; of several runtimes the newest serves."""
    if QLRConfig not in known_methods.LOADING_ATTRIBUTES_CONFIG_TYPES:  # else what a user's QLRConfig says is dropped
        known_methods.LOADING_ATTRIBUTES_CONFIG_TYPES += (QLRConfig,)
    known = AUTO_QUANTIZER_MAPPING.get("qlr")
    if known is not None:
        if getattr(known, "runtime_version", 0) > RUNTIME_VERSION:
            return
        del AUTO_QUANTIZER_MAPPING["qlr"]
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop("qlr", None)
    # by name: pipelines and trainers look there for what generates text
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update({f"qlr_{packed.__name__}": packed.__name__ for packed in PACKED.values()})
    register_quantization_config("qlr")(QLRConfig)
    register_quantizer("qlr")(QLRQuantizer)


register()
