"""GGUF for llama.cpp: every backbone bit for bit in model.gguf, the factors as a LoRA in adapter.gguf.

    y = W₀ x + L'(R' x)      W₀ = g·Q as blocks, L' = g·L diag(s), R' = R

Format: github.com/ggml-org/ggml, docs/gguf.md; the llama architecture: github.com/ggml-org/llama.cpp, src/models/llama.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.packing import unpack_stream
from qlr_jax.errors import QLRError
from qlr_jax.formats.dense import check_type, complete, decoded
from qlr_jax.formats.files import staged
from qlr_jax.formats.gguf.blocks import fold_scale, pack_blocks
from qlr_jax.formats.gguf.tokenizer import Vocabulary, read_vocabulary
from qlr_jax.formats.gguf.writer import Tensor, adapter_keys, model_keys, write_gguf
from qlr_jax.formats.qlr.packed import load, read_config
from qlr_jax.formats.targets import TARGETS, gguf_type
from qlr_jax.models import Llama, LlamaConfig
from qlr_jax.models.gguf.file import gguf_package
from qlr_jax.models.gguf.names import gguf_name, reorder, rope_factors
from qlr_jax.paths import local, output_folder
from qlr_jax.progress import Progress, silent

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DTYPES = {kind: dtype for dtype, kind in TYPES.items()}
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
        progress: takes the progress of writing, and the card's notes on the tokenizer.

    Returns:
        `dest`.

    Raises:
        QLRError: the gguf package is missing; `out` cannot be loaded; a spec, or the scale of a block, that GGUF cannot represent
            exactly; an unknown dtype; `dest` is not empty. Nothing is then written.
    """
    check_type(dtype)
    gguf_package("writing")
    out, dest = local(out), output_folder(dest, sources=[out])
    base = read_config(out)[1].get("settings", {}).get("base_model")
    progress = progress or silent()
    model = load(out)
    tensors, factors = model_tensors(model, TYPES[dtype]), adapter_tensors(model)
    vocabulary = read_vocabulary(out, model.config)
    names = {"name": Path(base).name if base else "Llama", "base": base and Path(base).name}
    with staged(dest) as folder:
        write_gguf(folder / MODEL, model_keys(model.config, tensors, vocabulary, **names), tensors, progress)
        if factors:
            write_gguf(folder / ADAPTER, adapter_keys(**names), factors, progress)
        size = sum(path.stat().st_size for path in folder.iterdir())
        notes = (*_notes(tensors, factors), *vocabulary.notes)
        complete(folder, out, None, target="gguf", snippet=snippet(bool(factors), vocabulary), notes=notes, size=size)
    for note in vocabulary.notes:
        progress.say(note)
    return dest


def model_tensors(model: Llama, plain: str) -> dict[str, Tensor]:
    """Every tensor of model.gguf by GGUF's name.

    Args:
        model: as `load` returns it.
        plain: GGUF's type of embedding and head.

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
        blocks = isinstance(value, QLRMatrix) and TARGETS["gguf"].holds(value.spec, value.shape)
        if linear in linears or blocks:
            kind = "BF16"
            if isinstance(value, QLRMatrix):
                TARGETS["gguf"].check(linear, value.spec, value.shape)
                kind = gguf_type(value.spec)
            make = lambda n=linear, v=value: reorder(_backbone(n, v), n, config)  # noqa: E731
        elif isinstance(value, QLRMatrix):  # an embedding or a head that no block holds is decoded
            kind = plain
            make = lambda n=name, v=value, k=kind: plain_rows(n, v.dense(), k)  # noqa: E731
        else:
            kind = plain if value.ndim == 2 else "F32"
            make = lambda n=name, v=value, k=kind: plain_rows(n, v, k)  # noqa: E731
        found[gguf_name(name)] = Tensor(kind, tuple(value.shape), make)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        found["rope_freqs.weight"] = Tensor("F32", (config.head_dim // 2,), lambda: plain_rows("", rope_factors(config), "F32"))
    return found


def adapter_tensors(model: Llama) -> dict[str, Tensor]:
    """lora_a = R' (rank, in) and lora_b = L' (out, rank) of every matrix with factors; BF16 where that is exact, else F32."""
    found = {}
    for name, linear in model.linears().items():
        value = linear.weight.get_value()
        if not isinstance(value, QLRMatrix) or not value.spec.rank:
            continue
        for part in "ab":
            make = lambda n=name, v=value, p=part: _factor(n, v, p, model.config)  # noqa: E731
            factor = make()  # computed again when it is written, so that one at a time is in memory
            kind = "BF16" if np.array_equal(factor.astype(ml_dtypes.bfloat16).astype(np.float32), factor) else "F32"
            cast = lambda m=make, k=kind: plain_rows("", m(), k)  # noqa: E731
            found[f"{gguf_name(name + '.weight')}.lora_{part}"] = Tensor(kind, factor.shape, cast)
    return found


def plain_rows(name: str, value: Any, kind: str) -> np.ndarray:
    """An array in another type.

    Args:
        name: of the tensor, for the error.
        value: the array.
        kind: F32, F16 or BF16.

    Raises:
        QLRError: where a number is beyond the range of float16.
    """
    return decoded(name, np.asarray(value, np.float32), DTYPES[kind])


def snippet(adapter: bool, vocabulary: Vocabulary) -> str:
    """Python that runs the exported model."""
    if not vocabulary.tokens:
        return SNIPPET_NO_VOCABULARY.strip()
    flag, lines = (f" --lora {ADAPTER}", SNIPPET_ADAPTER) if adapter else ("", "")
    return SNIPPET.format(flag=flag, adapter=lines).strip()


def _factor(name: str, value: QLRMatrix, part: str, config: LlamaConfig) -> np.ndarray:
    """R' (rank, in) for `part` "a", L' (out, rank) in llama.cpp's order of rows for "b"."""
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
    codes = np.asarray(unpack_stream(part["codes"], int(value.spec.quantizer().bits), value.shape[1]))
    return pack_blocks(kind, codes, fold_scale(name, np.asarray(part["scales"]), scale))


def _notes(tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> list[str]:
    linear = Counter(t.kind for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2)
    blocks = ", ".join(f"{count} as {kind}" for kind, count in linear.most_common())
    notes = [f"Linear layers: {blocks}, each with exactly the numbers that qlr-jax computes with."]
    if set(linear) - {"BF16"}:
        notes.append(
            "llama.cpp rounds activations to 8 bits where weights are quantized, so its logits differ slightly from those."
        )
    if factors:
        notes.append(f"{ADAPTER} has the low-rank factors, a part of this model: load it with {MODEL}, at scale 1.")
    return notes
