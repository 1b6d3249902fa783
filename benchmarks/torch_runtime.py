"""The PyTorch runtime against a dense model: prefill, decoding, memory and load time, side by side in one run.

    python benchmarks/torch_runtime.py
    python benchmarks/torch_runtime.py --threads 1 --clock cpu      the tables of RESULTS.md: three minutes on a busy machine
    python benchmarks/torch_runtime.py --specs trellis-2 e8-2 --tokens 128 --rounds 3
    python benchmarks/torch_runtime.py --device cuda --json torch_runtime.json
    QLR_NATIVE=0 python benchmarks/torch_runtime.py    without the C++ products

Random codes: any byte stream is a valid code, so nothing is solved and the text that comes out means nothing, but speed and size
are those of a real model. First a Llama of a few layers, loaded from its folder in bfloat16, then the linear layers alone, in
bfloat16 and in float32. Dense and packed take turns within every round, and the figure is the best round's, because other work on
the machine can only add time; the ratio is to dense in the same type. With two threads on two busy cores each waits for the other,
and even the best round says little; the processor's time of one thread (--clock cpu) is then the figure to take.
    prefill     tokens a second for one sequence of --tokens
    decode      tokens a second, one sequence, one token at a time with a cache of keys and values
    memory      of all tensors that stay after a forward pass, MB; then those of the linear layers, with the tables that decode
                them, over the bytes that the folder has for them
    load        from_pretrained with the files in the page cache, wall clock, s, comparison with checksums.json included
`dequantized` is the first spec's folder loaded with dequantize: a dense model that is decoded while it loads.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax.formats.qlr import modeling_qlr as runtime

SPECS = ["trellis-2", "trellis-2+r16@trellis-2", "int-4g32", "int-4g32+r16@bf16"]


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def best_seconds(works: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, float]:
    """The best round for each work, which take turns; a first round, which makes tables, is not counted."""
    clock = CLOCKS[arguments.clock]
    best = dict.fromkeys(works, float("inf"))
    for i in range(arguments.rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if i:
                best[name] = min(best[name], clock() - start)
    return best


def fill(module: nn.Module) -> None:
    """Random codes, and scales of a size that neither overflows nor vanishes."""
    for name, buffer in module.named_buffers():
        if name.endswith("rates"):  # three quarters of a bit around the mean, from segment to segment
            part = module.get_submodule(name.rpartition(".")[0])
            pairs = torch.tensor([12, -12]).repeat(len(buffer), -(-buffer.shape[1] // 2))
            buffer.copy_(part.count // 2 + pairs[:, : buffer.shape[1]])
        elif buffer.dtype == torch.uint8:
            buffer.random_(0, 256)
        elif buffer.dtype == torch.bfloat16:
            buffer.normal_(0.0, 0.02)
        else:
            buffer.fill_(0.002 if name.endswith("scales") else 0.02)


def layers(shapes: list[tuple[int, int]], arguments: argparse.Namespace) -> list[dict]:
    """Milliseconds of single layers, packed and dense, at prefill and for one token."""
    rows = []
    print(
        f"\nlinear layers, ms (times dense)\n{'out × in':>12s} {'tokens':>6s} {'type':9s} {'dense':>8s}  "
        + "  ".join(arguments.specs)
    )
    for shape in shapes:
        packed = {spec: runtime.QLRLinear(spec, shape).to(arguments.device) for spec in arguments.specs}
        for linear in packed.values():
            fill(linear)
        for tokens in (arguments.tokens, 1):
            for dtype in (torch.bfloat16, torch.float32):
                dense = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device=arguments.device)
                x = torch.randn(tokens, shape[1], dtype=dtype, device=arguments.device)
                works = {name: lambda f=f, x=x: f(x) for name, f in {"dense": dense, **packed}.items()}
                best = best_seconds(works, arguments)
                name = str(dtype).removeprefix("torch.")
                cells = (f"{1e3 * best[s]:8.2f} ({best[s] / best['dense']:.2f})".ljust(len(s)) for s in arguments.specs)
                print(
                    f"{shape[0]:>5d} × {shape[1]:<4d} {tokens:6d} {name:9s} {1e3 * best['dense']:8.2f}  " + "  ".join(cells),
                    flush=True,
                )
                rows.append({"shape": shape, "tokens": tokens, "dtype": name, "seconds": best})
    return rows


def write_model(folder: Path, config: LlamaConfig, spec: str) -> None:
    """A folder of the model with random weights: dense in bfloat16, or every linear layer of the blocks as `spec`."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    save_random(folder, model, {} if spec == "dense" else dict.fromkeys(linears, spec))


def save_random(folder: Path, model: Any, specs: dict[str, str], rotation_block: int = 0, spread: float = 0.02) -> None:
    """A folder of a model that lies on the meta device, with random weights.

    Args:
        folder: where to.
        model: of transformers' own class.
        specs: matrix -> how it is packed; others are bfloat16.
        rotation_block: of the packed ones.
        spread: standard deviation of the others.
    """
    matrices = {}
    for name, spec in specs.items():
        shape = list(model.get_submodule(name).weight.shape)
        matrices[name] = {"spec": spec, "shape": shape, "seed": len(matrices), "rotation_block": rotation_block, "state_bits": 12}
    if matrices:
        model.__class__ = runtime.PACKED[type(model)]
        runtime.replace_linears(model, matrices)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else weight.data.normal_(0.0, spread)
    for linear in (module for module in model.modules() if isinstance(module, runtime.QLRLinear)):
        fill(linear)
    model.config.dtype = torch.bfloat16
    if matrices:
        model.config.quantization_config = runtime.QLRConfig(matrices=matrices)
    model.save_pretrained(folder)


def tensor_bytes() -> int:
    """Of all tensors that this process holds, each memory once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every object wakes deprecated ones
        found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
    return sum({(t.device, t.data_ptr()): t.untyped_storage().nbytes() for t in found if t.data_ptr()}.values())


def prefill(model: nn.Module, tokens: torch.Tensor) -> object:
    return model(tokens, use_cache=True, logits_to_keep=1).past_key_values


def decode(model: nn.Module, tokens: torch.Tensor, steps: int) -> None:
    """`steps` tokens, one at a time, after a short prompt."""
    cache = prefill(model, tokens[:, :16])
    for _ in range(steps):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)


def models(arguments: argparse.Namespace) -> list[dict]:
    """Whole models: load each from its folder, then let them take turns."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=arguments.width, intermediate_size=arguments.intermediate, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64, num_key_value_heads=max(arguments.width // 256, 1), tie_word_embeddings=False,
    )  # fmt: skip
    tokens = torch.randint(0, config.vocab_size, (1, arguments.tokens), device=arguments.device)
    found, rows = {}, {}
    with tempfile.TemporaryDirectory() as parent:
        for name in ["dense", *arguments.specs, "dequantized"]:
            folder = Path(parent) / (arguments.specs[0] if name == "dequantized" else name).replace("/", "_")
            if not folder.exists():
                write_model(folder, config, name)
            before, start = tensor_bytes(), time.perf_counter()
            options = {"quantization_config": runtime.QLRConfig(dequantize=True)} if name == "dequantized" else {}
            found[name] = AutoModelForCausalLM.from_pretrained(folder, device_map=arguments.device, **options)
            load = time.perf_counter() - start
            prefill(found[name], tokens)
            packed = sum(b.nbytes for m in found[name].modules() if isinstance(m, runtime.QLRLinear) for b in m.buffers())
            plain = sum(weight.nbytes for weight in found[name].parameters())
            rows[name] = {"model": name, "bytes": tensor_bytes() - before, "load_seconds": load}
            rows[name]["ratio"] = (rows[name]["bytes"] - plain) / packed if packed else None
    works = {name: lambda m=m: prefill(m, tokens) for name, m in found.items()}
    for name, seconds in best_seconds(works, arguments).items():
        rows[name]["prefill_tokens_per_second"] = arguments.tokens / seconds
    works = {name: lambda m=m: decode(m, tokens, 0) for name, m in found.items()}
    prompt = best_seconds(works, arguments)
    works = {name: lambda m=m: decode(m, tokens, arguments.steps) for name, m in found.items()}
    for name, seconds in best_seconds(works, arguments).items():
        rows[name]["decode_tokens_per_second"] = arguments.steps / (seconds - prompt[name])
    print(f"\nLlama, {arguments.layers} layers of width {arguments.width} and {arguments.intermediate}, bfloat16 (times dense)")
    print(f"{'':24s} {'prefill tok/s':>20s} {'decode tok/s':>20s} {'memory MB':>10s} {'/ packed':>9s} {'load s':>7s}")
    for name, row in rows.items():
        cells = []
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            cells.append(f"{row[key]:11.1f} ({rows['dense'][key] / row[key]:5.2f})")
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else ""
        print(
            f"{name:24s} {cells[0]:>20s} {cells[1]:>20s} {row['bytes'] / 1e6:10.1f} {ratio:>9s} {row['load_seconds']:7.2f}",
            flush=True,
        )
    return list(rows.values())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--specs", nargs="+", default=SPECS, help="packed forms; the same with and without factors shows their cost"
    )
    parser.add_argument("--width", type=int, default=2048, help="of the model; a head has 64")
    parser.add_argument("--intermediate", type=int, default=8192, help="width of the MLP")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the whole model")
    parser.add_argument("--tokens", type=int, default=512, help="of the prefill")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded one at a time")
    parser.add_argument("--rounds", type=int, default=5, help="of which the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this thread, so use it with --threads 1 only"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and (arguments.threads > 1 or arguments.device != "cpu"):
        parser.error("--clock cpu counts one thread; give --threads 1 and --device cpu with it")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names of arguments

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "runtime": runtime.RUNTIME_VERSION}
    library = runtime.native_products()
    versions["products"] = library.backend() if library else "torch"
    processor = torch.cuda.get_device_name() if arguments.device == "cuda" else processor_name()
    machine = {
        "device": processor,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "platform": platform.platform(),
        **versions,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    width, wide = arguments.width, arguments.intermediate
    result = {"machine": machine, "models": models(arguments)}  # first, so that it pays for the tables
    result["layers"] = layers([(width, width), (wide, width), (width, wide)], arguments)
    if arguments.json:
        setup = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"setup": setup} | result, indent=1) + "\n")


def processor_name() -> str:
    """As Linux tells it, with what matters for bfloat16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return f"{' '.join(sorted(names)) or platform.processor()} ({'with' if 'avx512_bf16' in flags else 'without'} avx512_bf16)"


if __name__ == "__main__":
    main()
