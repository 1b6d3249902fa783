"""Tokens a second of one model in PyTorch, dense and packed, and in llama.cpp, side by side in one run.

    python benchmarks/llama_cpp.py                                  TinyLlama's shape (1.1e9 weights), one thread
    python benchmarks/llama_cpp.py --threads 2 --specs trellis-2 int-4g32
    python benchmarks/llama_cpp.py --width 576 --intermediate 1536 --layers 30 --heads 9 --kv-heads 3 --vocabulary 49152 --tied

Random codes, as in torch_runtime.py: any byte stream is a valid code, so that speed and size are those of a real model and the text
means nothing. Embeddings and head are bf16 everywhere. All take turns within every round; the best round counts, because other work
on the machine can only add time. Q2_K needs widths that 256 divides. MB: of what a token reads, the embedding's other rows not
counted. Needs `pip install xllamacpp gguf torch`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
import xllamacpp
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.table import show
from benchmarks.torch_runtime import decode, processor_name, write_model
from qlr_jax.formats.qlr import modeling_qlr as runtime

BLOCKS = {"BF16": (1, 2, ()), "Q8_0": (32, 34, (0,)), "Q4_0": (32, 18, (0,)), "Q2_K": (256, 84, (80, 82))}
"""(weights, bytes, where its float16 scales lie) of a block."""
PROMPT = 16


def random_blocks(kind: str, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (rows, bytes): codes at random, scales that neither overflow nor vanish."""
    size, count, scales = BLOCKS[kind]
    if kind == "BF16":
        values = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = rng.integers(0, 256, (rows, cols // size, count), np.uint8)
    for at in scales:
        blocks[..., at : at + 2] = np.array([0.002], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path: Path, config: LlamaConfig, kind: str) -> None:
    """A random Llama whose linear layers are of `kind`."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    assert config.num_key_value_heads is not None
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)

    def add(name: str, rows: int, cols: int, kind: str) -> None:
        blocks = random_blocks(kind, rows, cols, rng)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(config.hidden_size, np.float32))

    width, wide = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * config.num_key_value_heads
    add("token_embd.weight", config.vocab_size, width, "BF16")
    norm("output_norm.weight")
    if not config.tie_word_embeddings:
        add("output.weight", config.vocab_size, width, "BF16")
    for i in range(config.num_hidden_layers):
        norm(f"blk.{i}.attn_norm.weight"), norm(f"blk.{i}.ffn_norm.weight")
        shapes = {"attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width), "attn_output": (width, width)}
        shapes |= {"ffn_gate": (wide, width), "ffn_up": (wide, width), "ffn_down": (width, wide)}
        for name, (rows, cols) in shapes.items():
            add(f"blk.{i}.{name}.weight", rows, cols, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in llama.cpp, in this process."""

    def __init__(self, path: Path, threads: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 512, 1, 1, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)
        self.rate(1)

    def rate(self, steps: int) -> float:
        """Tokens a second after a short prompt, as it says itself."""
        body = {"prompt": list(range(10, 10 + PROMPT)), "n_predict": steps, "ignore_eos": True, "cache_prompt": False}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + "/completion", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            found = json.loads(reply.read())["timings"]
        assert found["predicted_n"] == steps, f"{found['predicted_n']} tokens came for {steps}"
        return found["predicted_per_second"]


def torch_rate(model: Any, tokens: torch.Tensor) -> Callable[[int], float]:
    """The same in PyTorch: time of prompt and steps less that of the prompt."""

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        decode(model, tokens, steps)
        return time.perf_counter() - start

    return lambda steps: steps / (seconds(steps) - min(seconds(0) for _ in range(2)))


@torch.inference_mode()
def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--width", type=int, default=2048)
    parse.add_argument("--intermediate", type=int, default=5632)
    parse.add_argument("--layers", type=int, default=22)
    parse.add_argument("--heads", type=int, default=32)
    parse.add_argument("--kv-heads", type=int, default=4)
    parse.add_argument("--vocabulary", type=int, default=32000)
    parse.add_argument("--tied", action="store_true", help="the head is the embedding")
    parse.add_argument("--specs", nargs="*", default=["trellis-2", "trellis-2+r16@trellis-4", "int-4g32"])
    parse.add_argument("--types", nargs="*", default=list(BLOCKS), help="of llama.cpp")
    parse.add_argument("--steps", type=int, default=16)
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--json", type=Path)
    args = parse.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names of arguments
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, tie_word_embeddings=args.tied,
    )  # fmt: skip
    tokens = torch.arange(10, 10 + PROMPT)[None]
    works: dict[str, Callable[[int], float]] = {}
    size, kept = {}, []
    for name in ["dense", *args.specs]:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), config, name)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        title = f"PyTorch, {'bf16' if name == 'dense' else name}"
        held = sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
        size[title] = held - (0 if args.tied else 2 * args.vocabulary * args.width)
        works[title] = torch_rate(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        for kind in [kind for kind in args.types if args.width % BLOCKS[kind][0] == args.intermediate % BLOCKS[kind][0] == 0]:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, config, kind)
            kept.append(LlamaCpp(path, args.threads))
            title = f"llama.cpp, {kind}"
            size[title], works[title] = path.stat().st_size - (0 if args.tied else 2 * args.vocabulary * args.width), kept[-1].rate
        best = dict.fromkeys(works, 0.0)
        for _ in range(args.rounds):
            for name, rate in works.items():
                best[name] = max(best[name], rate(args.steps))
    dense = best["PyTorch, bf16"]
    facts = [
        {"model": name, "MB a token": size[name] / 1e6, "tokens/s": rate, "times bf16": rate / dense} for name, rate in best.items()
    ]
    library = runtime.native_products()
    products = f"products {library.backend()}" if library else "no C++ products"
    title = f"{processor_name()}, {args.threads} threads, {products}, torch {torch.__version__}, xllamacpp {version('xllamacpp')}"
    show(title, facts, args.json)


if __name__ == "__main__":
    main()
