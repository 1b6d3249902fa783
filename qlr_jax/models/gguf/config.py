"""GGUF metadata as the content of config.json; refuses what it does not know. Keys: github.com/ggml-org/ggml, docs/gguf.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.models.families import FAMILIES, UNSUPPORTED
from qlr_jax.models.gguf.file import GGUF
from qlr_jax.models.gguf.rope import llama3_scaling

ARCHITECTURES = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "gemma", "olmo2")}
"""llama.cpp's name of an architecture -> family; Mistral's models are llama there."""

SHAPES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
USED = {
    *SHAPES, "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size",
}  # fmt: skip
# Keys that change no logit with these values; any other value, and any other key of the architecture, is refused.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
IDS = {"bos_token_id": "bos", "pad_token_id": "padding"}
ENDS = ("eos", "eot", "eom")  # all end a text
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}  # by the tokenizer's model: what llama.cpp takes where none is named


def config_json(file: GGUF) -> dict[str, Any]:
    """What config.json would say of the model in a GGUF file.

    Raises:
        QLRError: an architecture, a key or a value that is not supported, or one that is missing; names it.
    """
    family = ARCHITECTURES.get(file.architecture)
    if family is None:
        why = UNSUPPORTED.get(file.architecture.replace("-", "_"))
        found = f"architecture {file.architecture!r} is not supported{f': {why}' if why else ''}"
        raise QLRError(f"{file.path}: {found}; known are {', '.join(ARCHITECTURES)}")
    _refuse(file)
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config["hidden_act"] = family.activation
    config |= {ours: _whole(file, theirs) for theirs, ours in SHAPES.items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = _whole(file, "attention.head_count_kv", heads)
    config["head_dim"] = _whole(file, "attention.key_length", hidden // max(heads, 1))
    config["vocab_size"] = _rows(file, "token_embd.weight")
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["rms_norm_eps"] = _number(file, "attention.layer_norm_rms_epsilon")
    config["rope_theta"] = _number(file, "rope.freq_base", 10000.0)
    scaling = _rope_scaling(file, config["rope_theta"])
    if scaling:
        config["rope_scaling"] = scaling
    _check(file, config)
    present = {name.split(".")[-2] for name in file.tensors if name.endswith(".bias")}
    biases = {"attention_bias": {"attn_q", "attn_k", "attn_v", "attn_output"}, "mlp_bias": {"ffn_gate", "ffn_up", "ffn_down"}}
    config |= {name: bool(present & theirs) for name, theirs in biases.items() if name in family.switches}
    config |= {name: values[0] for name, values in family.only.items()}
    return config | token_ids(file) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def token_ids(file: GGUF) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id; several ids that end a text are a list, as config.json has them."""
    found: dict[str, Any] = {name: token_id(file, key) for name, key in IDS.items()}
    ends = list(dict.fromkeys(i for key in ENDS if (i := token_id(file, key)) is not None))
    found["eos_token_id"] = None if not ends else ends[0] if len(ends) == 1 else ends
    return {name: value for name, value in found.items() if value is not None or name != "pad_token_id"}


def token_id(file: GGUF, name: str) -> int | None:
    """The id of a special token: "bos", "eos", "unknown", "padding"; None where the model has none."""
    default = DEFAULT_IDS.get(str(file.keys.get("tokenizer.ggml.model")), {}).get(name)
    value = file.keys.get(f"tokenizer.ggml.{name}_token_id", default)
    tokens = file.keys.get("tokenizer.ggml.tokens")
    # llama.cpp too passes by an id that no token has; files write 2³² − 1 for "none".
    return None if value is None or not 0 <= int(value) < (len(tokens) if tokens else 2**31) else int(value)


def _refuse(file: GGUF) -> None:
    """Fail closed: every key of the architecture is used, or has a value that changes nothing."""
    prefix = f"{file.architecture}."
    for key, value in file.keys.items():
        if not key.startswith(prefix) or (short := key.removeprefix(prefix)) in USED:
            continue
        if short == "expert_count" and value:
            raise QLRError(f"{file.path}: {key} is {value}: {UNSUPPORTED['mixtral']}")
        if short not in HARMLESS:
            raise QLRError(f"{file.path}: metadata {key!r} ({value!r}) is unknown, so the model cannot be imported faithfully")
        if value not in HARMLESS[short]:
            raise QLRError(f"{file.path}: metadata {key!r} is {value!r}; only {HARMLESS[short][0]!r} is supported")


def _check(file: GGUF, config: dict[str, Any]) -> None:
    """What must agree with the config, because nothing else is computed."""
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(file, key, config["head_dim"]) != config["head_dim"]:
            found = f"{key} is {file.get(key)!r} in heads of {config['head_dim']}"
            raise QLRError(f"{file.path}: {found}; only models that have the same number for both are supported")
    window = file.get("attention.sliding_window")
    if window and window < config["max_position_embeddings"]:
        raise QLRError(
            f"{file.path}: attention.sliding_window is {window}, below the context of {config['max_position_embeddings']}; "
            "llama.cpp computes this architecture without one, so give the original folder, which says what is meant"
        )


def _rope_scaling(file: GGUF, theta: float) -> dict[str, Any] | None:
    """Of all frequencies by one factor, or by the divisors in rope_freqs.weight, which are all that a file keeps of llama3's."""
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 1.0
    kind = file.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise QLRError(f"{file.path}: rope.scaling.type is {kind!r}; only linear, and llama3's by rope_freqs.weight, are supported")
    plain = None if kind == "none" or factor == 1 else {"rope_type": kind, "factor": _exact(factor)}
    stored = file.tensors.get("rope_freqs.weight")
    if stored is None:
        return plain
    divisors = np.fromfile(stored.path, np.float32, stored.nbytes // 4, offset=stored.offset)
    if stored.kind != "F32" or not np.isfinite(divisors).all():
        raise QLRError(f"{file.path}: rope_freqs.weight is no tensor of finite float32 numbers; get the file again")
    try:
        scaling = llama3_scaling(divisors, theta)
    except QLRError as error:
        raise QLRError(f"{file.path}: {error}") from None
    if plain and scaling:
        raise QLRError(f"{file.path}: rope.scaling.type is {kind!r}, and rope_freqs.weight scales again; only one is supported")
    return scaling or plain


def _whole(file: GGUF, key: str, default: int | None = None) -> int:
    value = file.get(key, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise QLRError(f"{file.path}: {key} differs from layer to layer; only models whose layers are alike are supported")
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise QLRError(f"{file.path}: metadata {file.architecture}.{key} is {value!r}; a whole number is needed")
    return value


def _number(file: GGUF, key: str, default: float | None = None) -> float:
    value = file.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise QLRError(f"{file.path}: metadata {file.architecture}.{key} is {value!r}; a number is needed")
    return _exact(value)


def _exact(value: float) -> float:
    """The shortest number with the same float32, since that is what was stored: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rows(file: GGUF, name: str) -> int:
    if name not in file.tensors:
        raise QLRError(f"{file.path} lacks tensor {name}; give the GGUF file of a whole model")
    return file.tensors[name].shape[0]
