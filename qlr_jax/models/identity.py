"""Which model is it: where it lies, what the hub calls it, and a digest that tells it from others of the same shapes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlr_jax.models.checkpoint import weight_files
from qlr_jax.models.gguf.file import read_gguf

WHOLE, BLOCK, BLOCKS = 2**30, 2**16, 512  # bytes that are read whole; of larger files, the bytes and number of evenly spaced blocks
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)")  # in the hub's cache


def identity(place: Path, name: str) -> dict[str, Any]:
    """What a report records of the model that it is of.

    Args:
        place: its folder or GGUF file, an absolute path.
        name: as it was given.

    Returns:
        name, path, hub (owner/name) and revision where it lies in the hub's cache, else None, and digest.
    """
    found = _SNAPSHOT.search(place.as_posix())
    hub, revision = (f"{found[1]}/{found[2]}", found[3]) if found else (None, None)
    return {"name": name, "path": str(place), "hub": hub, "revision": revision, "digest": digest_model(place)}


def digest_model(place: Path) -> str:
    """sha256 of the files of weights that are read, whole up to 1 GiB together; of more, their sizes and blocks all over each.

    Names play no part: a model may be copied and renamed. Where blocks are read, 512 of 64 KiB a file leave no gap in which a
    matrix of a large model has room; what differs in a few norms alone may pass.

    Args:
        place: a folder, or a GGUF file.
    """
    files = read_gguf(place).paths if place.is_file() else weight_files(place)
    return digest_files(files)


def digest_files(files: Iterable[Path]) -> str:
    """`digest_model` of these files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a").write_bytes(b"weights")
        ...     digest_files([Path(folder) / "a"])
        'sha256:d576eee25ca432b7dfcdc550a2bab5ea'
    """
    sized = [(path, path.stat().st_size) for path in files]
    whole, digest = sum(size for _, size in sized) <= WHOLE, hashlib.sha256()
    for path, size in sized:
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            if whole or size <= BLOCK * BLOCKS:
                while chunk := file.read(2**24):
                    digest.update(chunk)
                continue
            for at in range(BLOCKS):
                file.seek(at * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return f"sha256:{digest.hexdigest()[:32]}"
