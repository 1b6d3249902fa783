"""One compression job, as a story: load, calibrate, measure, allocate, solve, judge, save."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import allocators
import qlr_jax
from qlr_jax import calibration as calibrating
from qlr_jax import evaluation as evaluating
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.lazy import Lazy
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.solver import Solution
from qlr_jax.delivered import evaluate, inspect
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Comparison, Reference, compare, divergence
from qlr_jax.export.files import refuse_occupied, staged
from qlr_jax.export.packed import JOB, save_packed
from qlr_jax.export.targets import find_target
from qlr_jax.models import Llama, kind_of, layer_of
from qlr_jax.planning import TABLE, Constraints
from qlr_jax.preparation import (
    BUNDLED,
    BUNDLED_NAME,
    Source,
    calibrate,
    calibration_tokens,
    open_source,
    sense,
    sequence_length,
    solver_config,
    spread,
)
from qlr_jax.progress import Progress, logged, silent
from qlr_jax.recipe import DEMO, Recipe
from qlr_jax.report.record import Record
from qlr_jax.report.sensitivity import write_pictures
from qlr_jax.sensitivity import Sensitivity, Statistics
from qlr_jax.sequential import solve_sequentially
from qlr_jax.workspace import Workspace, digest_model, digest_text, enough_space

PROVED_GAP = 1e-4  # of the predicted damage; the predictions are good to a few parts in a hundred
CANDIDATES = ("allocated", "uniform", "rank0")


@dataclass(frozen=True)
class JobResult:
    """Where the compressed model lies, and its report (what report.json holds)."""

    out: Path
    report: dict[str, Any]


@dataclass
class Clock:
    """Seconds of every stage of a job."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Any:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    progress: Progress | None = None,
    command: str = "",
) -> JobResult:
    """Compress a Llama folder (or hub name) under a memory budget and write a folder that JAX and PyTorch load.

    Args:
        model: a Hugging Face folder or hub name of a Llama, Mistral, Qwen2, Qwen3 or Gemma model.
        out: the folder to write; it must not exist or be empty.
        budget: e.g. `2.25bpw`, `900MB`, `device:8GiB,context=8192`; the recipe's where not given.
        calibration: text file(s).
        recipe: a Recipe or a YAML file; the defaults where not given.
        evaluate_on: held-out text file(s) for the report's figures; none: calibration figures only.
        table: what `sensitivity` saved for this model and recipe; nothing is measured again then.
        constraints: locks and ties.
        resume: go on with a job that was interrupted, where `out` holds one of the same recipe, model and texts: what it has
            finished is not done again, and the result is that of a job that nothing interrupted.

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
    )


def demo(
    out: str | Path,
    *,
    budget: str | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    command: str = "qlr demo",
) -> JobResult:
    """Compress the bundled model, calibrated and evaluated on the standard library's text of this machine."""
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
    )


@one_blas_thread()
def _run(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    texts: tuple[str, str],
    progress: Progress | None,
    command: str,
    held_out_name: str,
    *,
    table: allocators.OptionTable | None = None,
    constraints: Constraints | None = None,
    resume: bool = False,
) -> JobResult:
    clock, progress, out = Clock(), progress or silent(), Path(out).expanduser()
    refuse_occupied(out, keep=(JOB,))

    with clock.stage("load"), progress.stage("loading"):
        opened = open_source(source, recipe)
        original = opened.model
        # a budget or a lock that cannot be met is refused before the work begins
        constraints = constraints or Constraints()
        allocators.Budget.parse(recipe.budget).on(constraints.on(opened.prices if table is None else table))
        if table is not None:
            Sensitivity(table).check(opened.prices, find_target(recipe.target).nbytes)
        space = Workspace.open(out, _facts(opened, recipe, texts, table, constraints), resume)
        if resume and not space.begun:
            progress.say(f"{out} holds no job to go on with; it begins now")
        progress = logged(progress, space.log)

    with clock.stage("calibrate"):
        statistics, sample = calibrate(opened, texts[0], recipe, progress, space.spill)

    with clock.stage("measure"):
        if table is None:
            probes = partial(space.solve, "probe")
            table = space.table(lambda: sense(opened, statistics, sample, recipe, progress, probes).table)
        found = Sensitivity(table)

    with clock.stage("allocate"):
        problem = allocators.Budget.parse(recipe.budget).on(constraints.on(found.table))
        plans = allocate(problem, progress)

    with clock.stage("solve"):
        solutions: Solutions = {}
        solver = partial(space.solve, "final")
        solve(plans.values(), solutions, statistics, recipe, progress, solver)

    with clock.stage("judge"), progress.stage("judging on calibration text", total=len(plans)) as stage:
        judged: dict[str, Comparison] = {}
        for name, plan in plans.items():
            judged[name] = divergence(with_weights(original, chosen(plan.specs, solutions)), sample)
            stage.advance(note=name)

    refined = None
    if recipe.refine and not problem.keeps_original:
        with clock.stage("refine"):
            refined = refine(problem, plans, judged, solutions, original, sample, statistics, recipe, progress, solver)

    with clock.stage("judge"):
        delivered = min(judged, key=lambda name: (judged[name].kl, CANDIDATES.index(name)))
        if delivered != "allocated":
            progress.say(f"the {delivered} model has the lower KL on the calibration text, so it is what is delivered")

    final = {name: chosen(plan.specs, solutions) for name, plan in plans.items()}
    if recipe.sequential and not problem.keeps_original:
        with clock.stage("solve in sequence"):
            tokens = calibration_tokens(texts[0], opened.tokenizer, original, recipe, opened.weights)
            better = resolve(plans[delivered], judged, delivered, tokens, original, sample, statistics, recipe, progress, space)
            solutions |= better
            final[delivered] |= {name: solution.value for (name, _), solution in better.items()}

    held_out: dict[str, Comparison] = {}
    if texts[1]:
        with clock.stage("evaluate"), progress.stage("evaluating on held-out text", total=len(plans)) as stage:
            rows = evaluating.windows(texts[1], opened.tokenizer, sequence_length(original, recipe))
            rows = spread(rows, recipe.evaluation_tokens)
            for name in plans:
                held_out[name] = compare(original, with_weights(original, final[name]), rows)
                stage.advance(note=name)

    base = BUNDLED_NAME if opened.folder == BUNDLED else str(source)
    record = Record(
        model=base,
        command=command,
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
    )
    with progress.stage("saving"), enough_space(out):
        report, matrices = record.report(), final[delivered]
        save_packed(out, original, matrices, source=opened.folder, settings={"base_model": base}, files=record.files(report))
    space.finish()
    return JobResult(out, report)


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


def allocate(problem: allocators.Problem, progress: Progress) -> dict[str, allocators.Allocation]:
    """The allocation under the budget, and what it is compared with: the best uniform spec, and rank 0 at the same bytes."""
    if problem.keeps_original:
        progress.say(f"the original fits {problem.budget} as it is; every matrix is kept in bf16")
        rows = problem.table.rows
        kept = tuple(allocators.Row(r.name, r.weights, (allocators.Option("bf16", 2 * r.weights, 0.0),), r.counted) for r in rows)
        same = allocators.allocate(table := allocators.OptionTable(kept), table.most_bytes)
        return dict.fromkeys(CANDIDATES, same)
    with progress.stage("allocating"):
        best = allocators.compared(problem.table, problem.limit, gap=PROVED_GAP)
    return {"allocated": best} | {name: best.baselines[name] for name in CANDIDATES if name in best.baselines}


Solutions = dict[tuple[str, str], Solution]
Solver = Callable[..., Solutions]
"""`solve_many`, or what calls it."""


def solve(
    plans: Iterable[allocators.Allocation],
    solutions: Solutions,
    statistics: Statistics,
    recipe: Recipe,
    progress: Progress,
    solver: Solver = solve_many,
) -> None:
    """Every (matrix, spec) that any plan wants and that `solutions` lacks, solved and put there."""
    wanted = dict.fromkeys((name, spec) for plan in plans for name, spec in plan.specs.items())
    problems = {key: statistics.problem(*key) for key in wanted if key not in solutions}
    with progress.stage("compressing", total=len(problems)) as stage:

        def on_done(key: tuple[str, str], solution: Solution) -> None:
            stage.advance(note=f"{key[0]} {key[1]} error {solution.stats['relative_error']:.4f}")

        solutions |= solver(problems, seed=recipe.seed, config=solver_config(recipe), on_done=on_done)


def refine(
    problem: allocators.Problem,
    plans: dict[str, allocators.Allocation],
    judged: dict[str, Comparison],
    solutions: Solutions,
    original: Llama,
    sample: Reference,
    statistics: Statistics,
    recipe: Recipe,
    progress: Progress,
    solver: Solver = solve_many,
) -> allocators.Refined:
    """Better the allocated plan by measuring others near it; `plans`, `judged` and `solutions` are brought up to date."""
    known = {tuple(plan.specs.items()): judged[name] for name, plan in plans.items()}
    config = solver_config(recipe)

    def measure(specs: Mapping[str, str]) -> float:
        key = tuple(specs.items())
        if key not in known:
            missing = {(n, s): statistics.problem(n, s) for n, s in specs.items() if (n, s) not in solutions}
            solutions.update(solver(missing, seed=recipe.seed, config=config))
            known[key] = divergence(with_weights(original, chosen(specs, solutions)), sample)
        return known[key].kl

    groups: dict[str, set[str]] = {}
    for name in problem.table.index:
        groups.setdefault(f"kind {kind_of(name)}", set()).add(name)
        groups.setdefault(f"layer {layer_of(name)}", set()).add(name)
    others = [plan for name, plan in plans.items() if name != "allocated"]
    with progress.stage("refining", total=recipe.refine) as stage:
        found = allocators.refine(
            problem.table,
            plans["allocated"],
            problem.limit,
            measure,
            groups=groups,
            evaluations=recipe.refine + len(plans),
            seconds=recipe.refine_seconds,
            candidates=others,
            on_measured=lambda proposal, kl, kept: stage.advance(note=f"{proposal}: KL {kl:.5f}" + (", kept" if kept else "")),
        )
    if found.allocation not in others:
        plans["allocated"] = dataclasses.replace(found.allocation, baselines=plans["allocated"].baselines)
        judged["allocated"] = known[tuple(found.allocation.specs.items())]
    return found


def resolve(
    plan: allocators.Allocation,
    judged: dict[str, Comparison],
    name: str,
    tokens: np.ndarray,
    original: Llama,
    sample: Reference,
    statistics: Statistics,
    recipe: Recipe,
    progress: Progress,
    space: Workspace,
) -> Solutions:
    """The plan solved again block by block, each behind the compressed ones before it; nothing where that is no better."""
    config = solver_config(recipe)
    with progress.stage("compressing in sequence", total=len(plan.specs)) as stage:

        def solver(problems: Any) -> Solutions:
            on_done = lambda key, _: stage.advance(note=" ".join(key))  # noqa: E731
            return space.solve("sequential", problems, seed=recipe.seed, config=config, on_done=on_done)

        found = solve_sequentially(original, plan.specs, tokens, statistics, solver, recipe.damping)
    after = divergence(with_weights(original, chosen(plan.specs, found)), sample)
    before = judged[name]
    told = f"solved in sequence the KL on the calibration text is {after.kl:.5f}, before {before.kl:.5f}"
    progress.say(told + (": kept" if after.kl < before.kl else ": not kept"))
    if after.kl >= before.kl:
        return {}
    judged[name] = after
    return found


def chosen(specs: Mapping[str, str], solutions: Solutions) -> dict[str, QLRMatrix]:
    """The compressed matrices of one plan."""
    return {name: solutions[name, spec].value for name, spec in specs.items()}


def with_weights(model: Llama, matrices: Mapping[str, QLRMatrix]) -> Llama:
    """A copy of the model with these matrices decoded in place of its own; everything else is shared."""
    copy: Llama = jax.tree.map(lambda leaf: leaf, model)
    linears = copy.linears()
    for name, matrix in matrices.items():
        weight = linears[name].weight
        held = weight.get_value()
        if isinstance(held, Lazy):
            weight.set_value(Lazy(held.shape, matrix.dense, held.dtype))
        else:
            weight.set_value(matrix.dense().astype(held.dtype))
    return copy


def peak_rss() -> int:
    """The largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = ["BUNDLED", "JobResult", "compress", "demo", "evaluate", "inspect", "sensitivity"]
