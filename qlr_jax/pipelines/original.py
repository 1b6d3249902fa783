"""The original of a compressed folder: the one that was recorded, found again where it lies, and no other."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.formats.checksums import SKIP_CHECKSUMS
from qlr_jax.formats.qlr.packed import read_config
from qlr_jax.models import Llama, LlamaConfig, load_model
from qlr_jax.models.bundled import BUNDLED, BUNDLED_NAME
from qlr_jax.models.identity import digest_model
from qlr_jax.paths import local
from qlr_jax.pipelines.source import locate

REPORT = "report.json"
NO_LOGIT = {"bos_token_id", "eos_token_id", "max_position_embeddings"}  # what may differ in the original's config


def recorded(out: str | Path) -> dict[str, Any]:
    """What a compressed folder says of its original: name, path, hub, revision, digest, each None where it does not say.

    Folders from before a digest was recorded have the name alone.
    """
    settings = read_config(out)[1].get("settings") or {}
    try:
        report = json.loads((local(out) / REPORT).read_text(encoding="utf-8")).get("original") or {}
    except (OSError, ValueError, AttributeError):
        report = {}
    found = {"name": settings.get("base_model")} | (settings.get("original") or {}) | report
    return {key: found.get(key) for key in ("name", "path", "hub", "revision", "digest")}


def find_original(out: str | Path, given: str | Path | None = None) -> Path:
    """The folder or file of the model that `out` was compressed from.

    Args:
        out: a compressed folder.
        given: where the original lies, or its name; where not given, it is looked for where `out` says.

    Raises:
        QLRError: `out` does not say, it is not there any more, or another model is: its weights are not the recorded ones.
            QLR_SKIP_CHECKSUMS=1 in the environment compares nothing.
    """
    known = recorded(out)
    name, path = known["name"], known["path"]
    what = f"{name}, at {path}" if path and path != name else f"{name}"
    if given is not None:
        return _checked(locate(given), known, out, what)
    if not name:
        raise QLRError(f"{out} does not say what it was compressed from; pass the original model's folder (--original)")
    if name == BUNDLED_NAME:
        return _checked(BUNDLED, known, out, what)
    if path and local(path).exists():
        return _checked(locate(path), known, out, what)
    # moved with the folder, or in the hub's cache: with a digest it is sure to be the same
    exact = f"{known['hub']}@{known['revision']}" if known["hub"] and known["revision"] else None
    names = [name] if known["digest"] is None else [place for place in (exact, name, known["hub"]) if place]
    for place in names:
        try:
            found = locate(place)
        except QLRError as error:
            why = str(error)
            continue
        return _checked(found, known, out, what)
    raise QLRError(f"the recorded original of {out}, {what}, is not there ({why}); pass where it lies now (--original MODEL)")


def load_original(
    out: str | Path,
    place: Path,
    compressed: LlamaConfig,
    ignore: Collection[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> Llama:
    """The model that `out` was compressed from.

    Args:
        out: the compressed folder.
        place: what `find_original` found.
        compressed: the configuration of the model in `out`.
        ignore: attributes of its config.json to go on without, beside those that `out` records.
        note: is given, a sentence at a time, how it was read.

    Raises:
        QLRError: as `load_model` and `check_config`.
    """
    settings = read_config(out)[1].get("settings") or {}
    found = load_model(place, ignore=[*settings.get("ignore_config", ()), *ignore], note=note)
    check_config(out, found.config, compressed)
    return found


def _checked(place: Path, known: dict[str, Any], out: str | Path, what: str) -> Path:
    """`place`, whose weights are the recorded ones; QLRError where they are not."""
    digest = known["digest"]
    if digest is None or os.environ.get(SKIP_CHECKSUMS) == "1" or digest_model(place) == digest:
        return place
    raise QLRError(
        f"{place} is another model than {out} was compressed from: its weights are not those of {what}; pass the original "
        f"(--original MODEL), or set {SKIP_CHECKSUMS}=1 if these are the same weights saved in another way"
    )


def check_config(out: str | Path, original: LlamaConfig, compressed: LlamaConfig) -> None:
    """Refuse an original whose config.json gives the same weights another meaning than it had when `out` was compressed.

    Args:
        out: the compressed folder.
        original, compressed: the configurations of the two.

    Raises:
        QLRError: naming what differs.
    """
    if recorded(out)["digest"] is None:
        return
    before, after = dataclasses.asdict(original), dataclasses.asdict(compressed)
    if name := next((key for key in before if key not in NO_LOGIT and before[key] != after[key]), None):
        raise QLRError(
            f"the original's {name} is {before[name]!r}, and {out} was compressed from a model with {after[name]!r}; give the "
            "original with the config.json that it had (--original MODEL)"
        )
