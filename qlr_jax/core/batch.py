"""Many matrices: small ones of one shape and kind of spec are solved together, and large ones of one input share its metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from typing import TypeVar

import jax
import numpy as np

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.metric import Metric
from qlr_jax.core.problem import kind_of_spec
from qlr_jax.core.reconstruction import factors_only, with_backbone
from qlr_jax.core.rows import solve_rows
from qlr_jax.core.sharding import available
from qlr_jax.core.solution import Solution
from qlr_jax.core.solver import solve_batch
from qlr_jax.core.spec import Spec

Key = TypeVar("Key", bound=Hashable)
Problems = Mapping[Key, tuple]  # (W, H, spec[, G, its diagonal or None[, Q or None]])
# Batches of factorizations inside one compiled loop wait for each other for ever in XLA's thread pool on a CPU once they are large
# (jaxlib 0.10.2: 16 matrices with 64 components hang, 8 never did): (matrices · components²) stays below, on each device by itself.
FACTORED_TOGETHER = 2**15
# Matrices of fewer rows than SMALL are batched, whatever their H, to keep a search busy: ROWS_TOGETHER rows at a time, or a FEW
# rows (one matrix at least) where there are not as many.
SMALL, ROWS_TOGETHER, FEW = 1024, 2048, 128


# one piece: its inner functions share what is solved and whose metric is current
def solve_many(
    problems: Problems[Key],
    *,
    seed: int = 0,
    config: SolverConfig | None = None,
    on_done: Callable[[Key, Solution], None] | None = None,
    into: MutableMapping[Key, Solution] | None = None,
    devices: int | None = None,
) -> MutableMapping[Key, Solution]:
    """Solve (weight (m, n), Hessian (n, n), spec[, output Hessian (m, m) or None[, backbone (m, n) or None]]) for every key.

    Where a backbone is given, only factors are solved for (`correction`). Where G is a diagonal, (m,), or the spec reads single
    rows, the matrix is solved by itself, row by row (`rows.solve_rows`).

    Large matrices whose Hessian is the same array (q, k, v; gate, up) share its rotation and its factors, and those of one shape
    and spec among them are solved in one batch. Small ones are batched across Hessians, and across specs of one kind
    (`problem.kind_of_spec`), in batches of two sizes a shape, filled up by repeating, so that few programs are compiled
    (`portions`). Batches run one after another: two compiled loops that run at once in one process can wait for each other for ever
    in XLA's thread pool on a CPU (seen with jaxlib 0.10.2 on two cores). Where this process has several devices, each batch is
    shared out over them, and batches of one kind are solved side by side, so that every device has about as much at a time as one
    alone would; what stops together does not depend on them.

    Args:
        problems: checked weights and Hessians (`checked_weight`, `checked_hessian`).
        seed: of the rotations' signs.
        config: settings of the solver; None: the defaults.
        on_done: called as soon as a matrix is finished.
        into: where each solution goes as soon as it is found, e.g. onto a disk; None: a dict. It may hold those of an earlier
            run: a batch of which all are there is not solved again; any other is solved whole, because matrices of one batch
            stop iterating together, so that results are those of a run that nothing interrupted.
        devices: how many of this process's devices to use at most; None: all (`solve_batch`).

    Returns:
        `into`.

    Example:
        >>> w = np.eye(32, dtype=np.float32)
        >>> found = solve_many({"a": (w, w, "int-4"), "b": (2 * w, w, "int-4")})
        >>> sorted(found), found["a"].stats["relative_error"] < 1e-3
        (['a', 'b'], True)
    """
    config = config or SolverConfig()
    solved: MutableMapping[Key, Solution] = {} if into is None else into
    whole, problems = problems, _residuals(problems)

    def finish(key: Key, solution: Solution | None) -> None:
        backbone = whole[key][4] if len(whole[key]) > 4 else None
        if backbone is not None:
            weight, hessian = whole[key][:2]
            solution = with_backbone(backbone, solution, weight, hessian, _output(whole[key]))
        assert solution is not None
        if key not in solved:  # of an earlier run: the same
            solved[key] = solution
        if on_done is not None:
            on_done(key, solution)

    def read(keys: list[Key]) -> bool:
        if any(key not in solved for key in keys):
            return False
        if on_done is not None:
            for key in keys:
                on_done(key, solved[key])
        return True

    def run(units: list[list[Key]], hessians: np.ndarray | Metric) -> None:
        keys = [key for unit in units for key in unit]
        weights, specs = np.stack([problems[k][0] for k in keys]), [problems[k][2] for k in keys]
        given = [output for k in keys if (output := _output(problems[k])) is not None]  # of one kind: all have one, or none
        outputs = np.stack(given) if given else None
        groups = [len(unit) for unit in units]
        wanted = [i for i, key in enumerate(keys) if key not in keys[:i]]  # no repeat that fills a batch up
        how = {"seed": seed, "config": config, "groups": groups, "devices": devices, "wanted": wanted}
        found = solve_batch(weights, hessians, specs, outputs=outputs, **how)
        for i, solution in zip(wanted, found, strict=True):
            finish(keys[i], solution)

    def own(units: list[list[Key]]) -> np.ndarray:
        return np.stack([problems[key][1] for unit in units for key in unit])

    for key in (key for key in whole if key not in problems):  # nothing to solve for
        finish(key, None)
    for key, (weight, hessian, spec, output, *_) in _by_rows(problems).items():
        if not read([key]):
            finish(key, solve_rows(weight, np.asarray(hessian), spec, row_weights=output, seed=seed, config=config))
    there = available(devices)
    small = (keys + [keys[-1]] * (size - len(keys)) for keys, size in _small(problems) if not read(keys))
    for units in _side_by_side(small, problems, lambda unit: there):
        run(units, own(units))
    metrics: dict[bool, Metric] = {}  # of one Hessian: rotated, and as it is
    current = None
    large = (keys for keys in _large(problems) if not read(keys))
    for units in _side_by_side(large, problems, lambda unit: there // len(unit)):
        if len(units) > 1:
            run(units, own(units))
            continue
        hessian, rotated = problems[units[0][0]][1], Spec.parse(problems[units[0][0]][2]).rotated
        if hessian is not current:  # one Hessian's factors are held at a time
            metrics, current = {}, hessian
        if rotated not in metrics:
            metrics[rotated] = Metric.make(hessian[None], seed, config, rotated)
        run(units, metrics[rotated])
    return solved


def batches(problems: Problems[Key]) -> list[list[Key]]:
    """The keys as `solve_many` solves them together, in its order; what has nothing to solve for comes first, each by itself.

    Any of these batches, left as they are, are the batches of a `solve_many` of their keys alone.

    Example:
        >>> w = np.eye(32, dtype=np.float32)
        >>> batches({"a": (w, w, "int-4"), "b": (w, w, "int-3"), "c": (w, w, "int-4")})
        [['a', 'c'], ['b']]
    """
    solved = _residuals(problems)
    alone = [key for key in problems if key not in solved] + list(_by_rows(solved))
    return [[key] for key in alone] + [keys for keys, _ in _small(solved)] + _large(solved)


def sizes(problems: Problems[Key]) -> Iterator[tuple[tuple, int, bool]]:
    """(one of its problems, matrices, whether they share one metric) of every batch that `solve_many` solves on one device.

    Matrices that are solved row by row are left out.

    Example:
        >>> w = np.eye(32, dtype=np.float32)
        >>> [(count, shared) for _, count, shared in sizes({"a": (w, w, "int-4"), "b": (w, w, "int-3")})]
        [(4, False), (4, False)]
    """
    solved = _residuals(problems)
    for keys, size in _small(solved):
        yield solved[keys[0]], size, False
    for keys in _large(solved):
        yield solved[keys[0]], len(keys), True


def _side_by_side(
    batches: Iterable[list[Key]], problems: Problems[Key], most: Callable[[list[Key]], int]
) -> Iterator[list[list[Key]]]:
    """The batches, those of one kind and size up to `most` of them at a time; with 1 each by itself and in order."""
    waiting: dict[tuple, list[list[Key]]] = defaultdict(list)
    for keys in batches:
        units = waiting[_kind(problems[keys[0]]), len(keys)]
        units.append(keys)
        if len(units) >= most(keys):
            yield [*units]
            units.clear()
    yield from (units for units in waiting.values() if units)


def _residuals(problems: Problems[Key]) -> Problems[Key]:
    """The problems that are to be solved: those with a given backbone become W − Q and factors alone, at rank 0 they fall away."""
    found = {}
    for key, problem in problems.items():
        if len(problem) < 5 or problem[4] is None:
            found[key] = problem
        elif spec := factors_only(problem[2]):
            weight, hessian, _, output, backbone = problem
            found[key] = (weight - backbone, hessian, spec, output)
    return found


def _is_by_rows(problem: tuple) -> bool:
    output = _output(problem)
    # what stands for a matrix on another machine has no axes here
    return Spec.parse(problem[2]).by_rows or (output is not None and getattr(output, "ndim", 2) == 1)


def _by_rows(problems: Problems[Key]) -> dict[Key, tuple]:
    """The problems that are solved row by row: (W, H, spec, G's diagonal or None)."""
    return {key: (*problem[:3], _output(problem)) for key, problem in problems.items() if _is_by_rows(problem)}


def _output(problem: tuple) -> np.ndarray | None:
    return problem[3] if len(problem) > 3 else None


def _kind(problem: tuple) -> tuple:
    """What matrices must have in common to be solved together."""
    shape = problem[0].shape
    return shape, kind_of_spec(Spec.parse(problem[2]), shape), _output(problem) is None


def _most(size: int, shape: tuple[int, int], spec: Spec) -> int:
    """Matrices of one batch: `size`, fewer where their factors would be too many."""
    return max(1, min(size, FACTORED_TOGETHER // bucket(spec.rank, min(shape)) ** 2)) if spec.rank else size


def _small(problems: Problems[Key]) -> Iterator[tuple[list[Key], int]]:
    """Batches of small matrices of one shape and kind of spec, and the size that each is filled up to."""
    groups: dict[tuple, list[Key]] = defaultdict(list)
    for key, problem in problems.items():
        if len(problem[0]) < SMALL and not _is_by_rows(problem):
            groups[_kind(problem)].append(key)
    wide = jax.default_backend() != "cpu"
    for (shape, *_), keys in groups.items():
        size = _most(ROWS_TOGETHER // shape[0], shape, Spec.parse(problems[keys[0]][2]))
        start = 0
        for count, filled in portions(len(keys), size, shape[0], wide):
            yield keys[start : start + count], filled
            start += count


def portions(count: int, size: int, rows: int, wide: bool = False) -> list[tuple[int, int]]:
    """(matrices, the size that they are filled up to) of each batch that so many small matrices of one kind are solved in.

    Two sizes, so that there are few programs: `size`, for what takes more than two thirds of it, and what has FEW rows, or one
    matrix. On a CPU a matrix takes 0.4 to 0.9 of its time in the large one, and what fills a batch up takes as long as what is
    asked for; a wide device has room for it, and there an eighth is enough.

    Args:
        count: how many there are.
        size: of a large batch.
        rows: of one matrix.
        wide: whether an accelerator solves them.

    Example:
        >>> portions(11, 8, 256), portions(7, 8, 256), portions(5, 64, 32)
        ([(8, 8), (1, 1), (1, 1), (1, 1)], [(7, 8)], [(4, 4), (1, 4)])
        >>> portions(11, 8, 256, wide=True)
        [(8, 8), (3, 8)]
    """
    few, found = max(1, min(size, FEW // rows)), list[tuple[int, int]]()
    while count:
        filled = size if count > (size // 8 if wide else 2 * size / 3) else few
        found.append((min(count, filled), filled))
        count -= found[-1][0]
    return found


def _large(problems: Problems[Key]) -> list[list[Key]]:
    """Batches of large matrices that share Hessian, shape and spec; those of one Hessian follow each other."""
    by_hessian: dict[int, dict[tuple, list[Key]]] = defaultdict(lambda: defaultdict(list))
    for key, problem in problems.items():
        if len(problem[0]) >= SMALL and not _is_by_rows(problem):
            # no larger batches than those of one spec: they would take more memory, and are busy enough
            by_hessian[id(problem[1])][str(problem[2]), _kind(problem)].append(key)
    batches = []
    for groups in by_hessian.values():
        for (spec, (shape, *_)), keys in groups.items():
            size = _most(len(keys), shape, Spec.parse(spec))
            batches += [keys[start : start + size] for start in range(0, len(keys), size)]
    return batches
