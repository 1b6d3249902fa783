"""The `generate` command: what a model writes after a prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlr_jax import evaluation
from qlr_jax.evaluation import GenerationSettings
from qlr_jax.formats.qlr.packed import load
from qlr_jax.models import Llama, load_model, load_tokenizer
from qlr_jax.pipelines.source import locate
from qlr_jax.progress import Progress, silent
from qlr_jax.settings.host import slow_products


@dataclasses.dataclass(frozen=True)
class Generator:
    """What it takes to write text.

    Attributes:
        model: as it was loaded, packed or not.
        tokenizer: of its folder.
        ends: the tokens that end a text.
    """

    model: Llama
    tokenizer: Any
    ends: tuple[int, ...]


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
        source: a compressed folder, or any that `load_model` takes, such as the original.
        prompt, settings, stop, options: as for `evaluation.stream_text`.
        ignore_config: attributes of an original's config.json to go on without.

    Raises:
        QLRError: as `load`, `load_model` and `evaluation.stream_text`; before the first piece.
    """
    found = open_generator(source, ignore_config=ignore_config, progress=progress)
    return evaluation.stream_text(found.model, found.tokenizer, prompt, settings, stop=stop, ends=found.ends, **options)


def open_generator(source: str | Path, *, ignore_config: Sequence[str] = (), progress: Progress | None = None) -> Generator:
    """Load a model and its tokenizer to generate with.

    Args:
        source, ignore_config: as for `generate`.

    Raises:
        QLRError: as `load` and `load_model`.
    """
    progress = progress or silent()
    with progress.stage("loading"):
        folder = locate(source)
        packed = _is_packed(folder)
        model = load(folder) if packed else load_model(folder, ignore=ignore_config, note=progress.say)
        if packed and (slow := slow_products()):
            progress.say(slow)
        tokenizer = load_tokenizer(folder)
    return Generator(model, tokenizer, _ends(folder, model, tokenizer))


def _ends(folder: Path, model: Llama, tokenizer: Any) -> tuple[int, ...]:
    """config.json may name the end of a text alone; that of a turn stands in generation_config.json or with the tokenizer."""
    named = _json(folder / "generation_config.json").get("eos_token_id")
    ids = [*model.config.eos_ids, *(named if isinstance(named, list) else [named]), getattr(tokenizer, "eos_token_id", None)]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < model.config.vocab_size))


def _is_packed(folder: Path) -> bool:
    config = _json(folder / "config.json").get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == "qlr"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # load_model says what is wrong
    return found if isinstance(found, dict) else {}
