"""Names and shapes of a model's tensors, as Hugging Face spells them; which linear layers share an input."""

import math
import re

from qlr_jax.errors import QLRError
from qlr_jax.models.config import LlamaConfig

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
"""Kinds of linear layers, in the order in which they are listed everywhere."""

_ROOM = {kind: "self_attn" if kind in "qkvo" else "mlp" for kind in KINDS}
_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o_proj", "gate": "gate_up", "up": "gate_up", "down": "down_proj"}
_PATTERN = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


def linear_names(config: LlamaConfig) -> list[str]:
    """Every linear layer of the blocks: layer by layer, q, k, v, o, gate, up, down.

    >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    >>> linear_names(config)[0], len(linear_names(config))
    ('model.layers.0.self_attn.q_proj', 14)
    """
    return [f"model.layers.{i}.{_ROOM[kind]}.{kind}_proj" for i in range(config.num_hidden_layers) for kind in KINDS]


def parts_of(name: str) -> tuple[int, str]:
    """(layer, kind) of a linear layer's name; QLRError for anything else.

    >>> parts_of("model.layers.3.mlp.down_proj")
    (3, 'down')
    """
    match = _PATTERN.fullmatch(name)
    if match is None or _ROOM[match[3]] != match[2]:
        raise QLRError(f"{name!r} is no linear layer; give a name such as 'model.layers.0.self_attn.q_proj'")
    return int(match[1]), match[3]


def layer_of(name: str) -> int:
    """The layer's number: 3 for "model.layers.3.mlp.down_proj"."""
    return parts_of(name)[0]


def kind_of(name: str) -> str:
    """The kind, one of KINDS: "down" for "model.layers.3.mlp.down_proj"."""
    return parts_of(name)[1]


def input_of(name: str) -> str:
    """The name of the input that a linear layer reads; q, k, v share one, gate and up share one.

    >>> input_of("model.layers.3.self_attn.k_proj"), input_of("model.layers.3.mlp.down_proj")
    ('model.layers.3.self_attn.qkv', 'model.layers.3.mlp.down_proj')
    """
    layer, kind = parts_of(name)
    return f"model.layers.{layer}.{_ROOM[kind]}.{_INPUT[kind]}"


def input_names(config: LlamaConfig) -> list[str]:
    """Every distinct input, in the order in which the forward pass meets them."""
    return list(dict.fromkeys(input_of(name) for name in linear_names(config)))


def shape_of(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }[kind_of(name)]  # fmt: skip


def tensor_names(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, with its shape; no lm_head where the embedding is tied."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for name in linear_names(config):
        out[f"{name}.weight"] = shape_of(config, name)
        if kind_of(name) in config.biases:
            out[f"{name}.bias"] = shape_of(config, name)[:1]
    for i in range(config.num_hidden_layers):
        out[f"model.layers.{i}.input_layernorm.weight"] = (config.hidden_size,)
        out[f"model.layers.{i}.post_attention_layernorm.weight"] = (config.hidden_size,)
        if config.traits.qk_norm:
            out |= {f"model.layers.{i}.self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    out["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return out


def parameter_count(config: LlamaConfig) -> int:
    """How many numbers a model of this config holds, a tied head counted once.

    >>> parameter_count(LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    236
    """
    return sum(math.prod(shape) for shape in tensor_names(config).values())
