"""What rounding activations to 16 bits inside the C++ products does to a model's predictions.

    python benchmarks/rounding.py OUT --text heldout.txt --tokens 2048

OUT is a folder that `qlr compress` made. Its model reads the text in pieces of 8 tokens, as many as are rounded, in float32: once
with exact products, once with rounded ones, in PyTorch. KL(exact ‖ rounded), nats a token, beside the KL of the compression itself
that OUT's report has.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qlr_jax.formats.qlr import modeling_qlr as runtime
from qlr_jax.formats.qlr import native_products
from qlr_jax.native import product

PIECE = 8


@contextmanager
def rounded() -> Iterator[None]:
    """Products round, whatever the type of x."""
    kept = product.multiply

    def multiply(*args: Any, exact: bool) -> str:
        return kept(*args, exact=False)

    native_products.product.multiply = multiply
    try:
        yield
    finally:
        native_products.product.multiply = kept


def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary), in float64."""
    cache, rows = None, []
    for start in range(0, tokens.shape[1], PIECE):
        out = model(tokens[:, start : start + PIECE], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0].double().log_softmax(-1))
    return torch.cat(rows)


@torch.inference_mode()
def main() -> None:
    """Run and print."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("out", type=Path)
    parse.add_argument("--text", type=Path, required=True)
    parse.add_argument("--tokens", type=int, default=2048)
    parse.add_argument("--length", type=int, default=512, help="of a sequence")
    args = parse.parse_args()
    if product.library() is None:
        raise SystemExit("the C++ library is not built")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names of arguments
    runtime.register()
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    text = args.text.read_text(encoding="utf-8")[: 20 * args.tokens]
    tokens = AutoTokenizer.from_pretrained(args.out)(text, return_tensors="pt").input_ids[:, : args.tokens]
    divergences, changed = [], 0
    for start in range(0, tokens.shape[1], args.length):
        own = tokens[:, start : start + args.length]
        exact = log_probabilities(model, own)
        with rounded():
            other = log_probabilities(model, own)
        divergences.append((exact.exp() * (exact - other)).sum(-1))
        changed += int((exact.argmax(-1) != other.argmax(-1)).sum())
    found = torch.cat(divergences)
    report = json.loads((args.out / "report.json").read_text(encoding="utf-8"))
    said = f"KL(exact ‖ rounded) {found.mean():.2e}, largest {found.max():.2e}, likeliest token changed {changed} times"
    print(f"{tokens.shape[1]} tokens: {said}")
    print(f"KL of the compression, held out, as report.json has it: {report['kl']:.3g}")


if __name__ == "__main__":
    main()
