"""The forward of Llama and its relatives in flax.nnx, the names of its tensors, and Hugging Face folders in and out.

Configurations, families, sites and names are light; what needs JAX is imported on first use (PEP 562).
"""

from typing import TYPE_CHECKING

from qlr_jax.models.config import LlamaConfig, RopeScaling
from qlr_jax.models.families import FAMILIES, Family, Norms
from qlr_jax.models.known import known_config
from qlr_jax.models.names import (
    EMBEDDING,
    HEAD,
    input_names,
    input_of,
    is_linear,
    kind_of,
    layer_of,
    linear_names,
    parameter_count,
    parts_of,
    shape_of,
    tensor_names,
    vocabulary_names,
)
from qlr_jax.models.sites import KINDS, SITES, Site
from qlr_jax.on_demand import resolver

if TYPE_CHECKING:
    from qlr_jax.models.folder import find_folder, load_model, load_tokenizer, save_model
    from qlr_jax.models.llama import Linear, Llama

_HOMES = {
    "Linear": "qlr_jax.models.llama",
    "Llama": "qlr_jax.models.llama",
    "find_folder": "qlr_jax.models.folder",
    "load_model": "qlr_jax.models.folder",
    "load_tokenizer": "qlr_jax.models.folder",
    "save_model": "qlr_jax.models.folder",
}

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "HEAD",
    "KINDS",
    "SITES",
    "Family",
    "Linear",
    "Llama",
    "LlamaConfig",
    "Norms",
    "RopeScaling",
    "Site",
    "find_folder",
    "input_names",
    "input_of",
    "is_linear",
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
    "vocabulary_names",
]


__getattr__ = resolver(__name__, _HOMES)
