"""`qlr.solve`: what it promises about its value, its statistics and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlr_jax as qlr
from qlr_jax.core import batch
from qlr_jax.core.backbone import downdate_strength, downdated, round_backbone
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import PRESETS, SolverConfig
from qlr_jax.core.factors import fit_factors
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.metric import Metric, outlier_channels
from qlr_jax.core.solver import solve_batch
from qlr_jax.errors import QLRError

FAST = {"state_bits": 6, "iterations": 2}
MAIN, SHAPE = "trellis-2+r4@trellis-4", (32, 48)


def normal(m, n, seed=0):
    return np.random.default_rng(seed).standard_normal((m, n))


def hessian_of(kind, n, make):
    if kind == "none":
        return None
    if kind == "singular":
        return make(n, samples=5)
    h = make(n)
    if kind == "outlier":  # one input channel that dwarfs the rest
        scale = np.ones(n)
        scale[n // 2] = 300
        h = h * scale * scale[:, None]
    return h


def error_of(value, weight, hessian):
    """√(tr(E H Eᵀ) / tr(W H Wᵀ)) in float64."""
    w = np.asarray(np.asarray(weight, np.float32), np.float64)
    h = np.eye(w.shape[1]) if hessian is None else np.asarray(np.asarray(hessian, np.float32), np.float64)
    e = w - np.asarray(value.dense(), np.float64)
    return np.sqrt(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T))


# spec, (m, n), Hessian, the error it must reach
CASES = [
    (MAIN, SHAPE, "plain", 0.3),
    ("trellis-3.375", SHAPE, "plain", 0.2),
    ("trellis-1.5+r4@trellis-4", SHAPE, "singular", 0.3),
    ("trellis-2.25", (37, 53), "outlier", 0.4),
    ("int-4g16+r3@bf16", (53, 37), "outlier", 0.1),
    ("none/rot+r16@bf16,trellis-3", (16, 40), "plain", 0.3),  # the full rank
    ("none+r16@int-8,bf16", SHAPE, "singular", 0.02),
    ("int-3a", (37, 53), "none", 0.2),
    ("bf16", (37, 53), "plain", 0.003),
    ("e8-2+r4@e8-4", SHAPE, "plain", 0.4),
    ("nf-4g16/rot", (37, 53), "outlier", 0.1),
]


@pytest.fixture(scope="module", params=CASES, ids=[f"{c[0]}-{c[1][0]}x{c[1][1]}-{c[2]}" for c in CASES])
def solved(request, activations):
    text, shape, kind, reach = request.param
    weight, hessian = normal(*shape), hessian_of(kind, shape[1], activations)
    return text, weight, hessian, reach, qlr.solve(weight, hessian, text, **FAST)


def test_error_is_what_it_says(solved):
    _, weight, hessian, reach, solution = solved
    found = error_of(solution.value, weight, hessian)
    assert solution.stats["relative_error"] == pytest.approx(found, rel=1e-4, abs=1e-7)
    assert 0 < found < reach


def test_bytes_are_the_spec(solved):
    text, weight, _, _, solution = solved
    assert solution.value.nbytes == qlr.Spec.parse(text).nbytes(weight.shape)
    assert solution.value.nbytes == sum(len(np.asarray(a).tobytes()) for a in solution.value.arrays.values())
    assert solution.value.shape == weight.shape == solution.value.dense().shape
    assert str(solution.value.spec) == text


def test_best_is_kept(solved):
    text, _, _, _, solution = solved
    history = solution.stats["history"]
    assert solution.stats["relative_error"] <= 1.01 * min(history)
    halves = 1 if text.startswith("none") or "+r" not in text else 2
    assert len(history) == halves * solution.stats["iterations"] and solution.stats["iterations"] <= 2
    assert (solution.verdict is qlr.Verdict.SINGLE_PASS) == ("+r" not in text)
    assert len(str(solution.verdict)) > 20  # explains itself


def test_factors_unrotate(solved):
    """Dense with and without the factors differ by (Uᵀ L)(R V)."""
    text, *_, solution = solved
    value = solution.value
    if "+r" not in text:
        assert value.without_factors().arrays.keys() == value.arrays.keys()
        return
    left, right = (np.asarray(a, np.float64) for a in value.unrotated_factors())
    rank = value.spec.rank
    assert left.shape == (value.shape[0], rank) and right.shape == (rank, value.shape[1])
    difference = np.asarray(value.dense(), np.float64)
    if value.spec.backbone != "none":
        alone = value.without_factors()
        assert alone.spec.rank == 0 and alone.spec.backbone == value.spec.backbone
        assert alone.nbytes == alone.spec.nbytes(value.shape)
        difference -= np.asarray(alone.dense(), np.float64)
    np.testing.assert_allclose(left @ right, difference, atol=2e-5 * np.abs(difference).max() + 1e-6)


def test_pytree(solved):
    value = solved[-1].value
    leaves, tree = jax.tree.flatten(value)
    again = jax.tree.unflatten(tree, leaves)
    assert again.layout == value.layout and again.arrays.keys() == value.arrays.keys()
    ways = [jax.jit(lambda q: q.dense())]  # as an argument of a compiled function
    if solved[0] in (MAIN, "int-3a"):  # one operation after another as well
        ways.append(QLRMatrix.dense)
    for dense in ways:
        found = dense(jax.tree.map(jnp.asarray, value))
        np.testing.assert_allclose(found, value.dense(), rtol=1e-5, atol=1e-6)  # host and device


@pytest.fixture(scope="module")
def main(activations):
    weight, hessian = normal(*SHAPE), activations(SHAPE[1])
    return weight, hessian, qlr.solve(weight, hessian, MAIN, **FAST)


def same(one, other):
    assert one.arrays.keys() == other.arrays.keys()
    return all(np.array_equal(one.arrays[k], other.arrays[k]) for k in one.arrays)


def test_deterministic_by_seed(main):
    weight, hessian, solution = main
    assert same(qlr.solve(weight, hessian, MAIN, **FAST).value, solution.value)
    other = qlr.solve(weight, hessian, MAIN, seed=1, **FAST)
    assert not same(other.value, solution.value) and other.value.layout.seed == 1
    assert other.stats["relative_error"] == pytest.approx(error_of(other.value, weight, hessian), rel=1e-4)


@pytest.mark.parametrize("power", [-100, 60])
def test_units_do_not_matter(main, power):
    """A power of two on H changes nothing; on W only g."""
    weight, hessian, solution = main
    assert same(qlr.solve(weight, hessian * 2.0**power, MAIN, **FAST).value, solution.value)
    scaled = qlr.solve(np.ldexp(weight.astype(np.float32), power // 2), hessian, MAIN, **FAST)
    np.testing.assert_allclose(np.ldexp(np.asarray(scaled.value.dense()), -(power // 2)), solution.value.dense(), atol=1e-5)
    assert scaled.stats["relative_error"] == pytest.approx(solution.stats["relative_error"], rel=1e-4)


def test_batch_equals_singles(main, activations):
    weight, hessian, _ = main
    spec, config = "none+r4@trellis-4", SolverConfig(state_bits=6, iterations=1)
    weights = np.stack([weight, 0.01 * normal(*SHAPE, seed=1)]).astype(np.float32)
    hessians = np.stack([hessian, activations(SHAPE[1], seed=1)]).astype(np.float32)
    for i, both in enumerate(solve_batch(weights, hessians, spec, config=config)):
        (alone,) = solve_batch(weights[i : i + 1], hessians[i : i + 1], spec, config=config)
        # sums may differ in their last bit, and a near tie then falls the other way
        assert both.stats["relative_error"] == pytest.approx(alone.stats["relative_error"], rel=0.02)
    for i, both in enumerate(solve_batch(weights, hessians, "int-4", config=config)):
        (alone,) = solve_batch(weights[i : i + 1], hessians[i : i + 1], "int-4", config=config)
        assert np.mean(np.asarray(both.value.dense() == alone.value.dense())) > 0.98


def test_specs_of_one_kind_are_solved_together(activations):
    """Rates and ranks of their own in one batch: each comes out with its own spec, about as well as by itself."""
    specs = {
        "a": "trellis-2w+r4@trellis-4",
        "b": "trellis-2.5w+r4@trellis-4",
        "c": "trellis-2.25w+r12@trellis-4",
        "d": "trellis-2w",
    }
    specs |= {"e": "trellis-3w", "f": "trellis-2w+r4@trellis-3", "g": "trellis-2"}
    problems = {
        key: (normal(*SHAPE, seed=i).astype(np.float32), activations(SHAPE[1], seed=i).astype(np.float32), spec,
              activations(SHAPE[0], seed=9 + i).astype(np.float32))
        for i, (key, spec) in enumerate(specs.items())
    }  # fmt: skip
    config = SolverConfig(state_bits=6, iterations=2)
    assert batch.batches(problems) == [["a", "b", "c"], ["d", "e"], ["f"], ["g"]]
    found = solve_many(problems, config=config)
    for key, (w, h, spec, g) in problems.items():
        value, alone = found[key].value, qlr.solve(w, h, spec, output_hessian=g, state_bits=6, iterations=2)
        assert str(value.spec) == spec and value.nbytes == qlr.Spec.parse(spec).nbytes(SHAPE)
        assert {name: a.shape for name, a in value.arrays.items()} == {name: a.shape for name, a in alone.value.arrays.items()}
        assert found[key].stats["weighted_error"] == pytest.approx(alone.stats["weighted_error"], rel=0.03)
        error = w - np.asarray(value.dense(), np.float64)
        of_all = np.sqrt(np.trace(g @ error @ h @ error.T) / np.trace(g @ w.astype(np.float64) @ h @ w.T))
        assert found[key].stats["weighted_error"] == pytest.approx(of_all, rel=1e-4)


def test_one_hessian_for_all_equals_one_each(main, monkeypatch):
    """Matrices of one input are solved together, with one H, one factor of it and one rotation."""
    weights = {k: normal(*SHAPE, seed=i).astype(np.float32) for i, k in enumerate("qk")}
    hessian = main[1].astype(np.float32)
    each = solve_batch(np.stack(list(weights.values())), np.stack([hessian] * 2), "int-4/rot")
    monkeypatch.setattr(batch, "SMALL", 32)  # so that these count as large
    made = []
    monkeypatch.setattr(batch.Metric, "make", lambda *a, make=Metric.make: made.append(a) or make(*a))
    problems = {k: (w, hessian, "int-4/rot") for k, w in weights.items()} | {"v": (weights["q"], hessian, "bf16/rot")}
    shared = solve_many(problems)
    assert len(made) == 1 and made[0][0].shape == (1, 48, 48)
    for key, alone in zip("qk", each, strict=True):
        assert shared[key].stats["relative_error"] == pytest.approx(alone.stats["relative_error"], rel=0.01)
    again = solve_many(problems | {"w": (weights["q"], hessian.copy(), "int-4/rot")})
    assert len(made) == 3  # another array is another metric
    assert again["w"].stats["relative_error"] == pytest.approx(again["q"].stats["relative_error"], rel=0.01)


@pytest.mark.parametrize("spec, outputs", [(MAIN, False), (MAIN, True), ("trellis-2+r4@trellis-2", False)])
def test_few_state_bits_while_alternating_end_where_all_of_them_do(main, activations, spec, outputs):
    """Coarse factors are best as they were before Q was rounded behind them, which then has to be behind the same ones."""
    weight, hessian, _ = main
    given = {"output_hessian": activations(len(weight)) if outputs else None, "state_bits": 10}
    few, all_of_them = (qlr.solve(weight, hessian, spec, alternation_bits=bits, **given) for bits in (6, 10))
    assert few.value.layout.state_bits == 10 and few.value.nbytes == all_of_them.value.nbytes
    key = "weighted_error" if outputs else "relative_error"
    assert few.stats[key] == pytest.approx(all_of_them.stats[key], rel=0.1)  # few tiles: in large matrices 0.99 to 1
    last = few.stats["history"][-2:]
    assert few.stats[key] == pytest.approx(min(last), rel=1e-3) and (last[0] < last[1] or spec == MAIN)
    assert few.stats["relative_error"] == pytest.approx(error_of(few.value, weight, hessian), rel=1e-4)
    near = qlr.solve(weight, hessian, spec, alternation_bits=8, **given)  # would spare nothing
    assert same(near.value, all_of_them.value)


def test_one_compilation_serves_a_bucket_of_ranks_and_all_rates(main):
    weight, hessian, _ = main  # solved with rank 4 and 2 bits already
    compiled = [f.__wrapped__._cache_size() for f in (fit_factors, round_backbone)]
    for spec in ("trellis-2.5+r8@trellis-3", "trellis-1.5+r16@trellis-4,trellis-2", "trellis-2"):
        found = qlr.solve(weight, hessian, spec, **FAST)
        assert found.stats["relative_error"] == pytest.approx(error_of(found.value, weight, hessian), rel=1e-4)
    assert [f.__wrapped__._cache_size() for f in (fit_factors, round_backbone)] == compiled


def test_rank_pays_where_the_spectrum_is_steep(main):
    """At the same bytes: factors win on low rank + noise, backbone bits win on a flat matrix."""
    weight = main[0]
    plain = "trellis-3.375"
    assert qlr.Spec.parse(MAIN).nbytes(SHAPE) == qlr.Spec.parse(plain).nbytes(SHAPE)
    rng = np.random.default_rng(4)
    steep = rng.standard_normal((32, 4)) @ rng.standard_normal((4, 48)) + 0.1 * weight

    def error(w, spec):
        return qlr.solve(w, None, spec, **FAST).stats["relative_error"]

    assert error(steep, MAIN) < 0.6 * error(steep, plain)
    assert error(weight, MAIN) > error(weight, plain)


def test_more_bits_are_better(main):
    weight, hessian, _ = main
    errors = [qlr.solve(weight, hessian, f"trellis-{b}", **FAST).stats["relative_error"] for b in ("1", "1.5", "2.25", "3", "4")]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.35 * errors[0]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_downdated_hessian_is_the_loss_after_refitting(activations, strength):
    rng = np.random.default_rng(0)
    h, error, right = activations(40), rng.standard_normal((12, 40)), rng.standard_normal((5, 40))
    down = np.asarray(downdated(jnp.asarray(h, jnp.float32)[None], jnp.asarray(right, jnp.float32)[None], strength))[0]
    left = error @ h @ right.T @ np.linalg.inv(right @ h @ right.T)  # the refitted L
    kept = error - left @ right
    full, refitted = np.trace(error @ h @ error.T), np.trace(kept @ h @ kept.T)
    expected = full - strength * (full - refitted)
    assert np.trace(error @ down.astype(np.float64) @ error.T) == pytest.approx(expected, rel=1e-4)
    assert refitted < 0.95 * full


def test_paper_preset(main):
    """CALDERA's settings: all iterations run, plain rounding with one scale a factor; options go over it."""
    weight, hessian, _ = main
    spec = "e8-2+r4@e8-4"
    paper = qlr.solve(weight, hessian, spec, preset="paper", iterations=3, inner=2)
    assert paper.stats["iterations"] == 3 and len(paper.stats["history"]) == 6
    assert paper.verdict is qlr.Verdict.ITERATION_LIMIT
    assert len(np.unique(np.asarray(paper.value.arrays["component_scale"]))) == 1
    assert paper.stats["relative_error"] == pytest.approx(error_of(paper.value, weight, hessian), rel=1e-4)
    config = SolverConfig.make({}, "paper")
    assert (config.iterations, config.inner, config.damping, config.start) == (15, 10, 1e-2, "low-rank")
    assert SolverConfig.make({"iterations": 20, "inner": 50}, "paper") == SolverConfig(
        **{**PRESETS["paper"], "iterations": 20, "inner": 50}
    )


@pytest.mark.parametrize("start", ["weight", "low-rank", "outliers", "backbone"])
def test_every_start_keeps_the_best(main, start):
    weight, hessian, _ = main
    solution = qlr.solve(weight, hessian, "int-3g16+r4@int-8", start=start, iterations=2)
    assert solution.stats["relative_error"] == pytest.approx(error_of(solution.value, weight, hessian), rel=1e-4)
    assert solution.stats["relative_error"] <= 1.01 * min(solution.stats["history"])
    if start == "backbone":  # its first result is that of rank 0
        alone = qlr.solve(weight, hessian, "int-3g16").stats["relative_error"]
        assert solution.stats["history"][0] == pytest.approx(alone, rel=0.02)


def test_weight_start_leaves_the_least_to_the_backbone(main):
    """On low rank + noise under a steep metric, fitting W first beats fitting it in H: what Q must round is smaller."""
    rng = np.random.default_rng(4)
    steep = rng.standard_normal((32, 4)) @ rng.standard_normal((4, 48)) + 0.3 * main[0]
    errors = {s: qlr.solve(steep, main[1], MAIN, start=s, **FAST).stats["history"][0] for s in ("weight", "low-rank")}
    assert errors["weight"] < 0.97 * errors["low-rank"]


def test_outlier_channels(activations):
    hessian = activations(6)[None] * np.array([1, 50, 1, 1, 9, 1])
    kept, one = outlier_channels(np.concatenate([hessian, hessian]), [2, 1])
    assert set(np.flatnonzero(kept.any(0))) <= {1, 4} and kept[1, 4] == hessian[0, 1, 4]
    assert np.flatnonzero(one.any(0)).tolist() == [1]


def test_downdate_follows_the_factors_precision():
    strengths = [downdate_strength(qlr.Spec.parse(f"int-3+r4@{f}"), SolverConfig()) for f in ("int-4", "int-6", "int-8", "bf16")]
    assert strengths == sorted(strengths) and strengths[0] == 0 and strengths[-1] == 0.9
    assert downdate_strength(qlr.Spec.parse("int-3"), SolverConfig()) == 0
    assert downdate_strength(qlr.Spec.parse("int-3+r4@int-4"), SolverConfig(downdate=1.0)) == 1


@pytest.mark.parametrize("spec", ["int-2g16", "int-4a", "int-4/rot"])
def test_bound_holds_where_it_applies(main, spec):
    weight, hessian, solution = main
    assert solution.stats["bound"] is None
    stats = qlr.solve(weight, hessian, spec).stats
    assert stats["relative_error"] < stats["bound"] < 3 * stats["relative_error"]


@pytest.mark.parametrize("spec", [MAIN, "int-3a"])
def test_zero_weight(spec):
    shape = SHAPE if spec == MAIN else (37, 53)  # one that is compiled already
    solution = qlr.solve(np.zeros(shape), None, spec, **FAST)
    assert solution.verdict is qlr.Verdict.ZERO_WEIGHT and solution.stats["relative_error"] == 0
    np.testing.assert_array_equal(solution.value.dense(), 0)
    assert solution.value.nbytes == qlr.Spec.parse(spec).nbytes(shape)


def test_zero_hessian(main):
    solution = qlr.solve(main[0], np.zeros((48, 48)), MAIN, **FAST)
    assert solution.stats["relative_error"] == 0
    assert np.isfinite(np.asarray(solution.value.dense())).all()


def test_block_rotation(activations):
    weight, hessian = normal(32, 96), activations(96)
    solution = qlr.solve(weight, hessian, "bf16/rot", rotation_block=32, **FAST)
    assert solution.value.layout.rotation_block == 32
    assert solution.stats["relative_error"] == pytest.approx(error_of(solution.value, weight, hessian), rel=1e-4)
    assert 0 < solution.stats["relative_error"] < 0.003


W, H = normal(4, 6), np.eye(6)
WITH_NAN, WITH_INF = W.copy(), W.copy()
WITH_NAN[1, 2], WITH_INF[3, 5] = np.nan, -np.inf


@pytest.mark.parametrize(("weight", "hessian", "spec", "options", "message"), [
    (WITH_NAN, None, "int-4", {}, "the weight holds nan at row 1, column 2"),
    (WITH_INF, None, "int-4", {}, "the weight holds -inf at row 3, column 5"),
    (W[0], None, "int-4", {}, r"the weight has shape \(6,\); pass a matrix"),
    (W[:, :0], None, "int-4", {}, r"the weight has shape \(4, 0\)"),
    (W, np.full((6, 6), np.nan), "int-4", {}, "the Hessian holds NaN or infinity"),
    (W, np.eye(5), "int-4", {}, r"the Hessian has shape \(5, 5\); the weight has 6 inputs, so pass \(6, 6\)"),
    (W, H + np.triu(np.ones((6, 6))), "int-4", {}, r"the Hessian is not symmetric .* pass \(H \+ Hᵀ\) / 2"),
    (W, np.diag([1, 1, 1, 1, 1, -0.1]), "int-4", {}, "the Hessian is indefinite"),
    (W, H, "int-4+r5@bf16", {}, "rank 5 is larger than the 4 × 6 matrix allows; pass at most 4"),
    (W, H, "int-44", {}, "int-44 is not offered"),
    (W, H, "int-4", {"iteration": 3}, "'iteration' is not a solver option; pass one of .*iterations"),
    (W, H, "int-4", {"iterations": 0}, "iterations=0 does nothing; pass at least 1"),
    (W, H, "int-4+r1@bf16", {"downdate": 1.5}, r"downdate=1.5 is outside \[0, 1\]"),
    (W, H, "trellis-2", {"state_bits": 20}, "20 state bits is not offered"),
    (W, H, "int-4", {"preset": "fast"}, "preset 'fast' is not known; pass one of 'paper', or leave it out"),
    (W, H, "int-4", {"start": "svd"}, "start='svd' is not known; pass 'race' or 'weight' or 'low-rank'"),
    (W, H, "int-4", {"damping": -0.1}, "damping=-0.1 is no fraction"),
    (W, H, "trellis-2", {"alternation_bits": 5}, "alternation_bits=5 is no number of state bits; pass 6 to 16"),
])  # fmt: skip
def test_refused(weight, hessian, spec, options, message):
    with pytest.raises(QLRError, match=message):
        qlr.solve(weight, hessian, spec, **options)


def test_few_small_matrices_are_not_solved_many_times_over(monkeypatch):
    """A batch is filled up to one of two sizes, and no solution is made of what fills it up."""
    sizes = []

    def counted(weights, *given, wanted, **options):
        sizes.append((len(weights), list(wanted)))
        return [object()] * len(wanted)

    monkeypatch.setattr(batch, "solve_batch", counted)
    matrix = np.eye(32, dtype=np.float32)
    for count in (1, 4, 9, 50, 65):
        assert len(batch.solve_many({i: (matrix, matrix, "int-4") for i in range(count)})) == count
    few = [(4, [0]), (4, [*range(4)]), (4, [*range(4)]), (4, [*range(4)]), (4, [0])]
    assert sizes == [*few, (64, [*range(50)]), (64, [*range(64)]), (4, [0])]


@pytest.mark.parametrize("rows", [16, 192, 576, 1000])
def test_no_batch_is_filled_up_by_much(rows):
    size = batch.ROWS_TOGETHER // rows
    for count in range(1, 3 * size + 2):
        found = batch.portions(count, size, rows)
        assert sum(own for own, _ in found) == count and {filled for _, filled in found} <= {size, max(1, 128 // rows)}
        assert all(own == filled for own, filled in found[:-1])
        own, filled = found[-1]
        assert own == filled or 3 * own > 2 * filled or filled * rows <= 128
        on_wide = batch.portions(count, size, rows, wide=True)
        assert sum(own for own, _ in on_wide) == count and all(own > filled // 8 or filled < size for own, filled in on_wide)
        assert sum(own for own, filled in on_wide if filled < size) <= max(1, size // 8)
