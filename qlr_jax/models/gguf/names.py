"""Tensors in GGUF: their names there, the order of rows in q and k, and the rotary frequencies' divisors.

Architectures: github.com/ggml-org/llama.cpp, src/llama-arch.cpp and src/models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qlr_jax.models.config import LlamaConfig
from qlr_jax.models.families import FAMILIES
from qlr_jax.models.llama import frequencies
from qlr_jax.models.names import kind_of, tensor_names
from qlr_jax.models.sites import SITES

LINEARS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
NORMS = {  # by the place of a block's norm, an attribute of `Norms`
    "before_attention": "attn_norm", "after_attention": "post_attention_norm",
    "before_mlp": "ffn_norm", "after_mlp": "post_ffw_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

INTERLEAVED = ("llama", "mistral")
"""Families that llama.cpp calls llama: rotary pairs are neighbours there. In all others they lie half a head apart, as in ours."""


def gguf_name(name: str, family: str = "llama") -> str:
    """GGUF's name of a tensor.

    Example:
        >>> gguf_name("model.layers.3.self_attn.o_proj.weight"), gguf_name("lm_head.weight")
        ('blk.3.attn_output.weight', 'output.weight')
        >>> gguf_name("model.layers.0.post_attention_layernorm.weight"), gguf_name("model.layers.0.self_attn.q_proj.bias")
        ('blk.0.ffn_norm.weight', 'blk.0.attn_q.bias')
    """
    stem, part = name.rsplit(".", 1)
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{part}"
    layer, local = stem.split(".", 3)[2:]
    return f"blk.{layer}.{_block_names(family)[local]}.{part}"


def hugging_face_names(config: LlamaConfig) -> dict[str, str]:
    """GGUF's name -> ours, of every tensor that a model of this config has."""
    return {gguf_name(name, config.family): name for name in tensor_names(config)}


def reorder(rows: np.ndarray, name: str, config: LlamaConfig) -> np.ndarray:
    """Rows of q and k in llama.cpp's order: the pair that rotary frequency i rotates is rows 2i and 2i + 1, not i and i + d/2.

    Args:
        rows: (out, anything) of a linear layer; those of other layers than q and k stay as they are.
        name: of the layer.
        config: of the model.
    """
    heads = _rotary_heads(name, config)
    return rows if heads is None else rows.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def natural_order(rows: np.ndarray, name: str, config: LlamaConfig) -> np.ndarray:
    """The inverse of `reorder`, of a bias too.

    Example:
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> natural_order(np.arange(8), "model.layers.0.self_attn.q_proj", config).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = _rotary_heads(name, config)
    return rows if heads is None else rows.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """Divisors of the rotary frequencies theta^(−2i/d), (head_dim / 2,)."""
    return np.asarray(frequencies(replace(config, rope_scaling=None)) / frequencies(config))


def _rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """The heads of a layer whose rows llama.cpp orders otherwise; None for all other layers."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    return heads.get(kind_of(name)) if config.family in INTERLEAVED else None


def _block_names(family: str) -> Mapping[str, str]:
    """Names inside a block: ours -> GGUF's."""
    norms = FAMILIES[family].norms
    names = {site.path: LINEARS[site.kind] for site in SITES}
    names |= {getattr(norms, place): name for place, name in NORMS.items()}
    return names | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
