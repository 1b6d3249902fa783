"""L and R as a LoRA adapter beside their backbones: two halves of one model, for PEFT and for what reads its adapters.

    W ≈ Q' + B A      Q' = g Uᵀ Q V      lora_B = B = g Uᵀ L diag(s)  (out, rank)      lora_A = A = R V  (rank, in)

No rotation is left in any of them, and LoRA's own scale, lora_alpha / r, is 1 for every matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.errors import QLRError
from qlr_jax.export.card import CARD, card_text
from qlr_jax.export.dense import bytes_of, check_type, decoded, dense_entries, with_type
from qlr_jax.export.files import SHARD_BYTES, copy_companions, refuse_occupied, staged, write_checksums, write_json, write_tensors
from qlr_jax.export.packed import load, read_config

BASES = ("dense", "compressed-tensors")
UNIFORM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as its --max-lora-rank
WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"
SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")  # base and adapter; needs peft
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
HUB_NOTE = (
    "Before uploading to the hub, set `base_model_name_or_path` in adapter_config.json to the repository's own owner/name: "
    "there, unlike in a local folder, transformers looks for the base by that name."
)


def export_peft(
    out: str | Path,
    dest: str | Path,
    *,
    base: str = "dense",
    dtype: str = "bfloat16",
    uniform_rank: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a packed folder as a base model, Q alone, and a LoRA adapter, L and R, both in one folder.

    With the dense base, `AutoModelForCausalLM.from_pretrained(dest)` loads both. With the compressed-tensors base the adapter
    lies in `adapter/`, to be attached as the card says (`export_compressed_tensors`, which this then is).

    Args:
        out: a packed folder.
        dest: the folder to write; new or empty.
        base: "dense" (Q decoded), or "compressed-tensors" (Q as packed integers, where it can hold them).
        dtype: of the base's plain weights and of the adapter: bfloat16, float16 or float32.
        uniform_rank: pad every rank with zeros to one of UNIFORM_RANKS, for readers that know one rank for all.
        shard_bytes: tensors of more bytes than this are split into shards.

    Returns:
        `dest`.

    Raises:
        QLRError: no matrix of `out` has a rank, a rank beyond the largest uniform one, and all that `export_dense` and
            `export_compressed_tensors` raise; nothing is then written.
    """
    check_type(dtype)
    if base not in BASES:
        raise QLRError(f"base {base!r} is not offered; pass one of {', '.join(BASES)}")
    out, dest = Path(out).expanduser(), Path(dest).expanduser()
    raw, quantization = read_config(out)
    refuse_occupied(dest)
    if not any("+r" in entry.get("spec", "") for entry in quantization.get("matrices", {}).values()):
        raise QLRError(f"no matrix of {out} has a rank, so there is no adapter to write; export it as {' or '.join(BASES)}")
    if base == "compressed-tensors":
        from qlr_jax.export.compressed_tensors import export_compressed_tensors  # it writes its adapter with this module

        return export_compressed_tensors(out, dest, dtype=dtype, uniform_rank=uniform_rank, shard_bytes=shard_bytes)
    values = {name: param.get_value() for name, param in load(out).tensors().items()}
    ranked = with_rank(values)
    common = common_rank(ranked, uniform_rank)
    with staged(dest) as folder:
        entries = dense_entries({name: backbone(value) for name, value in values.items()}, dtype)
        write_tensors(folder, entries, shard_bytes)
        if not (folder / INDEX).exists():
            # vLLM reads every safetensors file of a folder that has no index, the adapter's too
            weights = {"weight_map": dict.fromkeys(entries, "model.safetensors")}
            write_json(folder / INDEX, {"metadata": {"total_size": bytes_of(entries)}, **weights})
        size = bytes_of(entries) + write_adapter(folder, ranked, dtype, common)
        copy_companions(out, folder)
        write_json(folder / "config.json", with_type(raw, dtype))
        notes = [f"Base and adapter are in {dtype}. The base alone, without peft, is another and worse model.", HUB_NOTE]
        notes += [rank_note(ranked, common)]
        card = card_text(out, target="peft", snippet=SNIPPET, notes=notes, size=size)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_checksums(folder)
    return dest


def with_rank(values: Mapping[str, Any]) -> dict[str, QLRMatrix]:
    """Linear layer's name -> its matrix, of those tensors that have factors."""
    return {name.removesuffix(".weight"): v for name, v in values.items() if isinstance(v, QLRMatrix) and v.spec.rank}


def backbone(value: Any) -> Any:
    """What a base holds of a tensor: Q' of a matrix with factors (zeros where it is factors alone), else the tensor itself."""
    if not isinstance(value, QLRMatrix) or not value.spec.rank:
        return value
    return np.broadcast_to(np.float32(0), value.shape) if value.spec.backbone == "none" else value.without_factors()


def common_rank(ranked: Mapping[str, QLRMatrix], uniform: bool) -> int:
    """The least of UNIFORM_RANKS that holds every matrix's rank; 0 where ranks stay as they are.

    Raises:
        QLRError: none does.
    """
    if not uniform or not ranked:
        return 0
    name, most = max(((name, matrix.spec.rank) for name, matrix in ranked.items()), key=lambda pair: pair[1])
    if most > UNIFORM_RANKS[-1]:
        raise QLRError(f"{name} has rank {most}, and the largest uniform rank is {UNIFORM_RANKS[-1]}; leave uniform_rank out")
    return next(rank for rank in UNIFORM_RANKS if rank >= most)


def write_adapter(folder: Path, ranked: Mapping[str, QLRMatrix], dtype: str, common: int = 0) -> int:
    """Write adapter_config.json and adapter_model.safetensors: the bytes of its tensors.

    Args:
        folder: an existing folder.
        ranked: linear layer's name -> its matrix, each with a rank.
        dtype: of the tensors.
        common: the rank to which zeros pad; 0 for each its own.
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
    write_json(folder / CONFIG, adapter_config({name: common or matrix.spec.rank for name, matrix in ranked.items()}))
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
    """What the card says of the adapter's ranks."""
    ranks = sorted({matrix.spec.rank for matrix in ranked.values()})
    if common:
        return f"Every rank is padded with zeros to {common}: vLLM takes it with `--max-lora-rank {common}`."
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks of {ranks[0]} to {ranks[-1]}"
    return f"The adapter holds {said} on {len(ranked)} matrices; LoRA's scale is 1 on each of them."
