"""What a job is of: with all of it the same, an interrupted one may go on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax

import qlr_jax
from allocators import OptionTable
from qlr_jax.models import LlamaConfig
from qlr_jax.settings.constraints import Constraints
from qlr_jax.settings.recipe import Recipe

DIGEST = "sha256:"  # how the digest of a model begins, since it is of all weights


def job_facts(
    model: Mapping[str, Any],
    config: LlamaConfig,
    recipe: Recipe,
    calibration: str,
    held_out: str,
    table: OptionTable | None,
    constraints: Constraints,
) -> dict[str, Any]:
    """Recipe, model, texts, constraints and versions of a job, as plain values.

    Args:
        model: of the original, as `models.identity` records it.
        config: of the original.
        calibration, held_out: the texts themselves.
        table: an option table that was given, None where it is measured.
        constraints: locks and ties of the table's rows.
    """
    settings = dataclasses.asdict(recipe)
    return {
        "recipe": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "model": f"{model['digest']} {digest_text(repr(config))}",
        "calibration text": digest_text(calibration),
        "held-out text": digest_text(held_out),
        "table": digest_text(table.to_json()) if table else None,
        "constraints": dataclasses.asdict(constraints),
        "versions": {"qlr-jax": qlr_jax.__version__, "jax": jax.__version__},
    }


def completed(facts: Any, now: Mapping[str, Any] | None = None) -> Any:
    """What a job was begun as, its recipe filled up with the defaults of settings that did not exist then.

    Args:
        facts: as they were read.
        now: of the job at hand, whose model counts as the same where the earlier one has a digest of another kind.

    Example:
        >>> completed({"recipe": {"seed": 3}})["recipe"]["strategy"]
        'allocated'
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("recipe"), dict):
        return facts
    defaults = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in dataclasses.fields(Recipe)}
    model = facts.get("model")
    if now and DIGEST in str(now.get("model")) and DIGEST not in str(model):
        model = now["model"]
    return {**facts, "model": model, "recipe": {**defaults, **facts["recipe"]}}


def digest_text(text: str) -> str:
    """What tells one text from another.

    Example:
        >>> digest_text("")
        'e3b0c44298fc1c14'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]
