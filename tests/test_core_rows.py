"""Matrices whose rows are read one by one: solved by slabs, decoded row by row, against float64."""

import jax
import numpy as np
import pytest

import qlr_jax as qlr
from qlr_jax.core import rows as by_rows
from qlr_jax.core.batch import batches, solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.rows import row_energies, solve_rows
from qlr_jax.errors import QLRError

SPECS = ("int-4g32", "int-3g16a", "int-8", "nf-3g32", "bf16", "trellis-3/rows", "trellis-2.25/rows", "e8-3/rows")
QUICK = SolverConfig(state_bits=6)


@pytest.fixture(scope="module")
def case(activations):
    """W with rows of very different sizes (one of them zero), H, and the weights of rows."""
    rng = np.random.default_rng(0)
    sizes = np.exp(1.5 * rng.standard_normal((150, 1)))
    weight = (0.02 * sizes * rng.standard_normal((150, 64))).astype(np.float32)
    weight[7] = 0
    return weight, activations(64).astype(np.float32), np.abs(rng.standard_normal(150))


@pytest.fixture(scope="module")
def solved(case):
    weight, hessian, counts = case
    return {spec: solve_rows(weight, hessian, spec, row_weights=counts, config=QUICK) for spec in SPECS}


def oracle(weight, dense, hessian, counts=None):
    """√(Σ g e H eᵀ / Σ g w H wᵀ) in float64."""
    e, w, h = (np.asarray(a, np.float64) for a in (weight - dense, weight, hessian))
    g = np.ones(len(w)) if counts is None else counts
    return np.sqrt(np.einsum("i,ij,jk,ik", g, e, h, e) / np.einsum("i,ij,jk,ik", g, w, h, w))


@pytest.mark.parametrize("spec", SPECS)
def test_errors_are_those_of_what_is_stored(spec, case, solved):
    weight, hessian, counts = case
    solution = solved[spec]
    dense = np.asarray(solution.value.dense())
    assert solution.stats["relative_error"] == pytest.approx(oracle(weight, dense, hessian), rel=1e-4)
    assert solution.stats["weighted_error"] == pytest.approx(oracle(weight, dense, hessian, counts), rel=1e-4)
    assert not dense[7].any()
    assert solution.value.nbytes == qlr.Spec.parse(spec).nbytes(weight.shape)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_of_the_whole(spec, solved):
    value = solved[spec].value
    index = np.array([[0, 149, 7], [64, 63, 0]])
    dense = np.asarray(value.dense())
    np.testing.assert_allclose(np.asarray(value.rows(index)), dense[index], rtol=0, atol=1e-6 * np.abs(dense).max())
    np.testing.assert_allclose(np.asarray(jax.jit(lambda v, i: v.rows(i))(value, index)), dense[index], atol=1e-6)


def test_slabs_do_not_change_the_result(case, solved, monkeypatch):
    weight, hessian, counts = case
    monkeypatch.setattr(by_rows, "SLAB_WEIGHTS", 64 * 64)
    for spec in ("int-4g32", "trellis-3/rows"):
        again = solve_rows(weight, hessian, spec, row_weights=counts, config=QUICK)
        whole = solved[spec]
        assert again.stats["weighted_error"] == pytest.approx(whole.stats["weighted_error"], rel=1e-3)
        assert {k: np.shape(a) for k, a in again.value.arrays.items()} == {k: np.shape(a) for k, a in whole.value.arrays.items()}
    energies = row_energies(weight, hessian)
    np.testing.assert_allclose(energies, np.einsum("ij,jk,ik->i", weight, hessian, weight, dtype=np.float64), rtol=1e-3, atol=1e-9)


def test_unrotated_integers_are_those_of_the_ordinary_solve(case):
    weight, hessian, _ = case
    one, other = solve_rows(weight, hessian, "int-4g32").value, qlr.solve(weight, hessian, "int-4g32").value
    assert all(np.array_equal(one.arrays[key], other.arrays[key]) for key in other.arrays)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**17])
@pytest.mark.parametrize("spec", ["bf16", "int-4g32", "nf-3g32"])
def test_weights_of_any_size_keep_it(spec, factor, case, solved):
    weight, hessian, counts = case
    scaled = solve_rows(np.float32(factor) * weight, hessian, spec, row_weights=counts, config=QUICK)
    assert oracle(factor * weight, np.asarray(scaled.value.dense()), hessian) == pytest.approx(
        solved[spec].stats["relative_error"], rel=0.01
    )


def test_feedback_in_h_betters_the_outputs_and_scales_of_rows_better_small_rows(case):
    weight, hessian, _ = case
    options = {"state_bits": 6}
    aware = qlr.solve(weight, hessian, "trellis-3/rows", **options)
    blind = qlr.solve(weight, None, "trellis-3/rows", **options)
    assert aware.stats["relative_error"] < oracle(weight, np.asarray(blind.value.dense()), hessian)
    assert blind.stats["relative_error"] < oracle(weight, np.asarray(aware.value.dense()), np.eye(64))
    small = np.argsort(np.square(weight).sum(1))[1:20]
    error = np.square(weight - np.asarray(blind.value.dense()))[small].sum() / np.square(weight[small]).sum()
    assert error < 0.1  # one scale of the whole would round them to nothing


def test_solve_many_takes_them_beside_others(case):
    weight, hessian, counts = case
    problems = {
        "embed": (weight, hessian, "trellis-3/rows", counts, None),
        "other": (weight, hessian, "int-4g32"),
        "plain": (weight, hessian, "int-4g32", counts),
    }
    assert batches(problems) == [["embed"], ["plain"], ["other"]]
    found = solve_many(problems, config=QUICK)
    assert found["embed"].value.spec.by_rows and "weighted_error" in found["embed"].stats
    assert np.array_equal(found["plain"].value.arrays["backbone.codes"], found["other"].value.arrays["backbone.codes"])


def test_specs_and_inputs_that_cannot_be(case):
    weight, hessian, counts = case
    assert str(qlr.Spec.parse("trellis-3.0/rows")) == "trellis-3/rows"
    for text, says in (
        ("int-4g32/rows", "leave /rows out"),
        ("trellis-3/rows+r8@int-4", "no factors"),
        ("bf16/rows", "leave /rows out"),
    ):
        with pytest.raises(QLRError, match=says):
            qlr.Spec.parse(text)
    for spec in ("trellis-3", "int-4g32+r8@bf16"):
        with pytest.raises(QLRError, match="single rows"):
            solve_rows(weight, hessian, spec)
    with pytest.raises(QLRError, match="diagonal of 3 for 150 rows"):
        qlr.solve(weight, hessian, "int-4g32", output_hessian=counts[:3])
    with pytest.raises(QLRError, match="take a diagonal"):
        qlr.solve(weight, hessian, "trellis-3/rows", output_hessian=np.eye(150))
    with pytest.raises(QLRError, match="largest float16"):
        qlr.solve(1e8 * weight, hessian, "trellis-3/rows", state_bits=6)
