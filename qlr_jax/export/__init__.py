"""Folders out: packed with its PyTorch runtime, and in other formats. Importing this starts neither JAX nor torch (PEP 562)."""

from importlib import import_module
from typing import Any

_HOMES = {
    "check_files": "qlr_jax.export.files",
    "export_compressed_tensors": "qlr_jax.export.compressed_tensors",
    "export_dense": "qlr_jax.export.dense",
    "export_gguf": "qlr_jax.export.gguf",
    "export_peft": "qlr_jax.export.peft",
    "load": "qlr_jax.export.packed",
    "read_matrices": "qlr_jax.export.packed",
    "save_packed": "qlr_jax.export.packed",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qlr_jax.export' has no attribute {name!r}")
