"""Writing model folders: all or nothing, sharded safetensors, checksums."""

import hashlib
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

CHECKSUMS = "checksums.json"
SKIP_CHECKSUMS = "QLR_SKIP_CHECKSUMS"  # set to 1, a load compares nothing
SHARD_BYTES = 4_000_000_000

Entry = tuple[int, Callable[[], np.ndarray]]
"""A tensor to write: its bytes, and a function that makes it when its shard is written."""


@contextmanager
def staged(out: str | Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """A new folder beside `out`, moved into its place when the block ends well, deleted when it does not.

    Args:
        out: what is to be written; it may exist if it is empty but for entries named in `keep`.

    Raises:
        QLRError: if `out` is a file or holds anything else; nothing is then touched.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with staged(Path(parent) / "model") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...     print([p.name for p in (Path(parent) / "model").iterdir()])
        ['config.json']
    """
    out = Path(out).expanduser()
    refuse_occupied(out, keep)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.absolute().parent))
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp's own is for its maker alone
        if out.is_dir() and any(out.iterdir()):
            # config.json makes it a model folder, so it comes last
            for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
                os.replace(path, out / path.name)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_occupied(out: Path, keep: Collection[str] = ()) -> None:
    """Raise QLRError if `out` is a file, or a folder with anything in it that is not named in `keep`."""
    if out.exists() and not out.is_dir():
        raise QLRError(f"{out} is a file; give a folder to write to")
    held = sorted(p.name for p in out.iterdir() if p.name not in keep) if out.is_dir() else []
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise QLRError(f"{out} already holds {held[0]}{more}; give a new or empty folder")


def write_tensors(folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards and their index where the tensors' bytes exceed `shard_bytes`.

    One shard is in memory at a time.
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
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name beside it and rename it, so that no half of it is ever seen; returns the path.

    Raises:
        QLRError: where the place cannot be written.
    """
    if path.is_dir():
        raise QLRError(f"{path} is a folder; pass the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise QLRError(f"{path} cannot be written: {error.strerror or error}; pass a file in a folder that exists") from None
    return path


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a model beside its weights: tokenizer files, chat template, generation_config.json."""
    from qlr_jax.models.folder import TOKENIZER_FILES  # brings JAX along, which writing a text does not need

    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_checksums(folder: Path) -> None:
    """Write checksums.json: the sha256 of every file in `folder` and below, and of what a packed folder's config.json says."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    listed: dict[str, Any] = {"algorithm": "sha256", "files": {p.relative_to(folder).as_posix(): _digest(p) for p in files}}
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        listed["config"] = _config_digest(config)
    write_json(folder / CHECKSUMS, listed)


def check_weights(folder: str | Path) -> None:
    """Compare what a load reads (weights, their index, config.json but for `dequantize`) with checksums.json.

    A folder without a list passes, and so does everything where the environment has QLR_SKIP_CHECKSUMS=1.

    Raises:
        QLRError: naming the file that has changed; or if the list is unreadable.
    """
    folder = Path(folder)
    if os.environ.get(SKIP_CHECKSUMS) == "1" or not (folder / CHECKSUMS).is_file():
        return
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        sums = {name: digest for name, digest in listed["files"].items() if ".safetensors" in name and (folder / name).is_file()}
        config = listed.get("config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise QLRError(f"{folder / CHECKSUMS} is damaged; get the folder again") from None
    changed = [name for name, digest in sums.items() if _digest(folder / name) != digest]
    if config and _config_digest(folder / "config.json") != config:
        changed.append("config.json")
    if changed:
        again = f"get it again, or delete {CHECKSUMS} if the change is meant"
        raise QLRError(f"{folder / changed[0]} has changed since it was written (its sha256 differs); {again}")


def check_files(folder: str | Path) -> int:
    """Compare every file with checksums.json: how many were compared.

    Raises:
        QLRError: naming the first file that is missing or differs; or if there is no list.
    """
    folder = Path(folder)
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QLRError(f"{folder} has no readable {CHECKSUMS} ({type(error).__name__}), so its files cannot be checked") from None
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise QLRError(f"{folder / name} is missing; get the folder again")
        if _digest(folder / name) != digest:
            raise QLRError(f"{folder / name} has changed since it was written (its sha256 differs); get it again")
    return len(listed)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_digest(path: Path) -> str:
    """sha256 of what config.json says; `dequantize`, a wish of the PyTorch runtime's user, is no part of it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("quantization_config"), dict):
        config["quantization_config"].pop("dequantize", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
