"""The commands `qlr demo | compress | evaluate | inspect | export`: they parse, call and print; what is heavy loads inside them."""

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

EXPORT_TARGETS = ("dense",)

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
    force: Annotated[bool, typer.Option("--force", help="Accept less calibration text than a matrix has inputs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compress a Llama model under a memory budget into a folder that PyTorch and JAX load.

    OUT holds the packed weights, the recipe, report.json and report.html.

    \b
    Example:
        qlr compress path/to/llama small --budget 2.25bpw --calibration text.txt
        qlr compress path/to/llama small --budget 900MB --calibration a.txt --calibration b.txt --evaluate-on heldout.txt
        qlr compress path/to/llama small --recipe small/recipe.yaml --seed 1
    """
    with _clear_errors(as_json):
        from qlr_jax.recipe import Recipe, read_settings

        settings = read_settings(recipe) if recipe else {}
        if budget is None and "budget" not in settings:
            raise QLRError("no budget is given; pass --budget, e.g. --budget 2.25bpw, or name it in the recipe")
        given = {"budget": budget, "include": include, "exclude": exclude, "seed": seed, "state_bits": state_bits}
        settings |= {name: value for name, value in given.items() if value is not None and value != []}
        chosen = Recipe(**settings)
        chosen = chosen.updated(force=True) if force else chosen

        from qlr_jax import job, progress

        result = job.compress(
            model,
            out,
            budget=chosen.budget,
            calibration=list(calibration) if calibration else None,
            recipe=chosen,
            progress=progress.choose(as_json),
            command=_command(),
            evaluate_on=list(evaluate_on) if evaluate_on else None,
        )
        _tell_job(result, as_json)


@app.command(short_help="Perplexity and divergence from the original.")
def evaluate(
    out: Compressed,
    text: Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="Held-out UTF-8 text; may repeat.")] = None,
    original: Annotated[
        Path | None, typer.Option("--original", metavar="MODEL", help="Folder of the original, for the divergence from it.")
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Windows of text to measure, at most.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a compressed model: perplexity, divergence from the original, agreement of the top token.

    \b
    Example:
        qlr evaluate small --text heldout.txt --original path/to/llama
        qlr evaluate qlr-demo --json
    """
    with _clear_errors(as_json):
        from qlr_jax import job, progress, report

        result = job.evaluate(
            out, text=list(text) if text else None, original=original, progress=progress.choose(as_json), windows=windows
        )
        _tell(result, as_json, report.evaluation)


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


@app.command(short_help="A compressed model in another format.")
def export(
    out: Compressed,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder for the exported model; new or empty.")],
    to: Annotated[str, typer.Option("--to", help=f"Format: {', '.join(EXPORT_TARGETS)}.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Write a compressed model in another format; dense is the plain Llama folder with every Q + L R multiplied out.

    \b
    Example:
        qlr export qlr-demo dense-llama --to dense
        qlr export qlr-demo dense-llama --to dense --dtype float32
    """
    with _clear_errors(as_json):
        if to not in EXPORT_TARGETS:
            raise QLRError(f"export target {to!r} is not available; --to takes {', '.join(EXPORT_TARGETS)}")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise QLRError(f"dtype {dtype!r} is not available; --dtype takes bfloat16, float16 or float32")
        from qlr_jax.export.dense import export_dense

        export_dense(out, dest, dtype=dtype)
        _tell({"out": str(out), "dest": str(dest), "to": to, "dtype": dtype}, as_json, lambda _: f"{dest}: {to} model in {dtype}")


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


def _tell_job(result: Any, as_json: bool) -> None:
    """A finished job: the report, where it lies, how to load the model."""
    if as_json:
        return _tell({"out": str(result.out), **result.report}, True, None)
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
