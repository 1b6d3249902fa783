"""L and R as a LoRA adapter: which matrices have one, at which ranks, and its two files.

lora_B = B = g Uᵀ L diag(s)  (out, rank)      lora_A = A = R V  (rank, in)      lora_alpha / r = 1
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.errors import QLRError
from qlr_jax.formats.dense import decoded
from qlr_jax.formats.files import write_json

UNIFORM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as its --max-lora-rank
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_rank(values: Mapping[str, Any]) -> dict[str, QLRMatrix]:
    """Linear layer's name -> its matrix, for those tensors that have factors."""
    return {name.removesuffix(".weight"): v for name, v in values.items() if isinstance(v, QLRMatrix) and v.spec.rank}


def backbone(value: Any) -> Any:
    """A tensor as the base model has it: Q' of a matrix with factors (zeros where it is factors only), else the tensor itself."""
    if not isinstance(value, QLRMatrix) or not value.spec.rank:
        return value
    return np.broadcast_to(np.float32(0), value.shape) if value.spec.quantizer().empty else value.without_factors()


def common_rank(ranked: Mapping[str, QLRMatrix], uniform: bool) -> int:
    """The least of UNIFORM_RANKS that no matrix's rank exceeds; 0 where ranks stay as they are.

    Args:
        ranked: linear layer's name -> its matrix, each with a rank.
        uniform: whether one rank is wanted for all.

    Raises:
        QLRError: a rank exceeds the largest of them.
    """
    if not uniform or not ranked:
        return 0
    name, most = max(((name, matrix.spec.rank) for name, matrix in ranked.items()), key=lambda pair: pair[1])
    if most > UNIFORM_RANKS[-1]:
        raise QLRError(f"{name} has rank {most}, and the largest uniform rank is {UNIFORM_RANKS[-1]}; leave uniform_rank out")
    return next(rank for rank in UNIFORM_RANKS if rank >= most)


def write_adapter(folder: Path, ranked: Mapping[str, QLRMatrix], dtype: str, common: int = 0, base: str | None = None) -> int:
    """Write adapter_config.json and adapter_model.safetensors; returns the bytes of the tensors.

    Args:
        folder: an existing folder.
        ranked: linear layer's name -> its matrix, each with a rank.
        dtype: of the tensors.
        common: the rank that all are padded to with zeros; 0 leaves each its own.
        base: where the base model is, for tools that look it up there; None: it is not said.
    """
    import ml_dtypes  # noqa: F401  numpy learns bfloat16
    from safetensors.numpy import save_file

    tensors = {}
    for name, matrix in ranked.items():
        left, right = matrix.unrotated_factors()
        missing = max(common - matrix.spec.rank, 0)
        pairs = {"lora_A": np.pad(right, ((0, missing), (0, 0))), "lora_B": np.pad(left, ((0, 0), (0, missing)))}
        for part, value in pairs.items():
            key = f"base_model.model.{name}.{part}.weight"
            tensors[key] = np.ascontiguousarray(decoded(key, value, dtype))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    ranks = {name: common or matrix.spec.rank for name, matrix in ranked.items()}
    write_json(folder / CONFIG, adapter_config(ranks) | {"base_model_name_or_path": base})
    return sum(array.nbytes for array in tensors.values())


def adapter_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json of a LoRA with these ranks.

    alpha_pattern repeats rank_pattern: without it PEFT scales a matrix of rank k by lora_alpha / k.

    Example:
        >>> config = adapter_config({"a": 8, "b": 2, "c": 8})
        >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]
        (8, 8, {'b': 2}, {'b': 2})
    """
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def rank_note(ranked: Mapping[str, QLRMatrix], common: int) -> str:
    """A sentence for the card on the adapter's ranks."""
    ranks = sorted({matrix.spec.rank for matrix in ranked.values()})
    if common:
        return f"Every rank is padded with zeros to {common}: vLLM takes it with `--max-lora-rank {common}`."
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks of {ranks[0]} to {ranks[-1]}"
    return f"The adapter has {span} on {len(ranked)} matrices; LoRA's scale is 1 on each of them."
