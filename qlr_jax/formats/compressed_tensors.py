"""The compressed-tensors folder: integer backbones as packed int32, for vLLM and transformers; factors as an adapter inside it.

    weight_packed  int32 (out, ⌈in·b / 32⌉)   u of every weight, a little-endian bit stream along a row
    weight_scale   (out, groups)              g · scale, in float16 where that is exact, else in float32
    weight_shape   int64 (2,)                 out, in                  weight = weight_scale · (u − 2^(b−1))

The scales are kept exactly whatever `dtype` is: g is a power of two, so g · scale is a float16 number unless it leaves the range.
Readers cast them to the model's type. A float16 or float32 model is then exact; bfloat16 rounds every scale by up to 2^-9.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.formats.adapter import backbone, common_rank, rank_note, with_rank, write_adapter
from qlr_jax.formats.checksums import write_checksums
from qlr_jax.formats.dense import SNIPPET, bytes_of, check_type, complete, dense_entries
from qlr_jax.formats.files import SHARD_BYTES, Entry, staged, with_type, write_tensors
from qlr_jax.formats.qlr.packed import load, read_config
from qlr_jax.formats.targets import CT_INTEGERS, Target, find_target
from qlr_jax.models import is_linear, kind_of, layer_of
from qlr_jax.models.sites import BY_KIND
from qlr_jax.paths import local, output_folder

FORMAT = "pack-quantized"
ADAPTER = "adapter"  # a folder of its own: beside the model, transformers would attach it before the integers are decoded
ADAPTER_SNIPPET = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
model.hf_quantizer.compressor.decompress_model(model)  # before the adapter, which wraps plain linear layers
model = PeftModel.from_pretrained(model, folder, subfolder="adapter")
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def export_compressed_tensors(
    out: str | Path,
    dest: str | Path,
    *,
    dtype: str = "bfloat16",
    uniform_rank: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a packed folder of plain integers as a compressed-tensors model; its factors go to `adapter/`, a LoRA adapter.

    Args:
        out: a packed folder whose backbones are `int-b` of 2, 3, 4, 8 bits, symmetric, unrotated, in groups of 32, 64, 128 or
            a row, or bf16 (`TARGETS["compressed-tensors"]`); they may differ from matrix to matrix.
        dest: the folder to write; new or empty.
        dtype: of what is no integer (embeddings, norms, head, bf16 matrices, adapter): bfloat16, float16 or float32.
        uniform_rank: as for `export_peft`.
        shard_bytes: tensors of more bytes than this are split into shards with an index.

    Returns:
        `dest`.

    Raises:
        QLRError: a backbone that the format cannot represent, with those that it can; no integer at all; and all that
            `export_dense` raises. Nothing is then written.
    """
    check_type(dtype)
    out, dest = local(out), output_folder(dest, sources=[out])
    raw, _ = read_config(out)
    model = load(out)
    values = {name: param.get_value() for name, param in model.tensors().items()}
    target = find_target("compressed-tensors")
    packed = _integers(values, target)
    if not packed:
        raise QLRError(f"no matrix of {out} holds integers, so there is nothing to pack; export it as dense")
    ranked = with_rank(values)
    common = common_rank(ranked, uniform_rank)
    arrays = {name: pack(matrix) for name, matrix in packed.items()}
    schemes = {name: matrix.spec.backbone for name, matrix in packed.items()}
    plain = [name for name in model.linears() if name not in packed]
    config = with_type(raw, dtype) | {"quantization_config": quantization_config(schemes, plain)}

    with staged(dest) as folder:
        entries: dict[str, Entry] = {}
        for name, value in values.items():
            linear = name.removesuffix(".weight")
            entries |= packed_entries(linear, arrays[linear]) if linear in packed else dense_entries({name: backbone(value)}, dtype)
        write_tensors(folder, entries, shard_bytes)
        size = bytes_of(entries)
        if ranked:
            (folder / ADAPTER).mkdir()
            size += write_adapter(folder / ADAPTER, ranked, dtype, common)
            write_checksums(folder / ADAPTER)
        wide = sum(own["weight_scale"].dtype == np.float32 for own in arrays.values())
        notes = _integer_notes(dtype, schemes, wide) + (_adapter_notes(ranked, common) if ranked else [])
        notes += _tie_notes({**schemes, **dict.fromkeys(plain, dtype)}, target.ties)
        snippet = ADAPTER_SNIPPET if ranked else SNIPPET
        complete(folder, out, config, target="compressed-tensors", snippet=snippet, notes=notes, size=size)
    return dest


def _integers(values: Mapping[str, Any], target: Target) -> dict[str, QLRMatrix]:
    """Linear layer's name -> its matrix, for those with an integer backbone; QLRError for one that the format cannot represent.

    A packed embedding or head is none of them: it is decoded.
    """
    named = {name.removesuffix(".weight"): value for name, value in values.items()}
    matrices = {name: value for name, value in named.items() if isinstance(value, QLRMatrix) and is_linear(name)}
    for name, matrix in matrices.items():
        target.check(name, matrix.spec, matrix.shape)
    return {name: matrix for name, matrix in matrices.items() if matrix.spec.backbone in CT_INTEGERS}


def pack(matrix: QLRMatrix) -> dict[str, np.ndarray]:
    """The three arrays of the format, by their names, of the backbone of an integer matrix.

    Example:
        >>> import numpy as np, qlr_jax as qlr
        >>> arrays = pack(qlr.solve(np.eye(32, dtype=np.float32), None, "int-3g32").value)
        >>> {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        {'weight_packed': ('int32', (32, 3)), 'weight_scale': ('float16', (32, 1)), 'weight_shape': ('int64', (2,))}
    """
    part = matrix.part("backbone")
    # the bit stream of the packed folder in whole words; a row's unused bits are zero
    codes = np.asarray(part["codes"])
    words = np.ascontiguousarray(np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))).view("<i4")
    exact = np.asarray(part["scales"]).astype(np.float32) * np.asarray(matrix.arrays["scale"])
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    scale = half if np.array_equal(half.astype(np.float32), exact) else exact
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": np.array(matrix.shape, np.int64)}


def packed_entries(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """Tensors to write for an integer matrix: the arrays that `pack` made."""
    return {f"{name}.{key}": (array.nbytes, lambda array=array: array) for key, array in arrays.items()}


def quantization_config(schemes: Mapping[str, str], plain: Sequence[str]) -> dict[str, Any]:
    """config.json's quantization_config: a group a distinct scheme, its matrices by name; everything else is ignored.

    Args:
        schemes: linear layer's name -> its integer backbone.
        plain: names of the linear layers that are stored as they are.

    Example:
        >>> config = quantization_config({"a": "int-4g32", "b": "int-8", "c": "int-4g32"}, ["d"])
        >>> {name: (group["targets"], group["weights"]["num_bits"]) for name, group in config["config_groups"].items()}
        {'group_0': (['a', 'c'], 4), 'group_1': (['b'], 8)}
        >>> config["ignore"]
        ['d', 'lm_head']
    """
    groups = {}
    for i, scheme in enumerate(dict.fromkeys(schemes.values())):
        groups[f"group_{i}"] = {
            "targets": [name for name, own in schemes.items() if own == scheme],
            "weights": weight_arguments(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*plain, "lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def weight_arguments(scheme: str) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of an integer backbone.

    Example:
        >>> weight_arguments("int-3g64")["strategy"], weight_arguments("int-8")["strategy"]
        ('group', 'channel')
    """
    width, group = CT_INTEGERS[str(Spec.parse(scheme))]
    spread = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    return {"num_bits": width, "type": "int", "symmetric": True, **spread, "dynamic": False, "actorder": None}


def split_ties(schemes: Mapping[str, str], ties: Sequence[Sequence[str]]) -> list[str]:
    """The tied matrices of a layer whose schemes differ, a sentence each.

    Args:
        schemes: linear layer's name -> its scheme, integer or not.
        ties: groups of patterns of names that must share one.

    Example:
        >>> names = {f"model.layers.3.self_attn.{kind}_proj": "int-8" for kind in "qkv"}
        >>> split_ties(names | {"model.layers.3.self_attn.k_proj": "plain"}, [("*q_proj", "*k_proj", "*v_proj")])
        ['layer 3: q_proj int-8, k_proj plain, v_proj int-8']
    """
    found: dict[tuple[int, int], dict[str, str]] = {}
    for name, scheme in schemes.items():
        for i, tie in enumerate(ties):
            if any(fnmatchcase(name, pattern) for pattern in tie):
                found.setdefault((layer_of(name), i), {})[BY_KIND[kind_of(name)].name] = scheme
    return [
        f"layer {layer}: " + ", ".join(f"{part} {scheme}" for part, scheme in parts.items())
        for (layer, _), parts in found.items()
        if len(set(parts.values())) > 1
    ]


def _integer_notes(dtype: str, schemes: Mapping[str, str], wide: int) -> list[str]:
    counts = Counter(schemes.values())
    notes = [
        "Integers: " + ", ".join(f"{scheme} × {count}" for scheme, count in counts.items()) + f"; everything else is {dtype}.",
        "Scales are stored exactly, in float16" + (f", and in float32 for {wide} matrices beyond its range" if wide else "") + ". "
        "Readers cast them to the model's type: bfloat16 rounds each by up to one part in 512, float16 and float32 keep those "
        "that are stored so.",
    ]
    if len(counts) > 1:
        notes.append("Leave `dequantize=True` out: transformers up to 5.24 then reads every matrix by the first scheme.")
    return notes


def _adapter_notes(ranked: Mapping[str, QLRMatrix], common: int) -> list[str]:
    attach = "`from_pretrained` alone loads the integers, which is another and worse model: attach the adapter as above."
    return [attach, rank_note(ranked, common)]


def _tie_notes(schemes: Mapping[str, str], ties: Sequence[Sequence[str]]) -> list[str]:
    split = split_ties(schemes, ties)
    if not split:
        return []
    more = f", and {len(split) - 1} more" if len(split) > 1 else ""
    return [
        "vLLM runs q, k, v as one matrix, and gate, up as one, and wants one scheme for each. Here they differ, so it will not "
        f"load this folder; transformers does ({split[0]}{more}). `qlr compress --target compressed-tensors` ties them."
    ]
