"""Mean squared error and time of every grid on a unit Gaussian, beside the limit 4^-b that no code can pass.

    python benchmarks/quantizers.py                       trellis at 8, 10, 12 state bits, and all others: a minute on a CPU
    python benchmarks/quantizers.py --large               14 and 16 state bits too
    python benchmarks/quantizers.py --json quantizers.json

The error is relative to the sample's own variance, which takes out most of the sampling noise: 65,536 weights give 1 %.
Time is a weight's, relative to the same rate at 12 state bits. Peers: the best scalar quantizer of a Gaussian (Lloyd-Max,
0.3634, 0.1175, 0.0345, 0.0095 at 1 to 4 bits) and the E8 lattice (0.0917 at 2 bits). Where an error is to be reached it stands
beside what was measured, and the exit status is 1 if one was missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.quantizers.search import LENGTH, code_values, search
from qlr_jax.core.quantizers.trellis import Trellis

RATES = ("1", "3/2", "2", "9/4", "5/2", "3", "7/2", "4", "9/2", "5", "11/2", "6")
OTHERS = ("e8-2", "e8-3", "e8-4", "nf-2", "nf-3", "nf-4", "nf-2g32", "nf-3g32", "nf-4g32", "nf-4g64")
OTHERS += ("int-2", "int-3", "int-4", "int-8", "int-2g32", "int-3g32", "int-4g32", "int-4g128", "int-4g32a")
TO_REACH = {  # (quantizer, state bits) -> mean squared error
    ("e8-2", None): 0.0925, ("e8-3", None): 0.030,
    ("trellis-1.5", 12): 0.144, ("trellis-2", 12): 0.0740, ("trellis-2.5", 12): 0.0385, ("trellis-3", 12): 0.0196,
    ("trellis-4", 12): 0.0051, ("trellis-5", 12): 0.0014, ("trellis-6", 12): 0.00041,
    ("trellis-2", 16): 0.0700, ("trellis-3", 16): 0.0178, ("trellis-4", 16): 0.0046,
}  # fmt: skip
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@partial(jax.jit, static_argnames="state_bits")
def trellis_error(x: jax.Array, shifts: jax.Array, gain: jax.Array, state_bits: int) -> jax.Array:
    """Squared error of each walk."""
    return jnp.sum(jnp.square(code_values(search(x, shifts, state_bits, gain), gain) - x), axis=1)


def summary(
    name: str, state_bits: int | None, rate: float, stored: float, squared: np.ndarray, energy: np.ndarray, seconds: float
) -> dict:
    ratio = squared.sum() / energy.sum()
    spread = np.sqrt(np.square(squared - ratio * energy).sum()) / energy.sum()  # of a ratio of sums
    to_reach = TO_REACH.get((name, state_bits))
    return {
        "quantizer": name, "state_bits": state_bits, "rate": rate, "stored_bits": stored,
        "mse": float(ratio), "standard_error": float(spread),
        "limit": 4.0**-stored, "times_limit": float(ratio * 4.0**stored), "lloyd_max": LLOYD_MAX.get(rate),
        "to_reach": to_reach, "reached": None if to_reach is None else bool(ratio <= to_reach),
        "microseconds_a_weight": seconds / energy.size / LENGTH * 1e6,
    }  # fmt: skip


def measure_trellis(walks: np.ndarray, state_bits: tuple[int, ...]) -> list[dict]:
    x, rows = jnp.asarray(walks), []
    for bits in state_bits:
        trellis_error(
            x, jnp.asarray(Trellis(Fraction(2)).shifts, jnp.int32), jnp.float32(1), bits
        ).block_until_ready()  # compiled here
        for rate in RATES:
            code = Trellis(Fraction(rate), state_bits=bits)
            start = time.perf_counter()
            squared = np.asarray(trellis_error(x, jnp.asarray(code.shifts, jnp.int32), jnp.float32(code.gain), bits), np.float64)
            seconds = time.perf_counter() - start
            energy = np.square(walks, dtype=np.float64).sum(1)
            rows.append(summary(code.name, bits, code.bits, code.bits, squared, energy, seconds))
            print(f"  {code.name:14s} {bits:2d} state bits  {seconds:6.1f} s", file=sys.stderr)
    base = {r["rate"]: r["microseconds_a_weight"] for r in rows if r["state_bits"] == 12}
    return [r | {"time_relative_to_12": r["microseconds_a_weight"] / base[r["rate"]] if base else None} for r in rows]


def measure_others(walks: np.ndarray) -> list[dict]:
    rows = []
    for name in OTHERS:
        quantizer = parse_quantizer(name)

        @jax.jit
        def values(x: jax.Array, quantizer=quantizer) -> jax.Array:
            scales = (jnp.ones((1, 1)),) if quantizer.unit_scale else quantizer.fit_qparams(x, False)
            return quantizer.round_block(x, quantizer.broadcast_qparams(scales, x.shape[-1]), (), False)[0]

        values(jnp.asarray(walks)).block_until_ready()
        start = time.perf_counter()
        found = np.asarray(values(jnp.asarray(walks)), np.float64)
        seconds = time.perf_counter() - start
        stored = 8 * sum(np.prod(s) * d.itemsize for s, d in quantizer.stored(*walks.shape).values()) / walks.size
        squared, energy = np.square(found - walks).sum(1), np.square(walks, dtype=np.float64).sum(1)
        rows.append(summary(name, None, quantizer.bits, float(stored), squared, energy, seconds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walks", type=int, default=256, help="walks of 256 weights (default 256)")
    parser.add_argument("--state-bits", type=int, nargs="+", default=[8, 10, 12])
    parser.add_argument("--large", action="store_true", help="14 and 16 state bits too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    arguments = parser.parse_args()
    walks = np.random.default_rng(arguments.seed).standard_normal((arguments.walks, LENGTH)).astype(np.float32)
    rows = measure_trellis(walks, (*arguments.state_bits, *((14, 16) if arguments.large else ()))) + measure_others(walks)
    head = ("quantizer", "states", "stored", "mse", "±", "4^-b", "× limit", "scalar", "to reach", "", "us/weight", "vs 12")
    print("{:14s} {:>6s} {:>7s} {:>9s} {:>6s} {:>9s} {:>8s} {:>8s} {:>8s} {:6s} {:>10s} {:>6s}".format(*head))
    for r in rows:
        states, scalar, relative = r["state_bits"], r["lloyd_max"], r.get("time_relative_to_12")
        mark = {None: "", True: "met", False: "MISSED"}[r["reached"]]
        print(
            f"{r['quantizer']:14s} {f'2^{states}' if states else '':>6s} {r['stored_bits']:7.4f} {r['mse']:9.6f}"
            f" {r['standard_error'] / r['mse']:6.2%} {r['limit']:9.6f} {r['times_limit']:8.3f} {scalar or '':>8}"
            f" {r['to_reach'] or '':>8} {mark:6s} {r['microseconds_a_weight']:10.4f} {f'{relative:.2f}' if relative else '':>6s}"
        )
    if arguments.json:
        machine = {"device": jax.devices()[0].device_kind, "platform": platform.platform(), "jax": jax.__version__}
        arguments.json.write_text(
            json.dumps({"machine": machine, "walks": arguments.walks, "seed": arguments.seed, "rows": rows}, indent=1) + "\n"
        )
    sys.exit(any(r["reached"] is False for r in rows))


if __name__ == "__main__":
    main()
