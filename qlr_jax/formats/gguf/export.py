"""GGUF for llama.cpp: model.gguf holds every backbone bit for bit, adapter.gguf the factors as a LoRA.

    y = W₀ x + L'(R' x)      W₀ = g·Q as blocks, L' = g·L diag(s), R' = R

Format: github.com/ggml-org/ggml, docs/gguf.md; the llama architecture: github.com/ggml-org/llama.cpp, src/models/llama.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.packing import unpack_stream
from qlr_jax.errors import QLRError
from qlr_jax.formats.card import CARD, card_text
from qlr_jax.formats.files import refuse_occupied, staged, write_checksums
from qlr_jax.formats.gguf.blocks import fold_scale, pack_blocks
from qlr_jax.formats.gguf.container import Tensor, adapter_keys, model_keys, package, write_gguf
from qlr_jax.formats.gguf.tokenizer import Vocabulary, read_vocabulary
from qlr_jax.formats.qlr.packed import load, read_config
from qlr_jax.formats.targets import TARGETS, gguf_type
from qlr_jax.models import Llama, LlamaConfig, parts_of
from qlr_jax.models.llama import frequencies
from qlr_jax.progress import Progress, silent

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LINEARS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
SNIPPET = """
import xllamacpp  # pip install xllamacpp; or without Python: llama-cli -m model.gguf{flag}

params = xllamacpp.CommonParams()
params.model.path = "model.gguf"{adapter}
server = xllamacpp.Server(params)
print(server.handle_completions({{"prompt": "Hello", "max_tokens": 16}}))
"""
SNIPPET_ADAPTER = """
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("adapter.gguf", 1.0)]"""
# llama.cpp's own programs stop where there is no vocabulary; those that call llama_decode by themselves need none.
SNIPPET_NO_VOCABULARY = """
from gguf import GGUFReader  # pip install gguf; run it with a program of your own on llama.h, which gives llama_decode token ids

print([tensor.name for tensor in GGUFReader("model.gguf").tensors])
"""


def export_gguf(out: str | Path, dest: str | Path, *, dtype: str = "bfloat16", progress: Progress | None = None) -> Path:
    """Write a packed folder for llama.cpp: model.gguf, adapter.gguf where a matrix has factors, README.md, checksums.json.

    Backbones int-4g32, int-8g32, int-2g256, int-3g256 become Q4_0, Q8_0, Q2_K, Q3_K blocks with the same numbers, g folded
    into their scales; bf16 stays BF16. Factors are a LoRA of scale 1, BF16 where that is exact and F32 elsewhere.

    Args:
        out: a packed folder.
        dest: the folder to write; new or empty.
        dtype: of embedding and head, one of bfloat16, float16, float32; norms are float32 always.
        progress: where to tell how far it is, and what the card notes on the tokenizer.

    Returns:
        `dest`.

    Raises:
        QLRError: the gguf package is missing; `out` cannot be loaded; a spec that GGUF cannot hold exactly, or a block's scale;
            an unknown dtype; `dest` holds something. Nothing is then written.
    """
    if dtype not in TYPES:
        raise QLRError(f"dtype {dtype!r} is not offered; pass one of {', '.join(TYPES)}")
    package()
    out, dest = Path(out).expanduser(), Path(dest).expanduser()
    refuse_occupied(dest)
    base = read_config(out)[1].get("settings", {}).get("base_model")
    told = progress or silent()
    model = load(out)
    tensors, factors = model_tensors(model, TYPES[dtype]), adapter_tensors(model)
    vocabulary = read_vocabulary(out, model.config)
    names = {"name": Path(base).name if base else "Llama", "base": base and Path(base).name}
    with staged(dest) as folder:
        write_gguf(folder / MODEL, model_keys(model.config, tensors, vocabulary, **names), tensors, told)
        if factors:
            write_gguf(folder / ADAPTER, adapter_keys(**names), factors, told)
        size = sum(path.stat().st_size for path in folder.iterdir())
        notes = (*_notes(tensors, factors), *vocabulary.notes)
        text = card_text(out, target="gguf", snippet=snippet(bool(factors), vocabulary), notes=notes, size=size)
        (folder / CARD).write_text(text, encoding="utf-8")
        write_checksums(folder)
    for note in vocabulary.notes:
        told.say(note)
    return dest


def model_tensors(model: Llama, plain: str) -> dict[str, Tensor]:
    """Every tensor of model.gguf by GGUF's name; `plain` is the type of embedding and head.

    Raises:
        QLRError: a spec that GGUF has no blocks for, naming the matrix; bytes are made, and may be refused, only on writing.
    """
    config, linears, found = model.config, model.linears(), {}
    window = config.sliding_window
    if config.family not in ("llama", "mistral") or config.biases or (window and window < config.max_position_embeddings):
        raise QLRError(
            f"a {config.traits.architecture} with what it has beyond a Llama (biases, norms of heads, a sliding window) is not "
            "written as GGUF; export it as dense, and convert that"
        )
    for name, param in model.tensors().items():
        value, linear = param.get_value(), name.removesuffix(".weight")
        if linear in linears:
            kind = "BF16"
            if isinstance(value, QLRMatrix):
                TARGETS["gguf"].check(linear, value.spec, value.shape)
                kind = gguf_type(value.spec)
            make = lambda n=linear, v=value: reorder(_backbone(n, v), n, config)  # noqa: E731
        else:
            kind = plain if value.ndim == 2 else "F32"
            make = lambda n=name, v=value, k=kind: plain_rows(n, v, k)  # noqa: E731
        found[gguf_name(name)] = Tensor(kind, tuple(value.shape), make)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        found["rope_freqs.weight"] = Tensor("F32", (config.head_dim // 2,), lambda: plain_rows("", rope_factors(config), "F32"))
    return found


def adapter_tensors(model: Llama) -> dict[str, Tensor]:
    """lora_a = R' (rank, in) and lora_b = L' (out, rank) of every matrix with factors; BF16 where their numbers are."""
    found = {}
    for name, linear in model.linears().items():
        value = linear.weight.get_value()
        if not isinstance(value, QLRMatrix) or not value.spec.rank:
            continue
        for part in "ab":
            make = lambda n=name, v=value, p=part: _factor(n, v, p, model.config)  # noqa: E731
            factor = make()  # made again on writing, so that one at a time is in memory
            kind = "BF16" if np.array_equal(factor.astype(ml_dtypes.bfloat16).astype(np.float32), factor) else "F32"
            cast = lambda m=make, k=kind: plain_rows("", m(), k)  # noqa: E731
            found[f"{gguf_name(name + '.weight')}.lora_{part}"] = Tensor(kind, factor.shape, cast)
    return found


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor.

    >>> gguf_name("model.layers.3.self_attn.o_proj.weight"), gguf_name("lm_head.weight")
    ('blk.3.attn_output.weight', 'output.weight')
    """
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    if stem.endswith("layernorm"):
        layer, norm = stem.split(".")[2:]
        return f"blk.{layer}.{'attn_norm' if norm == 'input_layernorm' else 'ffn_norm'}.weight"
    layer, kind = parts_of(stem)
    return f"blk.{layer}.{LINEARS[kind]}.weight"


def reorder(rows: np.ndarray, name: str, config: LlamaConfig) -> np.ndarray:
    """Rows (out, anything) of q and k as llama.cpp turns them: pair i of a head is rows 2i and 2i + 1, not i and i + d/2."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(parts_of(name)[1])
    return rows if heads is None else rows.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def plain_rows(name: str, value: Any, kind: str) -> np.ndarray:
    """An array as F32, F16 or BF16; QLRError naming it where float16 is too narrow."""
    array = np.asarray(value, np.float32)
    with np.errstate(over="ignore"):
        cast = array.astype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind])
    if kind == "F16" and not np.isfinite(cast).all():
        raise QLRError(f"{name} reaches {np.abs(array).max():g}, beyond float16; export as bfloat16")
    return cast


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """What llama.cpp divides the rotary frequencies theta^(−2i/d) by, (head_dim / 2,)."""
    return np.asarray(frequencies(replace(config, rope_scaling=None)) / frequencies(config))


def snippet(adapter: bool, vocabulary: Vocabulary) -> str:
    """Python that runs the exported model."""
    if not vocabulary.tokens:
        return SNIPPET_NO_VOCABULARY.strip()
    flag, lines = (f" --lora {ADAPTER}", SNIPPET_ADAPTER) if adapter else ("", "")
    return SNIPPET.format(flag=flag, adapter=lines).strip()


def _factor(name: str, value: QLRMatrix, part: str, config: LlamaConfig) -> np.ndarray:
    """R' (rank, in) where `part` is "a", L' (out, rank) in llama.cpp's order of rows where it is "b"."""
    left, right = value.unrotated_factors()
    return np.asarray(right) if part == "a" else reorder(np.asarray(left), name, config)


def _backbone(name: str, value: Any) -> np.ndarray:
    """Rows of g·Q: blocks, or bf16."""
    if not isinstance(value, QLRMatrix):
        return plain_rows(name, value, "BF16")
    kind, part, scale = gguf_type(value.spec), value.part("backbone"), float(value.arrays["scale"][0])
    if kind == "BF16":
        array = np.asarray(value.backbone(), np.float32)
        cast = array.astype(ml_dtypes.bfloat16)
        if not np.array_equal(cast.astype(np.float32), array):
            raise QLRError(f"{name}: its bf16 weights times g = {scale:g} are no bf16 numbers; compress it without factors")
        return cast
    codes = np.asarray(unpack_stream(part["codes"], value.spec.quantizer().width, value.shape[1]))
    return pack_blocks(kind, codes, fold_scale(name, np.asarray(part["scales"]), scale))


def _notes(tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> list[str]:
    linear = Counter(t.kind for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2)
    blocks = ", ".join(f"{count} as {kind}" for kind, count in linear.most_common())
    notes = [f"Linear layers: {blocks}, each with the very numbers that qlr-jax computes with."]
    if set(linear) - {"BF16"}:
        notes.append(
            "llama.cpp rounds activations to 8 bits where weights are quantized, so its logits differ slightly from those."
        )
    if factors:
        notes.append(f"{ADAPTER} holds the low-rank factors, a part of this model: load it with {MODEL}, at scale 1.")
    return notes
