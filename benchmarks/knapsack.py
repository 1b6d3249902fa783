"""Time and proved gap of the exact allocation, from 32 to 882 matrices, on synthetic tables of Llama shapes.

    python benchmarks/knapsack.py                       all sizes; prints a table, writes knapsack.json
    python benchmarks/knapsack.py --peer                beside it the plain model, given whole to HiGHS
    python benchmarks/knapsack.py --ties backbone       q, k, v tied, and gate, up
    python benchmarks/knapsack.py --joint               beside it the allocation where pairs of matrices interact

The peer is scipy.optimize.milp (HiGHS) on the textbook model with one 0-1 variable an option: no hull, no fixing, no start.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
from scipy import sparse
from scipy.optimize import LinearConstraint, milp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocators import Budget, Option, OptionTable, Row, allocate, baselines, frontier
from allocators.strategies import BASELINE, CONTROL
from benchmarks.interactions import Pairwise, allocate_jointly
from qlr_jax.models.sites import KINDS

COARSE = (np.arange(24, 69, 4) / 16, [(0, 16, 16), *((rank, bits, bits) for rank in (8, 16, 32, 64) for bits in (4, 8))])
FACTORS = [(4, 4), (4, 2), (2, 4), (8, 8), (2, 2)]  # bits of L and R
FINE = (np.arange(16, 65) / 16, [(0, 4, 4), *((rank, *bits) for bits in FACTORS for rank in (4, 8, 16, 32))])
# name: (layers, hidden, key-value width, intermediate, matrices kept, options, (rates, (rank, bits of L, bits of R)))
MODELS = {
    "32 x 60": (5, 256, 128, 768, 32, 60, COARSE),
    "42 x 245 (bundled)": (6, 256, 128, 768, 42, 245, FINE),
    "42 x 1029 (bundled)": (6, 256, 128, 768, 42, 1029, FINE),
    "224 x 60 (7B)": (32, 4096, 4096, 11008, 224, 60, COARSE),
    "560 x 60 (Llama-2-70B)": (80, 8192, 1024, 28672, 560, 60, COARSE),
    "882 x 100 (Llama-3.1-405B)": (126, 16384, 1024, 53248, 882, 100, COARSE),
}
QUARTERS = np.arange(4, 17) / 4
WAVES = 0.02 * np.sin(7 * QUARTERS)  # bits by which a trellis departs from 4^(-bits)
LOST = {2: 0.08, 4: 0.005, 8: 0.0, 16: 0.0}  # of a factor's share, to its own rounding


def shapes(hidden: int, kv: int, inter: int) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix kind."""
    square = (hidden, hidden)
    return dict(
        zip(KINDS, (square, (kv, hidden), (kv, hidden), square, (inter, hidden), (inter, hidden), (hidden, inter)), strict=True)
    )


def table(model: str, kind: str, seed: int) -> OptionTable:
    """A table with the rate curve of a trellis, a spectrum of random steepness a matrix, and damages noisy, smooth or all alike.

    damage = sensitivity · 4^(−bits) · (1 − captured(rank) (1 − lost by rounding L, R)) · noise;   bytes from the shape: backbone,
    row scales, both factors. The fine grid is as the bundled model's table: a scale a grid, a power-law spectrum, a rate curve
    interpolated in its logarithm between quarters of a bit, a correction for every rank.
    """
    layers, hidden, kv, inter, kept, count, (rates, sides) = MODELS[model]
    draw = np.random.default_rng(seed)
    grid = [(rate, *side) for side in sides for rate in rates][:count]
    rows = []
    for n in range(min(kept, layers * len(KINDS))):
        layer, name = divmod(n, len(KINDS))
        out, inner = shapes(hidden, kv, inter)[KINDS[name]]
        alike, fine = kind == "alike", rates is FINE[0]
        sensitivity = (1.0 if alike else draw.lognormal(0, 1)) * 1e-3
        steep = 0.4 if alike else draw.uniform(0.0, 1.5)
        captured = {rank: 1 - (1 + rank / 8) ** (-steep / 2) for rank, *_ in sides}
        correction, curve = dict.fromkeys(sides, 1.0), {rate: rate for rate in rates}
        if fine:
            spectrum = np.arange(1, 257.0) ** -steep
            share = (0.5 if alike else draw.uniform(0.2, 0.8)) / spectrum.sum()
            captured = {rank: share * spectrum[:rank].sum() for rank in captured}
            correction = {side: 1.0 if alike else draw.lognormal(0, 0.01) for side in sides}
            curve = {rate: float(np.interp(rate, QUARTERS, QUARTERS * 0.95 + WAVES)) for rate in rates}
        options = []
        for rate, rank, left, right in grid:
            tail = 1 - captured[rank] * (1 - LOST[left] - LOST[right])
            noise = draw.lognormal(0, 0.05) if kind == "noisy" else 1.0
            scales = (12 if rank else 4) if fine else 2 * out
            size = int(out * inner * rate / 8) + scales + (out * left + inner * right) * rank // 8
            spec = f"trellis-{rate:g}" + (f"+r{rank}@trellis-{left},trellis-{right}" if rank else "")
            damage = sensitivity * 4.0 ** -curve[rate] * tail * noise * correction[rank, left, right]
            options.append(Option(spec, size, damage, rank=rank))
        rows.append(Row(f"layers.{layer}.{KINDS[name]}", out * inner, tuple(options)))
    return OptionTable(tuple(rows))


def plain(table: OptionTable, limit: int, gap: float, seconds: float) -> tuple[float | None, float | None]:
    """Damage and bound of the textbook model as HiGHS returns them (untied tables only)."""
    size = np.array([o.bytes for row in table.rows for o in row.options], dtype=float)
    damage = np.array([o.damage for row in table.rows for o in row.options])
    owner = np.concatenate([np.full(len(row.options), i) for i, row in enumerate(table.rows)])
    one = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    result = milp(
        damage / damage.max(),
        integrality=np.ones(len(owner)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size[None, :] / size.max(), -np.inf, limit / size.max())],
        options=dict(mip_rel_gap=gap, time_limit=seconds),
    )
    scale = float(damage.max())
    return (None if result.x is None else float(result.fun) * scale), (result.mip_dual_bound or 0.0) * scale


def interactions(table: OptionTable, seed: int) -> Pairwise:
    """A Gram matrix of random directions, a fifth of it off the diagonal."""
    vectors = np.random.default_rng(seed).standard_normal((len(table.rows), 20))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Pairwise(tuple(table.index), 0.8 * np.eye(len(vectors)) + 0.2 * vectors @ vectors.T)


def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--gap", type=float, nargs="+", default=[1e-4, 0.0], help="relative gaps to ask for")
    parse.add_argument("--budget", nargs="+", default=["2.25bpw", "3bpw"])
    parse.add_argument("--damages", nargs="+", choices=["noisy", "smooth", "alike"], default=["noisy", "smooth", "alike"])
    parse.add_argument("--ties", choices=["none", "backbone", "spec"], default="none")
    parse.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parse.add_argument("--seconds", type=float, default=60.0, help="time limit of one solve")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--peer", action="store_true", help="also give the whole model to HiGHS")
    parse.add_argument("--joint", action="store_true", help="also allocate with interactions of pairs")
    parse.add_argument("--out", type=Path, default=Path("knapsack.json"))
    args = parse.parse_args()
    if args.peer and args.ties != "none":
        parse.error("the peer knows no ties; leave out --peer or --ties")
    names = f"{'table':28} {'damages':8} {'budget':8} {'asked':>7} {'seconds':>8} {'gap':>9} {'status':11}"
    print(f"{names} {'/uniform':>8} {'/rank0':>7} {'/greedy':>8}   damage over that of the baseline")
    records = []
    for model in args.models:
        for kind in args.damages:
            full = table(model, kind, args.seed)
            if args.ties != "none":
                full = full.tie("*.q", "*.k", "*.v", on=args.ties).tie("*.gate", "*.up", on=args.ties)
            start = time.perf_counter()
            corners = len(frontier(full))
            sweep = time.perf_counter() - start
            for text in args.budget:
                problem = Budget.parse(text).on(full)
                others = {n: a.damage for n, a in baselines(problem.table, problem.limit).items()}
                for gap in args.gap:
                    start = time.perf_counter()
                    found = allocate(problem.table, problem.limit, gap=gap, seconds=args.seconds)
                    record = dict(
                        model=model, damages=kind, ties=args.ties, budget=text, asked=gap, seconds=time.perf_counter() - start
                    )
                    record |= dict(gap=found.gap, status=found.status.value, damage=found.damage, baselines=others)
                    record |= dict(frontier_seconds=sweep, frontier_corners=corners)
                    ratio = [found.damage / others[n] if n in others else float("nan") for n in (BASELINE, CONTROL, "greedy")]
                    print(
                        f"{model:28} {kind:8} {text:8} {gap:7.0e} {record['seconds']:8.2f} {found.gap:9.1e} {found.status.value:11}"
                        f" {ratio[0]:8.4f} {ratio[1]:7.4f} {ratio[2]:8.5f}",
                        flush=True,
                    )
                    if args.peer:
                        start = time.perf_counter()
                        damage, bound = plain(problem.table, problem.limit, gap, args.seconds)
                        took = time.perf_counter() - start
                        record["peer"] = dict(seconds=took, damage=damage, bound=bound)
                        behind = (
                            "no solution"
                            if damage is None or bound is None
                            else f"gap {(damage - bound) / damage:.1e}, damage /ours {damage / found.damage:.6f}"
                        )
                        print(f"{'':28} {'':8} {'HiGHS':8} {gap:7.0e} {took:8.2f} {behind}", flush=True)
                    if args.joint:
                        pairs = interactions(problem.table, args.seed)
                        joint = allocate_jointly(problem.table, problem.limit, pairs, gap=gap, seconds=args.seconds)
                        apart = pairs.damage(problem.table, found.specs)
                        record["joint"] = dict(seconds=joint.seconds, gap=joint.gap, damage=joint.damage, of_sum=apart)
                        print(
                            f"{'':28} {'':8} {'pairs':8} {gap:7.0e} {joint.seconds:8.2f} {joint.gap:9.1e} {joint.status.value:11}"
                            f" joint damage /that of the least sum {joint.damage / apart:.4f}",
                            flush=True,
                        )
                    records.append(record)
    machine = dict(python=platform.python_version(), numpy=np.__version__, scipy=scipy.__version__, machine=platform.machine())
    args.out.write_text(
        json.dumps(dict(machine=machine, arguments=vars(args) | dict(out=str(args.out)), records=records), indent=1)
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
