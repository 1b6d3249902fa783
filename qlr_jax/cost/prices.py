"""What every option that a recipe offers costs in bytes: the option table before anything is measured."""

from __future__ import annotations

import contextlib
import fnmatch
from dataclasses import replace

import allocators
from qlr_jax import sensitivity
from qlr_jax.formats.targets import Target
from qlr_jax.models import LlamaConfig
from qlr_jax.settings.recipe import Recipe
from qlr_jax.settings.resolved import Settings


def price_options(config: LlamaConfig, recipe: Recipe, settings: Settings) -> allocators.OptionTable:
    """The option table of a recipe with its exact bytes in the target's format, under the target's ties; no damage yet.

    Args:
        config: the model's shapes.
        recipe: what is offered; with `backbone_from` a budget of bytes is the factors' alone.
        settings: the recipe, resolved for this model.
    """
    target = settings.target
    table = sensitivity.price(
        config,
        settings.matrices,
        lambda shape: sensitivity.options(recipe.backbones, recipe.ranks, recipe.factors, shape, target.nbytes, target.holds),
        target.nbytes,
        {
            name: sensitivity.vocabulary_options(recipe.vocabulary, shape, target.holds)
            for name, shape in settings.vocabulary.items()
        },
    )
    if recipe.backbone_from:
        table = replace(table, model=replace(table.model, fixed_bytes=0))
    return _tied(table, target)


def _tied(table: allocators.OptionTable, target: Target) -> allocators.OptionTable:
    """The table under the ties of its target, as far as their matrices are to be compressed."""
    for patterns in target.ties:
        present = [p for p in patterns if any(fnmatch.fnmatch(name, p) for name in table.index)]
        with contextlib.suppress(allocators.AllocationError):  # no two of them belong together
            table = table.tie(*present) if len(present) > 1 else table
    return table
