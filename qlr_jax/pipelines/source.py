"""The model that a job is of, and what of it is compressed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import allocators
from qlr_jax import cost
from qlr_jax.core.lazy import Lazy
from qlr_jax.core.objective import checked_weight
from qlr_jax.core.reconstruction import checked_backbone
from qlr_jax.cost.prices import price_options
from qlr_jax.engine import Call, Engine, Here, Pinned, place_of
from qlr_jax.errors import QLRError
from qlr_jax.models import Llama, LlamaConfig, find_folder, load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED, BUNDLED_NAME
from qlr_jax.models.identity import identity
from qlr_jax.progress import Progress
from qlr_jax.sensitivity import Sensitivity
from qlr_jax.settings.host import slow_search
from qlr_jax.settings.recipe import Recipe
from qlr_jax.settings.resolved import Settings

Weight = np.ndarray | Lazy
"""An array in memory, or one that is read when it is used."""


@dataclass(frozen=True)
class Source:
    """A model, and its matrices to compress.

    Attributes:
        name: as a report calls it.
        folder: where it lies.
        recipe: what is asked for.
        settings: the recipe, resolved for this model on this machine.
        weights: name -> W (out, in), checked.
        prices: the option table with its exact bytes, no damage yet.
        backbones: name -> Q, where the recipe takes them from another model.
        identity: where it lies, its name on the hub, and a digest of its weights (`models.identity`).
        notes: sentences on how the model was read, for a person.
    """

    name: str
    folder: Path
    model: Llama
    tokenizer: Any
    recipe: Recipe
    settings: Settings
    weights: Mapping[str, Weight]
    prices: allocators.OptionTable
    backbones: Mapping[str, Weight] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def locate(model: str | Path) -> Path:
    """The folder of a model: one that is given, "bundled", or a hub name's.

    Raises:
        QLRError: nothing of that name.
    """
    return BUNDLED if str(model) == BUNDLED_NAME else find_folder(model)


def open_source(model: str | Path, recipe: Recipe, whole: bool | None = None) -> Source:
    """Load a model and price every option that the recipe offers.

    Args:
        model: a folder, a hub name, or "bundled".
        whole: whether embedding and head are compressed too; None: where the recipe's budget counts them.

    Raises:
        QLRError: a model that cannot be read, weights that are not finite, patterns that leave nothing to compress, or given
            backbones of another model.
    """
    folder = locate(model)
    config = LlamaConfig.from_hf(folder, recipe.ignore_config)
    settings = Settings.of(recipe, config, whole=whole)
    notes: list[str] = []
    original = load_model(folder, on_disk=settings.streaming, ignore=recipe.ignore_config, note=notes.append)
    tokenizer = load_tokenizer(folder)
    matrices = original.matrices()
    names = (*settings.matrices, *settings.vocabulary)
    weights = {name: _checked(matrices[name].weight.get_value(), checked_weight) for name in names}
    backbones = _given_backbones(recipe, original, settings.streaming) if recipe.backbone_from else {}
    name = BUNDLED_NAME if folder == BUNDLED else str(model)
    prices = price_options(config, recipe, settings)
    known = identity(folder, name)
    return Source(name, folder, original, tokenizer, recipe, settings, weights, prices, backbones, known, tuple(notes))


def share(source: Source, engine: Engine) -> None:
    """Let an engine elsewhere open the same model on every machine: from where it lies, or from copies of its files.

    Args:
        source: opened here.
        engine: where pieces run.

    Raises:
        QLRError: a worker with too little memory for the largest batch of matrices.
    """
    if not isinstance(engine, Here):
        engine.check_memory(cost.of_a_worker(cost.Counted(source.model.config, source.recipe, cost.Machine.parse())))
        known, whole = source.identity, bool(source.settings.vocabulary)
        given = known["path"], engine.offer(source.folder), source.recipe, whole, known["digest"]
        opened = Pinned("source", Call(_opened, given))
        engine.share(source.model, Call(getattr, (opened, "model")))
        for name in ("weights", "backbones"):
            engine.share(getattr(source, name), Call(getattr, (opened, name)))
            engine.share_items(getattr(source, name))


def _opened(path: str, files: Any, recipe: Recipe, whole: bool, digest: str) -> Source:
    """The model on a worker: from the path, where it is there, else from copies of the files."""
    source = open_source(place := place_of(path, files), recipe, whole)
    if source.identity["digest"] != digest:
        raise QLRError(
            f"a worker on {platform.node()} has another model at {place} ({source.identity['digest']} where the job has {digest}); "
            "give all of them the same"
        )
    return source


def machine_notes(source: Source) -> list[str]:
    """What this machine lacks for the job, in sentences for a person."""
    searches = any("trellis" in option.spec for row in source.prices.rows for option in row.options)
    return [slow] if searches and (slow := slow_search()) else []


def saved_table(table: allocators.OptionTable, source: Source, progress: Progress) -> allocators.OptionTable:
    """A saved table for the job at hand: without the rows of embedding and head where its budget does not count them.

    Args:
        table: as it was saved; a table is measured for budgets of all kinds.
        source: of the job.
        progress: where it is said if the table was measured on another model of the same shapes.

    Raises:
        QLRError: a table of another model, target or version.
    """
    kept = table.select(lambda row: row.counted or row.name in source.prices.index)
    if kept is not None and len(kept.rows) < len(table.rows):
        table = replace(kept, model=source.prices.model)
    Sensitivity(table).check(source.prices, source.settings.target.nbytes)
    measured = table.notes.get("original") or {}
    if measured.get("digest") not in (None, source.identity["digest"]):
        progress.say(
            f"the table was measured on {measured.get('path')}, another model than {source.name}: its damages are that one's"
        )
    return table


def _given_backbones(recipe: Recipe, original: Llama, on_disk: bool) -> dict[str, Weight]:
    """Q of every linear layer: the weights of another model's folder, whose other tensors must be the original's."""
    source = str(recipe.backbone_from)
    other = load_model(source, on_disk=on_disk, ignore=recipe.ignore_config)
    theirs, ours, linears = other.tensors(), original.tensors(), original.linears()
    if list(theirs) != list(ours):
        raise QLRError(f"{source} is no model of the same tensors as the original; pass the dense weights of the same model")
    for name, param in ours.items():
        if name.removesuffix(".weight") in linears:
            continue
        one, two = (np.asarray(p.get_value(), np.float32) for p in (param, theirs[name]))
        if one.shape != two.shape or np.abs(one - two).max() > 0.02 * np.abs(one).max():
            raise QLRError(
                f"{source}: {name} is not the original's, so its linear layers do not stand for the same matrices; "
                "undo what was folded into it, or pass a dump of the same embeddings, norms and head"
            )
    shapes = {name: linear.weight.get_value().shape for name, linear in linears.items()}
    return {
        name: _checked(linear.weight.get_value(), lambda w, name=name: checked_backbone(w, shapes[name]))
        for name, linear in other.linears().items()
    }


def _checked(value: Any, check: Callable[[Any], np.ndarray]) -> Weight:
    """The checked array, or where the model's is read when it is used, one that is read and checked then."""
    return Lazy(value.shape, lambda: check(value.dense())) if isinstance(value, Lazy) else check(value)
