"""The forward of Llama and its relatives in flax.nnx, the names of its tensors, and Hugging Face folders in and out."""

from qlr_jax.models.config import LlamaConfig, RopeScaling
from qlr_jax.models.families import FAMILIES, Family
from qlr_jax.models.folder import find_folder, load_model, load_tokenizer, save_model
from qlr_jax.models.known import known_config
from qlr_jax.models.llama import Linear, Llama
from qlr_jax.models.names import (
    KINDS,
    input_names,
    input_of,
    kind_of,
    layer_of,
    linear_names,
    parameter_count,
    parts_of,
    shape_of,
    tensor_names,
)

__all__ = [
    "FAMILIES",
    "KINDS",
    "Family",
    "Linear",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "find_folder",
    "input_names",
    "input_of",
    "kind_of",
    "known_config",
    "layer_of",
    "linear_names",
    "load_model",
    "load_tokenizer",
    "parameter_count",
    "parts_of",
    "save_model",
    "shape_of",
    "tensor_names",
]
