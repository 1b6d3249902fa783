"""The trellis search in C++ beside XLA's: processor time a weight, and how much more squared error costs in 16 bits leave.

    python benchmarks/search.py --sequences 32 --repeats 3

Every search is of the same Gaussian sequences with no state known. XLA's is compiled before it is timed; the searches of one line
take turns, and the median of their turns is printed.
"""

import argparse
import ctypes
import time
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax import native
from qlr_jax.core.quantizers.search import LENGTH, _in_xla, code_values
from qlr_jax.core.quantizers.trellis import Trellis

SETS = ("portable", "avx2", "avx512", "neon")


def in_cpp(x: np.ndarray, code: Trellis, by: str, exact: bool) -> np.ndarray | None:
    """States by one instruction set on one thread; None where this machine has none of it."""
    library = native.library()
    assert library is not None, native.missing()
    states, free, shifts = np.empty(x.shape, np.int32), np.full(len(x), -1, np.int32), code.shifts.astype(np.int32)
    count, gain = ctypes.c_int64(len(x)), ctypes.c_float(code.gain)
    given = by.encode(), x.ctypes, shifts.ctypes, gain, free.ctypes, count, code.state_bits, int(exact), states.ctypes
    return None if library.qlr_search(*given) else states


@partial(jax.jit, static_argnames="state_bits")
def in_xla(x: jax.Array, shifts: jax.Array, gain: float, state_bits: int) -> jax.Array:
    """States by XLA's search, whatever else there is."""
    free = jnp.full(len(x), -1, jnp.int32)
    return _in_xla(x, shifts[None], jnp.float32(gain)[None], free, jnp.zeros(0, int), state_bits=state_bits, free=True)


def main() -> None:
    """Print one line a code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32, help="of 256 weights, at 12 state bits; fewer with more of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates", default="1,2,9/4,3,4,6", help="bits a weight")
    parser.add_argument("--state-bits", default="8,10,12,14", help="of a trellis")
    arguments = parser.parse_args()
    some = np.random.default_rng(0).standard_normal((1, LENGTH)).astype(np.float32)
    sets = [by for by in SETS if in_cpp(some, Trellis(Fraction(2), state_bits=6), by, False) is not None]
    print("µs a weight, processor time; in brackets: more squared error than XLA's search")
    print("state bits, rate | XLA | " + " | ".join(f"{by}{kind}" for by in sets for kind in (" 16 bits", " float32")))
    for state_bits in map(int, arguments.state_bits.split(",")):
        for rate in map(Fraction, arguments.rates.split(",")):
            code = Trellis(rate, state_bits=state_bits)
            count = max(4, min(64, arguments.sequences * 2**12 >> state_bits))
            x = np.random.default_rng(1).standard_normal((count, LENGTH)).astype(np.float32)
            given = jnp.asarray(x), jnp.asarray(code.shifts, jnp.int32), code.gain, state_bits
            jax.block_until_ready(in_xla(*given))
            searches = {"XLA": lambda given=given: np.asarray(in_xla(*given))}
            for by in sets:
                for exact in (False, True):
                    searches[f"{by}{exact}"] = partial(in_cpp, x, code, by, exact)
            seconds: dict[str, list[float]] = {name: [] for name in searches}
            errors = {}
            for _ in range(arguments.repeats):
                for name, search in searches.items():
                    start = time.process_time()
                    states = search()
                    seconds[name].append(time.process_time() - start)
                    errors[name] = float(np.square(np.asarray(code_values(states, code.gain), np.float64) - x).sum())
            cells = [
                f"{np.median(taken) / x.size * 1e6:.2f} ({errors[name] / errors['XLA'] - 1:+.0e})"
                for name, taken in seconds.items()
            ]
            print(f"{state_bits}, {float(rate):g} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
