"""Folders in and out: packed, with its PyTorch runtime, and in other tools' formats.

    qlr/                  the packed folder: written and read in JAX, read in PyTorch, Triton kernels
    dense                 every weight decoded                        peft                  L and R as a LoRA adapter (adapter)
    compressed_tensors    integers as vLLM reads them                 gguf/                 integers as llama.cpp reads them
    orbax                 a checkpoint, restored on a mesh
    targets               what each of them represents exactly, and in how many bytes
    files, checksums      writing folders whole, and finding damage   card                  the model card

Importing this starts neither JAX nor torch: names resolve on first use (PEP 562).
"""

from qlr_jax.on_demand import resolver

_HOMES = {
    "check_files": "qlr_jax.formats.checksums",
    "export_compressed_tensors": "qlr_jax.formats.compressed_tensors",
    "export_dense": "qlr_jax.formats.dense",
    "export_gguf": "qlr_jax.formats.gguf.export",
    "export_orbax": "qlr_jax.formats.orbax",
    "export_peft": "qlr_jax.formats.peft",
    "load": "qlr_jax.formats.qlr.packed",
    "read_matrices": "qlr_jax.formats.qlr.packed",
    "save_packed": "qlr_jax.formats.qlr.packed",
}

__all__ = sorted(_HOMES)


__getattr__ = resolver(__name__, _HOMES)
