"""Names, shards, and what is refused: pure Python, so that it is tested without vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlr_jax.errors import QLRError

SWITCH = "QLR_VLLM"  # an environment variable
PACKED, DEQUANTIZE = "packed", "dequantize"  # its values

# What auto_map calls a packed class -> transformers' class, by which vLLM knows the architecture; the runtime has the same names.
ARCHITECTURES = {
    "QLRForCausalLM": "LlamaForCausalLM",
    "QLRMistralForCausalLM": "MistralForCausalLM",
    "QLRQwen2ForCausalLM": "Qwen2ForCausalLM",
    "QLRQwen3ForCausalLM": "Qwen3ForCausalLM",
    "QLRGemmaForCausalLM": "GemmaForCausalLM",
    "QLROlmo2ForCausalLM": "Olmo2ForCausalLM",
}


def decodes_at_load(switch: str | None, in_config: bool, on_processor: bool) -> bool:
    """Whether matrices are decoded once, while they load.

    Args:
        switch: the value of QLR_VLLM; None or empty: not set.
        in_config: `dequantize` of the folder's config.json.
        on_processor: the product with packed matrices is fast on a processor only, so elsewhere it has to be asked for.

    Raises:
        QLRError: for any other value of the switch.

    Example:
        >>> decodes_at_load(None, False, True), decodes_at_load(None, False, False), decodes_at_load("packed", True, False)
        (False, True, False)
    """
    if switch and switch not in (PACKED, DEQUANTIZE):
        raise QLRError(f"{SWITCH} is {switch!r}; set it to {PACKED} or {DEQUANTIZE}, or leave it out")
    return switch == DEQUANTIZE if switch else in_config or not on_processor


def stored_names(layer: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of a folder's matrices, one below the other in a layer of vLLM.

    Args:
        layer: its name in vLLM.
        fused: last part of a fused layer's name -> those of the layers that it is made of.

    Example:
        >>> stored_names("model.layers.0.mlp.gate_up_proj", {"gate_up_proj": ["gate_proj", "up_proj"]})
        ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
        >>> stored_names("lm_head", {})
        ['lm_head']
    """
    parent, dot, last = layer.rpartition(".")
    return [f"{parent}{dot}{part}" for part in fused.get(last, [last])]


def shard_position(shard: str | int | None, names: Sequence[str]) -> int:
    """Which of a layer's matrices vLLM means.

    Args:
        shard: vLLM's mark on a tensor: "q", "k" or "v", a number, or None where a layer is one matrix.
        names: of the layer's matrices.

    Raises:
        QLRError: for a mark that this layer does not have.

    Example:
        >>> shard_position("k", ["q_proj", "k_proj", "v_proj"]), shard_position(1, ["gate_proj", "up_proj"])
        (1, 1)
    """
    position = {"q": 0, "k": 1, "v": 2}.get(shard) if isinstance(shard, str) else shard
    if position is None and shard is None and len(names) == 1:
        return 0
    if not isinstance(position, int) or not 0 <= position < len(names):
        raise QLRError(f"a tensor is marked as shard {shard!r} of {', '.join(names)}, and there is none; export the folder again")
    return position


def stored_entry(matrices: Mapping[str, dict], name: str) -> dict | None:
    """How a matrix is packed, as config.json has it; None where it is stored as a plain weight."""
    entry = matrices.get(name)
    return None if entry is None or entry["spec"] == "bf16" else entry


def embedding_name(layer: str, matrices: Mapping[str, dict]) -> str:
    """The name of an embedding in the folder: vLLM's Llama makes it without one.

    Example:
        >>> embedding_name("", {"model.embed_tokens": {}, "model.layers.0.mlp.up_proj": {}})
        'model.embed_tokens'
    """
    return layer or next((name for name in matrices if name.rpartition(".")[2] == "embed_tokens"), "model.embed_tokens")


def check_run(tensor: int, pipeline: int, lora: bool, decoded: bool) -> None:
    """Refuse what packed layers cannot do.

    Args:
        tensor, pipeline: over how many processes a matrix, or the layers, are split.
        lora: whether adapters are to be loaded.
        decoded: whether matrices are decoded at load.

    Raises:
        QLRError: says which, and what to do.
    """
    if tensor > 1 or pipeline > 1:
        asked = f"tensor_parallel_size={tensor}, pipeline_parallel_size={pipeline}"
        raise QLRError(f"a qlr folder is served by one process, not with {asked}; set both to 1, or qlr export it --to dense")
    if lora and not decoded:
        raise QLRError(f"adapters need dense weights beside them; set {SWITCH}={DEQUANTIZE}, or leave enable_lora out")


def check_used(matrices: Mapping[str, dict], used: set[str], model: str) -> None:
    """Refuse a model that leaves packed matrices out.

    Args:
        matrices: as config.json has them.
        used: names of those that a layer asked for.
        model: what vLLM runs, for the message.

    Raises:
        QLRError: names one that no layer asked for.
    """
    left = sorted(name for name in matrices if stored_entry(matrices, name) and name not in used)
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise QLRError(f"vLLM's {model} has no layer for {left[0]}{more}, which is packed; qlr export the folder --to dense")
