"""One linear layer by kernels: which it launches, with what, and when the layer's own forward is used instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import nn

from qlr_jax.formats.qlr.kernels.combine import apply_factor, finish
from qlr_jax.formats.qlr.kernels.language import launch
from qlr_jax.formats.qlr.kernels.plan import Format, format_of, split_q, split_r, tiles_of
from qlr_jax.formats.qlr.kernels.products import products
from qlr_jax.formats.qlr.modeling_qlr import INPUT, OUTPUT, _hartley, _walsh, block_size, constant

MOST_TOKENS = 8
CHUNK = 16  # rows of a factor, or of L, that are in registers at a time


@constant
def factors(block: int, device: torch.device) -> list[torch.Tensor]:
    """Factors of a rotation over `block`, as `modeling_qlr.rotation`, but two of about the same width, or one of at most 128."""
    power = block & -block
    odd = block // power
    inner = power if block <= 128 else min(power, 2 ** max(round(math.log2(block**0.5 / odd)), 0))
    first = torch.kron(_walsh(inner, device), _hartley(odd, device)) * power**-0.5
    return [first.contiguous()] + ([_walsh(power // inner, device)] if power > inner else [])


class Kernel:
    """`QLRLinear.forward` for a few tokens, by Triton kernels: y = g · Uᵀ (Q + L diag(s) R) V x.

    Args:
        linear: a QLRLinear with trellis, bf16, or integers of 2, 3, 4 or 8 bits in each of Q, L and R. It keeps its tensors: they
            are read where they are at every call, except that signs are read once.

    Raises:
        NotImplementedError: for another quantizer, or groups that end within a unit of codes.

    Example:
        >>> from qlr_jax.formats.qlr.modeling_qlr import QLRLinear
        >>> y = Kernel(QLRLinear("int-4g32+r4@bf16", (48, 64)).cuda())(torch.ones(1, 64).cuda())  # doctest: +SKIP
    """

    def __init__(self, linear: Any):
        self.linear = linear
        parts = [linear.backbone, linear.left, linear.right] if linear.rank else [linear.backbone, None, None]
        self.q, self.left, self.right = formats = [None if part is None else format_of(part) for part in parts]
        if linear.by_rows:  # inputs alone are rotated there, and each row has a scale
            raise NotImplementedError(f"there is no kernel for {linear.spec}")
        if [part is None for part in parts] != [format is None for format in formats]:
            raise NotImplementedError(f"there is no kernel for {linear.spec}")
        self.device = next(linear.buffers()).device
        self.rotations: list[list[torch.Tensor]] = [[], []]
        self.signs: list[torch.Tensor | None] = [None, None]
        if linear.rotated:
            sizes = linear.in_features, linear.out_features
            self.rotations = [factors(block_size(size, linear.rotation_block), self.device) for size in sizes]
            self.signs = [compact_signs(linear._signs(salt, self.device)) for salt in (INPUT, OUTPUT)]
        interpreted = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]  triton sets it as it is imported
        self.dp4a = self.device.type == "cuda" and torch.version.hip is None and not interpreted

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
        launch(
            products, (q.programs + r.programs,), v, *packed_arrays(linear.backbone, self.q), q_sums,
            *packed_arrays(linear.right if linear.rank else None), r_sums,
            self.q, self.right, q.splits, q.share, q.programs, r.splits, r.share, tokens, side, tiles.sequences, tiles.rows,
            tiles.units, tiles.generic_rows, tiles.columns, self.dp4a, num_warps=4,
        )  # fmt: skip

        factors = self.rotations[OUTPUT]
        # the first factor joins `finish`, unless it is too large for the registers
        first, others = (factors[0], factors[1:]) if factors and len(factors[0]) <= tiles.columns else (None, factors)
        length = tiles.columns if first is None else len(first)
        signs, bias = self.signs[OUTPUT], linear.bias
        y = x.new_empty(tokens, size, dtype=torch.float32 if others else x.dtype)
        launch(
            finish, (-(-size // length), tokens), q_sums, r_sums, *packed_arrays(linear.left if linear.rank else None),
            linear._buffers.get("component_scale"), linear._buffers.get("scale"), first, None if others else signs,
            None if others else bias, y, size, linear.rank, self.left, self.q.gain if self.q else 1.0, q.splits, r.splits,
            tokens, length, triton.next_power_of_2(length), CHUNK, self.dp4a, num_warps=8,
        )  # fmt: skip
        y = rotate(y, others, x.dtype, stride=1 if first is None else length, signs=signs, bias=bias)
        return y.view(*x.shape[:-1], size)


def rotate(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    *,
    stride: int = 1,
    enter: torch.Tensor | None = None,
    signs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the factors of a rotation to x (tokens, size).

    Args:
        x: rows to rotate.
        factors: square matrices, as `factors` returns them, or the last of them.
        dtype: of the result.
        stride: how far apart the elements are that the first factor takes.
        enter: multiplies x before.
        signs, bias: multiply the result, and are added to it.
    """
    for i, factor in enumerate(factors):
        length, last = len(factor), i == len(factors) - 1
        y = torch.empty_like(x, dtype=dtype if last else torch.float32)
        launch(
            apply_factor, (x.shape[1] // length, len(x)), x, factor, None if i else enter, y, signs if last else None,
            bias if last else None, x.shape[1], length, triton.next_power_of_2(length), stride, CHUNK,
            num_warps=4 if length <= 256 else 8,
        )  # fmt: skip
        x, stride = y, stride * length
    return x


def packed_arrays(part: Any, format: Format | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Codes, scales (or rates) and zeros of a `Part`; the codes as the integers that a format loads, where one is given."""
    if part is None:
        return None, None, None
    codes = part.codes
    if format is not None and format.kind != "bf16" and (format.kind == "trellis" or format.words):
        codes = codes.view(torch.int16 if format.kind == "trellis" and format.load_bits == 16 else torch.int32)
    return codes, part._buffers.get("scales", part._buffers.get("rates")), part._buffers.get("zeros")


def compact_signs(signs: torch.Tensor) -> torch.Tensor:
    """Signs in a byte each, where all of them are whole numbers."""
    small = signs.to(torch.int8)
    return small if torch.equal(small.to(signs.dtype), signs) else signs.contiguous()


def replace_forward(linear: nn.Module) -> None:
    """Let a layer's forward use kernels for 1 to MOST_TOKENS tokens, and its own code for more and for gradients.

    Raises:
        NotImplementedError: for a layer that has no kernel.
    """
    name = "_old_forward" if hasattr(linear, "_old_forward") else "forward"  # where accelerate has put its own before it
    setattr(linear, name, partial(forward, Kernel(linear), type(linear).forward))


def forward(kernel: Kernel, ordinary: Callable[[Any, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """W x by kernels where they serve this call, else by the layer's own forward.

    Args:
        kernel: of the layer.
        ordinary: the layer's own forward.
        x: (…, in).
    """
    bias = kernel.linear.bias
    gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    if gradient or not few or x.device != kernel.device or torch.compiler.is_compiling():
        return ordinary(kernel.linear, x)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return kernel(x)
