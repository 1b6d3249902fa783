"""The dense folder: every weight decoded and written under its original name, for any tool that reads Llama."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.export.files import SHARD_BYTES, copy_companions, staged, write_checksums, write_json, write_tensors
from qlr_jax.export.packed import load, read_config

TYPES = ("bfloat16", "float16", "float32")


def export_dense(out: str | Path, dest: str | Path, dtype: str = "bfloat16", *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a packed folder as a plain LlamaForCausalLM folder: the original's key names, config and tokenizer.

    Args:
        out: a packed folder.
        dest: the folder to write; new or empty.
        dtype: of the weights, one of bfloat16, float16, float32.
        shard_bytes: tensors of more bytes than this are split into shards with an index.

    Returns:
        `dest`.

    Raises:
        QLRError: `out` cannot be loaded, `dest` already holds something, an unknown dtype, a weight beyond float16's range.
    """
    if dtype not in TYPES:
        raise QLRError(f"dtype {dtype!r} is not offered; pass one of {', '.join(TYPES)}")
    out, dest = Path(out).expanduser(), Path(dest).expanduser()
    raw, _ = read_config(out)
    kind = jnp.dtype(dtype)
    with staged(dest) as folder:
        tensors = {name: param.get_value() for name, param in load(out).tensors().items()}
        sizes = {name: kind.itemsize * int(np.prod(value.shape)) for name, value in tensors.items()}
        entries = {name: (sizes[name], lambda n=name, v=value: _decoded(n, v, kind)) for name, value in tensors.items()}
        write_tensors(folder, entries, shard_bytes)
        copy_companions(out, folder)
        types = {key: dtype for key in ("dtype", "torch_dtype") if key in raw} or {"dtype": dtype}
        write_json(folder / "config.json", raw | types)
        write_checksums(folder)
    return dest


def _decoded(name: str, value: Any, kind: Any) -> np.ndarray:
    array = np.asarray(value.dense() if hasattr(value, "dense") else value)
    cast = array.astype(kind)
    if kind == np.float16 and not np.isfinite(cast).all():
        raise QLRError(f"{name} reaches {np.abs(array).max():g}, beyond float16; export as bfloat16")
    return cast
