"""The search in C++: every instruction set gives the same bits, and paths as good as those of XLA's search."""

import ctypes
import subprocess
import sys
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax import native
from qlr_jax.core.quantizers import search
from qlr_jax.core.quantizers.search import LENGTH, code_values
from qlr_jax.core.quantizers.trellis import Trellis

there = pytest.mark.skipif(native.library() is None, reason=f"no library: {native.missing()}")
SETS = ("portable", "avx2", "avx512", "neon")


@pytest.fixture(scope="module")
def sequences():
    return np.random.default_rng(2).standard_normal((6, LENGTH)).astype(np.float32)


def searched(x, code, by="portable", exact=False, ends=None, state_bits=None):
    """States by one instruction set, without JAX; None where this machine has none of it."""
    library, states = native.library(), np.empty(x.shape, np.int32)
    ends = np.full(len(x), -1, np.int32) if ends is None else ends.astype(np.int32)
    shifts = code.shifts.astype(np.int32)
    wrong = library.qlr_search(
        by.encode(), x.ctypes, shifts.ctypes, ctypes.c_float(code.gain), ends.ctypes, ctypes.c_int64(len(x)),
        state_bits or code.state_bits, int(exact), states.ctypes,
    )  # fmt: skip
    return None if wrong else states


def error(states, x, code):
    return float(np.square(np.asarray(code_values(states, code.gain), np.float64) - x).sum())


@there
@pytest.mark.parametrize("by", SETS[1:])
@pytest.mark.parametrize("exact", [False, True])
def test_every_instruction_set_gives_the_same_bits(sequences, by, exact):
    if searched(sequences[:1], Trellis(Fraction(2), state_bits=6), by) is None:
        pytest.skip(f"this machine has no {by}")
    for state_bits in (6, 7, 8, 10, 12):
        for rate in ("1", "21/16", "2", "9/4", "3", "4", "77/16", "6"):
            code = Trellis(Fraction(rate), state_bits=state_bits)
            plain = searched(sequences[:3], code, exact=exact)
            np.testing.assert_array_equal(searched(sequences[:3], code, by, exact), plain, err_msg=f"{state_bits} {rate}")


@there
@pytest.mark.parametrize("state_bits", [6, 8, 10])
@pytest.mark.parametrize("rate", ["1", "19/16", "3/2", "2", "11/4", "3", "4", "5", "6"])
def test_paths_close_and_cost_what_those_of_xla_do(sequences, state_bits, rate):
    code = Trellis(Fraction(rate), state_bits=state_bits)
    in_xla = np.asarray(xla(jnp.asarray(sequences), code.shifts, code.gain, state_bits))
    for exact, most in ((True, 1e-6), (False, 3e-4)):
        states = searched(sequences, code, exact=exact)
        before = np.roll(states, 1, axis=1)
        np.testing.assert_array_equal(states >> code.shifts, before & (2 ** (state_bits - code.shifts) - 1))
        assert error(states, sequences, code) == pytest.approx(error(in_xla, sequences, code), rel=most)


@partial(jax.jit, static_argnums=3)
def xla(x, shifts, gain, state_bits):
    shifts, ends = jnp.asarray(shifts, jnp.int32), jnp.full(len(x), -1, jnp.int32)
    return search._in_xla(x, shifts[None], jnp.float32(gain)[None], ends, jnp.zeros(0, int), state_bits=state_bits, free=True)


@there
def test_known_ends_are_kept_beside_others_that_are_not(sequences):
    code, ends = Trellis(Fraction(9, 4), state_bits=8), np.array([3, -1, 255, -7, 0, 100])
    states, free = searched(sequences, code, ends=ends), searched(sequences, code)
    np.testing.assert_array_equal(states[ends >= 0, -1], ends[ends >= 0])
    np.testing.assert_array_equal(states[ends < 0], free[ends < 0])


@there
@pytest.mark.parametrize("size", [0.0, 1e-30, 30.0, 1e30, np.inf, np.nan])
def test_weights_of_any_size_give_paths_that_close(sequences, size):
    """Far beyond the code 16 bits tell no states apart; what does not close in them is searched again."""
    for rate, state_bits in (("1", 12), ("9/4", 8), ("4", 10)):
        code = Trellis(Fraction(rate), state_bits=state_bits)
        states = searched(sequences[:2] * np.float32(size), code)
        before = np.roll(states, 1, axis=1)
        np.testing.assert_array_equal(states >> code.shifts, before & (2 ** (state_bits - code.shifts) - 1))
        assert states.min() >= 0 and states.max() < 2**state_bits


@there
def test_ends_that_no_path_of_16_bits_reaches_are_reached(sequences):
    """Two weights that only the costliest states suit, at both ends of a sequence that must close in another state."""
    code = Trellis(Fraction(1), state_bits=12)
    values = np.asarray(code_values(np.arange(2**12), code.gain))
    end = np.array([int(values.argmin())])
    x = np.full((1, LENGTH), 4.0, np.float32)
    assert searched(x, code, ends=end)[0, -1] == end[0]


@there
def test_zeros_are_searched_once_and_alike(sequences):
    """Padding among the weights: the states of zeros alone, wherever they lie, and those of a known end where one is given."""
    code, zeros = Trellis(Fraction(9, 4), state_bits=8), np.zeros((1, LENGTH), np.float32)
    x = np.concatenate([zeros, sequences[:2], -zeros, zeros])
    found = searched(x, code)
    np.testing.assert_array_equal(found, np.concatenate([searched(row[None], code) for row in x]))
    assert np.square(np.asarray(code_values(found[0], code.gain))).mean() < 0.01
    ends = np.array([7, -1, -1, -1, 9])
    assert [row[-1] for row in searched(x, code, ends=ends)[[0, 4]]] == [7, 9]


@there
def test_inside_compiled_code_many_sequences_are_those_of_each_alone(sequences):
    code = Trellis(Fraction(5, 2), state_bits=8)
    x = np.tile(sequences, (7, 1)) * np.linspace(0.5, 1.5, 42, dtype=np.float32)[:, None]

    @jax.jit
    def halves(x):
        return jax.lax.map(lambda part: search.search(part, jnp.asarray(code.shifts), 8, code.gain), x.reshape(2, 21, LENGTH))

    np.testing.assert_array_equal(np.asarray(halves(x)).reshape(x.shape), searched(x, code))
    assert search.search_jit(x[:0], code.shifts, 8, code.gain).shape == (0, LENGTH)


@there
def test_what_no_code_has_is_refused(sequences):
    code = Trellis(Fraction(2), state_bits=8)
    assert searched(sequences, code, by="mmx") is None
    assert searched(sequences, code, state_bits=5) is None and searched(sequences, code, state_bits=17) is None


@there
def test_other_devices_are_given_the_search_of_xla():
    given = (jnp.zeros((4, LENGTH)), jnp.full(LENGTH, 2, jnp.int32), 8, jnp.float32(1))
    lowered = {p: search.search_jit.trace(*given).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert "qlr_search" in lowered["cpu"] and "while" not in lowered["cpu"]
    assert all("qlr_search" not in lowered[p] and "while" in lowered[p] for p in ("tpu", "cuda"))


def test_without_it_searches_run_in_xla_and_jobs_say_so():
    told = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**__import__("os").environ, native.SWITCH: "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == [
        "False",
        "trellises are searched in XLA, about ten times slower than in C++ (fewer --state-bits take less): QLR_NATIVE is 0",
        "packed weights are decoded once, to the size of dense ones, not multiplied by from their codes: QLR_NATIVE is 0",
    ]


CHECK = """
from qlr_jax.core.quantizers import search
from qlr_jax.settings.host import slow_products, slow_search
print(search.has_native())
print(slow_search())
print(slow_products())
"""


def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path):
    """Neither one of another version, nor what is no library at all; the sentence names the file and what to do."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    for path in native.SOURCES.glob("*.*"):
        if path.suffix in (".h", ".cpp", ".so"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "viterbi.h").write_text("// changed")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    monkeypatch.setattr(native, "_folders", lambda: [tmp_path])
    found, why = native._find.__wrapped__()
    built = list(tmp_path.glob("*.so"))
    assert found is None and "install" in why and (not built or "other sources" in why)
    for path in built:
        path.unlink()
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    found, why = native._find.__wrapped__()
    assert found is None and "cannot be loaded" in why and "install qlr-jax again" in why


@there
def test_a_library_that_jax_refuses_is_as_none(monkeypatch):
    """One that was built with the headers of a newer jaxlib."""

    def refuse(*given, **named):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: the handler's API version (0.5) is incompatible with (0.3)")

    monkeypatch.setattr(native, "_refused", "")
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    native.registered.cache_clear()
    try:
        assert not native.registered("qlr_search") and "built for a newer jaxlib" in native.missing()
    finally:
        native.registered.cache_clear()
