"""Rates inside a matrix: the fewest errors for so many bits, what is stored, and every decoder of it."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core import solver
from qlr_jax.core.ldlq import feedback
from qlr_jax.core.products import packed_matmul
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.quantizers import search as searching
from qlr_jax.core.quantizers.segmented import LEAST, MOST, _errors, bounds, segments, water_filled
from qlr_jax.core.quantizers.trellis import Trellis
from qlr_jax.core.spec import Spec, expand_backbones
from qlr_jax.errors import QLRError

BITS = 6


def steep(n, seed, activations):
    """A metric whose LDLᵀ factor is far from flat."""
    h = activations(n, seed)
    return (h + 0.001 * np.trace(h) / n * np.eye(n)).astype(np.float32)


@pytest.fixture(scope="module")
def solved(activations):
    """trellis-2 and trellis-2w of one matrix of 130 × 100, in the metrics of its inputs and outputs."""
    weight = np.random.default_rng(0).standard_normal((130, 100)).astype(np.float32)
    h, g = steep(100, 0, activations), steep(130, 1, activations)
    return {spec: solver.solve(weight, h, spec, output_hessian=g, state_bits=BITS) for spec in ("trellis-2", "trellis-2w")}


@pytest.mark.parametrize("seed", range(4))
def test_rates_are_the_best_there_are(seed):
    """Against every choice of rates in steps of a quarter, at four segments."""
    draw = np.random.default_rng(seed)
    costs, sizes, mean = np.exp(draw.standard_normal(4)), draw.integers(1, 4, 4), 36
    found = water_filled(costs, sizes, mean, 8)
    assert (found >= LEAST).all() and (found <= MOST).all() and sizes @ found <= mean * sizes.sum() < sizes @ found + sizes.max()
    error = _errors(8)
    least = min(
        costs @ error[np.array(rates) - LEAST]
        for rates in itertools.product(range(LEAST, 80, 4), repeat=4)
        if sizes @ np.array(rates) <= mean * sizes.sum()
    )
    assert costs @ error[found - LEAST] <= least * 1.03  # less than one tile of the largest segment is left over


def test_where_errors_cost_alike_the_rate_is_one():
    assert (water_filled(np.ones(64), np.ones(64, int), 37, 8) == 37).all()


@pytest.mark.parametrize("mean", [LEAST, 36, MOST])
def test_segments_fill_what_is_stored(mean):
    grid = parse_quantizer(f"trellis-{mean / 16}w")
    shape = (1000, 700)
    grid = grid.for_backbone(shape)
    down, across = grid.tiles(*shape)
    (each,) = grid.metric_qparams(np.exp(np.random.default_rng(0).standard_normal((1, across))))
    assert each.shape == (1, 1, across * grid.tile[1])
    found = segments(each[0, 0, :: grid.tile[1]][bounds(across)[:-1]], across)
    (rows, size), _ = grid.stored(*shape)["codes"]
    assert rows == down and size * 0.98 <= found[-1].bytes.stop <= size
    assert found[0].cols.start == found[0].bytes.start == 0 and found[-1].cols.stop == across
    assert all(a.cols.stop == b.cols.start and a.bytes.stop == b.bytes.start for a, b in itertools.pairwise(found))


def test_it_loses_less_for_the_same_bytes(solved):
    plain, own = solved["trellis-2"], solved["trellis-2w"]
    assert own.value.nbytes <= plain.value.nbytes + 8 and own.value.nbytes == Spec.parse("trellis-2w").nbytes((130, 100))
    assert own.stats["weighted_error"] < 0.95 * plain.stats["weighted_error"]


def test_every_decoder_gives_the_same(solved):
    value = solved["trellis-2w"].value
    dense = np.asarray(value.dense())
    traced = jax.jit(lambda matrix: matrix.dense())(jax.tree.map(jnp.asarray, value))
    np.testing.assert_allclose(np.asarray(traced), dense, atol=1e-5 * np.abs(dense).max())
    x = np.random.default_rng(1).standard_normal((3, 100)).astype(np.float32)
    for implementation in ("xla", "native") if searching.has_native() else ("xla",):
        np.testing.assert_allclose(packed_matmul(x, value, implementation), x @ dense.T, atol=1e-4 * np.abs(x @ dense.T).max())


def test_a_segment_is_a_backbone_of_its_rate(solved):
    value = solved["trellis-2w"].value
    grid, arrays = Spec.parse("trellis-2w").quantizer(BITS, (130, 100)), value.part("backbone")
    whole = np.asarray(grid.decode(arrays, 130, 100))
    (height, width), (down, across) = grid.tile, grid.tiles(130, 100)
    stream, rates = np.asarray(arrays["codes"]), np.asarray(arrays["rates"])
    assert len(np.unique(rates)) > 2 and rates.shape == (min(8, across),)
    found = segments(rates, across)
    for segment in found:
        columns = segment.cols.stop - segment.cols.start
        own = Trellis(Fraction(segment.rate, 16), grid.tile_rows, BITS)
        codes = stream[:, segment.bytes].reshape(down, columns, 2 * segment.rate)
        decoded = np.asarray(own.decode({"codes": codes}, down * height, columns * width))
        left = segment.cols.start * width
        np.testing.assert_array_equal(decoded[:130, : 100 - left], whole[:, left : left + columns * width])


def test_predictions_know_of_it(activations):
    """What the rates should take off is near what they take off."""
    from qlr_jax.sensitivity.predict import predict, profile

    weight = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float32)
    h, g = (activations(n, n).astype(np.float32) + 0.05 * np.eye(n, dtype=np.float32) for n in (128, 256))
    known = profile(weight, h, 4, output=g)
    foretold = [predict(known, spec, BITS) for spec in ("trellis-2.5", "trellis-2.5w")]
    found = [
        solver.solve(weight, h, spec, output_hessian=g, state_bits=BITS).stats["weighted_error"]
        for spec in ("trellis-2.5", "trellis-2.5w")
    ]
    assert foretold[1] < foretold[0] and found[1] / found[0] == pytest.approx(foretold[1] / foretold[0], rel=0.15)


def test_without_a_metric_every_rate_is_the_mean():
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    plain, flat = (solver.solve(x, None, spec, state_bits=BITS) for spec in ("trellis-2.25", "trellis-2.25w"))
    assert np.unique(flat.value.arrays["backbone.rates"]).tolist() == [36]
    np.testing.assert_allclose(flat.value.dense(), plain.value.dense(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_the_search_in_xla_takes_a_code_a_sequence(known):
    """As each code's own search finds them."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((12, searching.LENGTH)), jnp.float32)
    codes = [Trellis(Fraction(r, 16)) for r in (16, 37, 96)]
    shifts, gains = np.stack([c.shifts for c in codes]), np.array([c.gain for c in codes], np.float32)
    which = np.arange(12) // 4
    ends = np.where(known, np.arange(12), -1)
    found = jax.jit(searching._in_xla, static_argnames=("state_bits", "free"))(
        x, shifts, gains, ends, which, state_bits=BITS, free=not known
    )
    for k in range(3):
        own = jax.jit(searching._in_xla, static_argnames=("state_bits", "free"))(
            x[which == k], shifts[k : k + 1], gains[k : k + 1], ends[which == k], jnp.zeros(0, jnp.int32),
            state_bits=BITS, free=not known,
        )  # fmt: skip
        values = [np.asarray(searching.code_values(np.asarray(s), gains[k])) for s in (found[which == k], own)]
        costs = [np.square(v - np.asarray(x[which == k])).sum(1) for v in values]
        np.testing.assert_allclose(costs[0], costs[1], rtol=1e-5)


@pytest.mark.skipif(not searching.has_native(), reason="the C++ library is not built")
def test_the_search_in_cpp_takes_a_code_a_group():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, searching.LENGTH)), jnp.float32)
    codes = [Trellis(Fraction(r, 16)) for r in (16, 37, 96)]
    shifts, gains, which = np.stack([c.shifts for c in codes]), np.array([c.gain for c in codes], np.float32), np.arange(9) // 3
    found = np.asarray(searching.search_jit(x, shifts, 10, gains, None, np.arange(3)))
    for k, code in enumerate(codes):
        own = np.asarray(searching.search_jit(x[which == k], code.shifts, 10, code.gain))
        np.testing.assert_array_equal(found[which == k], own)


def test_segments_are_as_even_as_can_be():
    assert all(np.ptp(np.diff(bounds(count))) <= 1 and len(bounds(count)) == min(count, 8) + 1 for count in range(1, 40))


def test_names():
    assert str(Spec.parse("trellis-2.0w+r8@trellis-2")) == "trellis-2w+r8@trellis-2"
    assert expand_backbones(["trellis-2..2.125w"]) == ["trellis-2w", "trellis-2.0625w", "trellis-2.125w"]
    for text, why in (("trellis-3w/rows", "leave w out"), ("trellis-2+r8@trellis-2w", "leave w out"), ("int-4w", "not a quantizer"),
                      ("trellis-7w", "not a rate")):  # fmt: skip
        with pytest.raises(QLRError, match=why):
            Spec.parse(text)


def test_the_traces_are_what_noise_costs(activations):
    """E[tr(η D ηᵀ)] of unit noise in a block of columns, against the factor itself."""
    h = steep(48, 0, activations)
    f, traces = feedback(jnp.asarray(h), 4)
    inverse = np.linalg.inv(np.eye(48) + np.asarray(f, np.float64))
    d = inverse @ h @ inverse.T
    np.testing.assert_allclose(traces, np.diagonal(d).reshape(-1, 4).sum(1), rtol=1e-3)
