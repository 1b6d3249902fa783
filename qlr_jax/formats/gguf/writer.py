"""Writing GGUF files: the metadata of a llama and of its adapter, and tensors one at a time.

Keys: github.com/ggml-org/ggml, docs/gguf.md; those of the architecture: github.com/ggml-org/llama.cpp, src/llama-arch.cpp.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.formats.gguf.tokenizer import Vocabulary
from qlr_jax.formats.targets import GGUF_BLOCKS
from qlr_jax.models import LlamaConfig
from qlr_jax.models.gguf.file import gguf_package
from qlr_jax.progress import Progress

PLAIN_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# GGUF's name of a file most of whose weights are of this type.
FILE_TYPES = {
    "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q3_K": "MOSTLY_Q3_K_M", "Q2_K": "MOSTLY_Q2_K",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: GGUF's type, its shape, and a function that makes its rows' bytes when they are written."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        _, block, size = GGUF_BLOCKS.get(self.kind, ("", 1, PLAIN_BYTES.get(self.kind, 0)))
        return self.shape[-1] // block * size


def model_keys(
    config: LlamaConfig, tensors: Mapping[str, Tensor], vocabulary: Vocabulary, name: str, base: str | None
) -> Callable[[Any], None]:
    """The metadata of model.gguf.

    Args:
        config: of the model.
        tensors: of model.gguf, which name the type of most weights.
        vocabulary: of its tokenizer.
        name: of the model.
        base: of the original, or None.

    Returns:
        A function that adds all of it to a `gguf.GGUFWriter`.

    Raises:
        QLRError: from that function, for a kind of rope scaling that GGUF does not have.
    """
    numbers = {  # by the writer's names of them, in the order of the file
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta,
        "rope_dimension_count": config.head_dim,
    }

    def add(writer: Any) -> None:
        library, scaling = gguf_package("writing"), config.rope_scaling
        writer.add_type("model")
        _add_names(writer, name, base)
        writer.add_file_type(library.LlamaFileType[FILE_TYPES[_main_type(tensors)]])
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
        for key, value in numbers.items():
            getattr(writer, f"add_{key}")(value)
        if scaling is not None and scaling.kind == "linear":
            writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling.factor)
        elif scaling is not None and scaling.kind != "llama3":  # llama3's is a tensor
            raise QLRError(
                f"rope scaling {scaling.kind!r} cannot be expressed in GGUF; export a model with linear or llama3 scaling"
            )
        vocabulary.write(writer)

    return add


def adapter_keys(name: str, base: str | None) -> Callable[[Any], None]:
    """The metadata of adapter.gguf, as `model_keys` returns it."""

    def add(writer: Any) -> None:
        writer.add_type("adapter")
        _add_names(writer, f"{name} factors", base)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # else llama.cpp multiplies by alpha and divides by each matrix's own rank

    return add


def _add_names(writer: Any, name: str, base: str | None) -> None:
    writer.add_name(name)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)


def write_gguf(path: Path, keys: Callable[[Any], None], tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Write one GGUF file of the llama architecture; one tensor is in memory at a time.

    Args:
        path: of the file.
        keys: adds its metadata to a `gguf.GGUFWriter`.
        tensors: by GGUF's names, in the order of the file.
        progress: takes the progress of writing.
    """
    library = gguf_package("writing")
    writer = library.GGUFWriter(path, "llama")
    keys(writer)
    for name, tensor in tensors.items():
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        kind = library.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.stage(f"writing {path.name}", total=len(tensors)) as stage:
            for name, tensor in tensors.items():
                writer.write_tensor_data(tensor.make())
                stage.advance(note=name)
    finally:
        writer.close()


def _main_type(tensors: Mapping[str, Tensor]) -> str:
    """The type of most weights of the linear layers."""
    weights: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            weights[tensor.kind] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]
