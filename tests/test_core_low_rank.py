"""Rank-constrained regression against numpy's float64 decompositions."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.low_rank import bucket, refit_left, refit_right, start_basis, top_subspace

M, N, RANK, COLUMNS = 24, 40, 5, 16


@pytest.fixture(scope="module", params=["regular", "singular"])
def problem(request, activations):
    rng = np.random.default_rng(2)
    a = (rng.standard_normal((M, M)) * np.geomspace(5, 0.2, M)) @ rng.standard_normal((M, N))
    h = activations(N) if request.param == "regular" else activations(N, samples=12)
    return a, h


def f32(a):
    return jnp.asarray(a, jnp.float32)


def optimum(a, h, rank):
    """SVD_r(A C) and what is left of it, H = C Cᵀ: (U_r, sum of the squared singular values beyond r)."""
    value, vector = np.linalg.eigh(h)
    u, s, _ = np.linalg.svd(a @ (vector * np.sqrt(np.maximum(value, 0))), full_matrices=False)
    return u[:, :rank], s, np.sum(s[rank:] ** 2)


def test_subspace_is_the_best(problem):
    a, h = problem
    basis, value = top_subspace(f32(a), f32(h), f32(start_basis(M, COLUMNS, 0)), 6)
    u, s, least = optimum(a, h, RANK)
    ours = np.asarray(basis, np.float64)[:, :RANK]
    np.testing.assert_allclose(ours.T @ ours, np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(value[:RANK], s[:RANK] ** 2, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.svd(u.T @ ours)[1], 1, atol=1e-4)  # the same subspace
    left = a - ours @ (ours.T @ a)
    loss = np.trace(left @ h @ left.T)
    assert loss == pytest.approx(least, rel=1e-3)
    plain = np.linalg.svd(a)[0][:, :RANK]  # the plain SVD serves the weights, not the outputs
    other = a - plain @ plain.T @ a
    assert np.square(other).sum() < np.square(left).sum() and np.trace(other @ h @ other.T) > 1.01 * loss


def test_more_steps_come_closer(problem):
    a, h = problem
    losses = []
    for steps in (1, 6):
        basis = np.asarray(top_subspace(f32(a), f32(h), f32(start_basis(M, 6, 0)), steps)[0], np.float64)[:, :RANK]
        left = a - basis @ (basis.T @ a)
        losses.append(np.trace(left @ h @ left.T))
    assert optimum(a, h, RANK)[2] * (1 - 1e-6) <= losses[1] < losses[0]


def test_zero_matrix_gives_a_basis():
    basis, value = top_subspace(jnp.zeros((M, N)), jnp.eye(N), f32(start_basis(M, COLUMNS, 0)), 2)
    np.testing.assert_allclose(basis.T @ basis, np.eye(COLUMNS), atol=1e-5)
    assert not np.asarray(value).any()


MASK = (np.arange(COLUMNS) < RANK).astype(np.float32)


def test_refit_left(problem):
    """The normal equations of min tr((A − L R) H (A − L R)ᵀ) on the masked components; the others stay out."""
    a, h = problem
    right = np.random.default_rng(5).standard_normal((COLUMNS, N))  # beyond the rank: junk that must not matter
    left, metric = refit_left(f32(a), f32(right), f32(h), jnp.asarray(MASK))
    value, vector = np.linalg.eigh(h)
    root = vector * np.sqrt(np.maximum(value, 0))
    used = right[:RANK]
    expected = np.linalg.lstsq((used @ root).T, (a @ root).T, rcond=None)[0].T
    np.testing.assert_allclose(left[:, :RANK], expected, atol=2e-3 * np.abs(expected).max())
    assert not np.asarray(left)[:, RANK:].any()
    gram = used @ h @ used.T
    np.testing.assert_allclose(metric[:RANK, :RANK], gram, atol=1e-4 * np.abs(gram).max())
    assert not np.asarray(metric)[:RANK, RANK:].any()
    error = a - np.asarray(left, np.float64)[:, :RANK] @ used
    best = a - expected @ used
    assert np.trace(error @ h @ error.T) == pytest.approx(np.trace(best @ h @ best.T), rel=1e-4)


def test_refit_right(problem):
    a, _ = problem
    left = np.random.default_rng(6).standard_normal((M, COLUMNS))
    right, metric = refit_right(f32(a), f32(left), jnp.asarray(MASK))
    expected = np.linalg.lstsq(left[:, :RANK], a, rcond=None)[0]
    np.testing.assert_allclose(right[:, :RANK].T, expected, atol=1e-4 * np.abs(expected).max())
    assert not np.asarray(right)[:, RANK:].any()
    np.testing.assert_allclose(metric[:RANK, :RANK], left[:, :RANK].T @ left[:, :RANK], rtol=1e-4, atol=1e-3)


def test_refits_survive_dependent_components():
    a = np.random.default_rng(0).standard_normal((M, N))
    left = np.zeros((M, COLUMNS))
    left[:, :2] = a[:, :1]  # the same component twice
    right, _ = refit_right(f32(a), f32(left), jnp.asarray(MASK))
    assert np.isfinite(np.asarray(right)).all()
    best = a[:, :1] @ np.linalg.lstsq(a[:, :1], a, rcond=None)[0]
    np.testing.assert_allclose(left @ np.asarray(right, np.float64).T, best, atol=5e-3)


@pytest.mark.parametrize(
    ("rank", "limit", "columns"), [(1, 99, 16), (16, 99, 16), (17, 99, 32), (257, 999, 512), (513, 900, 768), (37, 37, 37)]
)
def test_bucket(rank, limit, columns):
    assert bucket(rank, limit) == columns
