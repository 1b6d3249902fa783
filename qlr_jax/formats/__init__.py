"""Folders out: packed with its PyTorch runtime, and in other formats. Importing this starts neither JAX nor torch (PEP 562)."""

from importlib import import_module
from typing import Any

_HOMES = {
    "check_files": "qlr_jax.formats.files",
    "export_compressed_tensors": "qlr_jax.formats.compressed_tensors",
    "export_dense": "qlr_jax.formats.dense",
    "export_gguf": "qlr_jax.formats.gguf.export",
    "export_peft": "qlr_jax.formats.peft",
    "load": "qlr_jax.formats.qlr.packed",
    "read_matrices": "qlr_jax.formats.qlr.packed",
    "save_packed": "qlr_jax.formats.qlr.packed",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qlr_jax.formats' has no attribute {name!r}")
