"""A whole model: compressed under a budget, loaded again in JAX, and asked to go on with a text.

    python examples/compress_and_load.py                 about a minute on a CPU
    python examples/compress_and_load.py --quick         two matrices of one block, integers only
    python examples/compress_and_load.py --out DIR       keeps the folder, which PyTorch loads too

The model is the small Llama that comes with this library; its calibration text is the standard library's source of this machine.
"""

import argparse
import tempfile
from pathlib import Path

import jax.numpy as jnp

import qlr_jax as qlr
from qlr_jax import job
from qlr_jax.evaluation import GenerationSettings, stream_text
from qlr_jax.models import load_tokenizer

SMALL = qlr.Recipe(
    budget="3bpw",
    backbones=("int-2g32", "int-3g32", "int-4g32"),
    factors=("int-4",),
    ranks=(0, 8),  # rank 0 is always an option: the allocation decides where L R is worth its bytes
    iterations=1,
    sequences=16,
    measure_tokens=512,
    evaluation_tokens=2048,
    refine=0,
)
QUICK = SMALL.updated(
    include=("model.layers.0.self_attn.[qo]_proj",),  # of one shape: most of the time goes into compiling for a shape
    backbones=("int-2g32", "int-4g32"),
    ranks=(0,),
    outputs="alike",
    sequences=8,
    sequence_length=64,
    measure_tokens=128,
    evaluation_tokens=256,
    force=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder to write; a temporary one where not given")
    parser.add_argument("--quick", action="store_true", help="two matrices of one block, integers only")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = asked.out or Path(scratch) / "out"
        report = job.demo(out, recipe=QUICK if asked.quick else SMALL).report
        size, delivered = report["bytes"], report["delivered"]
        print(f"{size['before'] / 1e6:.2f} MB before, {size['after'] / 1e6:.2f} MB after")
        print(f"{report['bits_per_weight']:.3f} bits a weight of the compressed matrices")
        print(f"KL on held-out text: {report['kl'][delivered]:.4f} nats a token ({delivered})")

        model = qlr.load(out)  # Q, L and R stay packed; decoded as they are used
        print("logits:", model(jnp.arange(12)[None]).shape)
        settings = GenerationSettings(max_new_tokens=1 if asked.quick else 12)
        print("".join(stream_text(model, load_tokenizer(out), "def main(", settings)))


if __name__ == "__main__":
    main()
