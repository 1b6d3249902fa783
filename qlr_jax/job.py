"""One compression job, as a story: load, calibrate, measure, allocate, solve, select, save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import allocators
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.engine import HERE
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.pipelines import stages
from qlr_jax.pipelines.evaluate import evaluate
from qlr_jax.pipelines.inspect import inspect
from qlr_jax.pipelines.measure import sensitivity
from qlr_jax.pipelines.run import Outcome, Run
from qlr_jax.pipelines.source import machine_notes, open_source, saved_table, share
from qlr_jax.pipelines.texts import Files, Texts
from qlr_jax.progress import Progress
from qlr_jax.run.facts import job_facts
from qlr_jax.run.session import Session
from qlr_jax.sensitivity import Sensitivity
from qlr_jax.settings.constraints import Constraints
from qlr_jax.settings.host import prepare
from qlr_jax.settings.recipe import DEMO, Recipe


@dataclass(frozen=True)
class JobResult:
    """Where the compressed model lies, and what report.json holds."""

    out: Path
    report: dict[str, Any]


def compress(
    model: str | Path,
    out: str | Path,
    budget: str | None = None,
    calibration: Files = None,
    recipe: Recipe | str | Path | None = None,
    *,
    evaluate_on: Files = None,
    chat: bool = False,
    table: allocators.OptionTable | None = None,
    constraints: Constraints | None = None,
    resume: bool = False,
    cluster: Any = None,
    progress: Progress | None = None,
    command: str = "",
) -> JobResult:
    """Compress a Llama folder (or hub name) under a memory budget and write a folder that JAX and PyTorch load.

    JAX is set to run one compiled loop at a time, where it has not started yet, and to keep what it compiles on disk, where the
    user has not set that (`settings.host`).

    Args:
        model: a Hugging Face folder or hub name of a Llama, Mistral, Qwen2, Qwen3, Gemma or OLMo2 model.
        out: the folder to write; it must not exist or be empty.
        budget: e.g. `2.25bpw`, `900MB`, `device:8GiB,context=8192`; the recipe's where not given.
        calibration: text: files, folders, patterns, `FILE.jsonl#FIELD`; with `:WEIGHT` a mixture (`calibration.files.read_part`).
        recipe: a Recipe or a YAML file; the defaults where not given.
        evaluate_on: held-out text file(s) for the report's figures; none: calibration figures only.
        chat: apply the tokenizer's chat template to both (`calibration.Corpus`).
        table: what `sensitivity` saved for this model and recipe; nothing is measured again then.
        constraints: locks and ties.
        resume: go on with a job that was interrupted, where `out` holds one of the same recipe, model and texts: what it has
            finished is not done again, and the result is that of a job that nothing interrupted.
        cluster: a Dask cluster whose workers do the work: `tcp://scheduler:8786`, `local:4` for so many processes here, a scheduler
            file, or a `distributed.Client` (docs/clusters.md). The bytes that are left are those of this process alone.
        progress, command: where to say how far the job is, and what was typed, for the report.

    Raises:
        QLRError, allocators.AllocationError: one sentence on what cannot be used; nothing is written then.
    """
    session = Session(out, command, resume, cluster, progress, sources=[model])
    texts, asked = Texts.read(calibration, evaluate_on, chat), Recipe.of(recipe, budget).located()
    return _job(model, asked, texts, session, table, constraints or Constraints())


def demo(
    out: str | Path,
    *,
    budget: str | None = None,
    recipe: Recipe | None = None,
    resume: bool = False,
    cluster: Any = None,
    progress: Progress | None = None,
    command: str = "qlr demo",
) -> JobResult:
    """`compress` on the bundled model, calibrated and evaluated on the standard library's text of this machine."""
    session = Session(out, command, resume, cluster, progress, sources=[BUNDLED])
    return _job(BUNDLED, Recipe.of(recipe or DEMO, budget), Texts.standard_library(), session, None, Constraints())


# the story, best read in one piece
@one_blas_thread()
def _job(
    model: str | Path,
    recipe: Recipe,
    texts: Texts,
    session: Session,
    table: allocators.OptionTable | None,
    constraints: Constraints,
) -> JobResult:
    prepare()
    budget = allocators.Budget.parse(recipe.budget)
    with session:
        with session.stage("load", "loading"):
            source = open_source(model, recipe)
            stages.check_texts(source, texts.calibration, texts.held_out)
            table = None if table is None else saved_table(table, source, session.progress)
            # what cannot be met is refused before the work begins
            budget.on(constraints.on(source.prices if table is None else table))
        contents = texts.calibration.content, texts.held_out.content if texts.held_out else ""
        facts = job_facts(source.identity, source.model.config, recipe, *contents, table, constraints)
        notes = [*source.notes, *texts.notes, *machine_notes(source)]
        session.begin(facts, {"model": source.name, "budget": recipe.budget, "target": recipe.target}, notes)

        share(source, session.engine)

        wanted = table is None and not session.resume and session.engine is HERE
        with session.stage("calibrate"), stages.compiling_ahead(source, wanted):
            statistics, reference = stages.calibrate(source, texts.calibration, session.progress, session.spill, session.engine)
        run = Run(source, statistics, reference, session.progress, session.solver, session.note, session.engine)

        with session.stage("measure"):
            found = Sensitivity(session.table(lambda: stages.measure(run).table) if table is None else table)

        with session.stage("allocate"):
            problem = budget.on(constraints.on(found.table))
            plans = stages.allocate(run, problem)

        with session.stage("solve"):
            candidates = stages.solve_plans(run, plans)

        with session.stage("judge"):  # as report.json calls it
            candidates = stages.evaluate_on_calibration(run, candidates)

        refined = None
        if recipe.refines and not problem.keeps_original:
            with session.stage("refine"):
                candidates, refined = stages.refine(run, problem, candidates)
        delivered = stages.select(run, candidates)

        if recipe.sequential and not problem.keeps_original:
            with session.stage("solve in sequence"):
                again = stages.solve_in_sequence(run, candidates[delivered], texts.calibration)
                candidates = {**candidates, delivered: again}

        if texts.held_out:
            with session.stage("evaluate"):
                candidates = stages.evaluate_held_out(run, candidates, texts.held_out)

        outcome = Outcome(problem, found, candidates, delivered, refined)
        report = stages.save(run, session.out, outcome, texts, session.clock, session.command)
    return JobResult(session.out, report)


__all__ = ["BUNDLED", "JobResult", "compress", "demo", "evaluate", "inspect", "sensitivity"]
