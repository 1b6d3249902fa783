"""LDLQ: the factor, the identity behind it, and the rounding, against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.ldlq import feedback, ldlq, noise_gain, pad_metric, pad_to_tiles, variance_gain
from qlr_jax.core.objective import damped, quadratic, relative_error
from qlr_jax.core.quantizers import parse_quantizer

N, M = 48, 32


@pytest.fixture(scope="module")
def hessian(activations):
    h = activations(N)
    return h + 0.01 * np.trace(h) / N * np.eye(N)


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(3).standard_normal((M, N))


def f32(a):
    return jnp.asarray(a, jnp.float32)


@pytest.mark.parametrize("block", [1, 16, 48])
def test_factor(hessian, block, block_ldl):
    found, traces = feedback(f32(hessian), block)
    f, d = block_ldl(hessian, block)
    np.testing.assert_allclose((np.eye(N) + f) @ d @ (np.eye(N) + f).T, hessian, atol=1e-10)  # the oracle itself
    np.testing.assert_allclose(found, f, atol=2e-4 * max(np.abs(f).max(), 1))
    np.testing.assert_allclose(traces, np.diagonal(d).reshape(-1, block).sum(1), rtol=1e-3)
    inside = np.arange(N)[:, None] // block <= np.arange(N) // block
    assert not np.asarray(found)[inside].any()  # strictly block-lower


def test_coarser_blocks_cost_more(hessian):
    traces = [float(feedback(f32(hessian), b)[1].sum()) for b in (1, 16, 48)]
    assert traces[0] < traces[1] < traces[2] == pytest.approx(np.trace(hessian), rel=1e-4)


def columnwise(w, f, scale, zero, levels):
    """Elementwise LDLQ, one column after the other from the last, float64."""
    value, codes = np.zeros_like(w), np.zeros(w.shape, int)
    for j in reversed(range(w.shape[1])):
        aim = w[:, j] + (w - value)[:, j + 1 :] @ f[j + 1 :, j]
        codes[:, j] = np.clip(np.round(aim / scale[:, j] + zero[:, j]), 0, levels - 1)
        value[:, j] = (codes[:, j] - zero[:, j]) * scale[:, j]
    return value, codes


@pytest.fixture(scope="module", params=["int-3", "int-3g16a"])
def elementwise(request, hessian, weight):
    quantizer = parse_quantizer(request.param)
    grid = quantizer.broadcast_qparams(quantizer.fit_qparams(f32(weight), per_row=False), N)
    f, _ = feedback(f32(hessian), 1)
    values, codes = ldlq(f32(weight), f, grid, (), quantizer)
    return quantizer, grid, f, np.asarray(values, np.float64), np.asarray(codes)


def test_codes_are_those_of_the_recursion(elementwise, weight):
    quantizer, grid, f, values, codes = elementwise
    expected, expected_codes = columnwise(
        weight, np.asarray(f, np.float64), *(np.asarray(g, np.float64) for g in grid), 2**quantizer.width
    )
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_loss_is_that_of_the_rounding_errors(elementwise, weight, hessian, block_ldl):
    """tr(E H Eᵀ) = tr(η D ηᵀ), η what each rounding missed its aim by."""
    *_, values, _ = elementwise
    f, d = block_ldl(hessian, 1)
    error = weight - values
    eta = error + error @ f
    assert np.trace(error @ hessian @ error.T) == pytest.approx(np.trace(eta @ d @ eta.T), rel=1e-9)
    clipped = np.abs(eta) > np.abs(np.asarray(elementwise[1][0])) * 0.51
    assert clipped.mean() < 0.1  # η is within half a step, but for the few that fall off the grid


def test_worse_on_the_weights_better_on_the_outputs(elementwise, weight, hessian):
    quantizer, grid, _, values, _ = elementwise
    plain = np.asarray(quantizer.round_block(f32(weight), grid, (), False)[0], np.float64)

    def losses(v):
        return np.square(weight - v).sum(), np.trace((weight - v) @ hessian @ (weight - v).T)

    (ours, ours_out), (theirs, theirs_out) = losses(values), losses(plain)
    assert ours > 1.02 * theirs and ours_out < 0.9 * theirs_out


def test_trellis_loss_and_outputs(weight, hessian, block_ldl):
    quantizer = parse_quantizer("trellis-2", state_bits=6)
    grid = quantizer.fit_qparams(f32(weight), per_row=False)
    f, d = block_ldl(hessian, 16)
    values, codes = ldlq(f32(weight), feedback(f32(hessian), 16)[0], grid, quantizer.traced(), quantizer.static())
    assert codes.shape == (M // 16, N // 16, 256)
    plain, _ = ldlq(f32(weight), jnp.zeros((N, N)), grid, quantizer.traced(), quantizer.static())
    error, other = (weight - np.asarray(v, np.float64) for v in (values, plain))
    eta = error + error @ f
    assert np.trace(error @ hessian @ error.T) == pytest.approx(np.trace(eta @ d @ eta.T), rel=1e-9)
    assert np.square(error).sum() > np.square(other).sum()
    assert np.trace(error @ hessian @ error.T) < np.trace(other @ hessian @ other.T)


def test_transposed_codes_store_the_transpose(weight, block_ldl):
    """A matrix whose transpose is stored: its codes decode to the transpose of its values."""
    quantizer = parse_quantizer("trellis-2", tile_rows=8, state_bits=6)
    w = f32(weight[None, :, :16])  # (m, k): walks are 32 rows of 8 components
    metric = np.eye(16) + 0.5
    factor, _ = feedback(f32(metric), 8)
    values, codes = ldlq(w, factor[None], (jnp.ones((1, 1, 1)),), quantizer.traced(), quantizer.static(), transposed=True)
    decoded = quantizer.decode(quantizer.pack(np.asarray(codes[0]), ()), 16, M)
    np.testing.assert_array_equal(decoded, values[0].T)
    error = weight[:, :16] - np.asarray(values[0], np.float64)
    f, d = block_ldl(metric, 8)
    eta = error + error @ f
    assert np.trace(error @ metric @ error.T) == pytest.approx(np.trace(eta @ d @ eta.T), rel=1e-9)
    assert np.square(eta).mean() < 0.25  # each block was aimed at with the feedback of the others


def test_padding(hessian):
    assert pad_to_tiles(jnp.ones((2, 17, 33)), 16, 16).shape == (2, 32, 48)
    padded = np.asarray(pad_metric(f32(hessian)[None, :45, :45], 16))[0]
    np.testing.assert_array_equal(padded[:45, :45], f32(hessian)[:45, :45])
    filler = np.diag(padded)[45:]
    assert not padded[:45, 45:].any() and not padded[45:, :45].any()
    np.testing.assert_allclose(filler, np.trace(hessian[:45, :45]) / 45, rtol=1e-5)


def test_objective(weight, hessian):
    approx = np.round(weight)
    error = weight - approx
    loss = np.trace(error @ hessian @ error.T)
    assert float(quadratic(f32(error), f32(hessian))) == pytest.approx(loss, rel=1e-5)
    expected = np.sqrt(loss / np.trace(weight @ hessian @ weight.T))
    assert float(relative_error(f32(weight), f32(approx), f32(hessian))) == pytest.approx(expected, rel=1e-5)
    zero = jnp.zeros((2, 2))
    assert float(relative_error(zero, zero, jnp.eye(2))) == 0
    np.testing.assert_allclose(damped(f32(hessian), 0.5), hessian + 0.5 * np.trace(hessian) / N * np.eye(N), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(damped(zero, 0.5), np.eye(2))


def test_echo_is_the_noise_that_feedback_adds(hessian, activations):
    def exact(f):
        return np.square(np.eye(len(f)) - np.linalg.inv(np.eye(len(f)) + f)).sum() / len(f)

    f = np.asarray(feedback(f32(hessian), 16)[0], np.float64)
    assert float(noise_gain(f32(f))) == pytest.approx(exact(f), rel=1e-4)
    large = 288  # beyond the width to which every unit vector is a probe
    wide = np.tril(np.random.default_rng(0).standard_normal((large, large)), -1) / large**0.5
    assert float(noise_gain(f32(wide))) == pytest.approx(exact(wide), rel=0.2)
    # noise of variance D on targets whose variance it raises itself
    phi = exact(f)
    assert variance_gain(0.1, phi) == pytest.approx(1 + 0.1 * phi * variance_gain(0.1, phi))
