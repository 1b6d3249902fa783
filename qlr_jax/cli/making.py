"""Commands that begin with an original model: demo, compress, plan, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlr_jax.cli.options import (
    AsJson,
    AtLeast,
    BudgetText,
    Calibration,
    Chat,
    Cluster,
    CompileCache,
    Controls,
    Exclude,
    Force,
    HessiansFrom,
    IgnoreConfig,
    Include,
    Lock,
    RecipeFile,
    StateBits,
    StrategyName,
    Target,
    TieBackbone,
    TieSpec,
    given,
)
from qlr_jax.cli.shell import MixtureCommand, app, clear_errors, command, computing, show, text_of
from qlr_jax.errors import QLRError

if TYPE_CHECKING:
    from qlr_jax.job import JobResult
    from qlr_jax.settings.recipe import Recipe


@app.command(short_help="The bundled model, end to end, in minutes.")
def demo(
    out: Annotated[Path, typer.Option("--out", parser=given, metavar="DIR", help="Where the compressed model goes.")] = Path(
        "qlr-demo"
    ),
    budget: Annotated[str, typer.Option("--budget", help="Bits per weight of the compressed layers.")] = "2.25bpw",
    controls: Controls = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a demo that was interrupted.")] = False,
    cluster: Cluster = None,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Compress the bundled Llama end to end, in minutes on two CPU cores, without network.

    The model was trained on Python's standard library; the library of this machine calibrates it and evaluates it.

    \b
    Example:
        qlr demo
        qlr demo --out small --budget 3bpw
    """
    with computing(as_json, compile_cache):
        from qlr_jax import job, progress
        from qlr_jax.settings.recipe import DEMO, gathered

        recipe = DEMO.updated(**gathered(None, controls=controls))
        shown = progress.choose(as_json)
        settings = {"recipe": recipe, "resume": resume, "cluster": cluster, "progress": shown, "command": command()}
        show_job(job.demo(out, budget=budget, **settings), as_json)


# The options of a command are its signature, and its help is its docstring: nothing here would be clearer apart.
@app.command(short_help="A Llama model under a memory budget.", cls=MixtureCommand)
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Llama folder, its name on the hub, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(parser=given, metavar="OUT", help="Folder for the compressed model; new or empty.")],
    budget: BudgetText = None,
    calibration: Calibration = None,
    chat: Chat = False,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    ignore_config: IgnoreConfig = None,
    evaluate_on: Annotated[
        list[Path] | None, typer.Option("--evaluate-on", metavar="FILE", help="Held-out text to measure on; may repeat.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of rotations and samples; the same seed gives the same model.")
    ] = None,
    state_bits: StateBits = None,
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
    strategy: StrategyName = None,
    controls: Controls = None,
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
    cluster: Cluster = None,
    coordinator: Annotated[str | None, typer.Option("--coordinator", hidden=True)] = None,
    processes: Annotated[int | None, typer.Option("--processes", hidden=True)] = None,
    process: Annotated[int | None, typer.Option("--process", hidden=True)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what the job would need, as qlr plan does.")] = False,
    force: Force = False,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Compress a Llama model under a memory budget into a folder that PyTorch and JAX load.

    OUT holds the packed weights, the recipe, report.json and report.html. While the job is under way OUT/job holds what is
    finished: after an interruption the same command with --resume goes on from there.

    Many machines share a job with --cluster: what it leaves are the bytes of one machine's. A worker that is lost costs its part of
    the work, and a scheduler that is lost ends the job, with which --resume goes on.

    \b
    Example:
        qlr compress path/to/llama small --budget 2.25bpw --calibration text.txt
        qlr compress path/to/llama small --budget 900MB --calibration web.jsonl:2 code.txt:1 --evaluate-on heldout.txt
        qlr compress path/to/llama small --recipe small/recipe.yaml --seed 1
        qlr compress path/to/llama small --budget 3bpw --calibration text.txt --table measured --lock '*v_proj=trellis-4'
        qlr compress path/to/llama small --budget 4bpw --calibration text.txt --target gguf
        qlr compress path/to/llama small --budget 0.3bpw --calibration text.txt --backbone-from path/to/llama-gptq-dense
        qlr compress path/to/llama small --budget 2bpw --calibration text.txt --cluster tcp://10.0.0.1:8786
    """
    with computing(as_json, compile_cache):
        from qlr_jax.settings.recipe import Recipe, gathered

        settings = gathered(
            recipe,
            budget=budget,
            include=include,
            exclude=exclude,
            ignore_config=ignore_config,
            seed=seed,
            state_bits=state_bits,
            target=target,
            backbone_from=text_of(backbone_from),
            hessians_from=text_of(hessians),
            strategy=strategy,
            controls=controls,
            sequential=sequential,
            force=force or None,
        )
        if "budget" not in settings:
            raise QLRError("no budget is given; pass --budget, e.g. --budget 2.25bpw, or name it in the recipe")
        chosen = Recipe(**settings)
        if (coordinator, processes, process) != (None, None, None):
            raise QLRError(
                "--coordinator, --processes and --process are no more; start a Dask scheduler and workers, and give --cluster "
                "tcp://HOST:PORT (docs/clusters.md), or --cluster local:N for N processes of this machine"
            )
        if dry_run:
            return show_plan(model, chosen, None, 1, out, as_json)

        from qlr_jax import job, progress
        from qlr_jax.pipelines.allocate import read_table
        from qlr_jax.settings.constraints import Constraints

        saved = read_table(table) if table else None
        result = job.compress(
            model,
            out,
            budget=chosen.budget,
            calibration=calibration or None,
            chat=chat,
            recipe=chosen,
            progress=progress.choose(as_json),
            command=command(),
            evaluate_on=evaluate_on or None,
            table=saved,
            constraints=Constraints.parse(lock, at_least, tie, tie_spec),
            resume=resume,
            cluster=cluster,
        )
        show_job(result, as_json)


# The options of a command are its signature, and its help is its docstring: nothing here would be clearer apart.
@app.command(short_help="What a job would need: sizes, memory, time, disk.")
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder, name on the hub, GGUF file, 'bundled', or a known name such as Llama-2-70B."),
    ],
    budget: BudgetText = None,
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
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    ignore_config: IgnoreConfig = None,
    state_bits: StateBits = None,
    target: Target = None,
    controls: Controls = None,
    as_json: AsJson = False,
) -> None:
    """Show from a model's config.json what compressing it would need. No weights are read.

    How fast this machine is, is measured in a few seconds, and kept for a day; with --device it is not, and the rates are those
    known of such a machine.

    \b
    Example:
        qlr plan Llama-2-70B --budget 2.25bpw --device cpu:2TB,cores=64
        qlr plan path/to/llama --budget 900MB --device 24GiB
    """
    with clear_errors(as_json):
        from qlr_jax.settings.recipe import DEMO, Recipe, gathered

        settings = gathered(
            recipe,
            budget=budget,
            include=include,
            exclude=exclude,
            ignore_config=ignore_config,
            state_bits=state_bits,
            target=target,
            controls=controls,
        )
        show_plan(model, (DEMO if model == "bundled" else Recipe()).updated(**settings), device, hosts, out, as_json)


# The options of a command are its signature, and its help is its docstring: nothing here would be clearer apart.
@app.command(short_help="What every matrix is sensitive to, as a table.", cls=MixtureCommand)
def sensitivity(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Llama folder, its name on the hub, a GGUF file, or 'bundled'."),
    ],
    out: Annotated[Path, typer.Argument(parser=given, metavar="OUT", help="Folder for the table and its pictures; new or empty.")],
    calibration: Calibration = None,
    chat: Chat = False,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    ignore_config: IgnoreConfig = None,
    matrix: Annotated[
        str | None,
        typer.Option("--matrix", metavar="NAME", help="Draw its error against bits; else that of the most sensitive matrix."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of rotations and samples; the same seed gives the same table.")
    ] = None,
    target: Target = None,
    hessians: HessiansFrom = None,
    cluster: Cluster = None,
    force: Force = False,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Measure how much the error of every matrix matters, and write the table of all options that allocations are made from.

    OUT holds table.json, for qlr allocate and qlr frontier, sensitivity.html and its pictures. Nothing is compressed. 'bundled'
    needs no --calibration.

    \b
    Example:
        qlr sensitivity bundled measured
        qlr sensitivity path/to/llama measured --calibration text.txt
        qlr sensitivity path/to/llama measured --calibration text.txt --matrix model.layers.3.mlp.down_proj
        qlr allocate measured --budget 2.25bpw --budget 3bpw
    """
    with computing(as_json, compile_cache):
        from qlr_jax.settings.recipe import DEMO, Recipe, gathered

        settings = gathered(
            recipe,
            include=include,
            exclude=exclude,
            ignore_config=ignore_config,
            seed=seed,
            target=target,
            hessians_from=text_of(hessians),
            force=force or None,
        )
        chosen = (DEMO if model == "bundled" else Recipe()).updated(**settings)

        from qlr_jax import job, progress
        from qlr_jax.report.terminal.sensitivity import sensitivity_text

        result = job.sensitivity(
            model,
            out,
            calibration=calibration or None,
            chat=chat,
            recipe=chosen,
            matrix=matrix,
            cluster=cluster,
            progress=progress.choose(as_json),
            command=command(),
        )
        show(result, as_json, sensitivity_text)


def show_plan(model: str, recipe: Recipe, device: str | None, hosts: int, out: Path | None, as_json: bool) -> None:
    """What a job would need.

    Args:
        model: folder, known name, name on the hub, or "bundled".
        recipe: of the job.
        device: what it is to run on, `[KIND:]SIZE`; this machine where None.
        hosts: machines that share the job.
        out: where the job would write.
        as_json: print one JSON object.
    """
    from qlr_jax import cost, progress
    from qlr_jax.report.terminal.cost import plan_text

    config, size = cost.find_config(model, recipe.ignore_config)
    machine = cost.Machine.parse(device, hosts)
    rates = cost.measured_rates(config, recipe, machine, progress.choose(as_json)) if device is None else None
    found = cost.plan_job(config, recipe, machine, model=model, original_bytes=size, out=out, rates=rates)
    show(found.to_dict(), as_json, lambda _: plan_text(found))


def show_job(result: JobResult, as_json: bool) -> None:
    """A finished job: the report, where it lies, how to load the model."""
    if as_json:
        return show({"out": str(result.out), **result.report}, True, str)
    from qlr_jax.report import summary

    out = result.out
    typer.echo(summary(result.report))
    typer.echo(f"""
report:   {Path(out) / "report.html"}
JAX:      import qlr_jax as qlr; model = qlr.load({str(out)!r}); logits = model(tokens)
PyTorch:  AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)""")
