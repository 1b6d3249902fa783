"""The alternation: W ≈ g · Uᵀ (Q + L R) V, Q and L R improved in turn, the best pair kept.

After Q ← LDLQ(W − L R) and (L, R) ← rank-constrained regression of W − Q, both rounded, the error tr(E H Eᵀ) is evaluated
after each half-step; the alternation stops when it no longer falls. A trellis backbone has few state bits until then, and the best
pair is made once more with all of them. The decomposition and its alternation are CALDERA's (arXiv 2405.18886, algorithms 1 and 2);
trellis backbones and factors rounded with feedback in their own metrics are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.alternation import first_step, improve_backbone, init, keep_stopped, last_step, step
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.metric import Metric
from qlr_jax.core.objective import checked_hessian, checked_weight
from qlr_jax.core.problem import MatrixProblem, kind_of_spec
from qlr_jax.core.rows import solve_rows
from qlr_jax.core.sharding import matrix_placement
from qlr_jax.core.solution import Solution, finish
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError


def solve(
    weight: Any,
    hessian: Any,
    spec: str | Spec,
    *,
    output_hessian: Any = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> Solution:
    """Compress one matrix: W ≈ g · Uᵀ (Q + L R) V, with Q, L and R on their grids.

        minimise tr(G E H Eᵀ),  E = W − g · Uᵀ (Q + L R) V

    Args:
        weight: W, (out, in).
        hessian: H = E[x xᵀ], (in, in); None means the identity.
        spec: how to store it, e.g. `trellis-2+r32@trellis-4`.
        output_hessian: G, (out, out), e.g. the mean of g gᵀ over gradients g of the end loss at the outputs, or its diagonal
            (out,), for matrices whose rows are read one by one (rank 0); None means the identity: all outputs matter alike.
        seed: of the rotation's signs.
        preset: None, the default method; "paper", CALDERA as published, for specs such as `e8-2+r64@e8-4`.
        **options: fields of `SolverConfig`, e.g. state_bits=10, iterations=8; over a preset's own.

    Returns:
        The compressed matrix, how the solve ended, and its errors.

    Raises:
        QLRError: non-finite input, a Hessian that is not symmetric positive semi-definite, a rank too large, an unknown
            spec, option or preset.

    Source: CALDERA, arXiv 2405.18886; QTIP, arXiv 2406.11235; for G: YAQA, arXiv 2505.22988.

    Example:
        >>> import numpy as np
        >>> w = np.random.default_rng(0).standard_normal((32, 48))
        >>> solution = solve(w, None, "int-4g16")
        >>> bool(solution.stats["relative_error"] < 0.1), solution.verdict.name
        (True, 'SINGLE_PASS')
    """
    weight = checked_weight(weight)
    config = SolverConfig.make(options, preset)
    matrix = checked_hessian(hessian, weight.shape[1])
    rows = None if output_hessian is None or np.ndim(output_hessian) != 1 else _checked_rows(output_hessian, len(weight))
    if rows is not None or Spec.parse(spec).by_rows:
        if rows is None and output_hessian is not None:
            raise QLRError(f"{spec}: rows that are read one by one take a diagonal of output weights; pass ({len(weight)},)")
        return solve_rows(weight, matrix, spec, row_weights=rows, seed=seed, config=config)
    output = None if output_hessian is None else checked_hessian(output_hessian, weight.shape[0], "outputs")[None]
    return solve_batch(weight[None], matrix[None], spec, outputs=output, seed=seed, config=config)[0]


def _checked_rows(weights: Any, rows: int) -> np.ndarray:
    found = np.asarray(weights, np.float64)
    if len(found) != rows or not np.isfinite(found).all() or found.min() < 0:
        raise QLRError(f"output_hessian is a diagonal of {len(found)} for {rows} rows; pass one finite number, 0 or more, a row")
    return found


# one piece: the alternation, and when which matrix leaves it
@one_blas_thread()
def solve_batch(
    weights: np.ndarray,
    hessians: np.ndarray | Metric,
    specs: str | Spec | Sequence[str | Spec],
    *,
    outputs: np.ndarray | None = None,
    seed: int = 0,
    config: SolverConfig | None = None,
    groups: Sequence[int] | None = None,
    devices: int | None = None,
    wanted: Sequence[int] | None = None,
) -> list[Solution]:
    """`solve` for matrices of one shape, (b, m, n), and of specs of one kind, computed together; inputs already checked.

    The matrices are shared out over the devices of this process, and the rows of each where devices are left over; results are
    those of one device, for batches up to near ties (`core.sharding`).

    Args:
        weights: W of each, (b, m, n), float32.
        hessians: H, one each (b, n, n), one for all (1, n, n), or a `Metric` made before of either.
        specs: how to store them, one for all or one each of one kind (`problem.kind_of_spec`).
        outputs: G of each (b, m, m) or for all (1, m, m); None: the identity.
        seed: of the rotation's signs.
        config: settings; None: the defaults.
        groups: how many matrices after each other stop iterating together, e.g. (2, 2) of four; None: all of them.
        devices: how many to use at most; None: all.
        wanted: which matrices' solutions are made of what was found; None: all.

    Returns:
        A solution each, in order.

    Raises:
        QLRError: a rank too large, `devices` below 1.
    """
    config, shape = config or SolverConfig(), weights.shape[1:]
    each = [Spec.parse(own) for own in ([specs] * len(weights) if isinstance(specs, str | Spec) else specs)]
    for own in each:
        own.nbytes(shape)  # refuses a rank too large
    spec = each[0]
    assert len({kind_of_spec(own, shape) for own in each}) == 1, "such matrices are not solved together"
    assert not spec.by_rows, "such a matrix is solved by solve_rows"
    metric = hessians if isinstance(hessians, Metric) else Metric.make(hessians, seed, config, spec.rotated)
    output = None if outputs is None else Metric.make(outputs, seed, config, spec.rotated, hadamard.OUTPUT)
    placement = matrix_placement(weights.shape[0], weights.shape[1], devices)
    problem = MatrixProblem.make(weights, metric, output, each, seed, config, placement)
    del metric, output  # on several devices the problem has its own
    if spec.rank == 0:
        state = improve_backbone(problem, init(problem, config.start))
        assert state.best is not None
        return finish(problem, state.best, [[state.error]] * len(weights), [True] * len(weights), wanted)
    final, problem = problem, problem.with_backbone_bits(config.first_bits)
    state = first_step(problem)
    members = np.repeat(np.arange(len(groups or [0])), groups or len(weights))
    members = np.append(members, np.full(len(state.error) - len(members), members[-1]))  # a mesh is filled up with the last one
    histories = [[*state.trail] for _ in members]
    running, converged = np.ones(len(members), bool), np.zeros(len(members), bool)
    before = state
    for _ in range(config.iterations - 1):
        before = state
        state = keep_stopped(running, step(problem, before), before)
        for i in np.flatnonzero(running):
            histories[i] += state.trail
        gained = 1.0 - state.best_error / np.maximum(before.best_error, 1e-30)
        # factors that hold what Q leaves worse than Q's own result will not help the next Q either
        worse = state.error > 1.2 * state.best_error
        settled = (gained < config.tolerance) | worse
        converged = np.where(running, [settled[members == group].all() for group in members], converged)
        if config.tolerance > 0:
            running = ~converged
        if not running.any():
            break
    if final.backbones != problem.backbones:
        state = last_step(final, state)
        histories = [[*history, *state.trail] for history in histories]
    best = state.best
    assert best is not None
    del state, before, problem  # decoding needs the room
    return finish(final, best, histories, converged, wanted)
