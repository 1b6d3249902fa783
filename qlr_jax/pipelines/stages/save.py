"""Save: the delivered model as a folder, with the report of all that was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlr_jax.core.sharding import device_kind
from qlr_jax.formats.qlr.packed import save_packed
from qlr_jax.paths import enough_space
from qlr_jax.pipelines.run import Outcome, Run
from qlr_jax.pipelines.stages.select import held_out_rows
from qlr_jax.pipelines.texts import Texts
from qlr_jax.report.files import job_files
from qlr_jax.report.record import Record
from qlr_jax.run.journal import Clock, peak_rss


def save(run: Run, out: Path, outcome: Outcome, texts: Texts, clock: Clock, command: str) -> dict[str, Any]:
    """Write the folder of the delivered candidate; returns the report.

    Args:
        command: what was typed, for the report.

    Raises:
        QLRError: a full disk; nothing of the folder is left then.
    """
    source, candidates, statistics, settings = run.source, outcome.candidates, run.statistics, run.settings
    delivered = candidates[outcome.delivered]
    record = Record(
        model=source.name,
        original=source.identity,
        command=command,
        recipe=run.recipe,
        config=run.original.config,
        plans={name: candidate.plan for name, candidate in candidates.items()},
        delivered=outcome.delivered,
        solutions=delivered.solutions,
        sensitivity=outcome.sensitivity,
        calibration={name: candidate.calibration for name, candidate in candidates.items() if candidate.calibration},
        refined=outcome.refined,
        held_out={name: candidate.held_out for name, candidate in candidates.items() if candidate.held_out},
        held_out_name=texts.held_out_name,
        window=held_out_rows(run, texts.held_out).shape[1] if texts.held_out else run.settings.sequence_length,
        text_notes=texts.notes,
        seconds=clock.seconds,
        started=clock.started,
        peak_rss=peak_rss(),
        problem=outcome.problem,
        device=device_kind(),
        import_notes=source.notes,
        controls={"mode": run.recipe.controls, "state_bits": settings.controls.state_bits if settings.controls else None},
        left_out={"inputs": getattr(statistics.hessians, "left_out", {}), "outputs": getattr(statistics.outputs, "left_out", {})},
    )
    with run.progress.stage("saving"), enough_space(out):
        report = record.report()
        # where it lies is said in report.json alone: the rest of the folder may be published
        known = {key: source.identity.get(key) for key in ("hub", "revision", "digest")}
        recorded: dict[str, Any] = {"base_model": source.name, "original": known}
        if run.recipe.ignore_config:
            recorded["ignore_config"] = list(run.recipe.ignore_config)  # whoever reads the original again needs them too
        files = job_files(record, report)
        save_packed(out, run.original, delivered.matrices, source=source.folder, settings=recorded, files=files)
    return report
