"""Folders out: packed with its PyTorch runtime, and dense. Importing this starts neither JAX nor torch (PEP 562)."""

from importlib import import_module
from typing import Any

_HOMES = {
    "check_files": "qlr_jax.export.files",
    "export_dense": "qlr_jax.export.dense",
    "load": "qlr_jax.export.packed",
    "read_matrices": "qlr_jax.export.packed",
    "save_packed": "qlr_jax.export.packed",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qlr_jax.export' has no attribute {name!r}")
