"""The `sensitivity` command: how much each matrix's error matters, as the table that allocations are made from."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from qlr_jax.core.blas import one_blas_thread
from qlr_jax.engine import HERE, Engine
from qlr_jax.formats.files import staged
from qlr_jax.locks import locked, refuse_locked
from qlr_jax.models.bundled import BUNDLED_NAME
from qlr_jax.paths import output_folder
from qlr_jax.pipelines.allocate import TABLE
from qlr_jax.pipelines.run import Run
from qlr_jax.pipelines.source import machine_notes, open_source, share
from qlr_jax.pipelines.stages.ahead import compiling_ahead
from qlr_jax.pipelines.stages.calibrate import calibrate, check_texts
from qlr_jax.pipelines.stages.measure import measure
from qlr_jax.pipelines.texts import Files, Texts
from qlr_jax.progress import Progress, silent, with_status
from qlr_jax.report.html.sensitivity_page import write_pictures
from qlr_jax.run.journal import Clock
from qlr_jax.run.session import on_cluster, solver_on
from qlr_jax.settings.host import prepare
from qlr_jax.settings.recipe import Recipe


@one_blas_thread()
def sensitivity(
    model: str | Path,
    out: str | Path,
    calibration: Files = None,
    recipe: Recipe | str | Path | None = None,
    *,
    matrix: str | None = None,
    chat: bool = False,
    cluster: Any = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Measure how much each matrix's error matters, and write the table of all its options with pictures; nothing is compressed.

    Args:
        model: as for `compress`, or "bundled".
        out: the folder for table.json, sensitivity.html and the pictures; it must not exist or be empty.
        calibration: text file(s); "bundled" has its own.
        recipe: a Recipe or a YAML file; its budget plays no part.
        chat: apply the tokenizer's chat template to the text.
        matrix: whose error is drawn against bits; that of the largest damage where not given.
        cluster: where the work is done, as for `compress`.
        progress, command: where to report how far it is, and what was typed, for the table's notes.

    Returns:
        out, table (its path), matrices and options (how many), seconds, notes.

    Raises:
        QLRError: no calibration text, an `out` that cannot be written, holds something or belongs to another job, a model or recipe
            that cannot be used.
    """
    prepare()
    progress, recipe, out, clock = progress or silent(), Recipe.of(recipe).located(), output_folder(out, sources=[model]), Clock()
    refuse_locked(out)
    with locked(out), on_cluster(cluster, progress) as engine:
        shown = with_status(progress, lambda: engine.status)
        return _measured(model, out, calibration, chat, recipe, matrix, shown, clock, command, engine)


def _measured(
    model: str | Path,
    out: Path,
    calibration: Files,
    chat: bool,
    recipe: Recipe,
    matrix: str | None,
    progress: Progress,
    clock: Clock,
    command: str,
    engine: Engine,
) -> dict[str, Any]:
    own = str(model) == BUNDLED_NAME and not calibration
    texts = Texts.standard_library() if own else Texts.read(calibration, chat=chat)
    with clock.stage("load"), progress.stage("loading"):
        source = open_source(model, recipe, whole=True)  # a table is for budgets of all kinds
        for line in [*source.notes, *machine_notes(source)]:
            progress.say(line)
        check_texts(source, texts.calibration)
        for note in texts.notes:
            progress.say(note)
    share(source, engine)
    with clock.stage("calibrate"), compiling_ahead(source, engine is HERE):
        statistics, reference = calibrate(source, texts.calibration, progress, engine=engine)
    with clock.stage("measure"):
        solver = solver_on(engine)
        table = measure(Run(source, statistics, reference, progress, lambda kind: solver, engine=engine)).table
    seconds = dict(clock.seconds) | {"total": time.perf_counter() - clock.started}
    facts: dict[str, Any] = {"model": source.name, "original": dict(source.identity), "import": list(source.notes)}
    facts |= {"command": command, "seconds": seconds, "target": recipe.target, "recipe": recipe.to_yaml()}
    table = dataclasses.replace(table, notes=dict(table.notes) | facts)
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
