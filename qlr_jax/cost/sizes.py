"""Where the budget lies in the range of what the recipe offers, and the model's sizes before and at it."""

from __future__ import annotations

import math
from typing import Any

import allocators
from qlr_jax.cost.counted import Counted
from qlr_jax.cost.prices import price_options
from qlr_jax.models import tensor_names

COMPRESSED = "linear layers, embedding and head"


def budget_and_sizes(job: Counted) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Where the budget lies in the range of what the recipe offers, and the model's sizes before and at it."""
    recipe = job.recipe
    table = price_options(job.config, recipe, job.settings)
    least, most, weights = table.least_bytes, table.most_bytes, table.weights()
    found: dict[str, Any] = {
        "text": str(allocators.Budget.parse(recipe.budget)),
        "within": True,
        "why": "",
        "keeps_original": False,
    }
    found |= {"least_bytes": least, "most_bytes": most, "least_bits": 8 * least / weights, "most_bits": 8 * most / weights}
    limit = None
    try:
        problem = allocators.Budget.parse(recipe.budget).on(table)
        limit = 2 * weights if problem.keeps_original else min(problem.limit, most)
        found["keeps_original"] = problem.keeps_original
    except allocators.AllocationError as error:
        found |= {"within": False, "why": str(error)}
    found |= {"limit_bytes": limit, "limit_bits": None if limit is None else 8 * limit / weights}
    kinds = {"linear layers": job.linear_weights, "embeddings": 0, "head": 0, "norms and biases": 0}
    for name, shape in tensor_names(job.config).items():
        if name.removesuffix(".weight") not in job.linear_names:
            part = {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}.get(name, "norms and biases")
            kinds[part] += math.prod(shape)
    chosen = sum(math.prod(shape) for shape in job.settings.vocabulary.values())
    if chosen:  # what of the budget goes to which is for the allocation to say
        kinds = {COMPRESSED: sum(kinds.values()) - kinds["norms and biases"], "norms and biases": kinds["norms and biases"]}
    sizes = {part: {"before": 2 * count, "after": 2 * count} for part, count in kinds.items()}
    first = next(iter(kinds))
    sizes[first]["after"] = 2 * (kinds[first] - job.weights - chosen) + (least if limit is None else limit)
    sizes["whole"] = {when: sum(part[when] for part in sizes.values()) for when in ("before", "after")}
    return found, sizes
