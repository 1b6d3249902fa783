"""The `generate` command: what a model writes after a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlr_jax import evaluation
from qlr_jax.evaluation import GenerationSettings
from qlr_jax.formats.qlr.packed import load
from qlr_jax.models import load_model, load_tokenizer
from qlr_jax.pipelines.source import locate
from qlr_jax.progress import Progress, silent


def generate(
    source: str | Path,
    prompt: str,
    settings: GenerationSettings | None = None,
    *,
    stop: Sequence[str] = (),
    ignore_config: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[str]:
    """What a model writes after a prompt, piece by piece as it comes.

    Args:
        source: a compressed folder (decoded once), or any that `load_model` takes, such as the original.
        prompt, settings, stop, options: as for `evaluation.stream_text`.
        ignore_config: attributes of an original's config.json to go on without.

    Raises:
        QLRError: as `load`, `load_model` and `evaluation.stream_text`; before the first piece.
    """
    progress = progress or silent()
    with progress.stage("loading"):
        folder = locate(source)
        packed = _is_packed(folder)
        model = load(folder) if packed else load_model(folder, ignore=ignore_config, note=progress.say)
        tokenizer = load_tokenizer(folder)
    return evaluation.stream_text(model, tokenizer, prompt, settings, stop=stop, **options)


def _is_packed(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == "qlr"
    except (OSError, ValueError, KeyError, TypeError):
        return False  # load_model says what is wrong
