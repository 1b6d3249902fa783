"""Commands that begin with a compressed model: evaluate, verify, generate, inspect, adapt, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlr_jax.cli.options import AsJson, Chat, Cluster, CompileCache, Compressed, HeldOut, IgnoreConfig, Original, Windows, given
from qlr_jax.cli.shell import app, clear_errors, command, computing, show
from qlr_jax.errors import QLRError

EARLIER_NAMES = {"fresh": "added", "states": "hidden-states", "reround-backbone": "requantize-backbone"}  # still taken
EXPORT_TARGETS = ("dense", "peft", "compressed-tensors", "gguf", "orbax")
HIDDEN_STATES = 2.5  # weight of hidden-state distillation, beside a trained backbone
VALIDATE_EVERY, VALIDATIONS = 50, 15  # validation on held-out text: every 50 steps, or 15 times in a long training


@app.command(short_help="Perplexity and divergence from the original.")
def evaluate(
    out: Compressed,
    text: HeldOut = None,
    chat: Chat = False,
    original: Original = None,
    ignore_config: IgnoreConfig = None,
    windows: Windows = None,
    window: Annotated[
        int | None, typer.Option("--window", min=2, help="Tokens of a window; 2048, or as many as the model takes.")
    ] = None,
    no_drift: Annotated[bool, typer.Option("--no-drift", help="Do not compare hidden states after every block.")] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME",
            help="Zero-shot task of lm_eval, 'paper' for the five of CALDERA, or a YAML file; may repeat.",
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option("--task-path", metavar="DIR", help="Folder of further tasks as YAML; they need no network.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of a task, at most.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows or requests at a time, at most.")] = 8,
    cluster: Cluster = None,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Measure a compressed model: perplexity, divergence from the original, agreement of the top token, zero-shot tasks.

    Figures come with 95 % intervals over windows of the text, and with every choice of the protocol.

    \b
    Example:
        qlr evaluate small --text heldout.txt --original path/to/llama
        qlr evaluate qlr-demo --json
        qlr evaluate small --tasks paper
    """
    with computing(as_json, compile_cache):
        from qlr_jax import job, progress, report

        result = job.evaluate(
            out,
            text=text or None,
            chat=chat,
            original=original,
            ignore_config=ignore_config or (),
            progress=progress.choose(as_json),
            windows=windows,
            window=window,
            drift=not no_drift,
            tasks=tasks or (),
            task_path=task_path,
            limit=limit,
            batch=batch,
            cluster=cluster,
        )
        show(result, as_json, report.evaluation)


@app.command(short_help="The acceptance gate: status 0 or 1, and why.")
def verify(
    out: Compressed,
    text: HeldOut = None,
    chat: Chat = False,
    original: Original = None,
    ignore_config: IgnoreConfig = None,
    windows: Windows = None,
    thresholds: Annotated[
        Path | None,
        typer.Option("--thresholds", "--recipe", metavar="FILE", help="YAML of thresholds, or a recipe with a part 'thresholds:'."),
    ] = None,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Whether a compressed model may be used: thresholds on its quality, its files unchanged, JAX and PyTorch agreeing.

    The exit status is 0 where everything passed, else 1. A file of thresholds may name kl, perplexity_ratio, agreement, drift,
    relative_error, checksums and parity; null leaves a check out. Without one the thresholds are those of the folder's own
    recipe.yaml, where it has any.

    \b
    Example:
        qlr verify qlr-demo
        qlr verify small --text heldout.txt --original path/to/llama --thresholds thresholds.yaml
        qlr verify small --text heldout.txt --json
    """
    with computing(as_json, compile_cache):
        from qlr_jax import progress, report
        from qlr_jax.pipelines import verify as gate

        verdict = gate.verify(
            out,
            text=text or None,
            chat=chat,
            original=original,
            ignore_config=ignore_config or (),
            thresholds=thresholds,
            windows=windows,
            progress=progress.choose(as_json),
        )
        show(verdict, as_json, report.verdict_text)
        raise typer.Exit(0 if verdict["passed"] else 1)


@app.command(short_help="Text after a prompt.")
def generate(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a compressed model, or any model's folder or name.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the text begins with.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw among so many likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may repeat.")] = None,
    ignore_config: IgnoreConfig = None,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Let a compressed model write on from a prompt, so that a person can look.

    \b
    Example:
        qlr generate qlr-demo --prompt 'import os'
        qlr generate small --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1 --stop '\n\n'
    """
    with computing(as_json, compile_cache):
        from qlr_jax import progress
        from qlr_jax.pipelines import generate as pipeline

        pieces = pipeline.generate(
            out,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            ignore_config=ignore_config or (),
            progress=progress.choose(as_json),
        )
        if as_json:
            return show({"prompt": prompt, "text": "".join(pieces)}, True, str)
        typer.echo(prompt, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


@app.command(short_help="What is inside a compressed folder.")
def inspect(out: Compressed, as_json: AsJson = False) -> None:
    """Show what is inside a compressed folder: every matrix with its spec, shape, bytes and bits per weight.

    \b
    Example:
        qlr inspect qlr-demo
        qlr inspect qlr-demo --json
    """
    with clear_errors(as_json):
        from qlr_jax import job, report

        show(job.inspect(out), as_json, report.inspection)


# The options of a command are its signature, and its help is its docstring: nothing here would be clearer apart.
@app.command(
    short_help="A compressed model, adapted on a text.",
    context_settings={"token_normalize_func": lambda name: EARLIER_NAMES.get(name, name)},
)
def adapt(
    out: Compressed,
    dest: Annotated[Path, typer.Argument(parser=given, metavar="DEST", help="Folder for the adapted model; new or empty.")],
    text: Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="Text to adapt to; may repeat.")] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", metavar="FILE", help="Other text that the figures are measured on; may repeat."),
    ] = None,
    chat: Chat = False,
    original: Annotated[
        Path | None,
        typer.Option("--original", metavar="MODEL", help="Folder or GGUF file of the original: the teacher of kl and mix."),
    ] = None,
    ignore_config: IgnoreConfig = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="PART",
            help="factors, norms, scales, signs, embeddings or backbone; may repeat. Default: norms, scales, embeddings.",
        ),
    ] = None,
    loss: Annotated[str, typer.Option("--loss", help="kl (to the original), text (next token) or mix.")] = "kl",
    factors: Annotated[
        str, typer.Option("--factors", help="Grid that trained factors are stored on: same, bf16, or one such as trellis-4.")
    ] = "same",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Train only so many components of every matrix.")] = None,
    added: Annotated[
        str | None,
        typer.Option("--added", metavar="SIZE", help="Added components for so many bytes, e.g. 0.05bpw or 20kB."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the optimizer.")] = 600,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of one pass.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Passes that one step adds up.")] = 1,
    compute: Annotated[str, typer.Option("--compute", help="float32, or bf16 for products in bfloat16.")] = "float32",
    hidden_states: Annotated[
        float | None,
        typer.Option(
            "--hidden-states",
            min=0,
            help=f"Weight of hidden-state distillation from the original. Default: {HIDDEN_STATES:g} with a backbone, else 0.",
        ),
    ] = None,
    requantize_backbone: Annotated[
        int,
        typer.Option("--requantize-backbone", min=1, metavar="STEPS", help="Re-quantize trained backbones after so many steps."),
    ] = 20,
    remat: Annotated[bool, typer.Option("--remat", help="Compute activations again in the backward pass: less memory.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the text.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an adaptation that was interrupted.")] = False,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Adapt a compressed model to a text: train parts of it by gradient, and store them packed.

    Norms, scales and embeddings (lm_head with them) are trained unless --train says otherwise: they are stored already, so it costs
    no byte. Embeddings take 24 bytes of memory a number, 6.3 GB for Llama-2-7B; to leave them: --train norms --train scales.
    --train backbone re-quantizes Q as well, at no byte either, on text enough: it wins most, for 28 bytes of memory a weight.
    That takes half as long as an iteration of the compression's last solves, twice as long with every state bit: where it is dear,
    raise --requantize-backbone, and what is won falls a little.

    \b
    Example:
        qlr adapt small adapted --text mine.txt
        qlr adapt small adapted --text mine.txt --loss text --held-out other.txt
        qlr adapt small adapted --text mine.txt --train norms --train scales --train embeddings --train backbone --steps 1200
        qlr adapt small adapted --text mine.txt --train factors --train norms --train scales --factors bf16
    """
    with computing(as_json, compile_cache):
        from qlr_jax import progress
        from qlr_jax.adaptation import AdaptConfig
        from qlr_jax.pipelines import adapt as pipeline
        from qlr_jax.report import adapted_text

        more = ("factors",) if added or factors != "same" or rank else ()
        parts = tuple(train) if train else ("norms", "scales", "embeddings", *more)
        config = AdaptConfig(
            train=parts,
            loss=loss,
            factors=factors,
            rank=rank,
            fresh=added,
            steps=steps,
            evaluate_every=max(VALIDATE_EVERY, steps // VALIDATIONS),
            batch=batch,
            accumulate=accumulate,
            compute=compute,
            states=hidden_states if hidden_states is not None else HIDDEN_STATES if "backbone" in parts and loss != "text" else 0.0,
            reround_backbone=requantize_backbone,
            remat=remat,
            seed=seed,
        )
        result = pipeline.adapt(
            out,
            dest,
            text or None,
            config,
            original=original,
            ignore_config=ignore_config or (),
            held_out=held_out or None,
            chat=chat,
            resume=resume,
            progress=progress.choose(as_json),
            command=command(),
        )
        show(result, as_json, adapted_text)


@app.command(short_help="A compressed model in another format.")
def export(
    out: Compressed,
    dest: Annotated[Path, typer.Argument(parser=given, metavar="DEST", help="Folder for the exported model; new or empty.")],
    to: Annotated[str, typer.Option("--to", help=f"Format: {', '.join(EXPORT_TARGETS)}.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Of what is not packed: bfloat16, float16 or float32.")] = "bfloat16",
    base: Annotated[str, typer.Option("--base", help="Under a peft adapter: dense or compressed-tensors.")] = "dense",
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad the adapter to one rank that vLLM takes (peft, compressed-tensors).")
    ] = False,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Write a compressed model in the format of another tool, with a model card that says how to load it, and checksums.

    \b
    dense                plain Llama weights, every Q + L R multiplied out
    peft                 Q as the model, L R as its LoRA adapter, in one folder
    compressed-tensors   packed integers, for vLLM and transformers; L R in adapter/
    gguf                 Q4_0, Q8_0, Q2_K, Q3_K and BF16 blocks, for llama.cpp; L R as adapter.gguf
    orbax                a checkpoint that qlr.load restores, sharded over a mesh of devices

    \b
    Example:
        qlr export qlr-demo dense-llama --to dense
        qlr export qlr-demo with-adapter --to peft --uniform-rank
        qlr compress path/to/llama small --budget 4bpw --calibration text.txt --target gguf
        qlr export small small-gguf --to gguf
    """
    with computing(as_json, compile_cache):
        if to not in EXPORT_TARGETS:
            raise QLRError(f"export target {to!r} is not available; --to takes {', '.join(EXPORT_TARGETS)}")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise QLRError(f"dtype {dtype!r} is not available; --dtype takes bfloat16, float16 or float32")
        if base != "dense" and to != "peft":
            raise QLRError(f"--base {base} is for --to peft; leave it out for --to {to}")
        if uniform_rank and to not in ("peft", "compressed-tensors"):
            raise QLRError(f"--uniform-rank is for --to peft and compressed-tensors; leave it out for --to {to}")
        from qlr_jax import formats

        settings: dict[str, Any] = {"dtype": dtype}
        if to in ("peft", "compressed-tensors"):
            settings["uniform_rank"] = uniform_rank
        if to == "peft":
            settings["base"] = base
        write = getattr(formats, f"export_{to.replace('-', '_')}")
        write(out, dest, **settings)
        result = {"out": str(out), "dest": str(dest), "to": to, **settings}
        show(result, as_json, lambda _: f"{dest}: {to} model in {dtype}; {dest / 'README.md'} says how to load it")
