"""Train the bundled model on the text of Python's standard library, on a CPU, resumably.

    python benchmarks/train_bundled.py train  WORK --minutes 80       # again after an interruption: the same command
    touch WORK/decay                                                  # let the learning rate fall from now on
    python benchmarks/train_bundled.py export WORK [FOLDER]           # write the Hugging Face folder (default: the package's)

WORK holds the tokenizer, the orbax checkpoints and log.jsonl. The learning rate warms up, stays, and at the end falls to zero
(1 - sqrt): the fall starts at --decay-at tokens, when --minutes run short, or by hand, and is recorded in the checkpoint, so a
resumed run follows the same curve. The stable phase runs with --context tokens a row, the fall with --final-context.
"""

import argparse
import functools
import json
import math
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from qlr_jax.calibration.text import standard_library
from qlr_jax.models.config import LlamaConfig
from qlr_jax.models.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
BOS = "<s>"


# --- data ------------------------------------------------------------------------------------------------------------------


def train_tokenizer(text: str, work: Path) -> None:
    """Byte-level BPE of 2048 tokens with "<s>" as token 0, as files that AutoTokenizer reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text[i : i + 100_000] for i in range(0, len(text), 100_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(work / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS, "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (work / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(text: str, work: Path) -> np.ndarray:
    """Token ids of `text`, no BOS."""
    from tokenizers import Tokenizer

    return np.asarray(Tokenizer.from_file(str(work / "tokenizer.json")).encode(text, add_special_tokens=False).ids, np.int32)


def batch_at(tokens: np.ndarray, step: int, rows: int, context: int, seed: int) -> np.ndarray:
    """The rows of step `step`: a function of its arguments alone, so that a resumed run sees the same data.

    Every epoch cuts the text at another offset and shuffles the pieces; every second row starts with BOS.
    """
    per_epoch = (len(tokens) - 2 * context) // context // rows
    epoch, place = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch, context])
    offset = int(rng.integers(context))
    pieces = rng.permutation(per_epoch * rows)[place * rows : (place + 1) * rows]
    out = np.stack([tokens[offset + p * context : offset + (p + 1) * context + 1] for p in pieces])
    out[::2, 0] = CONFIG.bos_token_id
    return out


# --- model and step --------------------------------------------------------------------------------------------------------


def fast(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of bfloat16 operands accumulated in float32: twice the speed of float32 on a CPU that has AVX512-BF16."""
    return jnp.einsum(pattern, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@jax.custom_vjp
def fast_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x wᵀ for training; the two products of the backward pass are as fast as the forward one."""
    return fast("...n,mn->...m", x, w)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return fast_product(x, w), (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return fast("...m,mn->...n", g, w), fast("tm,tn->mn", g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]))


fast_product.defvjp(_forward, _backward)


def initial(seed: int) -> dict[str, jax.Array]:
    """Normal(0, 0.02) weights; the outputs that enter the residual stream smaller by sqrt(2 · layers)."""
    params = {name: p.get_value() for name, p in Llama(CONFIG, jax.random.key(seed)).tensors().items()}
    scale = 1 / math.sqrt(2 * CONFIG.num_hidden_layers)
    return {n: p * scale if n.endswith(("o_proj.weight", "down_proj.weight")) else p for n, p in params.items()}


def make_step():
    """(step, loss): step(params, state, rows, lr) -> params, state, loss; loss(params, rows) -> mean nats a token."""

    def loss(params: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
        model = Llama(CONFIG, product=fast_product)  # zeros: traced, then dropped by the compiler
        for name, param in model.tensors().items():
            param.set_value(params[name])
        return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean()

    decayed = lambda params: {name: p.ndim > 1 for name, p in params.items()}  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=decayed),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows, lr):
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), state, value

    return optimizer, step, jax.jit(loss)


def rate(step: int, peak: float, warmup: int, decay_from: int, decay_steps: int) -> float:
    """Learning rate: linear warm-up, constant, then peak · (1 − sqrt(share of the fall)); decay_from < 0 means not yet."""
    now = peak * min(1.0, (step + 1) / warmup)
    if decay_from < 0:
        return now
    return now * (1 - math.sqrt(min(1.0, max(0.0, (step - decay_from) / decay_steps))))


# --- the run ---------------------------------------------------------------------------------------------------------------


def save(work: Path, name: str, tree: dict) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    ocp.save(work / f"{name}.new", tree, overwrite=True)
    old = work / name
    if old.exists():
        shutil.rmtree(work / f"{name}.old", ignore_errors=True)
        old.rename(work / f"{name}.old")
    (work / f"{name}.new").rename(old)
    shutil.rmtree(work / f"{name}.old", ignore_errors=True)


def train(args: argparse.Namespace) -> None:
    """Train until the learning rate has fallen to zero, resuming from WORK's checkpoint if there is one."""
    work = Path(args.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    kept = ("seed", "lr", "warmup", "rows", "context", "final_context")
    command = f"--decay-at TOKENS --seed {args.seed}"
    (work / "settings.json").write_text(json.dumps({k: getattr(args, k) for k in kept} | {"command": command}) + "\n")
    text = standard_library("train")
    if not (work / "tokenizer.json").exists():
        train_tokenizer(text, work)
    tokens, heldout = encode(text, work), encode(standard_library("heldout"), work)
    final = args.final_context
    pieces = np.random.default_rng(0).permutation((len(heldout) - 1) // final)[:64]
    held = np.stack([heldout[p * final : (p + 1) * final + 1] for p in pieces])
    optimizer, step, loss = make_step()
    params = initial(args.seed)
    state = optimizer.init(params)
    # Plain numbers of the run travel with the weights: position, tokens seen, and the fall of the learning rate.
    run = {"step": 0, "tokens": 0, "decay_from": -1, "decay_steps": 1, "best": 1e9, "seconds": 0.0}
    for name in ("last", "last.old"):
        if (work / name).exists():
            restored = ocp.load(work / name, {"params": params, "state": state, "run": run})
            params, state, run = restored["params"], restored["state"], restored["run"]
            run = {k: float(v) if k in ("best", "seconds") else int(v) for k, v in run.items()}
            print(f"resumed {name} at step {run['step']}, {run['tokens']} tokens", flush=True)
            break
    print(f"{sum(p.size for p in params.values())} parameters, {len(tokens)} training tokens, {len(heldout)} held out", flush=True)
    start = saved = shown = time.time()
    recent, losses, speed = run["tokens"], [], 0.0

    def note(record: dict) -> None:
        with (work / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()), flush=True)

    while run["decay_from"] < 0 or run["step"] < run["decay_from"] + run["decay_steps"]:
        now = time.time()
        left = args.minutes * 60 - (now - start)
        if run["decay_from"] < 0 and run["step"] % 10 == 0:
            by_hand, by_clock = (work / "decay").exists(), speed > 0 and left < args.decay_share * args.minutes * 60
            if by_hand or by_clock or run["tokens"] >= args.decay_at:
                # At most the share asked for, and what the clock still allows at 0.8 of the speed (the final context is slower).
                steps = int(args.decay_share / (1 - args.decay_share) * run["step"])
                if args.minutes < 1e6:
                    steps = min(steps, int(0.8 * max(left, 120) * speed / (args.rows * args.context)))
                content = (work / "decay").read_text().strip() if by_hand else ""
                run |= {"decay_from": run["step"], "decay_steps": int(content) if content else max(steps, 50)}
                note({"decay_from": run["decay_from"], "decay_steps": run["decay_steps"]})
        falling = run["decay_from"] >= 0
        context = final if falling else args.context
        rows = batch_at(tokens, run["step"], args.rows * args.context // context, context, args.seed)
        lr = rate(run["step"], args.lr, args.warmup, run["decay_from"], run["decay_steps"])
        params, state, value = step(params, state, rows, lr)
        losses.append(float(value))
        run["step"] += 1
        run["tokens"] += rows.shape[0] * context
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss {losses[-1]} at step {run['step']}: lower --lr")
        if run["step"] % args.every == 0:
            now = time.time()
            speed, recent = (run["tokens"] - recent) / (now - shown), run["tokens"]
            run["seconds"], shown = run["seconds"] + now - shown, now
            record = {"step": run["step"], "tokens": run["tokens"], "loss": float(np.mean(losses)), "lr": lr, "speed": speed}
            losses = []
            if run["step"] % (4 * args.every) == 0:
                record["heldout"] = float(np.mean([float(loss(params, held[i : i + 8])) for i in range(0, len(held), 8)]))
                if record["heldout"] < run["best"]:
                    run["best"] = record["heldout"]
                    save(work, "best", {"params": params, "run": run})
            note(record | {"minutes": run["seconds"] / 60})
        if time.time() - saved > 180:
            save(work, "last", {"params": params, "state": state, "run": run})
            saved = time.time()
    record = {"step": run["step"], "tokens": run["tokens"]}
    record["heldout"] = float(np.mean([float(loss(params, held[i : i + 8])) for i in range(0, len(held), 8)]))
    if record["heldout"] < run["best"]:
        run["best"] = record["heldout"]
        save(work, "best", {"params": params, "run": run})
    save(work, "last", {"params": params, "state": state, "run": run})
    note(record | {"finished": True})


# ruff: noqa: E501  (the rows of the card)
CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags: [llama, qlr-jax, test-model]
---

# The bundled model of qlr-jax

A real, trained Llama that is small enough to travel inside the package: `qlr demo` compresses it without a download.
It knows Python source text and nothing else; it is meant for trying compression, not for use.

| | |
| --- | --- |
| Held-out loss | **{loss:.4f} nats a token** (perplexity {perplexity:.2f}), measured from these bf16 weights, computed in float32 |
| Held-out data | {windows} windows of {length} tokens, non-overlapping, one BOS at the start of the text; {bytes_per_token:.2f} bytes a token |
| Parameters | {parameters:,}: hidden {c.hidden_size}, intermediate {c.intermediate_size}, {c.num_hidden_layers} layers, {c.num_attention_heads} heads, {c.num_key_value_heads} key-value heads, tied embedding |
| Vocabulary | {c.vocab_size}, byte-level BPE trained on the training split; token 0 is `<s>` (BOS) |
| Tokens seen | {tokens:,} in {steps:,} steps of {rows} x {context} tokens ({final_context} tokens a row while the learning rate fell) |
| Optimiser | AdamW (0.9, 0.95), weight decay 0.1, clipping 1, peak rate {lr}, warm-up {warmup} steps, constant, then 1 - sqrt to 0 over the last {decay_steps:,} steps |
| Time | {hours:.1f} hours on two CPU cores shared with other work; bfloat16 products, float32 weights and sums |
| Seed | {seed} |
| Trained with | {versions} |

Data: the text of Python's own standard library, read from the interpreter that ran the script (`sysconfig.get_paths()["stdlib"]`,
Python {python}), without site-packages, dist-packages and test packages. A module is held out if the first four bytes of sha256 of
its path below the library, read as a big-endian share of 2^32, lie below 0.10; it is calibration text from 0.10 to 0.15; else it is
for training (`qlr_jax.calibration.standard_library`). Nothing of that text is stored here. Other Python versions have other modules,
so training again on another version gives another model; the split is by path, so what was held out stays held out.

    python benchmarks/train_bundled.py train WORK {command}
    python benchmarks/train_bundled.py export WORK
"""


def export(args: argparse.Namespace) -> None:
    """Write the best checkpoint as a Hugging Face folder, and the card with the loss measured from what was written."""
    import flax
    import tokenizers

    from qlr_jax.evaluation import perplexity, windows
    from qlr_jax.models import load_model, load_tokenizer, save_model

    work, folder = Path(args.work).resolve(), Path(args.folder)
    like = {name: jnp.zeros(p.shape) for name, p in initial(0).items()}
    numbers = {"step": 0, "tokens": 0, "decay_from": 0, "decay_steps": 0, "best": 0.0, "seconds": 0.0}
    found = ocp.load(work / "best", {"params": like, "run": numbers})
    params, run = found["params"], {k: float(v) for k, v in found["run"].items()}
    settings = json.loads((work / "settings.json").read_text()) if (work / "settings.json").exists() else {}
    model = Llama(CONFIG)
    for name, param in model.tensors().items():
        param.set_value(params[name])
    save_model(model, folder, "bfloat16", tokenizer_from=work)
    text = standard_library("heldout")
    rows = windows(text, load_tokenizer(folder), settings["final_context"])
    per_token = len(text.encode()) / rows.size
    if args.windows:
        rows = rows[np.random.default_rng(0).permutation(len(rows))[: args.windows]]
    value = perplexity(load_model(folder), rows, batch=16)
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}, "
    card = CARD.format(
        c=CONFIG, loss=math.log(value), perplexity=value, windows=len(rows), length=rows.shape[1], bytes_per_token=per_token,
        parameters=sum(p.size for p in params.values()), tokens=int(run["tokens"]), steps=int(run["step"]),
        decay_steps=int(run["decay_steps"]), hours=run["seconds"] / 3600, python=platform.python_version(),
        versions=versions + f"orbax {version('orbax-checkpoint')}, tokenizers {tokenizers.__version__}", **settings,
    )  # fmt: skip
    if int(run["decay_from"]) < 0:
        card = card.replace(
            "# The bundled model of qlr-jax\n", "# The bundled model of qlr-jax\n\n**Preliminary: training goes on.**\n"
        )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps({"loss": math.log(value), "perplexity": value, "tokens": int(run["tokens"]), "folder": str(folder)}))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    t = verbs.add_parser("train")
    t.add_argument("work")
    t.add_argument("--minutes", type=float, default=1e9, help="end of this process, the fall included")
    t.add_argument("--decay-at", type=float, default=float("inf"), help="tokens after which the learning rate falls")
    t.add_argument("--decay-share", type=float, default=0.3)
    t.add_argument("--lr", type=float, default=3e-3)
    t.add_argument("--warmup", type=int, default=200)
    t.add_argument("--rows", type=int, default=16)
    t.add_argument("--context", type=int, default=128)
    t.add_argument("--final-context", type=int, default=256)
    t.add_argument("--every", type=int, default=50)
    t.add_argument("--seed", type=int, default=0)
    t.set_defaults(run=train)
    e = verbs.add_parser("export")
    e.add_argument("work")
    e.add_argument("folder", nargs="?", default=str(Path(__file__).parents[1] / "qlr_jax" / "bundled"))
    e.add_argument("--windows", type=int, default=0, help="measure so many random held-out windows only (0: all)")
    e.set_defaults(run=export)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
