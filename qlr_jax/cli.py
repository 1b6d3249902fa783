"""The commands of `qlr`: they parse, call and print; what is heavy loads inside them."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qlr_jax.errors import QLRError

EXPORT_TARGETS = ("dense", "peft", "compressed-tensors", "gguf")

app = typer.Typer(
    name="qlr",
    help="Compress a Llama model as Q + L R: rank and bits of every matrix are chosen together under a memory budget.\n\n"
    "Start with: qlr demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Saved = Annotated[Path, typer.Argument(metavar="TABLE", help="A table.json, or the folder that qlr sensitivity wrote it into.")]
Lock = Annotated[
    list[str] | None,
    typer.Option("--lock", metavar="PATTERN=SPEC", help="Such matrices keep this spec, e.g. '*v_proj=trellis-4'; may repeat."),
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option("--at-least", metavar="PATTERN=BITS", help="Such matrices store so many bits per weight or more; may repeat."),
]
TieBackbone = Annotated[
    list[str] | None,
    typer.Option(
        "--tie",
        metavar="PATTERN,PATTERN",
        help="Matrices with the same text for * take the same backbone, e.g. '*q_proj,*k_proj'; may repeat.",
    ),
]
TieSpec = Annotated[
    list[str] | None,
    typer.Option("--tie-spec", metavar="PATTERN,PATTERN", help="As --tie, the whole spec with its rank; may repeat."),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Format to compress for: qlr (packed), compressed-tensors or gguf. Only what it holds is offered, at its bytes.",
    ),
]
HessiansFrom = Annotated[
    Path | None,
    typer.Option("--hessians", metavar="PATH", help="Hessians made elsewhere, a folder or a file of .safetensors or .npz."),
]
HeldOut = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="Held-out UTF-8 text; may repeat.")]
Original = Annotated[
    Path | None, typer.Option("--original", metavar="MODEL", help="Folder of the original, for the divergence from it.")
]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Windows of text to measure, at most.")]
Compressed = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a compressed model, made by qlr compress or qlr demo.")]


@app.command(short_help="The bundled model, end to end, in minutes.")
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the compressed model goes.")] = Path("qlr-demo"),
    budget: Annotated[str, typer.Option("--budget", help="Bits per weight of the compressed layers.")] = "2.25bpw",
    as_json: AsJson = False,
) -> None:
    """Compress the bundled Llama end to end, in minutes on two CPU cores, without network.

    The model was trained on Python's standard library; the library of this machine calibrates it and evaluates it.

    \b
    Example:
        qlr demo
        qlr demo --out small --budget 3bpw
    """
    with _clear_errors(as_json):
        from qlr_jax import job, progress

        _tell_job(job.demo(out, budget=budget, progress=progress.choose(as_json), command=_command()), as_json)


@app.command(short_help="A Llama model under a memory budget.")
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Llama folder in Hugging Face format, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the compressed model; new or empty.")],
    budget: Annotated[str | None, typer.Option("--budget", help="2.25bpw, 900MB or device:8GiB,context=8192.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option("--calibration", metavar="TEXT", help="UTF-8 text to calibrate on; may repeat.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML of settings; options win over it.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Compress only such layers, e.g. '*.mlp.*'; may repeat."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave such layers as they are; may repeat.")
    ] = None,
    evaluate_on: Annotated[
        list[Path] | None, typer.Option("--evaluate-on", metavar="FILE", help="Held-out text to measure on; may repeat.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of rotations and samples; the same seed gives the same model.")
    ] = None,
    state_bits: Annotated[
        int | None, typer.Option("--state-bits", help="Of the trellis, 6 to 16: more is better and slower.")
    ] = None,
    target: Target = None,
    backbone_from: Annotated[
        Path | None,
        typer.Option(
            "--backbone-from",
            metavar="DIR",
            help="Dense weights that another method made of MODEL: they are Q, only L R is fitted, and the budget is its own.",
        ),
    ] = None,
    hessians: HessiansFrom = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="TABLE", help="What qlr sensitivity wrote for this model: not measured again.")
    ] = None,
    lock: Lock = None,
    at_least: AtLeast = None,
    tie: TieBackbone = None,
    tie_spec: TieSpec = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--parallel",
            help="Solve what is delivered again, every block behind the compressed ones before it, and keep it where KL falls.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a job that was interrupted; what it finished is not done again.")
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option("--coordinator", metavar="HOST:PORT", help="Of process 0, where several processes share this job."),
    ] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="How many share it.")] = None,
    process: Annotated[int | None, typer.Option("--process", min=0, help="Which of them this is, from 0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what the job would need, as qlr plan does.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Accept less calibration text than a matrix has inputs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compress a Llama model under a memory budget into a folder that PyTorch and JAX load.

    OUT holds the packed weights, the recipe, report.json and report.html. While the job is under way OUT/job holds what is
    finished: after an interruption the same command with --resume goes on from there.

    Several machines that all see MODEL and OUT share a job: the same command on each, with --coordinator, --processes and its own
    --process. Process 0 calibrates, measures and writes; matrices are solved by all. If one is lost the job ends, what is solved is
    kept, and --resume goes on with as many as there are.

    \b
    Example:
        qlr compress path/to/llama small --budget 2.25bpw --calibration text.txt
        qlr compress path/to/llama small --budget 900MB --calibration a.txt --calibration b.txt --evaluate-on heldout.txt
        qlr compress path/to/llama small --recipe small/recipe.yaml --seed 1
        qlr compress path/to/llama small --budget 3bpw --calibration text.txt --table measured --lock '*v_proj=trellis-4'
        qlr compress path/to/llama small --budget 4bpw --calibration text.txt --target gguf
        qlr compress path/to/llama small --budget 0.3bpw --calibration text.txt --backbone-from path/to/llama-gptq-dense
        qlr compress path/to/llama small --budget 2bpw --calibration text.txt --coordinator 10.0.0.1:9911 --processes 4 --process 2
    """
    with _clear_errors(as_json):
        from qlr_jax.recipe import Recipe, gathered

        settings = gathered(
            recipe,
            budget=budget,
            include=include,
            exclude=exclude,
            seed=seed,
            state_bits=state_bits,
            target=target,
            backbone_from=_text(backbone_from),
            hessians_from=_text(hessians),
            sequential=sequential,
            force=force or None,
        )
        if "budget" not in settings:
            raise QLRError("no budget is given; pass --budget, e.g. --budget 2.25bpw, or name it in the recipe")
        chosen = Recipe(**settings)
        if dry_run:
            return _tell_plan(model, chosen, None, processes or 1, out, as_json)

        from qlr_jax import distributed, job, planning, progress

        cluster = distributed.join(out, coordinator, processes, process)
        saved = planning.read_table(table) if table else None
        result = job.compress(
            model,
            out,
            budget=chosen.budget,
            calibration=list(calibration) if calibration else None,
            recipe=chosen,
            progress=progress.choose(as_json),
            command=_command(),
            evaluate_on=list(evaluate_on) if evaluate_on else None,
            table=saved,
            constraints=planning.Constraints.parse(lock, at_least, tie, tie_spec),
            resume=resume,
            cluster=cluster,
        )
        _tell_job(result, as_json)


@app.command(short_help="What a job would need: sizes, memory, time, disk.")
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Llama folder, its name on the hub, 'bundled', or a known name such as Llama-2-70B."),
    ],
    budget: Annotated[str | None, typer.Option("--budget", help="2.25bpw, 900MB or device:8GiB,context=8192.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="[KIND:]SIZE",
            help="What it is to run on: 24GiB, 'cpu:24GiB,cores=2' or 'gpu:80GiB,host=512GiB'; this machine where left out.",
        ),
    ] = None,
    hosts: Annotated[int, typer.Option("--hosts", min=1, help="Machines that share the job.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the job would write: its disk must have the room."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML of settings; options win over it.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Compress only such layers, e.g. '*.mlp.*'; may repeat."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave out such layers; may repeat.")
    ] = None,
    state_bits: Annotated[
        int | None, typer.Option("--state-bits", help="Of trellis codes, 6 to 16: time grows with 2^bits.")
    ] = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Tell from a model's config.json what compressing it would need. Nothing is computed, and no weights are read.

    \b
    Example:
        qlr plan Llama-2-70B --budget 2.25bpw --device cpu:2TB,cores=64
        qlr plan path/to/llama --budget 900MB --device 24GiB
    """
    with _clear_errors(as_json):
        from qlr_jax.recipe import DEMO, Recipe, gathered

        settings = gathered(recipe, budget=budget, include=include, exclude=exclude, state_bits=state_bits, target=target)
        _tell_plan(model, (DEMO if model == "bundled" else Recipe()).updated(**settings), device, hosts, out, as_json)


@app.command(short_help="What every matrix is sensitive to, as a table.")
def sensitivity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Llama folder in Hugging Face format, its name on the hub, or 'bundled'.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the table and its pictures; new or empty.")],
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibration", metavar="TEXT", help="UTF-8 text to calibrate on; may repeat. 'bundled' needs none."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML of settings; options win over it.")] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="PATTERN", help="Measure only such layers, e.g. '*.mlp.*'; may repeat.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave out such layers; may repeat.")
    ] = None,
    matrix: Annotated[
        str | None,
        typer.Option("--matrix", metavar="NAME", help="Draw its error against bits; else that of the most sensitive matrix."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of rotations and samples; the same seed gives the same table.")
    ] = None,
    target: Target = None,
    hessians: HessiansFrom = None,
    force: Annotated[bool, typer.Option("--force", help="Accept less calibration text than a matrix has inputs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much the error of every matrix matters, and write the table of all options that allocations are made from.

    OUT holds table.json, for qlr allocate and qlr frontier, sensitivity.html and its pictures. Nothing is compressed.

    \b
    Example:
        qlr sensitivity bundled measured
        qlr sensitivity path/to/llama measured --calibration text.txt
        qlr sensitivity path/to/llama measured --calibration text.txt --matrix model.layers.3.mlp.down_proj
        qlr allocate measured --budget 2.25bpw --budget 3bpw
    """
    with _clear_errors(as_json):
        from qlr_jax.recipe import DEMO, Recipe, gathered

        settings = gathered(
            recipe,
            include=include,
            exclude=exclude,
            seed=seed,
            target=target,
            hessians_from=_text(hessians),
            force=force or None,
        )
        chosen = (DEMO if model == "bundled" else Recipe()).updated(**settings)

        from qlr_jax import job, progress
        from qlr_jax.report.sensitivity import sensitivity_text

        result = job.sensitivity(
            model,
            out,
            calibration=list(calibration) if calibration else None,
            recipe=chosen,
            matrix=matrix,
            progress=progress.choose(as_json),
            command=_command(),
        )
        _tell(result, as_json, sensitivity_text)


@app.command(short_help="The best specs under a budget, from a saved table.")
def allocate(
    table: Saved,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help="2.25bpw, 900MB or device:8GiB,context=8192; may repeat.")
    ] = None,
    lock: Lock = None,
    at_least: AtLeast = None,
    tie: TieBackbone = None,
    tie_spec: TieSpec = None,
    gap: Annotated[float, typer.Option("--gap", help="Stop where no better one can be better by more than this share.")] = 1e-4,
    seconds: Annotated[float, typer.Option("--seconds", help="Time for the search; what is proved by then is told.")] = 10.0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="JSON of all allocations with their specs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a spec for every matrix under a budget, with the proof, and compare with simpler ways of spending the same bytes.

    It works on a saved table and needs no model. Patterns are names of matrices with * for any text.

    \b
    Example:
        qlr allocate measured --budget 2.25bpw
        qlr allocate measured --budget 2.25bpw --budget 900MB --out plans.json
        qlr allocate measured --budget 3bpw --lock '*v_proj=trellis-4' --at-least '*down_proj=2.5'
        qlr allocate measured --budget 3bpw --tie '*q_proj,*k_proj,*v_proj'
    """
    with _clear_errors(as_json):
        if not budget:
            raise QLRError("no budget is given; pass --budget, e.g. --budget 2.25bpw")
        from qlr_jax import planning
        from qlr_jax.report.plans import plans_text

        held = planning.Constraints.parse(lock, at_least, tie, tie_spec).on(planning.read_table(table))
        plans = planning.plan(held, budget, gap=gap, seconds=seconds)
        written = planning.write_json(out, _plain(plans)) if out else None
        result = {"table": table, "allocations": plans, "out": written}
        _tell(result, as_json, lambda _: plans_text(plans) + (f"\n\nwritten: {written}" if written else ""))


@app.command(short_help="Size against damage, from a saved table.")
def frontier(
    table: Saved,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FOLDER", help="A compressed model of this table, to mark as measured; may repeat."),
    ] = None,
    lock: Lock = None,
    at_least: AtLeast = None,
    tie: TieBackbone = None,
    tie_spec: TieSpec = None,
    points: Annotated[int, typer.Option("--points", help="Corners of a curve, at most.")] = 200,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for frontier.json and frontier.svg; new or not.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The least predicted damage at every size, with and without rank, and the measured models beside it.

    It works on a saved table and needs no model. Patterns are names of matrices with * for any text.

    \b
    Example:
        qlr frontier measured
        qlr frontier measured --with small --with smaller --out pictures
        qlr frontier measured --tie '*q_proj,*k_proj,*v_proj' --json
    """
    with _clear_errors(as_json):
        from qlr_jax import planning
        from qlr_jax.report.frontier import frontier_text

        whole = planning.read_table(table)
        held = planning.Constraints.parse(lock, at_least, tie, tie_spec).on(whole)
        found = planning.curves(held, points) | {"measured": planning.measured_points(whole, beside or ())}
        files = planning.write_frontier(out, _plain(found)) if out else []
        result = {"table": table, **found, "files": files}
        lines = "".join(f"\nwritten: {file}" for file in files)
        _tell(result, as_json, lambda _: frontier_text(found, found["measured"]) + ("\n" + lines if lines else ""))


@app.command(short_help="Perplexity and divergence from the original.")
def evaluate(
    out: Compressed,
    text: HeldOut = None,
    original: Original = None,
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
    with _clear_errors(as_json):
        from qlr_jax import job, progress, report

        result = job.evaluate(
            out,
            text=list(text) if text else None,
            original=original,
            progress=progress.choose(as_json),
            windows=windows,
            window=window,
            drift=not no_drift,
            tasks=tasks or (),
            task_path=task_path,
            limit=limit,
            batch=batch,
        )
        _tell(result, as_json, report.evaluation)


@app.command(short_help="The acceptance gate: status 0 or 1, and why.")
def verify(
    out: Compressed,
    text: HeldOut = None,
    original: Original = None,
    windows: Windows = None,
    thresholds: Annotated[
        Path | None,
        typer.Option("--thresholds", "--recipe", metavar="FILE", help="YAML of thresholds, or a recipe with a part 'thresholds:'."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whether a compressed model may be used: thresholds on its quality, its files unchanged, JAX and PyTorch agreeing.

    The exit status is 0 where everything passed, else 1. A file of thresholds may name kl, perplexity_ratio, agreement, drift,
    relative_error, checksums and parity; null leaves a check out.

    \b
    Example:
        qlr verify qlr-demo
        qlr verify small --text heldout.txt --original path/to/llama --thresholds thresholds.yaml
        qlr verify small --text heldout.txt --json
    """
    with _clear_errors(as_json):
        from qlr_jax import gate, progress, report

        verdict = gate.verify(
            out,
            text=list(text) if text else None,
            original=original,
            thresholds=thresholds,
            windows=windows,
            progress=progress.choose(as_json),
        )
        _tell(verdict, as_json, report.verdict_text)
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
    as_json: AsJson = False,
) -> None:
    """Let a compressed model write on from a prompt, so that a person can look.

    \b
    Example:
        qlr generate qlr-demo --prompt 'import os'
        qlr generate small --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1 --stop '\n\n'
    """
    with _clear_errors(as_json):
        from qlr_jax import delivered, progress

        pieces = delivered.generate(
            out,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            progress=progress.choose(as_json),
        )
        if as_json:
            return _tell({"prompt": prompt, "text": "".join(pieces)}, True, None)
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
    with _clear_errors(as_json):
        from qlr_jax import job, report

        _tell(job.inspect(out), as_json, report.inspection)


@app.command(short_help="A compressed model, adapted on a text.")
def adapt(
    out: Compressed,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the adapted model; new or empty.")],
    text: Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="UTF-8 text to adapt to; may repeat.")] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", metavar="FILE", help="Other text that the figures are measured on; may repeat."),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option("--original", metavar="MODEL", help="Folder of the original: the teacher of the losses kl and mix."),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="PART", help="factors, norms, scales or embeddings; may repeat. Default: all but factors."),
    ] = None,
    loss: Annotated[str, typer.Option("--loss", help="kl (to the original), text (next token) or mix.")] = "kl",
    factors: Annotated[
        str, typer.Option("--factors", help="Grid that trained factors are stored on: same, bf16, or one such as trellis-4.")
    ] = "same",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Train only so many components of every matrix.")] = None,
    fresh: Annotated[
        str | None, typer.Option("--fresh", metavar="SIZE", help="New factors for so many bytes, e.g. 0.05bpw or 20kB.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the optimizer.")] = 600,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of one pass.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Passes that one step adds up.")] = 1,
    compute: Annotated[str, typer.Option("--compute", help="float32, or bf16 for products in bfloat16.")] = "float32",
    remat: Annotated[bool, typer.Option("--remat", help="Compute activations again in the backward pass: less memory.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the text.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an adaptation that was interrupted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a compressed model to a text: train its small parts by gradient, the backbone's codes frozen, and store them packed.

    Norms, scales and embeddings (lm_head with them) are trained unless --train says otherwise: they are stored already, so it costs
    no byte. Embeddings take 24 bytes of memory a number, 6.3 GB for Llama-2-7B; to leave them: --train norms --train scales.

    \b
    Example:
        qlr adapt small adapted --text mine.txt
        qlr adapt small adapted --text mine.txt --loss text --held-out other.txt
        qlr adapt small adapted --text mine.txt --train factors --train norms --train scales --factors bf16
    """
    with _clear_errors(as_json):
        from qlr_jax import progress, tuning
        from qlr_jax.adaptation import AdaptConfig
        from qlr_jax.report import adapted_text

        more = ("factors",) if fresh or factors != "same" or rank else ()
        parts = tuple(train) if train else ("norms", "scales", "embeddings", *more)
        config = AdaptConfig(
            train=parts,
            loss=loss,
            factors=factors,
            rank=rank,
            fresh=fresh,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            compute=compute,
            remat=remat,
            seed=seed,
        )
        result = tuning.adapt(
            out,
            dest,
            list(text) if text else None,
            config,
            original=original,
            held_out=list(held_out) if held_out else None,
            resume=resume,
            progress=progress.choose(as_json),
        )
        _tell(result, as_json, adapted_text)


@app.command(short_help="A compressed model in another format.")
def export(
    out: Compressed,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the exported model; new or empty.")],
    to: Annotated[str, typer.Option("--to", help=f"Format: {', '.join(EXPORT_TARGETS)}.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Of what is not packed: bfloat16, float16 or float32.")] = "bfloat16",
    base: Annotated[str, typer.Option("--base", help="Under a peft adapter: dense or compressed-tensors.")] = "dense",
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad the adapter to one rank that vLLM takes (peft, compressed-tensors).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a compressed model in the format of another tool, with a model card that says how to load it, and checksums.

    \b
    dense                plain Llama weights, every Q + L R multiplied out
    peft                 Q as the model, L R as its LoRA adapter, in one folder
    compressed-tensors   packed integers, for vLLM and transformers; L R in adapter/
    gguf                 Q4_0, Q8_0, Q2_K, Q3_K and BF16 blocks, for llama.cpp; L R as adapter.gguf

    \b
    Example:
        qlr export qlr-demo dense-llama --to dense
        qlr export qlr-demo with-adapter --to peft --uniform-rank
        qlr compress path/to/llama small --budget 4bpw --calibration text.txt --target gguf
        qlr export small small-gguf --to gguf
    """
    with _clear_errors(as_json):
        if to not in EXPORT_TARGETS:
            raise QLRError(f"export target {to!r} is not available; --to takes {', '.join(EXPORT_TARGETS)}")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise QLRError(f"dtype {dtype!r} is not available; --dtype takes bfloat16, float16 or float32")
        if base != "dense" and to != "peft":
            raise QLRError(f"--base {base} is for --to peft; leave it out for --to {to}")
        if uniform_rank and to not in ("peft", "compressed-tensors"):
            raise QLRError(f"--uniform-rank is for --to peft and compressed-tensors; leave it out for --to {to}")
        from qlr_jax import export as exporting

        settings: dict[str, Any] = {"dtype": dtype}
        if to in ("peft", "compressed-tensors"):
            settings["uniform_rank"] = uniform_rank
        if to == "peft":
            settings["base"] = base
        write = getattr(exporting, f"export_{to.replace('-', '_')}")
        write(out, dest, **settings)
        told = {"out": str(out), "dest": str(dest), "to": to, **settings}
        _tell(told, as_json, lambda _: f"{dest}: {to} model in {dtype}; {dest / 'README.md'} says how to load it")


def main() -> None:
    """The console script `qlr`: a usage error is one sentence (an object with --json) and status 2."""
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of typer's
            raise
        as_json = "--json" in sys.argv
        if as_json:
            print(json.dumps({"error": error.format_message()}))
        error.show()
        status = getattr(error, "exit_code", 2)
    sys.exit(status)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _command() -> str:
    return shlex.join(["qlr", *sys.argv[1:]])


@contextmanager
def _clear_errors(as_json: bool) -> Iterator[None]:
    """A user's mistake becomes one sentence on stderr and status 1, an interruption status 130; bugs keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; nothing more is running", as_json, 130)
    except ValueError as error:
        from allocators.errors import AllocationError

        if not isinstance(error, QLRError | AllocationError):
            raise
        _fail(str(error), as_json, 1)


def _fail(sentence: str, as_json: bool, status: int) -> None:
    typer.echo(f"qlr: {sentence}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": sentence}))
    raise typer.Exit(status)


def _tell(result: Mapping[str, Any], as_json: bool, text: Any) -> None:
    typer.echo(json.dumps(_plain(result), ensure_ascii=False) if as_json else text(result))


def _tell_plan(model: str, recipe: Any, device: str | None, hosts: int, out: Path | None, as_json: bool) -> None:
    from qlr_jax import cost
    from qlr_jax.report.cost import plan_text

    config, size = cost.find_config(model)
    found = cost.plan_job(config, recipe, cost.Machine.parse(device, hosts), model=model, original_bytes=size, out=out)
    _tell(found.to_dict(), as_json, lambda _: plan_text(found))


def _tell_job(result: Any, as_json: bool) -> None:
    """A finished job: the report, where it lies, how to load the model."""
    if as_json:
        return _tell({"out": str(result.out), **result.report}, True, None)
    if "solved" in result.report:
        return typer.echo(f"solved {result.report['solved']} matrices for process 0, which writes {result.out}")
    from qlr_jax.report import summary

    out = result.out
    typer.echo(summary(result.report))
    typer.echo(f"""
report:   {Path(out) / "report.html"}
JAX:      import qlr_jax as qlr; model = qlr.load({str(out)!r}); logits = model(tokens)
PyTorch:  AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)""")


def _plain(value: Any) -> Any:
    """`value` as strict JSON has it: numpy scalars become numbers, paths text, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


if __name__ == "__main__":
    main()
