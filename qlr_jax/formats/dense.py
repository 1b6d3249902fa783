"""The dense folder: every weight decoded and written under its original name, for any tool that reads Llama."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.formats.card import CARD, card_text
from qlr_jax.formats.checksums import write_checksums
from qlr_jax.formats.files import SHARD_BYTES, Entry, copy_companions, staged, with_type, write_json, write_tensors
from qlr_jax.formats.qlr.packed import load, read_config
from qlr_jax.models.products import unpacked
from qlr_jax.paths import local, output_folder

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
    out, dest = local(out), output_folder(dest, sources=[out])
    raw, _ = read_config(out)
    with staged(dest) as folder:
        values = {name: param.get_value() for name, param in load(out).tensors().items()}
        entries = dense_entries(values, dtype)
        write_tensors(folder, entries, shard_bytes)
        notes = [f"The weights are decoded and rounded to {dtype}: this folder is as large as an original in that type."]
        complete(folder, out, with_type(raw, dtype), target="dense", snippet=SNIPPET, notes=notes, size=bytes_of(entries))
    return dest


def complete(
    folder: Path, out: Path, config: Mapping[str, Any] | None, *, target: str, snippet: str, notes: Sequence[str], size: int
) -> None:
    """Write what lies beside an export's weights: config.json and the tokenizer's files, the card, and checksums last.

    Args:
        folder: with the weights, and nothing else that is missing here.
        out: the packed folder that is exported.
        config: content of config.json; None for a format that has neither it nor a tokenizer's files.
        target, snippet, notes, size: of the card, as in `card_text`.
    """
    if config is not None:
        copy_companions(out, folder)
        write_json(folder / "config.json", config)
    card = card_text(out, target=target, snippet=snippet, notes=notes, size=size)
    (folder / CARD).write_text(card, encoding="utf-8")
    write_checksums(folder)


def check_type(dtype: str) -> None:
    """Raise QLRError unless weights of this type can be written."""
    if dtype not in TYPES:
        raise QLRError(f"dtype {dtype!r} is not offered; pass one of {', '.join(TYPES)}")


def dense_entries(values: Mapping[str, Any], dtype: str) -> dict[str, Entry]:
    """Tensors to write: arrays, or matrices with `.dense()`, each decoded when it is written.

    Example:
        >>> entries = dense_entries({"a": np.eye(2, dtype=np.float32)}, "bfloat16")
        >>> entries["a"][0], entries["a"][1]().dtype
        (8, dtype(bfloat16))
    """
    size = jnp.dtype(dtype).itemsize
    return {
        name: (size * int(np.prod(value.shape)), lambda name=name, value=value: decoded(name, value, dtype))
        for name, value in values.items()
    }


def bytes_of(entries: Mapping[str, Entry]) -> int:
    """Bytes of all tensors together."""
    return sum(size for size, _ in entries.values())


def decoded(name: str, value: Any, dtype: str) -> np.ndarray:
    """An array, or a matrix with `.dense()`, in another type.

    Args:
        name: of the tensor, for the error.
        value: the array or matrix.
        dtype: bfloat16, float16 or float32.

    Raises:
        QLRError: where a number is beyond the range of float16.
    """
    array = np.asarray(unpacked(value))
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        cast = array.astype(jnp.dtype(dtype))
    if dtype == "float16" and not np.isfinite(cast).all():
        raise QLRError(f"{name} reaches {np.abs(array).max():g}, beyond float16; export as bfloat16")
    return cast
