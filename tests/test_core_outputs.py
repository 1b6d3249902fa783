"""The metric G of the outputs: feedback among rows, factors fitted in it, errors judged in it; against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlr_jax as qlr
from qlr_jax.core.alternation import init, step
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.ldlq import feedback, ldlq, ldlq_rows, row_group
from qlr_jax.core.metric import Metric
from qlr_jax.core.objective import quadratic
from qlr_jax.core.problem import MatrixProblem
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError

M, N = 192, 64  # three groups of 64 rows
QUICK = {"state_bits": 6, "iterations": 2}


@pytest.fixture(scope="module")
def case(activations):
    """A weight, and metrics of inputs and outputs with steep spectra."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((M, M)) * np.arange(1, M + 1) ** -0.8
    return rng.standard_normal((M, N)), activations(N) + 0.01 * np.eye(N), root @ root.T + 1e-3 * np.eye(M)


def weighted(e, h, g):
    return np.trace(g @ e @ h @ e.T)


def f32(a):
    return jnp.asarray(a, jnp.float32)


def test_quadratic_in_both_metrics(case):
    w, h, g = case
    assert float(quadratic(f32(w), f32(h), f32(g))) == pytest.approx(weighted(w, h, g), rel=1e-4)


def test_rows_feel_each_other_as_an_oracle_rounds_them(case, block_ldl):
    """A wide integer grid: groups of rows one after the other, columns one after the other, float64."""
    w, h, g = case
    fh, dh = block_ldl(h, 1)
    fg, dg = block_ldl(g, 64)
    step_size, value = 0.5, np.zeros_like(w)
    for start in range(M - 64, -1, -64):
        rows = slice(start, start + 64)
        aims = w[rows] + fg[:, rows].T @ np.where(np.arange(M)[:, None] >= start + 64, w - value, 0.0)
        for j in reversed(range(N)):
            aim = aims[:, j] + (aims - value[rows])[:, j + 1 :] @ fh[j + 1 :, j]
            value[rows, j] = step_size * np.round(aim / step_size)
    quantizer = parse_quantizer("int-8")
    grid = quantizer.broadcast_qparams((f32(np.full((1, M, 1), step_size)), f32(np.full((1, M, 1), 128.0))), N)
    assert row_group(M, 1) == 64
    found, codes = ldlq_rows(f32(w)[None], f32(fh)[None], f32(fg)[None], grid, quantizer.traced(), quantizer.static())
    assert codes.shape == (1, M, N)
    assert np.mean(np.asarray(found[0]) != value) < 0.002  # float32 may tip a value that lies between two levels
    e = w - value
    eta = (np.eye(M) + fg).T @ e @ (np.eye(N) + fh)
    assert np.abs(eta).max() <= step_size / 2 + 1e-9  # the rounding errors alone
    assert weighted(e, h, g) == pytest.approx(np.trace(dg @ eta @ dh @ eta.T), rel=1e-9)


@pytest.mark.parametrize("name", ["trellis-2", "e8-2", "int-3g16a"])
def test_rows_without_metric_are_rounded_as_before(case, name):
    """F_G = 0: the groups do not feel each other, whatever the grid and its tiles."""
    w, h, _ = case
    quantizer = parse_quantizer(name, state_bits=6, **({"tile_rows": 64} if name.startswith("trellis") else {}))
    width = quantizer.tile[1]
    pair = jnp.stack([f32(w), f32(w[::-1])])
    factor, _ = feedback(f32(h)[None], width)
    grid = jax.jit(lambda x: quantizer.broadcast_qparams(quantizer.fit_qparams(x, per_row=False), N))(pair)
    plain = ldlq(pair, factor, grid, quantizer.traced(), quantizer.static())
    rows = ldlq_rows(pair, factor, jnp.zeros((1, M, M)), grid, quantizer.traced(), quantizer.static())
    assert [a.shape for a in rows] == [a.shape for a in plain]
    assert np.mean(np.asarray(rows[1]) != np.asarray(plain[1])) < 0.02  # sums in another order tip a few
    assert float(jnp.linalg.norm(pair - rows[0])) == pytest.approx(float(jnp.linalg.norm(pair - plain[0])), rel=0.01)


@pytest.mark.parametrize("spec", ["trellis-2", "trellis-2+r8@trellis-4", "int-3g16"])
def test_outputs_that_matter_are_kept_better(case, spec):
    w, h, g = case
    plain, aware = (qlr.solve(w, h, spec, output_hessian=o, **QUICK) for o in (None, g))
    errors = [w - np.asarray(s.value.dense(), np.float64) for s in (plain, aware)]
    assert weighted(errors[1], h, g) < 0.9 * weighted(errors[0], h, g)
    assert np.trace(errors[1] @ h @ errors[1].T) > np.trace(errors[0] @ h @ errors[0].T)  # it is paid for elsewhere
    assert "weighted_error" not in plain.stats
    assert aware.stats["weighted_error"] == pytest.approx(np.sqrt(weighted(errors[1], h, g) / weighted(w, h, g)), rel=1e-3)
    assert aware.stats["weighted_error"] == pytest.approx(min(aware.stats["history"]), rel=1e-3)
    assert aware.stats["bound"] is None


def test_factors_alone_reach_the_optimum_of_both_metrics(case):
    w, h, g = case
    c, k = np.linalg.cholesky(g), np.linalg.cholesky(h)
    s = np.linalg.svd(c.T @ w @ k, compute_uv=False) ** 2
    found = qlr.solve(w, h, "none+r8@bf16", output_hessian=g, damping=0.0, subspace_steps=12)
    assert found.stats["weighted_error"] == pytest.approx(np.sqrt(s[8:].sum() / s.sum()), rel=0.02)


def test_a_race_goes_on_with_the_better_start(case):
    w, h, g = case
    spec, config = Spec.parse("trellis-2+r8@trellis-4"), SolverConfig(state_bits=6, iterations=1)
    metric = Metric.make(h[None].astype(np.float32), 0, config, True)
    output = Metric.make(g[None].astype(np.float32), 0, config, True, 1)
    problem = MatrixProblem.make(w[None].astype(np.float32), metric, output, spec, 0, config)
    alone = [float(step(problem, init(problem, start)).best_error[0]) for start in ("weight", "backbone")]
    raced = qlr.solve(w, h, spec, output_hessian=g, state_bits=6, iterations=1)
    assert raced.stats["weighted_error"] == pytest.approx(min(alone), rel=1e-3)


def test_batches_mix_matrices_with_and_without(case):
    w, h, g = (a.astype(np.float32) for a in case)
    problems = {"with": (w, h, "trellis-2", g), "without": (w, h, "trellis-2"), "none": (w, h, "trellis-2", None)}
    found = solve_many(problems, config=SolverConfig(state_bits=6))
    single = qlr.solve(w, h, "trellis-2", output_hessian=g, state_bits=6)
    assert found["with"].stats["weighted_error"] == single.stats["weighted_error"]
    assert found["without"].stats == found["none"].stats and "weighted_error" not in found["none"].stats


@pytest.mark.parametrize(("output", "says"), [
    (np.eye(N), rf"has shape \({N}, {N}\); the weight has {M} outputs, so pass \({M}, {M}\)"),
    (-np.eye(M), "indefinite"),
    (np.full((M, M), np.nan), "NaN or infinity"),
])  # fmt: skip
def test_refused(case, output, says):
    with pytest.raises(QLRError, match=says):
        qlr.solve(case[0], case[1], "trellis-2", output_hessian=output)
