"""NVFP4 against float64 numpy with ml_dtypes' float4_e2m1fn and float8_e4m3fn, and at the edges of what they hold."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qlr_jax as qlr
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.quantizers.nvfp4 import MAGNITUDES, VALUES

NVFP4 = parse_quantizer("nvfp4")
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
CASES = ["gaussian", "zero groups", "outlier", "asymmetric", "heavy tails", "one sign", "groups of many sizes"]


def weights(case, shape=(6, 53)):
    """53 columns: the last group holds 5 weights."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    if case == "zero groups":
        x[1], x[2, 16:32], x[3, 48:] = 0, 0, 0
    elif case == "outlier":
        x[0, 3] = 1e5
    elif case == "asymmetric":
        x = x + 1.5
    elif case == "heavy tails":
        x = x**3
    elif case == "one sign":
        x = -np.abs(x)
    elif case == "groups of many sizes":
        x = x * np.geomspace(1e-6, 1e3, shape[0])[:, None]
    return x.astype(np.float32)


def rounded(x, per_row=False, unit=None):
    """The unit, values in its units, their stored arrays and the scales (rows, groups), all as float64."""
    qparams = NVFP4.fit_qparams(jnp.asarray(x), per_row, unit)
    values, codes = NVFP4.round_block(jnp.asarray(x), NVFP4.broadcast_qparams(qparams, x.shape[1]), NVFP4.traced(), False)
    arrays = NVFP4.pack(np.asarray(codes), qparams[1:])
    return np.asarray(qparams[0], np.float64), np.asarray(values, np.float64), np.asarray(codes), arrays


def oracle_decoded(arrays, shape):
    """e2m1 · e4m3 from the stored bytes: two codes a byte, the first in the low half."""
    rows, cols = shape
    size = np.stack([arrays["codes"] & 15, arrays["codes"] >> 4], -1).reshape(rows, -1)[:, :cols]
    scales = np.repeat(E4M3[arrays["scales"].view(np.uint8)], 16, axis=1)[:, :cols]
    return E2M1[size] * scales


def max_scaled(x, unit):
    """The usual way: each group's largest weight falls on 6, the scale is cast to e4m3, weights go to the nearest e2m1."""
    out = np.zeros(x.shape)
    for start in range(0, x.shape[1], 16):
        part = x[:, start : start + 16] / unit
        scale = (np.abs(part).max(1, keepdims=True) / 6).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scaled = part / np.where(scale > 0, scale, 1)
        nearest = E2M1[np.abs(scaled[..., None] - E2M1).argmin(-1)]
        out[:, start : start + 16] = nearest * scale * unit
    return out


def test_levels_are_those_of_e2m1():
    np.testing.assert_array_equal(VALUES, E2M1)
    np.testing.assert_array_equal(np.signbit(VALUES), np.signbit(E2M1))


@pytest.mark.parametrize("case", CASES)
def test_what_is_stored_is_what_the_oracle_decodes(case):
    x = weights(case)
    unit, values, _, arrays = rounded(x)
    wanted = oracle_decoded(arrays, x.shape)
    np.testing.assert_array_equal(np.asarray(NVFP4.decode(arrays, *x.shape)), wanted)  # 2 + 4 bits: float32 is exact
    np.testing.assert_allclose(values, wanted * unit, rtol=2e-7)
    assert np.isfinite(wanted).all() and not (arrays["scales"].view(np.uint8) & 0x80).any()  # no NaN, no negative scale


@pytest.mark.parametrize("case", CASES)
def test_every_weight_goes_to_the_nearest_value(case):
    x = weights(case)
    unit, values, _, arrays = rounded(x)
    scales = np.repeat(E4M3[arrays["scales"].view(np.uint8)], 16, axis=1)[:, : x.shape[1]] * unit
    least = np.abs(x[..., None] - scales[..., None] * E2M1).min(-1)
    assert (np.abs(x - values) <= least * (1 + 1e-5) + 1e-6 * scales).all()


def test_ties_go_towards_zero_and_no_zero_is_negative():
    ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    codes = np.asarray(NVFP4.to_codes(jnp.asarray(np.r_[ties, -ties, 0.0, -0.0, 0.2, -0.2, 7, -1e9]), jnp.ones(())))
    np.testing.assert_array_equal(codes, [*range(7), 0, *range(9, 15), 0, 0, 0, 0, 7, 15])
    around = np.r_[np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(0))]
    np.testing.assert_array_equal(NVFP4.to_codes(jnp.asarray(around), jnp.ones(())), [*range(1, 8), *range(7)])


@pytest.mark.parametrize("case", CASES)
def test_the_scale_search_is_no_worse_than_scaling_by_the_largest(case):
    x = weights(case).astype(np.float64)
    unit, values, _, _ = rounded(x.astype(np.float32))
    edges = np.arange(0, 48, 16)  # whole groups: the search fills the last with its own last weight
    x, values = x[:, :48], values[:, :48]
    ours, plain = (np.add.reduceat(np.square(x - v), edges, axis=1) for v in (values, max_scaled(x, unit)))
    assert (ours <= plain * (1 + 1e-4) + 1e-12 * np.square(unit)).all() and ours.sum() < plain.sum()


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e20])
def test_size_does_not_matter(size):
    x = weights("gaussian") * np.float32(2.0 ** np.round(np.log2(size)))
    assert np.isfinite(x).all()
    one, other = rounded(weights("gaussian")), rounded(x)
    assert all(np.array_equal(a.view(np.uint8), other[3][key].view(np.uint8)) for key, a in one[3].items())
    np.testing.assert_allclose(other[1], x * (one[1] / weights("gaussian")), rtol=1e-6)


def test_scales_stay_in_the_range_of_e4m3():
    """From 448 down to 2⁻⁹, below which a group is zero: 2 · 10⁻⁶ of the largest weight and less."""
    x = weights("groups of many sizes") * np.array([1e-8, 1, 1, 1, 1, 1], np.float32)[:, None]
    scales = rounded(x)[3]["scales"].astype(np.float64)
    assert scales.max() <= 448 and scales[-1].max() > 0.5 * 256
    assert not scales[0].any() and ((scales == 0) | (scales >= 2.0**-9)).all()
    cast = NVFP4.cast_scales(jnp.asarray([1e9, 464.0, 448.0, 2.0**-9, 2.0**-11, 0.0]))
    np.testing.assert_array_equal(np.asarray(cast, np.float64), [448, 448, 448, 2.0**-9, 0, 0])


def test_an_outlier_spoils_its_own_group_only():
    x = weights("outlier")
    _, values, _, _ = rounded(x)
    error = np.square(x - values)
    assert abs(values[0, 3] / 1e5 - 1) < 1e-2
    error[0, :16] = 0
    # scales of the others are subnormal in e4m3 there, or of its lowest binades: up to twice the error of a Gaussian row
    assert error.mean() < 2 * 0.0066


def test_rows_have_a_unit_each():
    """A component of a factor is a row, whose scale is stored with the component."""
    x = weights("heavy tails") * np.geomspace(1e-12, 1e9, 6, dtype=np.float32)[:, None]
    unit, values, _, _ = rounded(x, per_row=True)
    np.testing.assert_allclose(unit[:, 0], np.sqrt(np.mean(np.square(x.astype(np.float64)), 1)), rtol=1e-6)
    assert (np.sum(np.square(x - values), 1) < 0.02 * np.sum(np.square(x.astype(np.float64)), 1)).all()


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4/rot"])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_solved_matrices_of_any_size(spec, size):
    x = weights("gaussian", (24, 40)) * np.float32(size)
    solution = qlr.solve(x, None, spec, iterations=1)
    dense = np.asarray(solution.value.dense(), np.float64)
    assert np.linalg.norm(dense / size - x / size) < 0.11 * np.linalg.norm(x / size)
    assert solution.value.nbytes == 24 * 20 + 24 * 3 + 4


def test_zero_is_zero():
    assert not np.asarray(qlr.solve(np.zeros((24, 40), np.float32), None, "nvfp4", iterations=1).value.dense()).any()
