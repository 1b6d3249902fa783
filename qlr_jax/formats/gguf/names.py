"""A llama's tensors in GGUF: their names there, the order of rows in q and k, and the rotary frequencies' divisors.

The llama architecture: github.com/ggml-org/llama.cpp, src/llama-arch.cpp and src/models/llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlr_jax.models import LlamaConfig, parts_of
from qlr_jax.models.llama import frequencies

LINEARS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor.

    Example:
        >>> gguf_name("model.layers.3.self_attn.o_proj.weight"), gguf_name("lm_head.weight")
        ('blk.3.attn_output.weight', 'output.weight')
    """
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    if stem.endswith("layernorm"):
        layer, norm = stem.split(".")[2:]
        return f"blk.{layer}.{'attn_norm' if norm == 'input_layernorm' else 'ffn_norm'}.weight"
    layer, kind = parts_of(stem)
    return f"blk.{layer}.{LINEARS[kind]}.weight"


def reorder(rows: np.ndarray, name: str, config: LlamaConfig) -> np.ndarray:
    """Rows of q and k in llama.cpp's order: the pair that rotary frequency i rotates is rows 2i and 2i + 1, not i and i + d/2.

    Args:
        rows: (out, anything) of a linear layer; those of other layers than q and k stay as they are.
        name: of the layer.
        config: of the model.
    """
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(parts_of(name)[1])
    return rows if heads is None else rows.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """Divisors of the rotary frequencies theta^(−2i/d), (head_dim / 2,)."""
    return np.asarray(frequencies(replace(config, rope_scaling=None)) / frequencies(config))
