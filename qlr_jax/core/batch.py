"""Many matrices: those of one shape and spec are solved together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.solver import Solution, solve_batch

Key = TypeVar("Key", bound=Hashable)
ROWS_TOGETHER = 1024  # rows that keep a trellis search busy: smaller matrices are batched up to this many


def solve_many(
    problems: Mapping[Key, tuple[np.ndarray, np.ndarray, str]],
    *,
    seed: int = 0,
    config: SolverConfig | None = None,
    on_done: Callable[[Key, Solution], None] | None = None,
) -> dict[Key, Solution]:
    """Solve (weight (m, n), Hessian (n, n), spec) for every key.

    Batches have one fixed size a shape, filled up by repeating, so that each shape is compiled once. They run one after another:
    two compiled loops that run at once in one process can wait for each other for ever in XLA's thread pool on a CPU
    (seen with jaxlib 0.10.2 on two cores).

    Args:
        problems: checked weights and Hessians (`checked_weight`, `checked_hessian`).
        on_done: called as soon as a matrix is finished.

    Example:
        >>> w = np.eye(32, dtype=np.float32)
        >>> found = solve_many({"a": (w, w, "int-4"), "b": (2 * w, w, "int-4")})
        >>> sorted(found), found["a"].stats["relative_error"] < 1e-3
        (['a', 'b'], True)
    """
    groups: dict[tuple[tuple[int, ...], str], list[Key]] = defaultdict(list)
    for key, (weight, _, spec) in problems.items():
        groups[weight.shape, str(spec)].append(key)
    solved: dict[Key, Solution] = {}
    for (shape, spec), keys in groups.items():
        size = max(1, ROWS_TOGETHER // shape[0])
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            filled = part + [part[-1]] * (size - len(part))
            weights, hessians = (np.stack([problems[k][which] for k in filled]) for which in (0, 1))
            for key, solution in zip(part, solve_batch(weights, hessians, spec, seed=seed, config=config), strict=False):
                solved[key] = solution
                if on_done is not None:
                    on_done(key, solution)
    return solved
