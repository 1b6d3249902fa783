"""Backbones as a base model, L and R as its LoRA adapter: for PEFT, and for other readers of its adapters.

    W ≈ Q' + B A      Q' = g Uᵀ Q V      lora_B = B = g Uᵀ L diag(s)  (out, rank)      lora_A = A = R V  (rank, in)

All three are in the basis of W, without rotations, and LoRA's own scale, lora_alpha / r, is 1 for every matrix.
"""

from __future__ import annotations

from pathlib import Path

from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.formats.adapter import backbone, common_rank, rank_note, with_rank, write_adapter
from qlr_jax.formats.compressed_tensors import export_compressed_tensors
from qlr_jax.formats.dense import bytes_of, check_type, complete, dense_entries
from qlr_jax.formats.files import INDEX, SHARD_BYTES, staged, with_type, write_json, write_tensors
from qlr_jax.formats.qlr.packed import load, read_config
from qlr_jax.paths import local, output_folder

BASES = ("dense", "compressed-tensors")
SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")  # base and adapter; needs peft
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
HUB_NOTE = (
    "`base_model_name_or_path` in adapter_config.json says where this folder was written: `AutoPeftModelForCausalLM` looks for the "
    "base there, so set it anew where the folder is moved. Before uploading to the hub, set it to the repository's own owner/name: "
    "there, unlike in a local folder, transformers looks for the base by that name too."
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
    lies in `adapter/`, to be attached as the card shows: that is what `export_compressed_tensors` writes.

    Args:
        out: a packed folder.
        dest: the folder to write; new or empty.
        base: "dense" (Q decoded), or "compressed-tensors" (Q as packed integers, where all backbones are such).
        dtype: of the base's plain weights and of the adapter: bfloat16, float16 or float32.
        uniform_rank: pad every rank with zeros to one of UNIFORM_RANKS, for readers that take one rank for all.
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
    out, dest = local(out), output_folder(dest, sources=[out])
    raw, quantization = read_config(out)
    if not any(Spec.parse(entry.get("spec", "bf16")).rank for entry in quantization.get("matrices", {}).values()):
        raise QLRError(f"no matrix of {out} has a rank, so there is no adapter to write; export it as {' or '.join(BASES)}")
    if base == "compressed-tensors":
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
        size = bytes_of(entries) + write_adapter(folder, ranked, dtype, common, base=str(dest.absolute()))
        notes = [f"Base and adapter are in {dtype}. The base alone, without peft, is another and worse model.", HUB_NOTE]
        notes += [rank_note(ranked, common)]
        complete(folder, out, with_type(raw, dtype), target="peft", snippet=SNIPPET, notes=notes, size=size)
    return dest
