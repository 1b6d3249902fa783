"""One compression job, as a story: load, calibrate, measure, allocate, solve, judge, save."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

import allocators
import qlr_jax
from qlr_jax import calibration as calibrating
from qlr_jax import evaluation as evaluating
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.lazy import LazyMap
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Comparison, compare, divergence
from qlr_jax.formats.files import refuse_occupied, staged
from qlr_jax.formats.qlr.packed import JOB, save_packed
from qlr_jax.formats.targets import find_target
from qlr_jax.pipelines.allocate import TABLE, Constraints
from qlr_jax.pipelines.delivered import evaluate, inspect
from qlr_jax.pipelines.preparation import (
    BUNDLED,
    BUNDLED_NAME,
    Source,
    calibrate,
    calibration_tokens,
    open_source,
    sense,
    sequence_length,
)
from qlr_jax.pipelines.steps import CANDIDATES, Solutions, allocate, chosen, refine, resolve, solve, with_weights
from qlr_jax.progress import Progress, logged, silent
from qlr_jax.report.files import job_files
from qlr_jax.report.html.sensitivity_page import write_pictures
from qlr_jax.report.record import Record
from qlr_jax.run.journal import Clock, Journal
from qlr_jax.run.processes import Cluster, Together
from qlr_jax.run.workspace import Workspace, digest_model, digest_text, enough_space
from qlr_jax.sensitivity import Sensitivity, Statistics
from qlr_jax.settings.recipe import DEMO, Recipe


@dataclass(frozen=True)
class JobResult:
    """Where the compressed model lies, and its report (what report.json holds)."""

    out: Path
    report: dict[str, Any]


def compress(
    model: str | Path,
    out: str | Path,
    budget: str | None = None,
    calibration: Sequence[str | Path] | str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    evaluate_on: Sequence[str | Path] | str | Path | None = None,
    table: allocators.OptionTable | None = None,
    constraints: Constraints | None = None,
    resume: bool = False,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> JobResult:
    """Compress a Llama folder (or hub name) under a memory budget and write a folder that JAX and PyTorch load.

    Args:
        model: a Hugging Face folder or hub name of a Llama, Mistral, Qwen2, Qwen3, Gemma or OLMo2 model.
        out: the folder to write; it must not exist or be empty.
        budget: e.g. `2.25bpw`, `900MB`, `device:8GiB,context=8192`; the recipe's where not given.
        calibration: text file(s).
        recipe: a Recipe or a YAML file; the defaults where not given.
        evaluate_on: held-out text file(s) for the report's figures; none: calibration figures only.
        table: what `sensitivity` saved for this model and recipe; nothing is measured again then.
        constraints: locks and ties.
        resume: go on with a job that was interrupted, where `out` holds one of the same recipe, model and texts: what it has
            finished is not done again, and the result is that of a job that nothing interrupted.
        cluster: what `distributed.join` returned, where several processes work on this job; each calls this with the same
            arguments, process 0 returns the report and the others how many matrices they solved.

    Raises:
        QLRError, allocators.AllocationError: one sentence on what cannot be used; nothing is written then.
    """
    if not calibration:
        raise QLRError("no calibration text was given; pass one or more text files that resemble what the model will read")
    texts = calibrating.read_text(calibration), calibrating.read_text(evaluate_on) if evaluate_on else ""
    files = [evaluate_on] if isinstance(evaluate_on, str | Path) else evaluate_on or ()
    return _run(
        model,
        Path(out).expanduser(),
        _recipe(recipe, budget),
        texts,
        progress or silent(),
        command,
        ", ".join(map(str, files)),
        table=table,
        constraints=constraints,
        resume=resume,
        cluster=cluster,
    )


def demo(
    out: str | Path,
    *,
    budget: str | None = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    command: str = "qlr demo",
) -> JobResult:
    """Compress the bundled model, calibrated and evaluated on the standard library's text of this machine.

    Args:
        out, budget, recipe, resume: as for `compress`.
    """
    chosen = _recipe(recipe or DEMO, budget)
    texts = calibrating.standard_library("calibration"), calibrating.standard_library("heldout")
    return _run(
        BUNDLED,
        Path(out).expanduser(),
        chosen,
        texts,
        progress or silent(),
        command,
        "held-out modules of Python's standard library",
        resume=resume,
    )


@one_blas_thread()
def _run(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    texts: tuple[str, str],
    progress: Progress,
    command: str,
    held_out_name: str,
    *,
    table: allocators.OptionTable | None = None,
    constraints: Constraints | None = None,
    resume: bool = False,
    cluster: Cluster | None = None,
) -> JobResult:
    clock, constraints = Clock(), constraints or Constraints()
    refuse_occupied(out, keep=(JOB,))
    with Together(cluster or Cluster(), out / JOB) as team:
        with clock.stage("load"), progress.stage("loading"):
            opened = open_source(source, recipe)
            # a budget or a lock that cannot be met is refused before the work begins
            allocators.Budget.parse(recipe.budget).on(constraints.on(opened.prices if table is None else table))
            if table is not None:
                Sensitivity(table).check(opened.prices, find_target(recipe.target).nbytes)
        facts = _facts(opened, recipe, texts, table, constraints)
        if team.cluster.process:
            return JobResult(out, _help(team, opened, out, facts, progress))
        space = Workspace.open(out, facts, resume)
        if resume and not space.begun:
            progress.say(f"{out} holds no job to go on with; it begins now")
        base = BUNDLED_NAME if opened.folder == BUNDLED else str(source)
        journal = Journal(clock, space.tell, {"model": base, "command": command, "budget": recipe.budget, "target": recipe.target})
        progress = logged(progress, space.log)
        report = _job(opened, out, recipe, texts, space, team, journal, progress, held_out_name, table, constraints)
    space.finish()
    return JobResult(out, report)


def _help(team: Together, opened: Source, out: Path, facts: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """What every process but the first does: solve its share of what that one asks for."""
    with progress.stage("waiting for process 0"):
        statistics = Statistics(opened.weights, *team.statistics(), opened.backbones)
        space = Workspace.open(out, facts, resume=True)
    with progress.stage("solving for process 0") as stage:
        solved = team.serve(space, statistics.problem, lambda key, found: stage.advance(note=f"{key[0]} {found.told()}"))
    return {"process": team.cluster.process, "processes": team.cluster.processes, "solved": solved}


def _job(
    opened: Source,
    out: Path,
    recipe: Recipe,
    texts: tuple[str, str],
    space: Workspace,
    team: Together,
    journal: Journal,
    progress: Progress,
    held_out_name: str,
    table: allocators.OptionTable | None,
    constraints: Constraints,
) -> dict[str, Any]:
    """The story; returns the report."""
    clock, original = journal.clock, opened.model
    solver = partial(journal.watched, partial(team.solve, space))

    with clock.stage("calibrate"):
        statistics, sample = calibrate(opened, texts[0], recipe, progress, space.spill)
        team.publish(space, statistics.hessians, statistics.outputs)

    with clock.stage("measure"):
        if table is None:
            table = space.table(lambda: sense(opened, statistics, sample, recipe, progress, solver("probe")).table)
        found = Sensitivity(table)

    with clock.stage("allocate"):
        problem = allocators.Budget.parse(recipe.budget).on(constraints.on(found.table))
        plans = allocate(problem, progress)

    with clock.stage("solve"):
        solutions: Solutions = LazyMap()
        solve(plans.values(), solutions, statistics, recipe, progress, final := solver("final"))

    with clock.stage("judge"), progress.stage("judging on calibration text", total=len(plans)) as stage:
        judged: dict[str, Comparison] = {}
        for name, plan in plans.items():
            judged[name] = divergence(with_weights(original, chosen(plan.specs, solutions)), sample)
            journal.add(calibration_kl={name: found.kl for name, found in judged.items()})
            stage.advance(note=name)

    refined = None
    if recipe.refine and not problem.keeps_original:
        with clock.stage("refine"):
            refined = refine(problem, plans, judged, solutions, original, sample, statistics, recipe, progress, final)

    with clock.stage("judge"):
        delivered = min(judged, key=lambda name: (judged[name].kl, CANDIDATES.index(name)))
        if delivered != "allocated":
            progress.say(f"the {delivered} model has the lower KL on the calibration text, so it is what is delivered")

    models = {name: chosen(plan.specs, solutions) for name, plan in plans.items()}
    if recipe.sequential and not problem.keeps_original:
        with clock.stage("solve in sequence"):
            tokens = calibration_tokens(texts[0], opened.tokenizer, original, recipe, opened.weights)
            alone = journal.watched(space.solve, "sequential")  # each block waits for the one before it
            better = resolve(plans[delivered], judged, delivered, tokens, original, sample, statistics, recipe, progress, alone)
            if better:
                models[delivered] = chosen(plans[delivered].specs, better)
                solutions.update(better)

    held_out: dict[str, Comparison] = {}
    if texts[1]:
        with clock.stage("evaluate"), progress.stage("evaluating on held-out text", total=len(plans)) as stage:
            rows = evaluating.windows(texts[1], opened.tokenizer, sequence_length(original, recipe))
            rows = calibrating.thinned(rows, recipe.evaluation_tokens)
            for name in plans:
                held_out[name] = compare(original, with_weights(original, models[name]), rows)
                journal.add(kl={name: found.kl for name, found in held_out.items()})
                stage.advance(note=name)

    base = journal.facts["model"]
    record = Record(
        model=base,
        command=journal.facts["command"],
        recipe=recipe,
        config=original.config,
        plans=plans,
        delivered=delivered,
        solutions=solutions,
        sensitivity=found,
        judged=judged,
        refined=refined,
        held_out=held_out,
        held_out_name=held_out_name,
        seconds=clock.seconds,
        started=clock.started,
        peak_rss=peak_rss(),
        problem=problem,
        device=jax.devices()[0].device_kind,
        left_out={"inputs": getattr(statistics.hessians, "left_out", {}), "outputs": getattr(statistics.outputs, "left_out", {})},
    )
    with progress.stage("saving"), enough_space(out):
        report = record.report()
        settings, files = {"base_model": base}, job_files(record, report)
        save_packed(out, original, models[delivered], source=opened.folder, settings=settings, files=files)
    return report


def _recipe(recipe: Recipe | str | Path | None, budget: str | None) -> Recipe:
    found = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(Path(recipe)) if recipe else Recipe()
    return found.updated(budget=budget) if budget else found


def _facts(
    source: Source,
    recipe: Recipe,
    texts: tuple[str, str],
    table: allocators.OptionTable | None,
    constraints: Constraints,
) -> dict[str, Any]:
    """What a job is of: with all of it the same, an interrupted one may go on."""
    settings = dataclasses.asdict(recipe)
    return {
        "recipe": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "model": digest_model(source.folder),
        "calibration text": digest_text(texts[0]),
        "held-out text": digest_text(texts[1]),
        "table": digest_text(table.to_json()) if table else None,
        "constraints": dataclasses.asdict(constraints),
        "versions": {"qlr-jax": qlr_jax.__version__, "jax": jax.__version__},
    }


def sensitivity(
    model: str | Path,
    out: str | Path,
    calibration: Sequence[str | Path] | str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    matrix: str | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Measure how much each matrix's error matters, and write the table of all its options with pictures; nothing is compressed.

    Args:
        model: as for `compress`, or "bundled".
        out: the folder for table.json, sensitivity.html and the pictures; it must not exist or be empty.
        calibration: text file(s); "bundled" has its own.
        recipe: a Recipe or a YAML file; its budget plays no part.
        matrix: whose error is drawn against bits; that of the largest damage where not given.

    Returns:
        out, table (its path), matrices and options (how many), seconds, notes.
    """
    progress, recipe, out = progress or silent(), _recipe(recipe, None), Path(out).expanduser()
    refuse_occupied(out)
    if calibration:
        text = calibrating.read_text(calibration)
    elif str(model) == BUNDLED_NAME:
        text = calibrating.standard_library("calibration")
    else:
        raise QLRError("no calibration text was given; pass one or more text files that resemble what the model will read")
    clock = Clock()
    with one_blas_thread():
        with clock.stage("load"), progress.stage("loading"):
            opened = open_source(model, recipe)
        with clock.stage("calibrate"):
            statistics, sample = calibrate(opened, text, recipe, progress)
        with clock.stage("measure"):
            table = sense(opened, statistics, sample, recipe, progress).table
    seconds = dict(clock.seconds) | {"total": time.perf_counter() - clock.started}
    base = BUNDLED_NAME if opened.folder == BUNDLED else str(model)
    told = {"model": base, "command": command, "seconds": seconds, "target": recipe.target, "recipe": recipe.to_yaml()}
    table = dataclasses.replace(table, notes=dict(table.notes) | told)
    with staged(out) as folder:
        (folder / TABLE).write_text(table.to_json() + "\n", encoding="utf-8")
        write_pictures(table, folder, matrix)
    return {
        "out": str(out),
        "table": str(out / TABLE),
        "matrices": len(table.rows),
        "options": sum(len(row.options) for row in table.rows),
        "seconds": seconds,
        "notes": table.notes,
    }


def peak_rss() -> int:
    """The largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = ["BUNDLED", "JobResult", "compress", "demo", "evaluate", "inspect", "sensitivity"]
