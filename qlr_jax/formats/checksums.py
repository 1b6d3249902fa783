"""checksums.json: the sha256 of every file of a folder, written with it and compared by every load."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.formats.files import write_json
from qlr_jax.paths import local

CHECKSUMS = "checksums.json"
SKIP_CHECKSUMS = "QLR_SKIP_CHECKSUMS"  # set to 1, a load compares nothing


def write_checksums(folder: Path) -> None:
    """Write checksums.json: the sha256 of every file in `folder` and below, and of the content of a packed folder's config.json."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    listed: dict[str, Any] = {"algorithm": "sha256", "files": {p.relative_to(folder).as_posix(): _digest(p) for p in files}}
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        listed["config"] = _config_digest(config)
    write_json(folder / CHECKSUMS, listed)


def check_weights(folder: str | Path) -> None:
    """Compare what a load reads (weights, their index, config.json but for `dequantize`) with checksums.json.

    A folder without checksums.json passes, and so does any folder where the environment has QLR_SKIP_CHECKSUMS=1.

    Raises:
        QLRError: naming the file that has changed; or if checksums.json is unreadable.
    """
    folder = local(folder)
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
    """Compare every file of a folder with its checksums.json; returns how many were compared.

    Raises:
        QLRError: naming the first file that is missing or differs; or if there is no checksums.json.
    """
    folder = local(folder)
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
    """sha256 of the content of config.json without `dequantize`, which users of the PyTorch runtime may set."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("quantization_config"), dict):
        config["quantization_config"].pop("dequantize", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
