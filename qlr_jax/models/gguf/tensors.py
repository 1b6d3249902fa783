"""The tensors of a GGUF file as a model has them: dequantized to float32, named and ordered as in a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.models.config import LlamaConfig
from qlr_jax.models.gguf.file import GGUF, Stored, gguf_package
from qlr_jax.models.gguf.names import hugging_face_names, natural_order
from qlr_jax.models.names import tensor_names

IN_CONFIG = "rope_freqs.weight"  # read as the config's rope scaling
CHUNK = 2**24  # weights that are dequantized at once


def gguf_readers(file: GGUF, config: LlamaConfig) -> dict[str, Callable[[], np.ndarray]]:
    """For every tensor a function that reads it, by our name; one that the model does not have keeps GGUF's.

    q and k of the llama architecture get the order of rows that they had before conversion. A norm that multiplies by
    1 + weight (Gemma's) is stored with the one added. Of biases that a config switches on for several layers at once, those
    that the file leaves out are zeros.
    """
    ours, shapes = hugging_face_names(config), tensor_names(config)
    found = {ours.get(name, name): stored for name, stored in file.tensors.items() if name != IN_CONFIG}
    readers = {name: _reader(stored, name, config) for name, stored in found.items()}
    if config.attention_bias or config.mlp_bias:
        for name in shapes.keys() - readers.keys():
            if name.endswith(".bias"):
                readers[name] = lambda shape=shapes[name]: np.zeros(shape, np.float32)
    return readers


def _reader(stored: Stored, name: str, config: LlamaConfig) -> Callable[[], np.ndarray]:
    stem = name.rpartition(".")[0]
    offset = config.traits.norm_offset if stem.endswith("norm") else 0.0
    linear = stem.endswith("_proj")

    def read() -> np.ndarray:
        array = dequantized(stored)
        if linear:
            array = natural_order(array, stem, config)
        return array - np.float32(offset) if offset else array

    return read


def dequantized(stored: Stored) -> np.ndarray:
    """A tensor's numbers in float32.

    Raises:
        QLRError: its file was cut short after it was opened.
    """
    library = gguf_package("reading")
    kind = library.GGMLQuantizationType[stored.kind]
    raw = np.fromfile(stored.path, np.uint8, stored.nbytes, offset=stored.offset)
    if raw.size < stored.nbytes:
        raise QLRError(f"{stored.path} is truncated; get it again")
    cols = stored.shape[-1] if stored.shape else 1
    rows = math.prod(stored.shape) // cols
    out, step = np.empty((rows, cols), np.float32), max(1, CHUNK // cols)
    for at in range(0, rows, step):  # the package makes copies of what it is given
        out[at : at + step] = library.quants.dequantize(raw.reshape(rows, -1)[at : at + step], kind)
    return out.reshape(stored.shape)
