"""What a job is of: with all of it the same, an interrupted one may go on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax

import qlr_jax
from allocators import OptionTable
from qlr_jax.models.checkpoint import weight_files
from qlr_jax.models.gguf.file import read_gguf
from qlr_jax.settings.constraints import Constraints
from qlr_jax.settings.recipe import Recipe

SAMPLE = 2**16  # bytes at both ends of a file of weights that stand for all of it


def job_facts(
    folder: Path, recipe: Recipe, calibration: str, held_out: str, table: OptionTable | None, constraints: Constraints
) -> dict[str, Any]:
    """Recipe, model, texts, constraints and versions of a job, as plain values.

    Args:
        folder: of the original model.
        calibration, held_out: the texts themselves.
        table: an option table that was given, None where it is measured.
        constraints: locks and ties of the table's rows.
    """
    settings = dataclasses.asdict(recipe)
    return {
        "recipe": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "model": digest_model(folder),
        "calibration text": digest_text(calibration),
        "held-out text": digest_text(held_out),
        "table": digest_text(table.to_json()) if table else None,
        "constraints": dataclasses.asdict(constraints),
        "versions": {"qlr-jax": qlr_jax.__version__, "jax": jax.__version__},
    }


def completed(facts: Any) -> Any:
    """What a job was begun as, its recipe filled up with the defaults of settings that did not exist then.

    Example:
        >>> completed({"recipe": {"seed": 3}})["recipe"]["strategy"]
        'allocated'
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("recipe"), dict):
        return facts
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}
    return {**facts, "recipe": {**defaults, **facts["recipe"]}}


def digest_text(text: str) -> str:
    """What tells one text from another.

    Example:
        >>> digest_text("")
        'e3b0c44298fc1c14'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_model(folder: Path) -> str:
    """What tells one model folder, or GGUF file, from another: its configuration, size and both ends of every file that is read."""
    gguf = read_gguf(folder) if folder.is_file() else None
    digest = hashlib.sha256(b"" if gguf else (folder / "config.json").read_bytes())
    for path in gguf.paths if gguf else weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
