"""Factors for a given backbone, against the best rank-r approximation in both metrics, in float64."""

import numpy as np
import pytest

import qlr_jax as qlr
from qlr_jax.core.batch import solve_many
from qlr_jax.core.reconstruction import reconstruct_error
from qlr_jax.errors import QLRError

ROWS, COLS, RANK = 48, 64, 8


@pytest.fixture(scope="module")
def case(activations):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((ROWS, COLS)).astype(np.float32)
    backbone = np.round(weight * 2) / 2  # exact in bf16
    return backbone, weight, activations(COLS, 1).astype(np.float32), activations(ROWS, 2).astype(np.float32)


def least(error, hessian, output, rank):
    """The least tr(G (E − L R) H (E − L R)ᵀ): what the singular values of C_Gᵀ E C_H leave."""
    left, right = np.linalg.cholesky(output.astype(np.float64)), np.linalg.cholesky(hessian.astype(np.float64))
    values = np.linalg.svd(left.T @ error.astype(np.float64) @ right, compute_uv=False)
    return float(np.sqrt(np.sum(values[rank:] ** 2)))


def weighted(error, hessian, output):
    return float(np.sqrt(np.sum((output.astype(np.float64) @ error) * (error @ hessian.astype(np.float64)))))


@pytest.mark.parametrize("outputs", [False, True])
def test_factors_are_near_the_best_there_are(case, outputs):
    backbone, weight, hessian, output = case
    given = output if outputs else None
    found = reconstruct_error(backbone, weight, hessian, f"bf16+r{RANK}@bf16", output_hessian=given, damping=0.0)
    metric = output if outputs else np.eye(ROWS)
    error = weight - np.asarray(found.value.dense(), np.float64)
    best = least(weight - backbone, hessian, metric, RANK)
    assert best <= weighted(error, hessian, metric) <= 1.02 * best
    stat = found.stats["weighted_error" if outputs else "relative_error"]
    assert stat == pytest.approx(weighted(error, hessian, metric) / weighted(weight, hessian, metric), rel=1e-3)
    np.testing.assert_array_equal(np.asarray(found.value.backbone()), backbone)  # to the bit, whatever g is
    assert found.value.nbytes == qlr.Spec.parse(f"bf16+r{RANK}@bf16").nbytes((ROWS, COLS))


def test_coarse_factors_cost_a_little_and_rank_zero_keeps_the_backbone(case):
    backbone, weight, hessian, _ = case
    errors = [
        reconstruct_error(backbone, weight, hessian, f"bf16+r{RANK}@{g}").stats["relative_error"]
        for g in ("bf16", "int-8", "int-4")
    ]
    nothing = reconstruct_error(backbone, weight, hessian, "bf16")
    assert errors[0] < errors[2] < nothing.stats["relative_error"] and errors[1] < 1.01 * errors[0]
    np.testing.assert_array_equal(np.asarray(nothing.value.dense()), backbone)


def test_many_are_those_of_one(case):
    backbone, weight, hessian, output = case
    problems = {
        "given": (weight, hessian, "bf16+r4@int-8", output, backbone),
        "kept": (weight, hessian, "bf16", None, backbone),
        "own": (weight, hessian, "int-4g16", None, None),
    }
    seen = []
    solved = solve_many(problems, on_done=lambda key, _: seen.append(key))
    assert sorted(seen) == sorted(problems)
    single = reconstruct_error(backbone, weight, hessian, "bf16+r4@int-8", output_hessian=output)
    assert solved["given"].stats["weighted_error"] == pytest.approx(single.stats["weighted_error"], rel=1e-3)
    assert str(solved["own"].value.spec) == "int-4g16" and solved["kept"].value.layout.spec == "bf16"


def test_refusals(case):
    backbone, weight, hessian, _ = case
    for spec in ("int-4+r8@bf16", "bf16/rot+r8@bf16"):
        with pytest.raises(QLRError, match="pass bf16"):
            reconstruct_error(backbone, weight, hessian, spec)
    with pytest.raises(QLRError, match="the backbone has shape"):
        reconstruct_error(backbone.T, weight, hessian, "bf16+r8@bf16")
    with pytest.raises(QLRError, match="NaN"):
        reconstruct_error(np.full_like(backbone, np.nan), weight, hessian, "bf16+r8@bf16")
