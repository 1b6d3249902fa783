"""Products with packed layers as operators that torch.compile takes whole.

A layer is handed over by its name, as vLLM does with attention: traced, codes would be decoded by hundreds of small operators, and
the C++ library, which reads them where they lie, could not take part.
"""

from __future__ import annotations

import torch
from torch import nn


def find_shards(name: str) -> nn.Module:
    """The shards that a layer's name stands for, in the model that vLLM runs at the moment."""
    from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]  not here in tests

    return get_forward_context().no_compile_layers[name]


@torch.library.custom_op("qlr::vllm_product", mutates_args=())
def vllm_product(x: torch.Tensor, bias: torch.Tensor | None, name: str, outputs: int) -> torch.Tensor:
    """W x + bias: (…, in) -> (…, outputs), in x's type."""
    return find_shards(name)(x, bias)


@vllm_product.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, name: str, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op("qlr::vllm_rows", mutates_args=())
def vllm_rows(tokens: torch.Tensor, name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an embedding: (…) -> (…, width), in `dtype`."""
    return find_shards(name).rows(tokens, dtype)  # pyright: ignore[reportCallIssue]  of `Shards`


@vllm_rows.register_fake
def _(tokens: torch.Tensor, name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    return tokens.new_empty((*tokens.shape, width), dtype=dtype)
