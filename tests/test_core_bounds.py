"""The bounds against what they bound: a dithered quantizer and LDLQ written here, in float64 numpy, averaged over seeds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.bounds import (
    Dither,
    alternation_bound,
    ldl_diagonal,
    ldlq_bound,
    lplr_bound,
    nearest_bound,
    rank_constrained_error,
)
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.ldlq import feedback, ldlq
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.solver import solve, solve_batch
from qlr_jax.errors import QLRError

SEEDS = 100
BACKBONE = Dither(bits=4, reach=12.0)
SIZES = [(32, 32), (16, 32), (32, 16), (16, 16)]
RANKS = [0, 3, 8]


def unit_lower(h):
    """I + F and D of H = (I + F) D (I + F)ᵀ, by elimination."""
    n, rest, f, d = len(h), h.copy(), np.eye(len(h)), np.zeros(len(h))
    for j in range(n):
        d[j] = rest[j, j]
        f[j + 1 :, j] = rest[j + 1 :, j] / d[j]
        rest[j + 1 :, j + 1 :] -= np.outer(f[j + 1 :, j], rest[j, j + 1 :])
    return f, d


def dithered(x, dither, rng):
    """x rounded up or down to the grid at random, its mean kept; refuses to saturate."""
    assert np.abs(x).max() <= dither.reach
    step = 2 * dither.reach / (2**dither.bits - 1)
    place = (x + dither.reach) / step
    return (np.floor(place) + (rng.random(x.shape) < place - np.floor(place))) * step - dither.reach


def scalar_ldlq(w, h, rounding):
    """Columns from the last to the first, each aimed at W_j + Σ_{c>j} E_c F_cj; w may be a batch."""
    f, _ = unit_lower(h)
    error = np.zeros(w.shape)
    for j in reversed(range(w.shape[-1])):
        aim = w[..., j] + error[..., j + 1 :] @ f[j + 1 :, j]
        error[..., j] = w[..., j] - rounding(aim, j)
    return w - error


def loss(e, h):
    return np.einsum("...ij,jk,...ik->...", e, h, e)


def problem(activations, m, n, seed):
    h = activations(n, seed)
    return np.random.default_rng(seed).standard_normal((m, n)), h + 0.01 * np.trace(h) / n * np.eye(n)


@pytest.fixture(scope="module", params=SIZES, ids=str)
def rounded(request, activations):
    """A problem, and W − Q of `SEEDS` dithered LDLQ."""
    w, h = problem(activations, *request.param, seed=sum(request.param))
    rng = np.random.default_rng(1)
    q = scalar_ldlq(np.broadcast_to(w, (SEEDS, *w.shape)), h, lambda aim, _: dithered(aim, BACKBONE, rng))
    return w, h, w - q


def test_diagonal(activations):
    h = activations(24)
    f, d = unit_lower(h)
    np.testing.assert_allclose(f * d @ f.T, h, atol=1e-12)  # the oracle itself
    np.testing.assert_allclose(ldl_diagonal(h), d)
    assert float(feedback(jnp.asarray(h, jnp.float32), 1)[1].sum()) == pytest.approx(d.sum(), rel=1e-4)  # of what the solver uses


@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_lemma(activations, rank):
    a, h = problem(activations, 12, 20, 0)
    c = np.linalg.cholesky(h)
    u, s, vt = np.linalg.svd(a @ c, full_matrices=False)
    best = (u[:, :rank] * s[:rank] @ vt[:rank]) @ np.linalg.inv(c)
    assert rank_constrained_error(a, h, rank) == pytest.approx(loss(a - best, h), abs=1e-9)
    rng = np.random.default_rng(1)
    for _ in range(20):  # nothing near it of that rank is better
        left, right = u[:, :rank] + 0.05 * rng.standard_normal((12, rank)), rng.standard_normal((rank, 20)) * 0.05
        other = left @ (u[:, :rank].T @ best + right)
        assert loss(a - other, h) >= rank_constrained_error(a, h, rank) - 1e-9


def test_dither():
    x = np.linspace(-3, 3, 41)
    dither = Dither(2, 3.0)
    errors = np.stack([dithered(x, dither, np.random.default_rng(s)) - x for s in range(2000)])
    assert np.abs(errors.mean(0)).max() < 0.1 and np.abs(errors).max() <= dither.step
    assert 0.97 < np.square(errors).mean(0).max() / dither.variance < 1.03  # met halfway between levels, and not exceeded


@pytest.mark.parametrize("rank", RANKS)
def test_backbone_with_exact_factors(rounded, rank):
    w, h, a = rounded
    tails = np.array([rank_constrained_error(x, h, rank) for x in a])
    bound = alternation_bound(w, h, rank, BACKBONE)
    assert bound.tail == bound.error == pytest.approx(ldlq_bound(unit_lower(h)[1], len(w), BACKBONE.variance, rank))
    assert bound.full == pytest.approx(BACKBONE.variance * len(w) * unit_lower(h)[1].sum())
    mean = tails.mean() + 3 * tails.std() / SEEDS**0.5
    assert mean < bound.tail < 6 * tails.mean()
    assert bound.tail <= (1 - rank / len(w)) * bound.full * (1 + 1e-12) < bound.closed_form
    relative = np.sqrt(tails / loss(w, h))
    assert relative.mean() < bound.relative < 2.5 * relative.mean()
    # targets anywhere between two levels have two thirds of the variance of the worst: with half of it this is no bound
    assert rank or bound.tail / 2 < tails.mean() - 3 * tails.std() / SEEDS**0.5


def test_weights_halfway_between_levels_meet_the_bound():
    """H = I: no feedback, so every error is half a step, and nothing below the bound would do."""
    dither = Dither(3, 7.0)  # step 2, levels odd
    w = 2.0 * np.random.default_rng(0).integers(-2, 3, (8, 12))
    q = scalar_ldlq(w, np.eye(12), lambda aim, _: dithered(aim, dither, np.random.default_rng(1)))
    assert loss(w - q, np.eye(12)) == pytest.approx(alternation_bound(w, np.eye(12), 0, dither).error)


def test_random_signs_are_no_bound_on_the_tail():
    """The tail may fall as variances grow: errors on the diagonal alone, the rest on the grid, exceed signs everywhere."""
    dither, rank = Dither(3, 7.0), 2
    w = np.ones((3, 3)) - np.eye(3)
    diagonal = scalar_ldlq(w, np.eye(3), lambda aim, _: dithered(aim, dither, np.random.default_rng(0)))
    everywhere = np.array(list(itertools.product([-1.0, 1.0], repeat=9))).reshape(-1, 3, 3)
    mean = np.mean([rank_constrained_error(e, np.eye(3), rank) for e in everywhere])
    found = rank_constrained_error(w - diagonal, np.eye(3), rank)
    assert found == pytest.approx(1.0) and mean == pytest.approx(3 / 8)
    assert ldlq_bound(np.ones(3), 3, dither.variance, rank) == pytest.approx(found)  # met


def test_tail_on_steep_and_on_flat_diagonals():
    assert ldlq_bound(np.ones(10), 6, 1.0, 2) == (6 - 2) * (10 - 2)
    assert ldlq_bound([100, 1, 1], 3, 1.0, 1) == 3 * 2  # the steep column is fitted, not a row
    assert ldlq_bound([100, 1, 1], 3, 1.0, 2) == 2 * 1  # that column and a row
    assert ldlq_bound([5, 1, 3], 3, 1.0, 3) == 0


def rounded_factors(a, h, rank, left, right, rng, fitted=True):
    values, vectors = np.linalg.eigh(a @ h @ a.T)
    assert (np.diff(values) >= 0).all()
    u = vectors[:, ::-1][:, :rank]
    rounded = dithered(u, left, rng)
    return rounded, dithered(np.linalg.lstsq(rounded, a)[0] if fitted else u.T @ a, right, rng)


EXACT = 44  # bits: as good as not rounded


@pytest.mark.parametrize("bits", [(4, 4), (4, EXACT), (EXACT, 4)], ids=str)
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rounded_factors(activations, rank, fitted, bits):
    a, h = problem(activations, 24, 20, 3)
    left, right, rng = Dither(bits[0], 1.0), Dither(bits[1], 12.0), np.random.default_rng(0)
    pairs = [rounded_factors(a, h, rank, left, right, rng, fitted) for _ in range(3 * SEEDS)]
    losses = np.array([loss(a - found_left @ found_right, h) for found_left, found_right in pairs])
    exact, spare = rank_constrained_error(a, h, rank), 3 * losses.std() / len(pairs) ** 0.5
    added, bound = losses.mean() - exact, lplr_bound(a, h, rank, left, right) - exact
    assert spare < added and added + spare < bound < 6 * added
    assert fitted or bound / 2 < added  # each part is needed, at more than half of the variance


@pytest.mark.parametrize("rank", [3, 8])
def test_whole_alternation(rounded, rank):
    w, h, a = rounded
    left, right, rng = Dither(6, 1.0), Dither(6, 40.0), np.random.default_rng(2)
    losses = np.array([loss(x - np.matmul(*rounded_factors(x, h, rank, left, right, rng)), h) for x in a])
    bound = alternation_bound(w, h, rank, BACKBONE, left, right)
    assert losses.mean() + 3 * losses.std() / SEEDS**0.5 < bound.error < 6 * losses.mean()
    assert bound.error == pytest.approx(bound.tail + bound.factors) and bound.factors > 0
    assert alternation_bound(w, h, rank, BACKBONE, right=right).error < bound.error
    coarse = alternation_bound(w, h, rank, BACKBONE, Dither(1, 1.0))  # c = v_L m above 1: no negative weight on the tail
    assert coarse.error == pytest.approx(len(w) * coarse.full)
    fine = alternation_bound(w, h, rank, BACKBONE, Dither(40, 1.0), Dither(40, 40.0))
    assert fine.error == pytest.approx(fine.tail, rel=1e-6)


def test_damping_bounds_the_error_in_the_hessian_given(activations):
    w, _ = problem(activations, 12, 24, 0)
    h = activations(24, samples=10)  # singular
    with pytest.raises(QLRError, match="singular"):
        alternation_bound(w, h, 3, BACKBONE)
    bound = alternation_bound(w, h, 3, BACKBONE, damping=0.05)
    damped, rng = h + 0.05 * np.trace(h) / 24 * np.eye(24), np.random.default_rng(0)
    q = scalar_ldlq(np.broadcast_to(w, (SEEDS, *w.shape)), damped, lambda aim, _: dithered(aim, BACKBONE, rng))
    assert np.mean([rank_constrained_error(x, h, 3) for x in w - q]) < bound.error
    assert bound.relative == pytest.approx(np.sqrt(bound.error / loss(w, h)))


@pytest.mark.parametrize("seed", range(12))
def test_nearest_surely(activations, seed):
    w, h = problem(activations, 12, 16, seed)
    steps = np.repeat(np.random.default_rng(seed).uniform(0.1, 2.0, (12, 4)), 4, axis=1)
    q = scalar_ldlq(w, h, lambda aim, j: np.round(aim / steps[:, j]) * steps[:, j])
    d = ldl_diagonal(h)
    bound, found = nearest_bound(steps, d), loss(w - q, h)
    assert bound == pytest.approx(np.sum(steps**2 / 4 * d)) and bound / 6 < found < bound
    assert found > bound / 4 or seed  # a quarter of the step squared is not to be had for less
    for rank in RANKS:
        assert rank_constrained_error(w - q, h, rank) < nearest_bound(steps, d, rank)


def test_nearest_of_the_solvers_own_rounding(activations):
    """Feedback carries targets beyond the grid's ends: the bound has to be told how far."""
    w, h = problem(activations, 16, 32, 0)
    quantizer, f = parse_quantizer("int-3g16a"), feedback(jnp.asarray(h, jnp.float32), 1)[0]
    fit = jax.jit(lambda w: quantizer.broadcast_qparams(quantizer.fit_qparams(w, per_row=False), 32))
    grid = fit(jnp.asarray(w, jnp.float32))
    q, _ = ldlq(jnp.asarray(w, jnp.float32), f, grid, (), quantizer)
    error, steps = w - np.asarray(q, np.float64), np.broadcast_to(np.asarray(grid[0], np.float64), w.shape)
    over = np.maximum(np.abs(error @ (np.eye(32) + np.asarray(f, np.float64))) - steps / 2, 0)
    assert over.max() > 0.1 * steps.mean()
    bound = nearest_bound(steps, ldl_diagonal(h), overshoot=over)
    assert bound / 6 < loss(error, h) < bound


def test_overshoot_is_needed():
    steps, w = np.full((2, 3), 1.0), np.full((2, 3), 3.75)
    error = w - np.clip(np.round(w), -2, 1)  # a grid that ends at 1
    assert nearest_bound(steps, np.ones(3)) < loss(error, np.eye(3))
    assert nearest_bound(steps, np.ones(3), overshoot=2.25) == pytest.approx(loss(error, np.eye(3)))


BAD = {
    "rank 5 does not fit": lambda: rank_constrained_error(np.eye(4), np.eye(4), 5),
    "rank -1 does not fit": lambda: ldlq_bound(np.ones(4), 4, 1.0, -1),
    "rank 3 does not fit a matrix of 2 by 4": lambda: nearest_bound(np.ones((2, 1)), np.ones(4), 3),
    "pass \\(4, 4\\)": lambda: lplr_bound(np.eye(4), np.eye(3), 1, BACKBONE, BACKBONE),
    "indefinite": lambda: alternation_bound(np.eye(2), np.diag([1.0, -1.0]), 1, BACKBONE),
    "holds nan": lambda: rank_constrained_error([[np.nan]], [[1.0]], 0),
    "0 bits": lambda: Dither(0, 1.0),
    "reach=-1": lambda: Dither(2, -1.0),
    "singular": lambda: ldl_diagonal(np.zeros((2, 2))),
    "D = ": lambda: ldlq_bound([1.0, -1.0], 2, 1.0),
    "variance=inf": lambda: ldlq_bound([1.0], 2, np.inf),
    "damping=-1": lambda: alternation_bound(np.eye(2), np.eye(2), 1, BACKBONE, damping=-1),
    "pass \\(rows, 4\\)": lambda: nearest_bound(np.ones(4), np.ones(4)),
    "steps holds -1": lambda: nearest_bound(-np.ones((2, 1)), np.ones(4)),
    "overshoot holds -1": lambda: nearest_bound(np.ones((2, 1)), np.ones(4), overshoot=-1.0),
    "overshoot has shape \\(3,\\)": lambda: nearest_bound(np.ones((2, 1)), np.ones(4), overshoot=np.ones(3)),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    with pytest.raises(QLRError, match=message):
        BAD[message]()


def test_no_hessian_and_no_weight():
    w = np.random.default_rng(0).standard_normal((4, 6))
    assert alternation_bound(w, None, 2, BACKBONE) == alternation_bound(w, np.eye(6), 2, BACKBONE)
    assert alternation_bound(0 * w, None, 2, BACKBONE).relative == np.inf


BOUNDED = {  # spec -> settings; how far the bound may be above the error
    "int-3g16": ({}, 3),
    "int-2a+r4@int-8": ({}, 8),
    "int-2/rot+r4@int-4": ({"preset": "paper", "iterations": 2}, 4),
    "nf-3g16+r4@int-4": ({}, 8),
    "e8-2+r4@e8-4": ({"preset": "paper", "iterations": 2}, 4),
}


@pytest.mark.parametrize("spec", BOUNDED)
def test_solutions_never_exceed_their_bound(activations, spec):
    """On many random problems, of all sizes of W and with singular H, against float64."""
    given, most = BOUNDED[spec]
    config = SolverConfig.make({k: v for k, v in given.items() if k != "preset"}, given.get("preset"))
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((40, 16, 20)) * np.geomspace(1e-3, 1e3, 40)[:, None, None]
    weights[::5, :, ::7] *= 20  # outliers, which a grid may not reach
    hessians = np.stack([activations(20, i, 8 if i % 4 == 0 else 80) for i in range(40)])
    found = solve_batch(weights.astype(np.float32), hessians.astype(np.float32), spec, config=config)
    ratios = []
    for w, h, solution in zip(weights, hessians, found, strict=True):
        error = np.sqrt(loss(w - np.asarray(solution.value.dense(), np.float64), h) / loss(w, h))
        assert solution.stats["bound_note"] is None
        ratios.append(solution.stats["bound"] / error)
    assert min(ratios) > 1 and np.median(ratios) < most


NOTES = {
    "trellis-2": ({"state_bits": 6}, "trellis-2 has no covering radius"),
    "none+r4@int-8": ({}, "no backbone is rounded"),
    "int-4g16": ({"damping": 0.0}, "H is not damped"),
    "int-3": ({"output_hessian": np.eye(16)}, "errors are weighted by outputs"),
}


@pytest.mark.parametrize("spec", NOTES)
def test_where_there_is_no_bound_a_word_says_why(activations, spec):
    given, note = NOTES[spec]
    stats = solve(np.random.default_rng(0).standard_normal((16, 20)), activations(20), spec, **given).stats
    assert stats["bound"] is None and stats["bound_note"] == note


def test_a_lattice_tile_is_hardly_ever_farther_than_its_radius():
    """E8 inside the code's range: deep holes are met, and nothing is beyond them, but for the ends of the second stage."""
    x = np.random.default_rng(0).standard_normal((4096, 8)) * 0.4
    for name in ("e8-2", "e8-3", "e8-4"):
        code, scales = parse_quantizer(name), (jnp.ones((1, 1)),)
        found, _ = jax.jit(code.round_block, static_argnums=3)(x.astype(np.float32), scales, code.traced(), False)
        distance, radius = np.linalg.norm(x - np.asarray(found), axis=1), float(code.covering_radius(scales, 8)[0, 0])
        beyond = np.mean(distance > radius * (1 + 1e-6))
        assert beyond < 0.05 if name == "e8-4" else beyond == 0
        assert name == "e8-3" or distance.max() > 0.85 * radius
