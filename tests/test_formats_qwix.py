"""Integer grids as qwix's arrays: what they mean, and what its products make of them."""

import sys

import jax
import numpy as np
import pytest
from test_formats import random_matrix

from qlr_jax.errors import QLRError
from qlr_jax.formats.qwix_arrays import qarrays, times

qwix = pytest.importorskip("qwix")
M, N = 32, 64


@pytest.mark.parametrize("spec", ["int-1g32", "int-2", "int-3g32a", "int-5a", "int-8", "int-4g16+r4@int-8", "int-4/rot"])
def test_values_and_products_are_those_of_dense(spec):
    matrix = random_matrix(spec, (M, N))
    parts = {name: np.asarray(qwix.dequantize(part), np.float64) for name, part in qarrays(matrix).items()}
    want = np.asarray(matrix.dense(), np.float64)
    if not matrix.spec.rotated:
        got = parts["backbone"] + (parts["left"].T @ parts["right"] if matrix.spec.rank else 0)
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
    x = np.random.default_rng(2).standard_normal((2, 3, N)).astype(np.float32)
    y = jax.jit(times)(x, matrix)
    assert y.shape == (2, 3, M)
    np.testing.assert_allclose(y, x @ want.T, atol=2e-5 * np.abs(x @ want.T).max())


def test_codes_stay_as_narrow_as_qwix_can_hold_them():
    assert {str(qarrays(random_matrix(spec, (M, N)))["backbone"].qvalue.dtype) for spec in ("int-2", "int-4g32a")} == {"int4"}
    eight = qarrays(random_matrix("int-5g32a", (M, N)))["backbone"]
    assert str(eight.qvalue.dtype) == str(eight.zero_point.dtype) == "int8" and eight.scale.shape == (M, N // 32)


@pytest.mark.parametrize(
    "spec, says",
    [
        ("trellis-2", "trellis-2 is no integer grid"),
        ("int-4+r4@trellis-4", "trellis-4 is no integer grid"),
        ("int-4g48", "groups of 48 do not divide the 64 columns of the backbone"),
    ],
)
def test_what_qwix_cannot_hold_is_refused(spec, says):
    with pytest.raises(QLRError, match=says):
        qarrays(random_matrix(spec, (M, N)))


def test_without_qwix_it_is_one_sentence(monkeypatch):
    matrix = random_matrix("int-4", (M, N))
    monkeypatch.setitem(sys.modules, "qwix", None)
    for call in (lambda: qarrays(matrix), lambda: times(np.ones((1, N), np.float32), matrix)):
        with pytest.raises(QLRError, match=r"needs qwix, .*pip install 'qlr-jax\[qwix\]'"):
            call()
