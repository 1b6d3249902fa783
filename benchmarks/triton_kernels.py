"""Triton kernels for one token against dense bfloat16: a linear layer, rotations included, from a cold cache.

    python benchmarks/triton_kernels.py
    python benchmarks/triton_kernels.py --specs trellis-2 trellis-2+r16@trellis-2 --tokens 1 4 --json triton_kernels.json

Random codes: any byte stream is a valid code. Several copies of each layer, together larger than the second cache by far, are
called one after the other in one CUDA graph, so every call reads its weights from memory, and nothing waits for Python. Dense and
packed take turns within every round; the figure is the median round's, for one call.
    dense       torch.nn.functional.linear in bfloat16
    kernel      qlr_jax.formats.qlr.kernels; `times dense` above 1 is faster than dense
    ordinary    QLRLinear.forward, which decodes tile by tile: what the kernels replace

Before anything is timed, kernels are compared with the ordinary forward. Without a GPU that is all that happens, in Triton's
interpreter, at a small shape. (This file is not named kernels.py: beside other benchmarks it would hide the package of that name,
which transformers looks for.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax.formats.qlr import modeling_qlr as runtime

SPECS = ["trellis-2", "trellis-2+r16@trellis-2", "trellis-2.25", "trellis-3", "trellis-4", "int-4g32", "int-4g32+r16@bf16"]
SHAPES = ["4096x14336", "14336x4096"]
COLD = 4  # times the second cache


def make(spec: str, shape: tuple[int, int], device: str) -> runtime.QLRLinear:
    """A layer with random codes, of outputs of about the inputs' size."""
    linear = runtime.QLRLinear(spec, shape)
    for name, buffer in linear.named_buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256)
        elif buffer.dtype == torch.bfloat16:
            buffer.normal_(0.0, 0.02)
        else:
            buffer.fill_(0.002 if name.endswith("scales") else 0.02)
    return linear.to(device)


@torch.inference_mode()
def check(spec: str, shape: tuple[int, int], tokens: int, device: str) -> float:
    """Largest difference of the kernel's output from the ordinary one's, over the largest output, in float32."""
    from qlr_jax.formats.qlr.kernels import Kernel

    linear, x = make(spec, shape, device), torch.randn(tokens, shape[1], device=device)
    wanted = linear(x)
    return float((Kernel(linear)(x) - wanted).abs().max() / wanted.abs().max())


def recorded(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls in one graph; the first ones, which compile, go before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Of one call, by name, from graphs of so many calls each."""
    found = {name: [] for name in graphs}
    for _ in range(rounds + 1):
        for name, (graph, count) in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            found[name].append(1e3 * start.elapsed_time(stop) / count)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


@torch.inference_mode()
def measure(spec: str, shape: tuple[int, int], tokens: int, arguments: argparse.Namespace) -> dict:
    from qlr_jax.formats.qlr.kernels import Kernel

    cache = COLD * torch.cuda.get_device_properties(0).L2_cache_size
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    first = make(spec, shape, "cuda")
    packed = sum(buffer.nbytes for buffer in first.buffers())
    linears = [first] + [make(spec, shape, "cuda") for _ in range(cache // packed)]
    kernels = [Kernel(linear) for linear in linears]
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(1 + cache // (2 * shape[0] * shape[1]))]
    works = {
        "dense": [lambda w=w: torch.nn.functional.linear(x, w) for w in weights],
        "kernel": [lambda k=k: k(x) for k in kernels],
        "ordinary": [lambda m=m: m(x) for m in linears[:2]],  # reads more than it is given: what it decodes
    }
    graphs = {name: (recorded(calls), len(calls)) for name, calls in works.items()}
    times = microseconds(graphs, arguments.rounds)
    error = check(spec, shape, tokens, "cuda")
    row = {"spec": spec, "shape": shape, "tokens": tokens, "bytes": packed, "microseconds": times, "difference": error}
    print(
        f"{shape[0]:>5d} × {shape[1]:<5d} {tokens:6d} {spec:26s} {times['dense']:8.1f} {times['kernel']:8.1f} "
        f"{times['ordinary']:9.1f} {times['dense'] / times['kernel']:11.2f} {packed / times['kernel'] / 1e3:8.0f} {error:10.1e}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out × in, e.g. 4096x14336")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1], help="from 1 to 8")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    try:
        import triton
    except ImportError:
        parser.exit(1, "Triton is not installed, so there are no kernels to measure; pip install triton\n")
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        worst = max(check(spec, (72, 96), tokens, "cpu") for spec in arguments.specs for tokens in (1, 3))
        print(
            "There is no CUDA here, so nothing was measured; in Triton's interpreter, at 72 × 96, kernels and the ordinary forward "
            f"of {len(arguments.specs)} specs differ by at most {worst:.1e} of the largest output."
        )
        sys.exit(0 if worst < 1e-3 else 1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; microseconds of one call")
    heads = f"{'dense':>8s} {'kernel':>8s} {'ordinary':>9s} {'times dense':>11s} {'GB/s':>8s} {'difference':>10s}"
    print(f"{'out × in':>13s} {'tokens':>6s} {'':26s} {heads}")
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in arguments.shapes]
    rows = [measure(spec, shape, tokens, arguments) for shape in shapes for tokens in arguments.tokens for spec in arguments.specs]
    if arguments.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
