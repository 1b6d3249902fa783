"""PyTorch runtime of qlr-jax folders: a Llama whose linear layers stay packed and are decoded as they are used.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This one file needs torch, transformers and safetensors, nothing else, and travels with every folder. A weight W (out, in)
is stored as

    W ≈ g · Uᵀ (Q + L diag(s) R) V

with Q, L and R on quantized grids, and U, V orthogonal: random signs, which come from a seed, times a Hadamard-like matrix,
or the identity. A forward pass rotates x by V, multiplies by Q in tiles of rows and by R, then L, and rotates back by Uᵀ.
The arithmetic is float32 whatever the type of x, which is also the type of the result. At most `TILE_WEIGHTS` weights are
decoded at a time, so beside its input and output a layer needs about `TILE_BYTES` (16 MB), whatever its size.
"""

import itertools
import math
import re
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

FORMAT_VERSION = 1  # of the folder: what this file reads
RUNTIME_VERSION = 2  # of this file: where several are imported, the newest serves all

TILE_WEIGHTS = 2**19
TILE_BYTES = 32 * TILE_WEIGHTS  # peak of a tile while it is decoded, its float32 values included

# A folder records the codes that it was made with, and others are refused.
# The trellis: weights a walk, rows it may cover in Q and (at most) in a factor, constants of its hash.
TRELLIS = {"length": 256, "rows": [64, 32, 16], "factor_rows": 4, "multiplier": 2847382671, "addend": 1201005453}
LENGTH = TRELLIS["length"]
# The lattice: by bits, the scale of its first stage, and of the second within it; checksums of its tables (in quarters, int8).
LATTICE = {
    "scales": {"2": [0.96484375, 0.0], "3": [1.015625, 0.484375], "4": [1.125, 0.2578125]},
    "magnitudes": 2189498670,
    "roots": 1656410127,
}
CODES = {"trellis": TRELLIS, "lattice": LATTICE}


# ---------------------------------------------------------------------------------------------------- rotations

INPUT, OUTPUT = 0, 1


def signs(seed: int, salt: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """±1 (size,) in float32: the top bit of an integer hash of (seed, salt, index), so that no signs are stored."""
    mask = 0xFFFFFFFF
    word = (seed * 2 + salt) & mask
    offset = (word * 0x85EBCA6B + 0x27D4EB2F) & mask
    x = (_times(torch.arange(size, dtype=torch.int64, device=device), 0x9E3779B1) + offset) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _times(x ^ (x >> shift), factor)
    x = x ^ (x >> 16)
    return 1.0 - 2.0 * (x >> 31).float()


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x · factor mod 2³² for x, factor in [0, 2³²): in two halves, because the whole product overflows int64."""
    high, low = factor >> 16, factor & 0xFFFF
    return (((x * high) & 0xFFFF) * 0x10000 + x * low) & 0xFFFFFFFF


def block_size(size: int, block: int) -> int:
    """Width of the rotation's blocks: what `block` shares with `size`; all of `size` where `block` is 0 or shares < 32."""
    shared = math.gcd(size, block) if block else size
    return shared if shared >= 32 else size


def transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply the last axis by K = I ⊗ (H ⊗ O): Walsh-Hadamard H over 2^k, Hartley O over the odd rest of `block`.

    K is symmetric and orthogonal, so it is its own inverse. H is split in two, H_a ⊗ (H_b ⊗ O), so that two small matrix
    products do all of it.
    """
    power = block & -block
    odd = block // power
    inner = min(power, 1 << max((128 // odd).bit_length() - 1, 0))
    outer = power // inner
    y = x.reshape(-1, inner * odd) @ torch.kron(_walsh(inner, x), _hartley(odd, x))
    if outer > 1:
        y = _walsh(outer, x) @ y.view(-1, outer, inner * odd)
    return y.reshape(x.shape) * power**-0.5


def _walsh(size: int, like: torch.Tensor) -> torch.Tensor:
    """±1 (size, size): the sign of entry (i, j) is the parity of the bits that i and j share."""
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def _hartley(size: int, like: torch.Tensor) -> torch.Tensor:
    """cas(2π jk / size) / √size: symmetric and orthogonal for any size."""
    index = torch.arange(size, device=like.device)
    angle = (index[:, None] * index % size).double() * (2 * math.pi / size)
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).to(like.dtype)


# ------------------------------------------------------------------------------------------------ packed arrays


class Stored(nn.Module):
    """Buffers that keep the type they were saved in: `.to(torch.bfloat16)` moves them, but never casts them."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def store(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))


class Part(Stored):
    """Q (out, in), Lᵀ (rank, out) or R (rank, in) as it is stored; `decode` gives any of its rows in float32."""

    codes: torch.Tensor
    height = 1  # rows that are stored together: tiles start at a multiple of it
    unit = False  # of unit variance, its scale kept elsewhere

    def __init__(self, rows: int, cols: int):
        super().__init__()
        self.rows, self.cols = rows, cols

    def decode(self, start: int, stop: int) -> torch.Tensor:
        """Rows start … stop − 1: float32 (stop − start, cols)."""
        raise NotImplementedError

    def tiles(self):
        """(start, stop, rows start … stop − 1), at most TILE_WEIGHTS weights at a time."""
        step = max(TILE_WEIGHTS // self.cols // self.height, 1) * self.height
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            with torch.no_grad():
                yield start, stop, self.decode(start, stop)


class BFloat16Part(Part):
    """`bf16`: the values themselves."""

    def __init__(self, rows: int, cols: int):
        super().__init__(rows, cols)
        self.store("codes", (rows, cols), torch.bfloat16)

    def decode(self, start, stop):
        return self.codes[start:stop].float()


class GroupedPart(Part):
    """A little-endian bit stream of `bits`-bit codes a row, and one scale a group of weights (or a row)."""

    scales: torch.Tensor

    def __init__(self, rows: int, cols: int, bits: int, group: int):
        super().__init__(rows, cols)
        self.bits, self.group = bits, group
        self.groups = -(-cols // group) if group else 1
        self.store("codes", (rows, -(-cols * bits // 8)), torch.uint8)
        self.store("scales", (rows, self.groups), torch.float16)

    def read(self, start: int, stop: int, levels: torch.Tensor | None = None) -> torch.Tensor:
        """The codes of rows start … stop − 1 in float32, or what `levels` has for each."""
        # eight codes fill `bits` bytes, so each of the eight is read from the same place in all of these
        count = -(-self.cols // 8)
        codes = self.codes[start:stop]
        codes = nn.functional.pad(codes, (0, count * self.bits - codes.shape[1])).view(-1, count, self.bits)
        values = torch.empty((stop - start, count, 8), device=codes.device)
        for i in range(8):
            first, offset = divmod(i * self.bits, 8)
            wide = codes[..., first].int()
            if offset + self.bits > 8:  # it goes on in the next byte
                wide |= codes[..., first + 1].int() << 8
            code = (wide >> offset) & (2**self.bits - 1)
            values[..., i] = code if levels is None else levels.index_select(0, code.view(-1)).view(code.shape)
        return values.view(stop - start, -1)[:, : self.cols]

    def spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """(rows, groups) -> float32 that broadcasts against (rows, cols)."""
        wide = per_group.float()
        return wide.repeat_interleave(self.group, dim=1)[:, : self.cols] if self.group else wide


class IntegerPart(GroupedPart):
    """`int-b[g<group>][a]`: (u − zero) · scale, u in [0, 2^b)."""

    zeros: torch.Tensor

    def __init__(self, rows: int, cols: int, bits: int, group: int, asymmetric: bool):
        super().__init__(rows, cols, bits, group)
        self.asymmetric = asymmetric
        if asymmetric:
            self.store("zeros", (rows, self.groups), torch.uint8)

    def decode(self, start, stop):
        middle = 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))
        zero = self.spread(self.zeros[start:stop]) if self.asymmetric else middle
        return (self.read(start, stop) - zero) * self.spread(self.scales[start:stop])


class NormalFloatPart(GroupedPart):
    """`nf-b[g<group>]`: level · scale, the levels at equally likely quantiles of a Gaussian."""

    def decode(self, start, stop):
        levels = torch.tensor(normal_levels(self.bits), device=self.codes.device)
        return self.read(start, stop, levels) * self.spread(self.scales[start:stop])


@lru_cache
def normal_levels(bits: int) -> list[float]:
    """2^bits levels in [−1, 1], float32: 2^(b−1) + 1 quantiles from ½ to p and 2^(b−1) from ½ to 1 − p, over the largest."""
    half, full = 2 ** (bits - 1), 2**bits
    top = 1.0 - (1 / (2 * full) + 1 / (2 * (full - 1))) / 2

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(0.5 + i * ((top - 0.5) / (count - 1))) for i in range(count)]

    above, below = quantiles(half + 1), quantiles(half)
    table = torch.tensor([-x for x in below[:0:-1]] + above, device="cpu")
    return (table / table[-1]).tolist()


class LatticePart(Part):
    """`e8-b`: 8 weights of a row are a point of E8 + ¼ in two bytes; from 3 bits on a smaller point is added, in one byte or two.

    All values are short binary fractions, so float32 holds them exactly.
    """

    unit = True

    def __init__(self, rows: int, cols: int, bits: int):
        super().__init__(rows, cols)
        self.bits = bits
        self.store("codes", (rows, -(-cols // 8), bits), torch.uint8)

    def decode(self, start, stop):
        gain, inner = LATTICE["scales"][str(self.bits)]
        stage = self.codes[start:stop].reshape(-1, self.bits).unbind(1)
        values = shifted_points(stage[0], stage[1], gain)
        if self.bits == 3:
            values += (gain * inner * lattice_tables(values.device)[3]).index_select(0, stage[2].int())
        elif self.bits == 4:
            values += shifted_points(stage[2], stage[3], gain * inner)
        return values.view(stop - start, -1)[:, : self.cols]


def shifted_points(name: torch.Tensor, rest: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · (σ ∘ a ± ¼), float32 (n, 8): `name` of a, and in `rest` seven signs and the shift; the last sign follows."""
    magnitudes, odd, signs, _ = lattice_tables(name.device)
    name = name.int()
    pattern = ((rest & 127) << 1) | odd.index_select(0, name)
    points = (scale * magnitudes).index_select(0, name)
    points *= signs.index_select(0, pattern.int())
    points += ((rest >> 7).float() * (scale / 2) - scale / 4)[:, None]
    return points


@lru_cache
def lattice_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the E8 code: 256 vectors a; 1 where a adds up to an odd number; signs, by pattern and that; the second stage at 3 bits."""
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
    return magnitudes.to(device), odd.byte().to(device), signs.to(device), torch.stack(roots[:256]).to(device)


class TrellisPart(Part):
    """`trellis-b`: 256 weights are a closed walk of 256 · b bits; a weight's value is a hash of the state it is in.

    The state of weight t is the `state_bits` bits that end at bit ⌊(t + 1) b⌋ of the circular stream; a walk covers
    `height` rows and 256 / `height` columns, row by row.
    """

    unit = True

    def __init__(self, rows: int, cols: int, rate: Fraction, height: int, state_bits: int):
        super().__init__(rows, cols)
        self.rate, self.height, self.width, self.state_bits = rate, height, LENGTH // height, state_bits
        self.across = -(-cols // self.width)
        self.store("codes", (-(-rows // height), self.across, int(LENGTH * rate) // 8), torch.uint8)

    def values(self, device: torch.device) -> torch.Tensor:
        """float32 (2^state_bits,): the value of every state, near Gaussian of unit variance."""
        word = _times(torch.arange(2**self.state_bits, dtype=torch.int64, device=device), TRELLIS["multiplier"])
        word = (word + TRELLIS["addend"]) & 0xFFFFFFFF
        total = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24)
        gain = 1.0 + 0.1 * min(max(float(self.rate) - 2.0, 0.0), 1.0)
        scale = torch.tensor(gain, device="cpu") / torch.tensor(147.8, device="cpu")  # in float32, as the code is defined
        return (total - 510).float() * scale.item()

    def decode(self, start, stop):
        codes = self.codes[start // self.height : -(-stop // self.height)]
        count = codes.shape[-1]
        end = torch.arange(1, LENGTH + 1, device=codes.device) * self.rate.numerator // self.rate.denominator
        begin = (end - self.state_bits) % (8 * count)
        first, offset = begin // 8, (begin % 8).int()
        word = codes[..., first].int()  # a state is read from three bytes
        for k in (1, 2):
            word = word.bitwise_left_shift_(8).bitwise_or_(codes[..., (first + k) % count])
        states = word.bitwise_right_shift_(24 - self.state_bits - offset).bitwise_and_(2**self.state_bits - 1)
        values = self.values(codes.device).index_select(0, states.reshape(-1))
        rows = values.view(-1, self.across, self.height, self.width).transpose(1, 2).reshape(-1, self.across * self.width)
        return rows[: stop - start, : self.cols]


def walk_height(rows: int, cols: int) -> int:
    """Rows that a walk of a backbone covers: the tallest that pads at most a thirty-second more than the best."""
    walks = {height: -(-rows // height) * -(-cols * height // LENGTH) for height in TRELLIS["rows"]}
    return next(height for height in TRELLIS["rows"] if 32 * walks[height] <= 33 * min(walks.values()))


_QUANTIZER = re.compile(r"(?P<kind>int|nf|e8|trellis)-(?P<bits>[0-9.]+)(?:g(?P<group>[0-9]+))?(?P<asymmetric>a)?")
_SPEC = re.compile(r"(?P<backbone>[^/+@,]+)(?P<rot>/rot)?(?:\+r(?P<rank>[0-9]+)@(?P<left>[^/+@,]+)(?:,(?P<right>[^/+@,]+))?)?")


def make_part(quantizer: str, rows: int, cols: int, height: int, state_bits: int) -> Part:
    """An empty part for the quantizer that a spec names, e.g. `trellis-2.25`, `e8-2`, `int-4g32`, `nf-4g64`, `bf16`."""
    if quantizer == "bf16":
        return BFloat16Part(rows, cols)
    match = _QUANTIZER.fullmatch(quantizer)
    kind, bits, group = (match["kind"], match["bits"], int(match["group"] or 0)) if match else ("", "", 0)
    if kind == "int":
        return IntegerPart(rows, cols, int(bits), group, bool(match["asymmetric"]))
    if kind == "nf":
        return NormalFloatPart(rows, cols, int(bits), group)
    if kind == "e8" and bits in LATTICE["scales"]:
        return LatticePart(rows, cols, int(bits))
    if kind == "trellis":
        return TrellisPart(rows, cols, Fraction(bits), height, state_bits)
    raise ValueError(f"this qlr runtime does not know the quantizer {quantizer!r}; get a newer qlr-jax, or export the folder again")


# -------------------------------------------------------------------------------------------------- linear layer


class QLRLinear(Stored):
    """y = W x with W packed.

    Args:
        spec, shape, seed, rotation_block, state_bits: as config.json records them for each matrix.

    Buffers, named as the tensors in the file: backbone.codes, backbone.scales, backbone.zeros, left.*, right.*,
    component_scale (rank,) float16, scale (1,) float32; which of them are there follows from the spec.
    """

    scale: torch.Tensor
    component_scale: torch.Tensor

    def __init__(self, spec: str, shape: tuple[int, int], seed: int = 0, rotation_block: int = 0, state_bits: int = 12, **_):
        super().__init__()
        match = _SPEC.fullmatch(spec)
        if not match:
            raise ValueError(f"{spec!r} is not a spec that this qlr runtime knows; get a newer qlr-jax")
        self.out_features, self.in_features = rows, cols = int(shape[0]), int(shape[1])
        self.spec, self.seed, self.rotation_block = spec, seed, rotation_block
        backbone, self.rank = match["backbone"], int(match["rank"] or 0)
        self.backbone = None if backbone == "none" else make_part(backbone, rows, cols, walk_height(rows, cols), state_bits)
        self.rotated = bool(match["rot"]) or (self.backbone is not None and self.backbone.unit)
        if backbone != "bf16" or self.rank:
            self.store("scale", (1,), torch.float32)
        if self.rank:
            left, right = match["left"], match["right"] or match["left"]
            height = math.gcd(self.rank, TRELLIS["factor_rows"])
            self.left = make_part(left, self.rank, rows, height, state_bits)
            self.right = make_part(right, self.rank, cols, height, state_bits)
            if self.left.unit or self.right.unit:
                self.store("component_scale", (self.rank,), torch.float16)

    def extra_repr(self) -> str:
        return f"{self.out_features} × {self.in_features}, {self.spec}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) -> (…, out), in x's type."""
        v = x.float()
        if self.rotated:
            v = transform(v * self._signs(INPUT, v.device), block_size(self.in_features, self.rotation_block))
        if self.backbone is None:
            y = v.new_zeros(*v.shape[:-1], self.out_features)
        else:
            y = torch.cat([v @ rows.T for _, _, rows in self.backbone.tiles()], dim=-1)
        if self.rank:
            z = torch.cat([v @ rows.T for _, _, rows in self.right.tiles()], dim=-1)
            if "component_scale" in self._buffers:
                z = z * self.component_scale.float()
            for start, stop, rows in self.left.tiles():
                y = y + z[..., start:stop] @ rows
        if "scale" in self._buffers:
            y = y * self.scale
        if self.rotated:
            y = transform(y, block_size(self.out_features, self.rotation_block)) * self._signs(OUTPUT, y.device)
        return y.to(x.dtype)

    def dense(self) -> torch.Tensor:
        """W (out, in) in float32, decoded."""
        return self(torch.eye(self.in_features, device=next(self.buffers()).device)).T

    def _signs(self, salt: int, device: torch.device) -> torch.Tensor:
        return signs(self.seed, salt, self.out_features if salt == OUTPUT else self.in_features, device)


# -------------------------------------------------------------------------------------------------- transformers


class QLRConfig(QuantizationConfigMixin):
    """`quantization_config` of a qlr folder: how each matrix is stored, by the name of its linear layer.

    Raises:
        ValueError: for a format newer than this runtime, or made with another trellis or lattice code.
    """

    def __init__(self, format_version: int = FORMAT_VERSION, matrices: dict | None = None, **others):
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            raise ValueError(
                f"this folder has qlr format version {format_version}, but this runtime reads up to {FORMAT_VERSION}; "
                f"install a newer qlr-jax, or load it with the folder's own runtime (trust_remote_code=True)"
            )
        for name, code in CODES.items():
            found = others.pop(name, None) or code
            if found != code:
                raise ValueError(f"this folder uses the {name} code {found}, but this runtime decodes {code}; get a matching one")
            setattr(self, name, dict(code))
        self.quant_method = "qlr"
        self.format_version = format_version
        self.matrices = matrices or {}
        for name, value in others.items():  # kept as they are, so that saving loses nothing
            if name != "quant_method":
                setattr(self, name, value)


class QLRQuantizer(HfQuantizer):
    """Puts `QLRLinear` where config.json says so, before weights are loaded, and checks that every tensor is there."""

    requires_calibration = True  # in transformers' words: it loads folders, it does not make them
    runtime_version = RUNTIME_VERSION
    quantization_config: QLRConfig

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not isinstance(model, LlamaForCausalLM):
            raise ValueError(f"a qlr folder holds a LlamaForCausalLM, not a {type(model).__name__}; use AutoModelForCausalLM")
        if type(model) is LlamaForCausalLM:
            model.__class__ = QLRForCausalLM  # same model, and save_pretrained then takes this file along
        replace_linears(model, self.quantization_config.matrices)
        check_tensors(model, checkpoint_files)
        return model

    def _dequantize(self, model, dtype=None):
        # after save_pretrained, config.dtype is a name
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        for name, module in list(model.named_modules()):
            if isinstance(module, QLRLinear):
                weight = module.dense().to(dtype)
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                model.set_submodule(name, linear)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


class QLRForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with packed linear layers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`."""

    _auto_class = "AutoModelForCausalLM"


def replace_linears(model: nn.Module, matrices: dict) -> None:
    """Swap every linear layer that is stored packed; one whose spec is `bf16` is stored as a plain weight and stays."""
    for name, entry in matrices.items():
        if entry["spec"] == "bf16":
            continue
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"config.json describes {name}, which this model does not have; the folder is damaged") from None
        shape = list(entry["shape"])
        if not isinstance(old, nn.Linear) or [old.out_features, old.in_features] != shape:
            raise ValueError(f"config.json gives {name} the shape {shape}, but the model has {old}; the folder is damaged")
        with torch.device(old.weight.device):
            model.set_submodule(name, QLRLinear(**entry))


_TYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def check_tensors(model: nn.Module, files: list[str] | None) -> None:
    """Raise ValueError unless the files hold exactly the model's tensors: what is missing would load as random weights."""
    if not files:
        raise ValueError("a qlr model is loaded from its folder; no safetensors files were found or given")
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
        packed = not name.endswith(".weight")  # a plain weight may be cast, what is packed may not
        if shape != list(wanted.shape) or (packed and dtype != wanted.dtype):
            asked = f"{wanted.dtype} {list(wanted.shape)}"
            raise ValueError(f"{name} is {dtype} {shape}, but config.json asks for {asked}; get the folder's files again")


def register() -> None:
    """Make transformers know `quant_method: "qlr"` in this process; of several runtimes the newest serves."""
    known = AUTO_QUANTIZER_MAPPING.get("qlr")
    if known is not None:
        if getattr(known, "runtime_version", 0) > RUNTIME_VERSION:
            return
        del AUTO_QUANTIZER_MAPPING["qlr"]
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop("qlr", None)
    register_quantization_config("qlr")(QLRConfig)
    register_quantizer("qlr")(QLRQuantizer)


register()
