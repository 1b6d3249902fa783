"""Every quantizer × every property, and what normal floats, the lattice and the trellis promise beyond them."""

import itertools
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.ldlq import ldlq, pad_to_tiles
from qlr_jax.core.matrix import _decoded
from qlr_jax.core.packing import pack_stream, stream_bytes, unpack_stream
from qlr_jax.core.quantizers import QUANTIZERS, normal_float, parse_quantizer, stored_bytes
from qlr_jax.core.quantizers import e8 as lattice
from qlr_jax.core.quantizers.search import LENGTH, _forward, code_values, has_native, search_jit
from qlr_jax.core.quantizers.trellis import Trellis, gaussian_error, measured_error, read_states
from qlr_jax.core.quantizers.trellis_errors import ERRORS
from qlr_jax.errors import QLRError

TABLE = [name for kind in QUANTIZERS.values() for name in kind.examples]
SINGLES = [kind.examples[0] for kind in QUANTIZERS.values()]  # what is rounded without a companion as well
SHAPE = (21, 53)
BITS = 6


def rounded(quantizer, x):
    """Values of the real part, codes and qparams of x (*b, rows, cols), as the solver calls a quantizer."""
    by_metric = quantizer.metric_qparams(np.ones((len(x), -(-x.shape[-1] // quantizer.tile[1]))))
    return jax.tree.map(np.asarray, rounded_jit(x, by_metric, quantizer.traced(), quantizer.static()))


@partial(jax.jit, static_argnames="static")
def rounded_jit(x, by_metric, traced, static):
    """Compiled once for all rates."""
    cols = x.shape[-1]
    qparams = static.fit_qparams(x, per_row=False)
    qparams = (*qparams[: len(qparams) - len(by_metric)], *by_metric)
    of_weights = static.broadcast_qparams(qparams, cols)
    padded = pad_to_tiles(x, *static.tile)
    if static.unit_scale:  # as LDLQ does it, without feedback
        values, codes = ldlq(padded, jnp.zeros((padded.shape[-1],) * 2), of_weights, traced, static)
    else:
        values, codes = static.round_block(padded, of_weights, traced, False)
    return values[..., : x.shape[-2], :cols], codes, qparams


@partial(jax.jit, static_argnames=("quantizer", "transposed"))
def round_block(x, qparams, traced, quantizer, transposed=False):
    return quantizer.round_block(x, qparams, traced, transposed)


def stored_of(quantizer, qparams, i):
    """The qparams of one matrix that are stored: the scale of the whole is not."""
    return tuple(q[i] for q in (qparams[1:] if quantizer.unit_scale else qparams))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32) * [[[1.0]], [[0.03]]]


@pytest.fixture(scope="module", params=TABLE)
def case(request, x):
    quantizer = parse_quantizer(request.param, state_bits=BITS)
    return (quantizer, *rounded(quantizer, x.astype(np.float32)))


def packed(case, i):
    quantizer, _, codes, qparams = case
    return quantizer.pack(codes[i], stored_of(quantizer, qparams, i))


def test_stored_is_what_is_packed(case):
    quantizer = case[0]
    arrays, stored = packed(case, 0), quantizer.stored(*SHAPE)
    assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == stored
    assert stored_bytes(quantizer, *SHAPE) == sum(len(v.tobytes()) for v in arrays.values())


def test_decoded_equals_rounded(case):
    quantizer, values, _, scales = case
    for i in range(2):
        decoded = _decoded(quantizer, packed(case, i), *SHAPE)
        assert decoded.dtype == np.float32 and decoded.shape == SHAPE
        np.testing.assert_array_equal(decoded * (scales[0][i] if quantizer.unit_scale else 1.0), values[i])


def test_batch_equals_singles(case, x):
    quantizer, values, codes, _ = case
    for i in range(2):
        # beside zeros, by a program that is compiled already, and of each kind's first example alone
        for given in (np.stack([x[i], np.zeros(SHAPE)]), x[i : i + 1])[: 1 + (quantizer.name in SINGLES)]:
            one, one_codes, _ = rounded(quantizer, given.astype(np.float32))
            np.testing.assert_array_equal(one[0], values[i])
            np.testing.assert_array_equal(one_codes[0], codes[i])


def test_error_is_that_of_its_rate(case, x):
    """Within a small factor of 4^-b, the limit of a Gaussian source, and not below it."""
    quantizer, values, _, _ = case
    error = np.mean(np.square(np.asarray(values, np.float64) - x), axis=(1, 2)) / np.mean(np.square(x), axis=(1, 2))
    known = {
        "bf16": 2.0**-16,
        "none": 1.0,
        "int-1": 0.45,
        "trellis-5.5625": 14 * 4.0**-5.5625,
    }  # 6 state bits are few for that rate
    assert (error <= known.get(quantizer.name, (4 if quantizer.unit_scale else 6) * 4.0**-quantizer.bits)).all(), error
    assert (error > (0 if quantizer.name == "bf16" else 0.9 * 4.0**-quantizer.bits)).all()  # nor better than theory allows


def test_name_and_static_configuration(case):
    quantizer = case[0]
    assert parse_quantizer(quantizer.name, state_bits=BITS) == quantizer
    assert type(quantizer) in QUANTIZERS.values() and hash(quantizer.static()) is not None


def test_scales_are_cast_to_their_array(case):
    """What adaptation relies on: the array named `scales` is one of those stored, and casting gives its type."""
    quantizer = case[0]
    if quantizer.scales is not None:
        stored = packed(case, 0)[quantizer.scales]
        np.testing.assert_array_equal(np.asarray(quantizer.cast_scales(stored.astype(np.float32))), stored, strict=True)


def test_zero_matrix_stays_zero(case):
    quantizer = case[0]
    values, codes, scales = rounded(quantizer, np.zeros((2, *SHAPE), np.float32))
    assert not values.any()
    decoded = _decoded(quantizer, quantizer.pack(codes[0], stored_of(quantizer, scales, 0)), *SHAPE)
    assert quantizer.unit_scale or not decoded.any()


@pytest.mark.parametrize("name", ["none", "int-3g16a", "nf-4g32", "nvfp4", "e8-3", "trellis-2"])
def test_accelerators_take_it(name):
    """Rounding and decoding lower for TPU and CUDA, on a machine that has neither."""
    quantizer = parse_quantizer(name, state_bits=BITS)

    def there_and_back(x, arrays):
        grid = quantizer.broadcast_qparams(quantizer.fit_qparams(x, False), 16)
        return quantizer.round_block(x, grid, quantizer.traced(), False), quantizer.decode(arrays, 16, 16)

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    arrays = {key: jax.ShapeDtypeStruct(*of) for key, of in quantizer.stored(16, 16).items()}
    lowered = jax.export.export(jax.jit(there_and_back), platforms=("tpu", "cuda"))(x, arrays)
    assert lowered.platforms == ("tpu", "cuda") and lowered.out_avals[-1].shape == (16, 16)


# --- integers and normal floats


@pytest.mark.parametrize("name", ["int-2", "int-3g16", "int-4g32", "int-8", "int-4a", "int-2g32a", "nf-2g16", "nf-3", "nf-4g32"])
def test_scale_search_beats_absmax(name, x):
    quantizer = parse_quantizer(name)
    w = x[0].astype(np.float64) ** 3  # heavy tails
    ours = rounded(quantizer, np.stack([w, w]).astype(np.float32))[0][0].astype(np.float64)  # two: as `case`, compiled already
    size, levels, plain = quantizer.group or w.shape[1], 2**quantizer.width, np.empty_like(w)
    for start in range(0, w.shape[1], size):
        part = w[:, start : start + size]
        if name.startswith("nf"):
            table, scale = normal_float.levels(quantizer.width).astype(np.float64), np.abs(part).max(1)[:, None, None]
            nearest = np.abs(part[..., None] - table * scale).argmin(-1)
            plain[:, start : start + size] = table[nearest] * scale[..., 0]
            continue
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if not quantizer.asymmetric:
            high = np.abs(part).max(1)
            scale, zero = high / (levels / 2 - 1), np.full(len(part), levels / 2)
        else:
            scale = (high - low) / (levels - 1)
            zero = np.round(-low / scale)
        q = np.clip(np.round(part / scale[:, None] + zero[:, None]), 0, levels - 1)
        plain[:, start : start + size] = (q - zero[:, None]) * scale[:, None]
    assert np.square(ours - w).sum() < np.square(plain - w).sum()


def test_largest_weight_is_met_whatever_its_sign():
    """A group of one weight and zeros is exact: the positive end of the grid is one step shorter than the negative."""
    w = np.zeros((2, 16), np.float32)
    w[0, 3], w[1, 5] = 7, -7
    np.testing.assert_array_equal(rounded(parse_quantizer("int-4"), w[None])[0][0], w)


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 13))
    stream = pack_stream(codes, bits)
    assert stream.shape == (3, stream_bytes(13, bits)) == (3, -(-13 * bits // 8))
    whole = [sum(int(c) << (i * bits) for i, c in enumerate(row)) for row in codes]  # one long integer a row
    assert [int.from_bytes(row.tobytes(), "little") for row in stream] == whole
    np.testing.assert_array_equal(unpack_stream(jnp.asarray(stream), bits, 13), codes)


# as QLoRA prints them (arXiv 2305.14314, appendix E)
NF4 = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0]
NF4 += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]


def test_normal_float_levels():
    np.testing.assert_allclose(normal_float.levels(4), NF4, atol=1e-4)
    for bits in (2, 3, 4):
        levels = normal_float.levels(bits)
        assert len(levels) == 2**bits and (np.diff(levels) > 0).all()
        assert levels[0] == -1 and levels[2 ** (bits - 1) - 1] == 0 and levels[-1] == 1


def test_normal_float_takes_the_nearest_level():
    quantizer = parse_quantizer("nf-3")
    at = np.linspace(-1.3, 1.3, 521, dtype=np.float32)[None]
    values, codes = round_block(at, (np.ones((1, 1), np.float32),), (), quantizer)
    distance = np.abs(at[..., None].astype(np.float64) - normal_float.levels(3))
    np.testing.assert_allclose(np.abs(np.asarray(values, np.float64) - at), distance.min(-1), atol=1e-7)
    np.testing.assert_array_equal(normal_float.levels(3)[codes], values)


# --- the lattice


@pytest.fixture(scope="module")
def points():
    return np.asarray(jax.jit(lattice.shifted_points)(np.arange(2**16, dtype=np.int32)), np.float64)


def in_e8(points):
    """All integers or all half-odd numbers, with an even sum."""
    twice = 2 * points
    whole = (twice == np.round(twice)).all(1)
    parity = np.mod(twice, 2)
    return whole & ((parity == 0).all(1) | (parity == 1).all(1)) & (np.mod(points.sum(1), 2) == 0)


def test_points_are_of_the_lattice(points):
    assert in_e8(points - 0.25).all()
    assert len(np.unique(points, axis=0)) == 2**16
    assert not in_e8(points).any() and not in_e8(points[:9] - [0, 0, 0, 1, 0, 0, 0, 0] - 0.25).any()  # nor does the check pass all
    inside = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if np.square(v).sum() <= 10]
    assert {tuple(v) for v in lattice.magnitudes()} >= set(inside) and len(inside) == 227
    roots = lattice.roots().astype(np.float64)
    assert in_e8(roots).all() and len(np.unique(roots, axis=0)) == 256
    assert np.bincount(np.square(roots).sum(1).astype(int)).tolist() == [1, 0, 240, 0, 15]


def vectors(points):
    """Gaussian ones at several scales, the origin, points, and halfway between two points."""
    rng = np.random.default_rng(2)
    gaussian = [size * rng.standard_normal((80, 8)) for size in (0.1, 0.7, 1.0, 2.0, 20.0)]
    some = points[rng.integers(0, len(points), (2, 40))]
    axes = [s * np.eye(8) for s in (0.25, 0.5, 1.0)]
    return np.concatenate([*gaussian, np.zeros((1, 8)), np.full((1, 8), 0.25), *axes, some[0], some.mean(0)]).astype(np.float32)


@pytest.mark.parametrize("stage", ["shifted", "root"])
def test_nearest_point_is_exact(points, stage):
    table = points if stage == "shifted" else lattice.roots().astype(np.float64)
    search = jax.jit(lattice.nearest_shifted if stage == "shifted" else lattice.nearest_root)
    x = vectors(table)
    codes, again = np.split(np.asarray(search(np.concatenate([x, table]).astype(np.float32).T)), [len(x)])
    exact = x.astype(np.float64)
    best = np.concatenate([(np.square(table).sum(1) - 2 * part @ table.T).min(1) for part in np.array_split(exact, 8)])
    reached = np.square(table[codes] - exact).sum(1)
    energy = np.square(exact).sum(1)
    assert (reached <= best + energy + 1e-6 * (1 + energy)).all()
    np.testing.assert_array_equal(again, np.arange(len(table)))  # every point is its own nearest


@pytest.mark.parametrize(("bits", "most"), [(2, 0.0925), (3, 0.030), (4, 0.0095)])
def test_lattice_reaches_its_error(bits, most):
    x = np.random.default_rng(3).standard_normal((512, 64)).astype(np.float32)
    code = parse_quantizer(f"e8-{bits}")
    codes = np.asarray(round_block(x, (np.ones((1, 1), np.float32),), (), code)[1]).reshape(512, 8, -1)
    decoded = _decoded(code, code.pack(codes, ()), *x.shape).astype(np.float64)
    assert 4.0**-bits < np.square(decoded - x).sum() / np.square(x, dtype=np.float64).sum() <= most


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lattice_values_are_exact(bits):
    """On a grid of short binary fractions: no runtime can round them, in whatever order it computes."""
    stored = np.random.default_rng(4).integers(0, 256, (512, 8, bits), np.uint8)  # of the shape that is compiled already
    decoded = _decoded(parse_quantizer(f"e8-{bits}"), {"codes": stored}, 512, 64)[:64].astype(np.float64)
    np.testing.assert_array_equal(decoded * 8192, np.round(decoded * 8192))
    gain, inner = lattice.SCALES[bits]
    codes = stored[:64].astype(np.int64)
    wanted = points_of(codes[..., 0] | codes[..., 1] << 8)
    if bits == 3:
        wanted = wanted + inner * lattice.roots()[codes[..., 2]]
    if bits == 4:
        wanted = wanted + inner * points_of(codes[..., 2] | codes[..., 3] << 8)
    np.testing.assert_array_equal(decoded, (gain * wanted).reshape(64, 64))


def points_of(codes):
    """Points for 16-bit codes, float64, one after the other."""
    out = np.empty((*codes.shape, 8))
    for at, code in np.ndenumerate(codes):
        sign = np.array([1 - 2 * (code >> (8 + i) & 1) for i in range(7)] + [1.0])
        signed = sign * lattice.magnitudes()[code & 255]
        signed[7] *= 1 if signed.sum() % 2 == 0 else -1  # a half-odd number: turning it changes the sum by an odd one
        out[at] = signed + (0.25 if code >> 15 else -0.25)
    return out


@pytest.mark.parametrize(("bits", "shape"), [(2, (5, 19)), (3, (1, 8)), (4, (12, 3))])
def test_transposed_lattice(bits, shape):
    """A factor that is stored as its transpose: rounded as the transpose is, packed and decoded alike, whatever its shape."""
    code = parse_quantizer(f"e8-{bits}")
    x = np.random.default_rng(5).standard_normal((2, *shape)).astype(np.float32)
    padded = np.pad(x, [(0, 0), (0, 0), (0, -shape[1] % code.tile[1])])
    scale = np.sqrt(np.mean(np.square(x), axis=2, keepdims=True))
    without = [np.zeros((n, n), np.float32) for n in padded.shape[1:]]
    plain, codes = ldlq(padded, without[1], (scale,), (), code)
    turned, same = ldlq(padded.swapaxes(1, 2), without[0], (scale.swapaxes(1, 2),), (), code, transposed=True)
    # weights that only fill a point up are alike, and which of them takes which value is a tie
    np.testing.assert_array_equal(np.swapaxes(turned, 1, 2)[..., : shape[1]], np.asarray(plain)[..., : shape[1]])
    if not shape[1] % code.tile[1]:
        np.testing.assert_array_equal(codes, same)
    arrays = code.pack(np.asarray(same[1]), ())
    assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == code.stored(*shape)
    np.testing.assert_array_equal(_decoded(code, arrays, *shape) * scale[1], np.asarray(plain)[1, :, : shape[1]])


# --- the trellis

RATES = [Fraction(1), Fraction(17, 16), Fraction(3, 2), Fraction(9, 4), Fraction(4), Fraction(95, 16), Fraction(6)]


@pytest.fixture(scope="module")
def sequences():
    return np.random.default_rng(1).standard_normal((16, LENGTH)).astype(np.float32)


def found(sequences, rate):
    code = Trellis(rate, state_bits=BITS)
    return code, np.asarray(search_jit(jnp.asarray(sequences), jnp.asarray(code.shifts, jnp.int32), BITS, jnp.float32(code.gain)))


@pytest.mark.parametrize("rate", RATES)
def test_sequences_close_and_are_read_from_bits(sequences, rate):
    code, states = found(sequences, rate)
    before = np.roll(states, 1, axis=1)  # the last state stands before the first: the sequence is closed
    np.testing.assert_array_equal(states >> code.shifts, before & (2 ** (BITS - code.shifts) - 1))
    stream = code.pack(states.astype(np.uint16), ())["codes"]
    assert stream.shape == (16, 32 * rate)
    np.testing.assert_array_equal(read_states(jnp.asarray(stream), code.ends, BITS), states)


def test_shifts_add_up():
    for sixteenths in range(16, 97):
        code = Trellis(Fraction(sixteenths, 16))
        assert code.shifts.sum() == 16 * sixteenths and set(code.shifts) <= {sixteenths // 16, -(-sixteenths // 16)}


def viterbi(x, shifts, values, start):
    """Least cost of every last state (*b, states) over all sequences, float64, by the recursion over predecessors."""
    cost = start.astype(np.float64)
    for weight, shift in zip(x.astype(np.float64), shifts, strict=True):
        # before s came a state that ends as s >> shift says; its first `shift` bits may be any
        least = cost.reshape(*cost.shape[:-1], 2**shift, -1).min(-2)
        cost = np.repeat(least, 2**shift, axis=-1) + (weight - values) ** 2
    return cost


@pytest.mark.parametrize("rate", [Fraction(3, 2), Fraction(9, 4), Fraction(9, 2), Fraction(11, 2)])
def test_search_is_optimal(sequences, rate):
    """The forward pass is the dynamic programme's; the closed sequence is within 2 % of the best over every tail-biting state."""
    code, states = found(sequences, rate)
    values = np.asarray(code_values(jnp.arange(2**BITS), code.gain))
    shifts = jnp.asarray(code.shifts, jnp.int32)
    cost, _ = jax.jit(_forward, static_argnames="state_bits")(
        jnp.asarray(sequences.T), shifts, jnp.asarray(values)[:, None], jnp.zeros((2**BITS, 16)), state_bits=BITS
    )
    exact = np.stack([viterbi(w, code.shifts, values.astype(np.float64), np.zeros(2**BITS)) for w in sequences[:4]], 1)
    np.testing.assert_allclose(np.asarray(cost)[:, :4], exact, rtol=2e-5)
    reached = np.square(values[states].astype(np.float64) - sequences).sum(1)[:4]
    best = []
    for w in sequences[:4]:
        from_each = viterbi(w, code.shifts, values.astype(np.float64), np.where(np.eye(2**BITS, dtype=bool), 0, 1e30))
        best.append(from_each.diagonal().min())
    assert (reached >= np.array(best) * (1 - 1e-6)).all()
    assert reached.sum() < 1.02 * np.sum(best)


def test_sequences_of_known_ends_are_the_best_that_close_there(sequences):
    """One pass in place of two; an end that is not known, beside others that are, is found as without any."""
    code, states = found(sequences, Fraction(9, 4))
    values = np.asarray(code_values(jnp.arange(2**BITS), code.gain)).astype(np.float64)
    given = (jnp.asarray(sequences), jnp.asarray(code.shifts, jnp.int32), BITS, jnp.float32(code.gain))
    np.testing.assert_array_equal(search_jit(*given, jnp.asarray(states[:, -1])), states)
    ends = np.random.default_rng(0).integers(0, 2**BITS, len(sequences))
    again = np.asarray(search_jit(*given, jnp.asarray(ends)))
    np.testing.assert_array_equal(again[:, -1], ends)
    reached = np.square(values[again] - sequences).sum(1)
    for sequence, end, cost in zip(sequences[:4], ends, reached, strict=False):
        best = viterbi(sequence, code.shifts, values, np.where(np.arange(2**BITS) == end, 0, 1e30))[end]
        np.testing.assert_allclose(cost, best, rtol=3e-4)  # searches in C++ add costs in 16 bits
    ends[3] = -1
    again = np.asarray(search_jit(*given, jnp.asarray(ends)))
    np.testing.assert_array_equal(again[3], states[3])
    np.testing.assert_array_equal(np.delete(again[:, -1], 3), np.delete(ends, 3))


def test_code_is_near_gaussian():
    values = np.sort(np.asarray(code_values(jnp.arange(2**12), 1.0), np.float64))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert len(np.unique(values)) > 500


@pytest.mark.parametrize(
    ("rate", "low", "high"),
    [
        ("1", 0.25, 0.34),
        ("3/2", 0.125, 0.18),
        ("2", 0.0625, 0.09),
        ("5/2", 0.031, 0.048),
        ("3", 0.0156, 0.026),
        ("4", 0.0039, 0.0085),
        ("5", 0.00098, 0.0023),
        ("6", 0.00025, 0.0011),
    ],
)
def test_gaussian_error(rate, low, high):
    assert low < gaussian_error(Fraction(rate), 8) < high


def test_every_rate_errs_less_than_the_one_before():
    """Six decibels a bit, of which high rates lose little; between rates that are measured the prediction comes near."""
    x = np.random.default_rng(3).standard_normal((32, LENGTH)).astype(np.float32)
    errors = []
    for sixteenths in range(48, 97, 4):
        code = Trellis(Fraction(sixteenths, 16), state_bits=10)
        states = search_jit(jnp.asarray(x), jnp.asarray(code.shifts), 10, code.gain)
        errors.append(float(np.mean(np.square(np.asarray(code_values(states, code.gain)) - x)) / np.mean(np.square(x))))
        assert errors[-1] == pytest.approx(
            gaussian_error(code.rate, 10) if code.bits.is_integer() else code.gaussian_error(), rel=0.06
        )
    assert (np.diff(errors) < 0).all()
    over_limit = np.array(errors) * 4.0 ** np.arange(3, 6.001, 1 / 4)
    assert 1.2 < over_limit[0] < 1.4 and over_limit[-1] < 2.0 and (over_limit[1:] < 1.1 * over_limit[:-1]).all()


@pytest.mark.parametrize("rate, state_bits", [("1", 6), ("9/4", 8), ("6", 6)])
def test_errors_of_the_table_are_those_that_are_measured(rate, state_bits):
    """Searches in 16-bit costs, by which they were, are at most 1e-4 off those in float32."""
    rate = Fraction(rate)
    assert gaussian_error(rate, state_bits) == ERRORS[rate, state_bits]
    assert measured_error(rate, state_bits) == pytest.approx(ERRORS[rate, state_bits], rel=1e-6 if has_native() else 1e-3)


def test_more_states_are_better():
    assert gaussian_error(Fraction(2), 8) < gaussian_error(Fraction(2), 6)


def test_transposed_rounding(sequences):
    """What is stored transposed is rounded as its transpose is."""
    code = Trellis(Fraction(2), tile_rows=8, state_bits=BITS)
    a = sequences.reshape(2, 8, 256)[0, :, :32]
    scale = (np.ones((1, 1, 1), np.float32),)
    plain, codes = round_block(a[None], scale, code.traced(), code)
    turned, same = round_block(a.T[None], scale, code.traced(), code, transposed=True)
    np.testing.assert_array_equal(turned[0].T, plain[0])
    np.testing.assert_array_equal(codes, same)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Trellis(Fraction(13, 2)), r"trellis-6\.5 is not a rate; pass 1 to 6 bits in sixteenths, e\.g\. trellis-2\.25"),
    (lambda: Trellis(Fraction(7, 3)), "is not a rate"),
    (lambda: Trellis(Fraction(2), state_bits=5), "5 state bits is not offered; pass 6 to 16"),
    (lambda: Trellis(Fraction(2), state_bits=17), "17 state bits is not offered"),
    (lambda: parse_quantizer("e8-1"), "e8-1 is not offered; pass e8-2, e8-3 or e8-4"),
    (lambda: parse_quantizer("e8-5"), "e8-5 is not offered"),
    (lambda: parse_quantizer("e8-2g32"), "'e8-2g32' is not a quantizer; pass bf16"),
    (lambda: parse_quantizer("nf-5"), r"nf-5 is not offered; pass 2 to 4 bits, e\.g\. nf-4g64"),
    (lambda: parse_quantizer("nf-1"), "nf-1 is not offered"),
    (lambda: parse_quantizer("nf-4a"), "'nf-4a' is not a quantizer"),
    (lambda: parse_quantizer("nf-3g8"), "a group of 8 is not offered; pass 16 to 256"),
])  # fmt: skip
def test_refused(make, message):
    with pytest.raises(QLRError, match=message):
        make()
