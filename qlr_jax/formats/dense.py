"""The dense folder: every weight decoded and written under its original name, for any tool that reads Llama."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.formats.card import CARD, card_text
from qlr_jax.formats.files import SHARD_BYTES, Entry, copy_companions, staged, write_checksums, write_json, write_tensors
from qlr_jax.formats.qlr.packed import load, read_config

TYPES = ("bfloat16", "float16", "float32")
SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def export_dense(out: str | Path, dest: str | Path, dtype: str = "bfloat16", *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a packed folder as a plain folder of its family: the original's key names, config, tokenizer, and a card.

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
    check_type(dtype)
    out, dest = Path(out).expanduser(), Path(dest).expanduser()
    raw, _ = read_config(out)
    with staged(dest) as folder:
        values = {name: param.get_value() for name, param in load(out).tensors().items()}
        entries = dense_entries(values, dtype)
        write_tensors(folder, entries, shard_bytes)
        copy_companions(out, folder)
        write_json(folder / "config.json", with_type(raw, dtype))
        notes = [f"The weights are decoded and rounded to {dtype}: this folder is as large as an original in that type."]
        card = card_text(out, target="dense", snippet=SNIPPET, notes=notes, size=bytes_of(entries))
        (folder / CARD).write_text(card, encoding="utf-8")
        write_checksums(folder)
    return dest


def check_type(dtype: str) -> None:
    """Raise QLRError for a type of weights that is not written."""
    if dtype not in TYPES:
        raise QLRError(f"dtype {dtype!r} is not offered; pass one of {', '.join(TYPES)}")


def with_type(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json's content with the type of the weights under the keys that it had (transformers 4: torch_dtype)."""
    return {**raw, **({key: dtype for key in ("dtype", "torch_dtype") if key in raw} or {"dtype": dtype})}


def dense_entries(values: Mapping[str, Any], dtype: str) -> dict[str, Entry]:
    """Tensors to write: arrays, or matrices with `.dense()`, decoded one at a time when they are written."""
    size = jnp.dtype(dtype).itemsize
    return {
        name: (size * int(np.prod(value.shape)), lambda name=name, value=value: decoded(name, value, dtype))
        for name, value in values.items()
    }


def bytes_of(entries: Mapping[str, Entry]) -> int:
    return sum(size for size, _ in entries.values())


def decoded(name: str, value: Any, dtype: str) -> np.ndarray:
    """An array, or a matrix with `.dense()`, in `dtype`; QLRError where float16 cannot reach it."""
    array = np.asarray(value.dense() if hasattr(value, "dense") else value)
    with np.errstate(over="ignore"):  # told below, with the tensor's name
        cast = array.astype(jnp.dtype(dtype))
    if dtype == "float16" and not np.isfinite(cast).all():
        raise QLRError(f"{name} reaches {np.abs(array).max():g}, beyond float16; export as bfloat16")
    return cast
