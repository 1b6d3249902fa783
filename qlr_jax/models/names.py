"""Names and shapes of a model's tensors, as Hugging Face spells them; which linear layers share an input."""

import math
import re

from qlr_jax.errors import QLRError
from qlr_jax.models.config import LlamaConfig
from qlr_jax.models.sites import BY_KIND, BY_PATH, SITES

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_VOCABULARY = {EMBEDDING: "embedding", HEAD: "head"}
_LINEAR = re.compile(rf"model\.layers\.(\d+)\.({'|'.join(map(re.escape, BY_PATH))})")


def linear_names(config: LlamaConfig) -> list[str]:
    """Every linear layer of the blocks: layer by layer, q, k, v, o, gate, up, down.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
        >>> linear_names(config)[0], len(linear_names(config))
        ('model.layers.0.self_attn.q_proj', 14)
    """
    return [f"model.layers.{i}.{site.path}" for i in range(config.num_hidden_layers) for site in SITES]


def vocabulary_names(config: LlamaConfig) -> list[str]:
    """The matrices with a row for every token: the embedding, which is the head too where they are tied, and else the head.

    Example:
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
        >>> vocabulary_names(LlamaConfig(**sizes)), vocabulary_names(LlamaConfig(**sizes, tie_word_embeddings=True))
        (['model.embed_tokens', 'lm_head'], ['model.embed_tokens'])
    """
    return [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]


def is_linear(name: str) -> bool:
    """Whether a name is that of a linear layer of a block; those of embedding and head are not.

    Example:
        >>> is_linear("model.layers.3.mlp.down_proj"), is_linear("lm_head")
        (True, False)
    """
    return _LINEAR.fullmatch(name) is not None


def parts_of(name: str) -> tuple[int, str]:
    """(layer, kind) of a linear layer's name.

    Raises:
        QLRError: any other name.

    Example:
        >>> parts_of("model.layers.3.mlp.down_proj")
        (3, 'down')
    """
    match = _LINEAR.fullmatch(name)
    if match is None:
        raise QLRError(f"{name!r} is no linear layer; give a name such as 'model.layers.0.self_attn.q_proj'")
    return int(match[1]), BY_PATH[match[2]].kind


def layer_of(name: str) -> int:
    """The layer's number: 3 for "model.layers.3.mlp.down_proj"."""
    return parts_of(name)[0]


def kind_of(name: str) -> str:
    """The kind, one of KINDS: "down" for "model.layers.3.mlp.down_proj"; "embedding" and "head" of those two."""
    return _VOCABULARY.get(name) or parts_of(name)[1]


def input_of(name: str) -> str:
    """The name of the input that a linear layer reads; q, k, v share one, gate and up share one.

    Example:
        >>> input_of("model.layers.3.self_attn.k_proj"), input_of("model.layers.3.mlp.down_proj")
        ('model.layers.3.self_attn.qkv', 'model.layers.3.mlp.down_proj')
    """
    layer, kind = parts_of(name)
    return f"model.layers.{layer}.{BY_KIND[kind].input}"


def input_names(config: LlamaConfig) -> list[str]:
    """Every distinct input, in the order in which the forward pass meets them."""
    return list(dict.fromkeys(input_of(name) for name in linear_names(config)))


def shape_of(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(out, in) of a linear layer, of the embedding or of the head."""
    if name in _VOCABULARY:
        return config.vocab_size, config.hidden_size
    return config.shape_of(kind_of(name))


def tensor_names(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, with its shape; no lm_head where the embedding is tied."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for name in linear_names(config):
        out[f"{name}.weight"] = shape_of(config, name)
        if kind_of(name) in config.biases:
            out[f"{name}.bias"] = shape_of(config, name)[:1]
    for i in range(config.num_hidden_layers):
        out |= {f"model.layers.{i}.{norm}.weight": (config.hidden_size,) for norm in config.traits.norms.names}
        for name, size in zip("qk", config.qk_norm_sizes, strict=True):
            if size:
                out[f"model.layers.{i}.self_attn.{name}_norm.weight"] = (size,)
    out["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return out


def parameter_count(config: LlamaConfig) -> int:
    """How many numbers a model of this config holds, a tied head counted once.

    Example:
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> parameter_count(LlamaConfig(**sizes))
        236
    """
    return sum(math.prod(shape) for shape in tensor_names(config).values())
