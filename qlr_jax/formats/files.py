"""Writing model folders: all or nothing, sharded safetensors, JSON and text that are never half written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.locks import locked
from qlr_jax.models.checkpoint import COMPANIONS
from qlr_jax.models.gguf.file import read_gguf
from qlr_jax.models.gguf.tokenizer import write_companions
from qlr_jax.paths import PARTIAL, enough_space, output_file, output_folder

SHARD_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"

Entry = tuple[int, Callable[[], np.ndarray]]
"""A tensor to write: its bytes, and a function that makes it when its shard is written."""


@contextmanager
def staged(out: str | Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """A new folder inside `out`; when the block ends well its content is moved up, and when it does not it is deleted.

    Args:
        out: what is to be written; it may exist if it is empty but for entries named in `keep`.
        keep: names of those entries; they stay where they are.

    Raises:
        QLRError: if `out` cannot be written, holds anything else, or is being written by another; nothing is then touched.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with staged(Path(parent) / "model") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...     print([p.name for p in (Path(parent) / "model").iterdir()])
        ['config.json']
    """
    out = output_folder(out, keep)
    with locked(out), enough_space(out):
        # inside of it: it may be a disk of its own, where a folder beside it is on another
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=out))
        try:
            yield partial
            _move(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, out: Path) -> None:
    """Move what is in `partial` into `out`: all of it, or nothing."""
    moved = []
    try:
        # config.json makes it a model folder, so it comes last
        for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
            moved.append(out / path.name)
            os.replace(path, moved[-1])
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def write_tensors(folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards and their index where the tensors' bytes exceed `shard_bytes`.

    Args:
        folder: an existing folder.
        entries: name -> tensor, in the order of the files; a shard's are made when it is written, so one is in memory at a time.
        shard_bytes: the most that a shard has, unless a single tensor is larger.
    """
    import ml_dtypes  # noqa: F401  numpy learns bfloat16
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name, (size, _) in entries.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        # safetensors writes the bytes of non-contiguous arrays in memory order, silently wrong
        save_file({name: np.ascontiguousarray(entries[name][1]()) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it readable by its owner alone
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(size for size, _ in entries.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, value: object, *, indent: int = 2, allow_nan: bool = True) -> Path:
    """Write a value as JSON, a line break at the end, as `replace_text` writes.

    Args:
        path: of the file.
        value: of what JSON has.
        indent: of nested lines.
        allow_nan: False refuses NaN and infinities, which strict readers do not take.

    Raises:
        QLRError: where the place cannot be written.
        TypeError, ValueError: for what is no JSON; nothing is then written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "a.json", {"x": 1}).read_text()
        '{\\n  "x": 1\\n}\\n'
    """
    return replace_text(path, json.dumps(value, indent=indent, allow_nan=allow_nan) + "\n")


def replace_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name beside it and rename it, so that no half-written file is ever seen; returns the path.

    Raises:
        QLRError: where the place cannot be written.
    """
    path = output_file(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise QLRError(f"{path} cannot be written: {error.strerror or error}; pass a file in a folder that exists") from None
    return path


def with_type(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json's content with the type of the weights under the keys that it had (transformers 4: torch_dtype)."""
    return {**raw, **({key: dtype for key in ("dtype", "torch_dtype") if key in raw} or {"dtype": dtype})}


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a model beside its weights: tokenizer files, chat template, generation_config.json.

    Args:
        source: a model's folder, or a GGUF file, whose metadata are written as such files.
        folder: where to.
    """
    if source.is_file():
        return write_companions(read_gguf(source), folder)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
