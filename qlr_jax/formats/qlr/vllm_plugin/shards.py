"""The stored matrices of one layer of vLLM, which fuses several linear layers into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr import modeling_qlr as runtime


@contextmanager
def float32_by_default() -> Iterator[None]:
    """The runtime makes its tables in torch's default type, which vLLM sets to the model's while it loads one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Plain(nn.Module):
    """A weight that is not packed, beside others that are. No nn.Linear: those, vLLM replaces wherever it finds them."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)


class Shards(nn.Module):
    """y = [W₁; W₂; …] x, each W packed or a plain weight.

    Args:
        names: of the matrices in the folder.
        entries: how each is packed, as config.json has it; None: it is a plain weight.
        inputs: columns of all of them.
        outputs: rows of each.
        dtype: of plain weights.
        packed: class of the packed ones.

    Raises:
        QLRError: a shape in config.json that is not the layer's.
    """

    def __init__(
        self,
        names: Sequence[str],
        entries: Sequence[dict | None],
        inputs: int,
        outputs: Sequence[int],
        dtype: torch.dtype,
        packed: type[runtime.QLRLinear] = runtime.QLRLinear,
    ):
        super().__init__()
        self.names, self.outputs = list(names), list(outputs)
        self.parts = nn.ModuleList()
        for name, entry, rows in zip(names, entries, outputs, strict=True):
            if entry is not None and list(entry["shape"]) != [rows, inputs]:
                has = f"config.json gives {name} the shape {list(entry['shape'])}"
                raise QLRError(f"{has}, but vLLM's layer has {[rows, inputs]}; the folder is damaged")
            with float32_by_default():
                self.parts.append(Plain(inputs, rows, dtype) if entry is None else packed(**entry))
        self.waiting = {(at, name) for at, part in enumerate(self.parts) for name in part.state_dict()}

    def load(self, position: int, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor of the folder.

        Args:
            position: of the matrix.
            name: of the tensor within it.
            tensor: its values.

        Raises:
            QLRError: for a name, a shape or a type that config.json does not ask for.
        """
        full, wanted = f"{self.names[position]}.{name}", self.parts[position].state_dict().get(name)
        if wanted is None:
            raise QLRError(f"the folder holds {full}, which config.json does not describe; get its files again")
        plain = name == "weight"  # it may be cast, what is packed may not
        if tensor.shape != wanted.shape or (not plain and tensor.dtype != wanted.dtype):
            asked = f"{wanted.dtype} {list(wanted.shape)}"
            raise QLRError(f"{full} is {tensor.dtype} {list(tensor.shape)}, but config.json asks for {asked}; get its files again")
        wanted.copy_(tensor)
        self.waiting.discard((position, name))

    def check(self) -> None:
        """Raise QLRError unless every tensor was loaded: what is missing would be noise."""
        if self.waiting:
            position, name = min(self.waiting)
            raise QLRError(f"the folder lacks {self.names[position]}.{name}; get its files again")

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """W x + bias.

        Args:
            x: (…, in).
            bias: (out,) or None.

        Returns:
            (…, out), in x's type.
        """
        biases: Sequence[Any] = [None] * len(self.parts) if bias is None else bias.split(self.outputs)
        with float32_by_default():
            found = [product(part, x, bias) for part, bias in zip(self.parts, biases, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def rows(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a packed embedding by their number: (…) -> (…, in), in `dtype`."""
        with float32_by_default():
            return self.parts[0].rows(tokens).to(dtype)  # pyright: ignore  of QLREmbedding

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[W₁; W₂; …] (out, in), decoded; packed arrays are let go one by one."""
        found = []
        with float32_by_default():
            for at, part in enumerate(self.parts):
                found.append(part.weight.to(dtype) if isinstance(part, Plain) else part.dense(dtype))  # pyright: ignore[reportCallIssue]
                self.parts[at] = nn.Identity()
        return found[0] if len(found) == 1 else torch.cat(found)


def product(part: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """W x + bias of one matrix, in x's type; the bias is added before the result is rounded to it."""
    if isinstance(part, Plain):
        return nn.functional.linear(x, part.weight, bias)
    multiply = part.project if isinstance(part, runtime.QLREmbedding) else part
    return multiply(x) if bias is None else (multiply(x.float()) + bias.float()).to(x.dtype)
