"""Commands that work on a saved table: allocate, frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlr_jax.cli.options import AsJson, AtLeast, Lock, Saved, StrategyName, TieBackbone, TieSpec
from qlr_jax.cli.shell import app, clear_errors, plain, show
from qlr_jax.errors import QLRError
from qlr_jax.paths import output_file, output_folder


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
    strategy: StrategyName = None,
    gap: Annotated[float, typer.Option("--gap", help="Stop where no better one can be better by more than this share.")] = 1e-4,
    seconds: Annotated[float, typer.Option("--seconds", help="Time for the search; what is proved by then is reported.")] = 10.0,
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
        qlr allocate measured --budget 3bpw --strategy uniform
    """
    with clear_errors(as_json):
        if not budget:
            raise QLRError("no budget is given; pass --budget, e.g. --budget 2.25bpw")
        if out:
            output_file(out)  # refused before anything is searched
        from allocators.strategies import DEFAULT
        from qlr_jax.pipelines.allocate import plan, read_table, write_plans
        from qlr_jax.report.terminal.allocations import allocations_text
        from qlr_jax.settings.constraints import Constraints

        constrained = Constraints.parse(lock, at_least, tie, tie_spec).on(read_table(table))
        plans = plan(constrained, budget, gap=gap, seconds=seconds, strategy=strategy or DEFAULT)
        written = write_plans(out, plain(plans)) if out else None
        result = {"table": table, "allocations": plans, "out": written}
        show(result, as_json, lambda _: allocations_text(plans) + (f"\n\nwritten: {written}" if written else ""))


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
    with clear_errors(as_json):
        from qlr_jax.pipelines.allocate import curves, measured_points, read_table, write_frontier
        from qlr_jax.report.terminal.frontier import frontier_text
        from qlr_jax.settings.constraints import Constraints

        if out:
            output_folder(out, keep=None)
        whole = read_table(table)
        constrained = Constraints.parse(lock, at_least, tie, tie_spec).on(whole)
        found = curves(constrained, points) | {"measured": measured_points(whole, beside or ())}
        files = write_frontier(out, plain(found)) if out else []
        result = {"table": table, **found, "files": files}
        lines = "".join(f"\nwritten: {file}" for file in files)
        show(result, as_json, lambda _: frontier_text(found, found["measured"]) + ("\n" + lines if lines else ""))
