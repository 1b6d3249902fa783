"""Many matrices: those of one shape and spec are solved together, and those of one input share its metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.correction import alone, joined
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.metric import Metric
from qlr_jax.core.solver import Solution, solve_batch
from qlr_jax.core.spec import Spec

Key = TypeVar("Key", bound=Hashable)
Problems = Mapping[Key, tuple]  # (W, H, spec[, G or None[, Q or None]])
# Batches of factorizations inside one compiled loop wait for each other for ever in XLA's thread pool on a CPU once they are large
# (jaxlib 0.10.2: 16 matrices with 64 components hang, 8 never did): (matrices · components²) stays below.
FACTORED_TOGETHER = 2**15
SMALL, ROWS_TOGETHER = 1024, 2048  # matrices of fewer rows than SMALL are batched, whatever their H, to keep a search busy


def solve_many(
    problems: Problems[Key],
    *,
    seed: int = 0,
    config: SolverConfig | None = None,
    on_done: Callable[[Key, Solution], None] | None = None,
    known: Mapping[Key, Solution] | None = None,
) -> dict[Key, Solution]:
    """Solve (weight (m, n), Hessian (n, n), spec[, output Hessian (m, m) or None[, backbone (m, n) or None]]) for every key.

    Where a backbone is given, only factors are solved for (`correction`).

    Large matrices whose Hessian is the same array (q, k, v; gate, up) share its rotation and its factors, and those of one shape
    and spec among them are solved in one batch. Small ones are batched across Hessians, in batches of one fixed size a shape,
    filled up by repeating, so that each shape is compiled once. Batches run one after another: two compiled loops that run at
    once in one process can wait for each other for ever in XLA's thread pool on a CPU (seen with jaxlib 0.10.2 on two cores).

    Args:
        problems: checked weights and Hessians (`checked_weight`, `checked_hessian`).
        on_done: called as soon as a matrix is finished.
        known: solutions of an earlier run. A batch of which all are known is not solved again; any other is solved whole, because
            matrices of one batch stop iterating together, so that results are those of a run that nothing interrupted.

    Example:
        >>> w = np.eye(32, dtype=np.float32)
        >>> found = solve_many({"a": (w, w, "int-4"), "b": (2 * w, w, "int-4")})
        >>> sorted(found), found["a"].stats["relative_error"] < 1e-3
        (['a', 'b'], True)
    """
    config = config or SolverConfig()
    solved: dict[Key, Solution] = {}
    whole, problems = problems, _residuals(problems)

    def finish(key: Key, solution: Solution | None) -> None:
        weight, hessian, _, output, backbone = (*whole[key], None, None)[:5]
        if backbone is not None:
            solution = joined(backbone, solution, weight, hessian, output)
        assert solution is not None
        solved[key] = solution
        if on_done is not None:
            on_done(key, solution)

    def read(keys: list[Key]) -> bool:
        if known is None or any(key not in known for key in keys):
            return False
        for key in keys:
            solved[key] = known[key]
            if on_done is not None:
                on_done(key, solved[key])
        return True

    def run(keys: list[Key], metric: Metric, size: int) -> None:
        filled = keys + [keys[-1]] * (size - len(keys))
        weights, spec = np.stack([problems[k][0] for k in filled]), problems[keys[0]][2]
        outputs = None if _output(problems[keys[0]]) is None else np.stack([_output(problems[k]) for k in filled])
        solutions = solve_batch(weights, metric, spec, outputs=outputs, seed=seed, config=config)
        for key, solution in zip(keys, solutions, strict=False):
            finish(key, solution)

    for key in (key for key in whole if key not in problems):  # nothing to solve for
        finish(key, None)
    for keys, size in _small(problems):
        if read(keys):
            continue
        filled = keys + [keys[-1]] * (size - len(keys))
        hessians = np.stack([problems[k][1] for k in filled])
        run(keys, Metric.make(hessians, seed, config, Spec.parse(problems[keys[0]][2]).rotated), size)
    metrics: dict[bool, Metric] = {}  # of one Hessian: rotated, and as it is
    current = None
    for keys in _large(problems):
        if read(keys):
            continue
        hessian, rotated = problems[keys[0]][1], Spec.parse(problems[keys[0]][2]).rotated
        if hessian is not current:  # one Hessian's factors are held at a time
            metrics, current = {}, hessian
        if rotated not in metrics:
            metrics[rotated] = Metric.make(hessian[None], seed, config, rotated)
        run(keys, metrics[rotated], len(keys))
    return solved


def _residuals(problems: Problems[Key]) -> Problems[Key]:
    """The problems that are to be solved: those with a given backbone become W − Q and factors alone, at rank 0 they fall away."""
    found = {}
    for key, problem in problems.items():
        if len(problem) < 5 or problem[4] is None:
            found[key] = problem
        elif spec := alone(problem[2]):
            weight, hessian, _, output, backbone = problem
            found[key] = (weight - backbone, hessian, spec, output)
    return found


def _output(problem: tuple) -> np.ndarray | None:
    return problem[3] if len(problem) > 3 else None


def _kind(problem: tuple) -> tuple:
    """What matrices must have in common to be solved together."""
    return problem[0].shape, str(problem[2]), _output(problem) is None


def _most(size: int, shape: tuple[int, int], spec: Spec) -> int:
    """Matrices of one batch: `size`, fewer where their factors would be too many."""
    return max(1, min(size, FACTORED_TOGETHER // bucket(spec.rank, min(shape)) ** 2)) if spec.rank else size


def _small(problems: Problems[Key]) -> Iterator[tuple[list[Key], int]]:
    """Batches of small matrices of one shape and spec, and the size that each is filled up to."""
    groups: dict[tuple, list[Key]] = defaultdict(list)
    for key, problem in problems.items():
        if len(problem[0]) < SMALL:
            groups[_kind(problem)].append(key)
    for (shape, spec, _), keys in groups.items():
        size = _most(ROWS_TOGETHER // shape[0], shape, Spec.parse(spec))
        yield from ((keys[start : start + size], size) for start in range(0, len(keys), size))


def _large(problems: Problems[Key]) -> list[list[Key]]:
    """Batches of large matrices that share Hessian, shape and spec; those of one Hessian follow each other."""
    by_hessian: dict[int, dict[tuple, list[Key]]] = defaultdict(lambda: defaultdict(list))
    for key, problem in problems.items():
        if len(problem[0]) >= SMALL:
            by_hessian[id(problem[1])][_kind(problem)].append(key)
    batches = []
    for groups in by_hessian.values():
        for (shape, spec, _), keys in groups.items():
            size = _most(len(keys), shape, Spec.parse(spec))
            batches += [keys[start : start + size] for start in range(0, len(keys), size)]
    return batches
