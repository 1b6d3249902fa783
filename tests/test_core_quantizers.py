"""Every quantizer × every property, and what the trellis promises beyond them."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.ldlq import ldlq, pad_to_tiles
from qlr_jax.core.packing import pack_stream, stream_bytes, unpack_stream
from qlr_jax.core.quantizers import parse_quantizer, stored_bytes
from qlr_jax.core.quantizers.trellis import LENGTH, Trellis, _forward, _search_jit, code_values, gaussian_error, read_states
from qlr_jax.errors import QLRError

TABLE = [
    "bf16",
    "none",
    "int-1",
    "int-3",
    "int-4g16",
    "int-5g32a",
    "int-8a",
    "trellis-1",
    "trellis-2.25",
    "trellis-3.5",
    "trellis-4",
]
SHAPE = (21, 53)
BITS = 6


def rounded(quantizer, x):
    """Values of the real part and the codes of x (*b, rows, cols), as the solver calls a quantizer."""
    cols = x.shape[-1]
    scales = quantizer.fit(jnp.asarray(x), per_row=False)
    padded = pad_to_tiles(jnp.asarray(x), *quantizer.tile)
    if quantizer.unit:  # as LDLQ does it, without feedback: compiled once for all rates
        none = jnp.zeros((padded.shape[-1],) * 2)
        values, codes = ldlq(padded, none, scales, quantizer.data(), quantizer.family())
    else:
        values, codes = quantizer.round_block(padded, quantizer.grid(scales, cols), quantizer.data(), False)
    return values[..., : x.shape[-2], :cols], codes, scales


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32) * [[[1.0]], [[0.03]]]


@pytest.fixture(scope="module", params=TABLE)
def case(request, x):
    quantizer = parse_quantizer(request.param, state_bits=BITS)
    return (quantizer, *rounded(quantizer, x.astype(np.float32)))


def packed(case, i):
    quantizer, _, codes, scales = case
    return quantizer.pack(np.asarray(codes[i]), tuple(s[i] for s in scales))


def test_stored_is_what_is_packed(case):
    quantizer = case[0]
    arrays, stored = packed(case, 0), quantizer.stored(*SHAPE)
    assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == stored
    assert stored_bytes(quantizer, *SHAPE) == sum(len(v.tobytes()) for v in arrays.values())


def test_decoded_equals_rounded(case):
    quantizer, values, _, scales = case
    for i in range(2):
        decoded = np.asarray(quantizer.decode(packed(case, i), *SHAPE))
        assert decoded.dtype == np.float32 and decoded.shape == SHAPE
        scale = np.asarray(scales[0][i]) if quantizer.unit else 1.0
        np.testing.assert_array_equal(decoded * scale, np.asarray(values[i]))


def test_batch_equals_singles(case, x):
    quantizer, values, codes, _ = case
    for i in range(2):
        one, one_codes, _ = rounded(quantizer, x[i : i + 1].astype(np.float32))
        np.testing.assert_array_equal(one[0], values[i])
        np.testing.assert_array_equal(one_codes[0], codes[i])


def test_error_is_that_of_its_rate(case, x):
    """Within a small factor of 4^-b, the limit of a Gaussian source, and not below it."""
    quantizer, values, _, _ = case
    error = np.mean(np.square(np.asarray(values, np.float64) - x), axis=(1, 2)) / np.mean(np.square(x), axis=(1, 2))
    known = {"bf16": 2.0**-16, "none": 1.0, "int-1": 0.45}
    assert (error <= known.get(quantizer.name, (4 if quantizer.unit else 6) * 4.0**-quantizer.bits)).all(), error
    assert (error > (0 if quantizer.name == "bf16" else 0.9 * 4.0**-quantizer.bits)).all()  # nor better than theory allows


def test_name_and_family(case):
    quantizer = case[0]
    assert parse_quantizer(quantizer.name, state_bits=BITS) == quantizer
    hash(quantizer.family())


def test_zero_matrix_stays_zero(case):
    quantizer = case[0]
    values, codes, scales = rounded(quantizer, np.zeros((2, *SHAPE), np.float32))
    assert not np.asarray(values).any()
    decoded = quantizer.decode(quantizer.pack(np.asarray(codes[0]), tuple(s[0] for s in scales)), *SHAPE)
    assert quantizer.unit or not np.asarray(decoded).any()


# --- integers


@pytest.mark.parametrize("name", ["int-2", "int-3g16", "int-4g32", "int-8", "int-4a", "int-2g32a"])
def test_scale_search_beats_absmax(name, x):
    quantizer = parse_quantizer(name)
    w = x[0].astype(np.float64) ** 3  # heavy tails
    ours = np.asarray(rounded(quantizer, w[None].astype(np.float32))[0][0], np.float64)
    size, levels, plain = quantizer.group or w.shape[1], 2**quantizer.width, np.empty_like(w)
    for start in range(0, w.shape[1], size):
        part = w[:, start : start + size]
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


# --- the trellis

RATES = [Fraction(1), Fraction(17, 16), Fraction(3, 2), Fraction(9, 4), Fraction(4)]


@pytest.fixture(scope="module")
def walks():
    return np.random.default_rng(1).standard_normal((16, LENGTH)).astype(np.float32)


def found(walks, rate):
    code = Trellis(rate, state_bits=BITS)
    return code, np.asarray(_search_jit(jnp.asarray(walks), jnp.asarray(code.shifts, jnp.int32), BITS, jnp.float32(code.gain)))


@pytest.mark.parametrize("rate", RATES)
def test_walks_close_and_are_read_from_bits(walks, rate):
    code, states = found(walks, rate)
    before = np.roll(states, 1, axis=1)  # the last state stands before the first: the walk is closed
    np.testing.assert_array_equal(states >> code.shifts, before & (2 ** (BITS - code.shifts) - 1))
    stream = code.pack(states.astype(np.uint16), ())["codes"]
    assert stream.shape == (16, 32 * rate)
    np.testing.assert_array_equal(read_states(jnp.asarray(stream), code.ends, BITS), states)


def test_shifts_add_up():
    for sixteenths in range(16, 65):
        code = Trellis(Fraction(sixteenths, 16))
        assert code.shifts.sum() == 16 * sixteenths and set(code.shifts) <= {sixteenths // 16, -(-sixteenths // 16)}


def viterbi(x, shifts, values, start):
    """Least cost of every last state over all walks, float64, by the recursion over predecessors."""
    states, cost = np.arange(len(values)), start.astype(np.float64)
    for weight, shift in zip(x.astype(np.float64), shifts, strict=True):
        rest, top = states >> shift, np.arange(2**shift) << (BITS - shift)
        cost = cost[rest[:, None] | top].min(1) + (weight - values) ** 2
    return cost


@pytest.mark.parametrize("rate", [Fraction(3, 2), Fraction(9, 4)])
def test_search_is_optimal(walks, rate):
    """The forward pass is the dynamic programme's; the closed walk is within 2 % of the best over every seam."""
    code, states = found(walks, rate)
    values = np.asarray(code_values(jnp.arange(2**BITS), code.gain))
    shifts = jnp.asarray(code.shifts, jnp.int32)
    cost, _ = jax.jit(_forward, static_argnames="state_bits")(
        jnp.asarray(walks.T), shifts, jnp.asarray(values), jnp.zeros((2**BITS, 16)), state_bits=BITS
    )
    exact = np.stack([viterbi(w, code.shifts, values.astype(np.float64), np.zeros(2**BITS)) for w in walks[:4]], 1)
    np.testing.assert_allclose(np.asarray(cost)[:, :4], exact, rtol=2e-5)
    reached = np.square(values[states].astype(np.float64) - walks).sum(1)[:4]
    best = []
    for w in walks[:4]:
        seams = (
            viterbi(w, code.shifts, values.astype(np.float64), np.where(np.arange(2**BITS) == s, 0, 1e30))[s]
            for s in range(2**BITS)
        )
        best.append(min(seams))
    assert (reached >= np.array(best) * (1 - 1e-6)).all()
    assert reached.sum() < 1.02 * np.sum(best)


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
    ],
)
def test_gaussian_error(rate, low, high):
    assert low < gaussian_error(Fraction(rate), 8) < high


def test_more_states_are_better():
    assert gaussian_error(Fraction(2), 8) < gaussian_error(Fraction(2), 6)


def test_transposed_rounding(walks):
    """What is stored transposed is rounded as its transpose is."""
    code = Trellis(Fraction(2), tile_rows=8, state_bits=BITS)
    a = walks.reshape(2, 8, 256)[0, :, :32]
    plain, codes = code.round_block(a[None], (jnp.ones((1, 1, 1)),), code.data(), False)
    turned, same = code.round_block(a.T[None], (jnp.ones((1, 1, 1)),), code.data(), True)
    np.testing.assert_array_equal(turned[0].T, plain[0])
    np.testing.assert_array_equal(codes, same)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Trellis(Fraction(9, 2)), r"trellis-4\.5 is not a rate; pass 1 to 4 bits in sixteenths, e\.g\. trellis-2\.25"),
    (lambda: Trellis(Fraction(7, 3)), "is not a rate"),
    (lambda: Trellis(Fraction(2), state_bits=5), "5 state bits is not offered; pass 6 to 16"),
    (lambda: Trellis(Fraction(2), state_bits=17), "17 state bits is not offered"),
])  # fmt: skip
def test_refused(make, message):
    with pytest.raises(QLRError, match=message):
        make()
