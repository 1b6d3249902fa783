"""What more devices take off each one's work, and how one solve grows with the width of its matrix.

    python benchmarks/scaling.py                                both tables: under five minutes on two quiet CPU cores
    python benchmarks/scaling.py devices --devices 1 2 4 8      the first alone
    python benchmarks/scaling.py width --widths 256 512 1024 2048 4096 --state-bits 12
    python benchmarks/scaling.py --json scaling.json            all figures, with what they were measured on

`devices`: 32 and 8 matrices (256 × 256; one device solves 8 at a time), which are shared out; one matrix of 4096 rows without and
with an output Hessian, whose rows are; and the Hessians H of inputs and G of outputs of a calibration, whose sequences are. Devices
are simulated (a CPU that calls itself several), so time is told as that of the processor, all devices together: shared out without
loss it stays the same, and it is worth little on a busy machine. What shows the sharing is the work of one device:
arithmetic in the program that each device runs, counted in its jaxpr with every loop taken as often as it runs (XLA's own cost
analysis counts a loop's body once, and nearly all work is in loops). The ideal is the work of one device divided by the devices;
`× ideal` says how much more it is, because something is done on every device that a matrix has, or because walks of a trellis are
searched eight at a time. Bytes are the most that XLA reserves on a device for one of the compiled programs: arguments, results,
temporary.

`width`: one square matrix with trellis-2 and with int-4g32, no factors: seconds of the processor for a second solve (the first
compiles), peak memory of the process less that of one with a matrix of 64 × 64, and the exponents p of time ∝ widthᵖ and memory ∝
widthᵖ by least squares. Expect 2 where the search for codes dominates, toward 3 where products with H do; memory 2.

Every cell runs in a process of its own, BLAS on one thread. W is Gaussian, H the second moment of 256 Gaussian activations.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# no JAX up here: only the cells hold a backend, with as many devices as each wants
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = {
    "32 matrices": {"shape": (32, 256, 256), "outputs": False},
    "8 matrices": {"shape": (8, 256, 256), "outputs": False},
    "1 matrix": {"shape": (1, 4096, 256), "outputs": False},
    "1 matrix, G": {"shape": (1, 4096, 128), "outputs": True},
    "Hessians H": {"of": "inputs", "sequences": 16, "length": 256, "width": 128},
    "Hessians G": {"of": "outputs", "sequences": 16, "length": 256, "width": 128},
}
SPECS = ("trellis-2", "int-4g32")
MOVES = {
    *(
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "squeeze",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "concatenate",
        "pad",
    ),
    *("gather", "iota", "convert_element_type", "rev", "copy", "all_gather", "axis_index", "split", "stop_gradient"),
}
WAIT = 600  # seconds that one cell may take


# Cells: what runs in a process of its own ----------------------------------------------------------------------------------


def hessian(n: int, seed: int = 0) -> np.ndarray:
    """Second moment of 256 Gaussian activations with channels of falling size, and a hundredth of the identity."""
    sizes = np.geomspace(3, 0.1, n, dtype=np.float32)
    x = np.random.default_rng(seed).standard_normal((256, n), np.float32) * sizes
    return (h := x.T @ x / np.float32(256)) / 2 + h.T / 2 + np.float32(0.01) * np.eye(n, dtype=np.float32)


def seconds_of(run: Any, times: int = 2) -> float:
    """The least processor time of some runs after one that compiles, all threads together."""
    run()
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def operations(jaxpr: Any) -> float:
    """Arithmetic of a program: 2 for every term of a matrix product, 1 for every element of other results, 0 for moving data."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
        inner = [operations(v) for v in inner if hasattr(v, "eqns")]
        size = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "trellis_search":  # two passes; for every state a difference, a square, a sum, a minimum
            total += 8 * size * 2 ** eqn.params["state_bits"]
        elif eqn.primitive.name == "cond":
            total += max(inner)
        elif eqn.primitive.name in MOVES:
            continue
        elif eqn.primitive.name in ("cholesky", "triangular_solve"):
            total += size * eqn.invars[0].aval.shape[-1] / (3 if eqn.primitive.name == "cholesky" else 1)
        else:
            total += eqn.params.get("length", 1) * sum(inner) if inner else size
    return total


def program(made: Any, leaves: tuple) -> dict[str, float]:
    """Operations and bytes of one device's program."""
    import jax

    held = made.lower(*leaves).compile().memory_analysis()
    size = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes
    jaxpr = jax.make_jaxpr(made)(*leaves).jaxpr
    return {"operations": operations(jaxpr), "bytes": size}


def solve_cell(shape: tuple[int, int, int], outputs: bool, count: int, state_bits: int) -> dict[str, Any]:
    """Some matrices on `count` devices: seconds, and work and bytes of one of them."""
    from qlr_jax.core import sharding as devices
    from qlr_jax.core import solver
    from qlr_jax.core.batch import solve_many
    from qlr_jax.core.config import SolverConfig

    b, m, n = shape
    weights, metric = np.random.default_rng(1).standard_normal(shape, np.float32), hessian(n)
    problems = {i: (w, metric, "trellis-2", *([hessian(m, 1)] if outputs else [])) for i, w in enumerate(weights)}

    def run() -> None:
        solve_many(problems, config=SolverConfig(state_bits=state_bits))

    seconds = seconds_of(run)
    programs, real = [], devices._spread
    devices.ONE_AFTER_ANOTHER = ()  # as on accelerators

    def watched(*key: Any) -> Any:
        made = real(*key)

        def call(*leaves: Any) -> Any:
            programs.append(program(made, leaves))
            return made(*leaves)

        return call

    devices._spread = watched
    solver.matrix_placement = lambda b, m, _: devices.Placement(
        devices._mesh(*devices.shares(b, m, count))
    )  # a mesh for one device too: the same programs
    run()
    layout = "{} × {}".format(*devices.shares(b, m, count))
    work = {"operations": sum(p["operations"] for p in programs), "bytes": max(p["bytes"] for p in programs)}
    return {"layout": layout, "seconds": seconds} | work


def hessian_cell(of: str, sequences: int, length: int, width: int, count: int) -> dict[str, Any]:
    """Hessians of a small model on `count` devices; work is that of all calls for its blocks, by XLA: they hold no loop."""
    import jax

    from qlr_jax.models import Llama, LlamaConfig

    called = {"inputs": ("hessians", "hessians", "_advance"), "outputs": ("gradients", "output_hessians", "_pull_back")}
    name, find, inner = called[of]
    module = importlib.import_module(f"qlr_jax.calibration.{name}")  # in the package the first's name is its function's
    config = LlamaConfig(vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=4)
    model, tokens = Llama(config, jax.random.key(0)), np.random.default_rng(0).integers(0, 64, (sequences, length)).astype(np.int32)
    run = lambda: getattr(module, find)(model, tokens, batch=8)  # noqa: E731
    seconds, programs, real = seconds_of(run), [], getattr(module, inner)

    def watched(*arguments: Any, **static: Any) -> Any:
        made = real.lower(*arguments, **static).compile()
        held = made.memory_analysis()
        size = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes
        programs.append({"operations": made.cost_analysis()["flops"], "bytes": size})
        return real(*arguments, **static)

    setattr(module, inner, watched)
    run()
    work = {"operations": sum(p["operations"] for p in programs), "bytes": max(p["bytes"] for p in programs)}
    return {"layout": str(count), "seconds": seconds} | work


def width_cell(width: int, spec: str, state_bits: int) -> dict[str, Any]:
    """One square solve."""
    from qlr_jax.core.config import SolverConfig
    from qlr_jax.core.solver import solve_batch

    weight, metric = np.random.default_rng(1).standard_normal((1, width, width), np.float32), hessian(width)[None]
    config = SolverConfig(state_bits=state_bits)
    seconds = seconds_of(lambda: solve_batch(weight, metric, spec, config=config), 1 if width > 512 else 3)
    found = {"seconds": seconds, "relative_error": solve_batch(weight, metric, spec, config=config)[0].stats["relative_error"]}
    return found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


# The parent ----------------------------------------------------------------------------------------------------------------


def cell(kind: str, devices: int = 1, **arguments: Any) -> dict[str, Any]:
    """Run one cell in a process with so many devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "OPENBLAS_NUM_THREADS": "1"}
    env["NPROC"] = "64"  # threads of XLA's pool: with fewer, factorizations of several devices at once can wait for ever
    command = [sys.executable, __file__, "--cell", json.dumps({"kind": kind} | arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT)
    if done.returncode:
        raise SystemExit(f"{kind} {arguments} on {devices} devices failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_cell(told: dict[str, Any]) -> dict[str, Any]:
    kind = told.pop("kind")
    return {"solve": solve_cell, "hessians": hessian_cell, "width": width_cell}[kind](**told)


def exponent(rows: list[dict[str, Any]], of: str) -> float:
    """p of `of` ∝ widthᵖ, by least squares in logarithms."""
    x, y = (np.log([max(row[name], 1e-9) for row in rows]) for name in ("width", of))
    return float(np.polyfit(x, y, 1)[0])


def devices_table(counts: list[int], cases: list[str], state_bits: int) -> list[dict[str, Any]]:
    rows = []
    print(f"\n{'case':<18} {'devices':>7} {'layout':>7} {'work a device':>14} {'× ideal':>8} {'bytes a device':>15} {'cpu s':>8}")
    for case in cases:
        base = None
        for count in counts:
            arguments = dict(CASES[case])
            kind = "solve" if "shape" in arguments else "hessians"
            extra = {"state_bits": state_bits} if kind == "solve" else {}
            row = {"case": case, "devices": count} | cell(kind, count, **arguments, count=count, **extra)
            base = base or row["operations"] * count  # of the fewest devices asked for
            row["over_ideal"] = row["operations"] * count / base
            rows.append(row)
            print(
                f"{case:<18} {count:>7} {row['layout']:>7} {row['operations']:>14.3g} {row['over_ideal']:>8.2f} "
                f"{row['bytes'] / 1e6:>12.1f} MB {row['seconds']:>8.2f}",
                flush=True,
            )
    return rows


def width_table(widths: list[int], state_bits: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    rows, fits = [], {}
    print(f"\n{'spec':<12} {'width':>6} {'cpu s':>9} {'memory':>12} {'error':>8}")
    for spec in SPECS:
        own, least = [], cell("width", width=64, spec=spec, state_bits=state_bits)["peak"]
        for width in widths:
            row = {"spec": spec, "width": width} | cell("width", width=width, spec=spec, state_bits=state_bits)
            row["memory"] = row.pop("peak") - least
            own.append(row)
            print(
                f"{spec:<12} {width:>6} {row['seconds']:>9.2f} {row['memory'] / 1e6:>9.0f} MB {row['relative_error']:>8.4f}",
                flush=True,
            )
        rows += own
        if len(own) > 1:
            fits[spec] = {of: exponent(own, of) for of in ("seconds", "memory")}
            # the last doubling tells what is to come: compiled code and fixed costs weigh on narrow matrices
            fits[spec] |= {f"{of}, last two": exponent(own[-2:], of) for of in ("seconds", "memory")}
            told = ", ".join(f"{of} ∝ width^{p:.2f}" for of, p in fits[spec].items())
            print(f"{spec:<12} {told}")
    return rows, fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "devices", "width"), default="all", help="which table (both)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="how many to simulate (1 2 4 8)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="of square matrices")
    parser.add_argument("--state-bits", type=int, default=8, help="of the trellis, 6 to 16: time grows with 2^bits (8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(run_cell(json.loads(arguments.cell))))
        return
    start, found = time.perf_counter(), {}
    if arguments.what in ("all", "devices"):
        found["devices"] = devices_table(arguments.devices, arguments.cases, arguments.state_bits)
    if arguments.what in ("all", "width"):
        found["width"], found["exponents"] = width_table(arguments.widths, arguments.state_bits)
    found |= {"state_bits": arguments.state_bits, "cores": os.cpu_count(), "machine": platform.machine()}
    found["total_seconds"] = time.perf_counter() - start
    print(f"\n{found['total_seconds']:.0f} s on {found['cores']} cores")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
