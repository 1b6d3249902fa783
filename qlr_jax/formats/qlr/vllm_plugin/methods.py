"""vLLM's methods for layers that are packed: how their tensors are loaded, and what multiplies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]  not here in tests
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    UnquantizedEmbeddingMethod,
)

from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr import modeling_qlr as runtime
from qlr_jax.formats.qlr.vllm_plugin.operators import vllm_product, vllm_rows
from qlr_jax.formats.qlr.vllm_plugin.rules import shard_position
from qlr_jax.formats.qlr.vllm_plugin.shards import Shards


def attach(layer: Any, shards: Shards, name: str) -> None:
    """Put shards into a layer of vLLM, which loads into them from then on.

    Args:
        layer: of vLLM.
        shards: its matrices.
        name: of the layer, by which operators find the shards.
    """
    layer.qlr, layer.qlr_name = shards, f"{name}.qlr"
    layer.load_weights = lambda weights: load_weights(layer, weights)
    get_current_vllm_config().compilation_config.static_forward_context[layer.qlr_name] = shards


def detach(layer: Any) -> None:
    """Take the shards out of a layer, which is dense from then on."""
    del layer.qlr, layer.load_weights


def load_weights(layer: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """What vLLM's loader calls with the tensors of one layer; yields the names that were loaded."""
    for name, tensor in weights:
        shard = getattr(tensor, "shard_id", None)
        if name == "bias" and getattr(layer, "bias", None) is not None:
            layer.bias.weight_loader(layer.bias, tensor, *(() if shard is None else (shard,)))
        else:
            layer.qlr.load(shard_position(shard, layer.qlr.names), name, tensor)
        yield name


def multiply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product with a layer's shards, as one operator where torch.compile traces it."""
    if torch.compiler.is_compiling():
        return vllm_product(x, bias, layer.qlr_name, sum(layer.qlr.outputs))
    return layer.qlr(x, bias)


class PackedLinear(LinearMethodBase):
    """A linear layer of vLLM of one or several matrices, of which at least one is packed.

    Args:
        config: vLLM's quantization configuration of the folder.
        names: of the matrices.
    """

    def __init__(self, config: Any, names: list[str]):
        self.config, self.names = config, names
        self.plain = UnquantizedLinearMethod()

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """As vLLM asks; the layer gets no parameters, but `Shards`."""
        entries = [self.config.entry(name) for name in self.names]
        shards = Shards(self.names, entries, input_size_per_partition, output_partition_sizes, params_dtype)
        attach(layer, shards, layer.prefix)
        self.dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded, and decode where that is asked for."""
        layer.qlr.check()
        self.config.loaded(layer.qlr)
        if self.config.dequantize:
            weight = layer.qlr.dense(self.dtype)
            detach(layer)
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            layer.quant_method = self.plain
            self.plain.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """W x + bias, in x's type."""
        return multiply(layer, x, bias)


class PackedVocabulary(QuantizeMethodBase):
    """A packed embedding, or a packed head of its own.

    Args:
        config: vLLM's quantization configuration of the folder.
        name: of the matrix.
        head: whether it is a head.
    """

    def __init__(self, config: Any, name: str, head: bool):
        self.config, self.name, self.head = config, name, head
        self.plain = UnquantizedEmbeddingMethod()

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """As vLLM asks; the layer gets no parameters, but `Shards`, without the rows that vLLM pads a vocabulary by."""
        kind = runtime.QLRLinear if self.head else runtime.QLREmbedding
        entries = [self.config.entry(self.name)]
        shards = Shards([self.name], entries, input_size_per_partition, [layer.org_vocab_size], params_dtype, kind)
        attach(layer, shards, self.name)
        self.dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded, and decode where that is asked for."""
        if layer.quant_method is not self:  # a head that shares it came first
            return
        layer.qlr.check()
        self.config.loaded(layer.qlr)
        if self.config.dequantize:
            rows = layer.qlr.dense(self.dtype)
            detach(layer)
            weight = nn.functional.pad(rows, (0, 0, 0, layer.num_embeddings_padded - len(rows)))
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            layer.quant_method = self.plain
            self.plain.process_weights_after_loading(layer)

    def embedding(self, layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Rows by their number, in the model's type."""
        if torch.compiler.is_compiling():
            return vllm_rows(tokens, layer.qlr_name, layer.embedding_dim, self.dtype)
        return layer.qlr.rows(tokens, self.dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, with zeros for the rows that vLLM pads a vocabulary by."""
        logits = multiply(layer, x, None)
        logits = nn.functional.pad(logits, (0, layer.num_embeddings_padded - logits.shape[-1]))
        return logits if bias is None else logits + bias


class TiedHead(QuantizeMethodBase):
    """A head that has the matrix of a packed embedding.

    Args:
        config: vLLM's quantization configuration of the folder.
        name: of the embedding.
    """

    def __init__(self, config: Any, name: str):
        self.config, self.name = config, name
        self.embedding_layer: Any = None

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Nothing is its own."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Keep the embedding, here and not in the layer, where it would be a module a second time."""
        if not isinstance(embed_tokens.quant_method, PackedVocabulary):  # vLLM's Gemma makes it without asking for a method
            method = embed_tokens.quant_method = self.config.vocabulary(self.name, head=False)
            del embed_tokens.weight
            width, rows = embed_tokens.embedding_dim, embed_tokens.num_embeddings_padded
            method.create_weights(embed_tokens, width, [rows], width, rows, embed_tokens.params_dtype)
        self.embedding_layer = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Where the embedding is decoded, share its weight."""
        tied = self.embedding_layer
        if tied is None:
            raise QLRError("the head has no matrix of its own, and this model of vLLM does not tie it; set tie_word_embeddings")
        tied.quant_method.process_weights_after_loading(tied)
        if isinstance(tied.quant_method, UnquantizedEmbeddingMethod):
            layer.weight = tied.weight
            layer.quant_method = tied.quant_method
            layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, as the embedding's method has them."""
        return self.embedding_layer.quant_method.apply(self.embedding_layer, x, bias)
