"""What a cluster costs and brings: seconds a piece beside its work, bytes that travel, and how a large model would scale.

    python benchmarks/cluster.py [--model Llama-3-70B] [--hosts 1,2,4,8,16,32,64] [--json FILE]

The first two are measured with two workers on this machine. The scaling is simulated: the pieces of a job as it hands them out,
each with the seconds that the rates of this library's plans (measured on real jobs) give it on `--machine`, the measured overhead a
piece, and the time that hidden states and matrices take over a network of `--gigabits`.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from table import show

from qlr_jax import cost, job
from qlr_jax.cluster import connected
from qlr_jax.cost.counted import Counted
from qlr_jax.models.known import known_config
from qlr_jax.settings.recipe import Recipe

BATCH, WINDOWS = 8, 4  # sequences of a piece of input Hessians; of output Hessians and of attribution


@dataclass(frozen=True)
class Chain:
    """Pieces of which each waits for the one before it.

    Attributes:
        pieces: how many.
        seconds: of each.
        bytes: that travel where the next one runs on another host.
    """

    pieces: int
    seconds: float
    bytes: float = 0.0


def measured(pieces: int) -> dict[str, float]:
    """Milliseconds a piece, of independent ones and of a chain; megabytes that workers sent each other in a small job."""
    with connected("local:2") as engine:
        engine.result(engine.submit(abs, -1))
        begun = time.perf_counter()
        dict(engine.results({i: engine.submit(abs, -i) for i in range(pieces)}))
        apart = time.perf_counter() - begun
        value, begun = engine.submit(abs, -1), time.perf_counter()
        for _ in range(pieces):
            value = engine.submit(abs, value)
        engine.result(value)
        chained = time.perf_counter() - begun
        recipe = Recipe(
            budget="2.25bpw", backbones=("trellis-2", "trellis-2.5"), ranks=(0, 8), state_bits=6, search_state_bits=6, iterations=1,
            sequences=16, sequence_length=128, measure_tokens=1024, evaluation_tokens=2048, refine=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            job.demo(Path(folder) / "out", recipe=recipe, cluster=engine.client)
            seconds = time.perf_counter() - begun
        sent = engine.client.run(lambda dask_worker: sum(line["total"] for line in dask_worker.transfer_incoming_log))
    return {
        "pieces": pieces, "ms a piece, apart": 1e3 * apart / pieces, "ms a piece, in a chain": 1e3 * chained / pieces,
        "seconds of a small job": seconds, "MB between workers": sum(sent.values()) / 1e6,
    }  # fmt: skip


def chains(found: Counted, stages: dict[str, float]) -> dict[str, list[Chain]]:
    """The pieces of every stage, whose seconds on one host are `stages`."""
    layers, state = found.config.num_hidden_layers, 4.0 * found.length * found.config.hidden_size
    inputs, outputs = -(-found.tokens // (found.length * BATCH)), -(-found.output_sequences // WINDOWS)
    windows = -(-found.windows // WINDOWS)
    sizes = [shape[0] * shape[1] for (_, shape), count in found.groups.items() for _ in range(count)]
    plans = len(found.plans)

    def alike(name: str, count: int, length: int, rows: int) -> list[Chain]:
        return [Chain(length, stages.get(name, 0.0) / (count * length), rows * state)] * count

    def by_size(name: str, times: int) -> list[Chain]:
        each = stages.get(name, 0.0) / (times * sum(sizes))
        return [Chain(1, size * each, 4.0 * (found.hessians + found.outputs) / len(sizes)) for size in sizes for _ in range(times)]

    return {
        "input Hessians": alike("calibrate: inputs", inputs, layers, BATCH),
        "output Hessians": alike("calibrate: outputs", outputs, 2 * layers, WINDOWS),
        "spectra": by_size("measure: spectra", 1),
        "probes": by_size("measure: probes", 1),
        "attribution": alike("measure: attribution", 2 * windows, 2 * layers, WINDOWS),
        "solves": by_size("solve", plans),
        "evaluation": alike("judge", max(1, found.windows // BATCH) * plans, layers, BATCH)
        + alike("evaluate", max(1, found.recipe.evaluation_tokens // (found.length * BATCH)) * (plans + 1), layers, BATCH),
    }


def simulated(work: list[Chain], hosts: int, overhead: float, bandwidth: float) -> float:
    """Seconds until all is done: the longest chains first, each piece on the host that had the one before it, if that is free."""
    free = [0.0] * hosts
    ready = [(0.0, -chain.pieces * chain.seconds, number, chain.pieces, -1) for number, chain in enumerate(work)]
    heapq.heapify(ready)
    end = 0.0
    while ready:
        at, order, number, left, last = heapq.heappop(ready)
        chain, first = work[number], min(range(hosts), key=free.__getitem__)
        host = last if last >= 0 and free[last] <= max(at, free[first]) else first
        moved = chain.bytes / bandwidth if host != last and (last >= 0 or chain.pieces == 1) else 0.0
        free[host] = end_of_piece = max(at, free[host]) + overhead + moved + chain.seconds
        end = max(end, end_of_piece)
        if left > 1:
            heapq.heappush(ready, (end_of_piece, order, number, left - 1, host))
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="Llama-3-70B")
    parser.add_argument("--machine", default="cpu:512GiB,cores=32", help="of every host")
    parser.add_argument("--hosts", default="1,2,4,8,16,32,64")
    parser.add_argument("--gigabits", type=float, default=25.0, help="a second, of the network")
    parser.add_argument("--pieces", type=int, default=500)
    parser.add_argument("--overhead", type=float, help="milliseconds a piece, instead of measuring them")
    parser.add_argument("--measure-tokens", type=int, default=65536, help="of the recipe: attribution has so few windows otherwise")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    overhead = 1e-3 * (arguments.overhead or 0)
    if arguments.overhead is None:
        seen = measured(arguments.pieces)
        show("two workers on this machine", [seen], None)
        overhead = 1e-3 * seen["ms a piece, in a chain"]
    config, machine = known_config(arguments.model), cost.Machine.parse(arguments.machine)
    recipe = Recipe(budget="2.5bpw", measure_tokens=arguments.measure_tokens)
    plan = cost.plan_job(config, recipe, machine)
    work = chains(Counted(config, recipe, machine), {stage.name: stage.seconds for stage in plan.stages})
    rows = []
    for hosts in map(int, arguments.hosts.split(",")):
        took = {name: simulated(own, hosts, overhead, arguments.gigabits * 1.25e8) / 3600 for name, own in work.items()}
        total = sum(took.values())
        first = rows[0]["hours"] * rows[0]["hosts"] if rows else total * hosts
        slowest = max(took, key=lambda name: took[name])
        rows.append(
            {
                "hosts": hosts,
                "hours": total,
                "speed-up": first / total,
                "efficiency": first / total / hosts,
                **took,
                "most": slowest,
            }
        )
    show(f"{arguments.model} at 2.5 bits on hosts of {arguments.machine}, hours by stage (simulated)", rows, arguments.json)


if __name__ == "__main__":
    main()
