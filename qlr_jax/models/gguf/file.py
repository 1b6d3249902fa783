"""A GGUF file: which one a path means, its metadata, and where its tensors lie.

Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.errors import QLRError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        kind: GGUF's name of its type, e.g. "Q4_K".
        shape: as numpy has it, rows first.
        path, offset, nbytes: its bytes.
    """

    kind: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUF:
    """A model's file, or all shards of it: metadata as plain values, tensors by GGUF's names."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def paths(self) -> list[Path]:
        """Its files, in order."""
        return sorted({self.path, *(stored.path for stored in self.tensors.values())})

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's family."""
        return str(self.keys.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own: `get("context_length")` is that of "llama.context_length"."""
        return self.keys.get(f"{self.architecture}.{key}", default)


def gguf_package(doing: str) -> Any:
    """The gguf package.

    Args:
        doing: "reading" or "writing", for the message.

    Raises:
        QLRError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise QLRError(f"{doing} GGUF needs the gguf package: pip install 'qlr-jax[gguf]'") from None
    return gguf


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: a file that is one, or the one in a folder without safetensors; None where there is none.

    Of a model in shards it is the first.

    Raises:
        QLRError: a folder with several models; names them.
    """
    if path.is_file():
        return _first_shard(path) if path.suffix.lower() == ".gguf" or _begins_as_gguf(path) else None
    if not path.is_dir() or any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return None
    found = sorted({_first_shard(file) for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file()})
    if len(found) > 1:
        raise QLRError(f"{path} holds several GGUF files ({', '.join(file.name for file in found)}); give one of them")
    return found[0] if found else None


def read_gguf(path: Path) -> GGUF:
    """The metadata of a file and of the shards beside it, and where their tensors lie; no tensor is read.

    Args:
        path: of the file, or of the first shard.

    Raises:
        QLRError: the gguf package is missing; a file that is missing, damaged, in the other byte order, or holds no model; a type
            of tensor that the package does not know.
    """
    match = _SHARD.fullmatch(path.name)
    paths = [path]
    if match:
        count = int(match[3])
        paths = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    shards = []
    for file in paths:
        if not file.is_file():
            raise QLRError(f"{file} does not exist; give a GGUF file with all of its shards beside it")
        stat = file.stat()
        shards.append(_read(file, stat.st_mtime_ns, stat.st_size))
    kind = shards[0].keys.get("general.type", "model")
    if kind != "model":
        raise QLRError(f"{path} holds no model (its general.type is {kind!r}); give the GGUF file of the model itself")
    split = shards[0].keys.get("split.count", 1) or 1
    if split != len(paths):
        raise QLRError(
            f"{path} is one of {split} shards; give the first, named …-00001-of-{split:05d}.gguf, with the others beside it"
        )
    return GGUF(path, shards[0].keys, {name: stored for shard in shards for name, stored in shard.tensors.items()})


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> GGUF:
    """One file; kept, since its list of tokens takes seconds to read, and several parts of a job ask for it."""
    library = gguf_package("reading")
    if not _begins_as_gguf(path):
        raise QLRError(f"{path} is no GGUF file; if it is a pointer of Git LFS, fetch the file itself")
    try:
        reader = library.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except Exception as error:  # the package raises whatever numpy does where bytes are missing
        if "GGMLQuantizationType" in str(error):
            raise QLRError(
                f"{path} holds a tensor of a type that the gguf package does not know ({error}); install a newer one"
            ) from None
        raise QLRError(f"{path} is truncated or damaged ({error or type(error).__name__}); get it again") from None
    if reader.byte_order != "I":
        raise QLRError(f"{path} is written for processors of the other byte order; convert it with gguf-convert-endian")
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        tensors[tensor.name] = Stored(tensor.tensor_type.name, shape, path, int(tensor.data_offset), int(tensor.n_bytes))
    for kind in {stored.kind for stored in tensors.values()}:
        _check_kind(path, kind)
    return GGUF(path, keys, tensors)


def _check_kind(path: Path, kind: str) -> None:
    library = gguf_package("reading")
    number = library.GGMLQuantizationType[kind]
    try:
        library.quants.dequantize(np.zeros((1, library.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        raise QLRError(
            f"{path} holds tensors of type {kind}, which the gguf package does not dequantize; give another conversion"
        ) from None


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise QLRError(f"{path} cannot be read: {error.strerror or error}") from None


def _first_shard(path: Path) -> Path:
    match = _SHARD.fullmatch(path.name)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}{path.suffix}") if match else path
