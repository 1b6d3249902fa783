"""What stands in the way of a job, what would make it run, and what else one should know."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlr_jax.cost.counted import Counted
from qlr_jax.cost.stages import MEMORY_ERROR, Stage, find_stages, peak, resident
from qlr_jax.models import parameter_count
from qlr_jax.paths import local, resolved
from qlr_jax.settings.limits import OUTPUTS_SHARE, REFERENCE_BYTES, WEIGHTS_SHARE

WORTH = 0.99  # a setting that leaves more of the peak than this is not worth what it costs elsewhere


def refusals(job: Counted) -> list[str]:
    """What the job itself would refuse once it runs, a sentence each."""
    found, widest, vocab = [], max(n for _, n in job.shapes.values()), job.config.vocab_size
    if job.tokens < widest and not job.recipe.force:
        found.append(
            f"calibration: {job.recipe.sequences} sequences of {job.length} tokens are fewer than the {widest:,} inputs of the "
            "widest matrix; pass more sequences"
        )
    if (half := 2 * job.measured * vocab) > REFERENCE_BYTES:
        fit = REFERENCE_BYTES // (2 * job.length * vocab)
        found.append(
            f"reference: log-probabilities of {job.measured:,} tokens × {vocab:,} words take {half / 1e9:.2f} GB in float16, more "
            f"than the {REFERENCE_BYTES / 1e9:g} GB that may be kept; pass measure_tokens: {fit * job.length}"
            + ("" if fit else f" and sequence_length: {REFERENCE_BYTES // (2 * vocab)} at most")
        )
    if job.streaming and job.recipe.attribution == "second-order":
        found.append("attribution: second order needs the whole model in memory; pass attribution: path, or streaming: false")
    return found


def memory_shortages(job: Counted, stages: Sequence[Stage]) -> list[str]:
    """For every kind of memory that is too small: how much the highest stage needs, and its largest parts."""
    found = []
    sides = ("host",) if job.machine.kind == "cpu" else ("device", "host")
    for side in sides:
        room = getattr(job.machine, "host" if side == "host" else "memory")
        worst = max(stages, key=lambda stage: getattr(stage, side))
        if getattr(worst, side) <= room:
            continue
        largest = sorted(resident(stages, worst, side, job.machine.kind), key=lambda pair: -pair[1])[:3]
        parts = ", ".join(f"{what} {bytes_ / 1e9:,.1f} GB" for what, bytes_ in largest)
        where = "memory" if side == "host" and job.machine.kind == "cpu" else f"{side} memory"
        found.append(f"{where}: {worst.name} needs {getattr(worst, side) / 1e9:,.1f} GB of {room / 1e9:,.1f} GB ({parts})")
    return found


def disk_shortages(disk: Mapping[str, int], out: Path) -> list[str]:
    """The folders whose disk has too little room for what a job puts there, a sentence each.

    Args:
        disk: bytes of the output, of job/ and statistics beside it, and of the temporary folder.
        out: the output folder, which need not exist.
    """
    path = resolved(local(out))
    place, spare = next(p for p in (path, *path.parents) if p.exists()), Path(tempfile.gettempdir())
    needed = {place: disk["output"] + disk["job"] + disk["statistics"]}
    if disk["temporary"]:
        where = place if place.stat().st_dev == spare.stat().st_dev else spare
        needed[where] = needed.get(where, 0) + disk["temporary"]
    found = []
    for folder, size in needed.items():
        if size > (free := shutil.disk_usage(folder).free):
            instead = "name an output folder on another disk" if folder == place else "set TMPDIR to a folder on another disk"
            found.append(
                f"disk: the job puts {size / 1e9:,.1f} GB into {folder}, whose disk has {free / 1e9:,.1f} GB free; free "
                f"some of it, or {instead}"
            )
    return found


def remedies(job: Counted) -> list[str]:
    """Settings that take the job under the machine's memory, one after another as far as needed; and the machine that it needs."""
    tried, changes, machines = job, {}, []
    steps: list[dict[str, Any]] = [
        {"measure_tokens": max(job.length, REFERENCE_BYTES // (2 * job.length * job.config.vocab_size) * job.length)}
        if 2 * job.measured * job.config.vocab_size > REFERENCE_BYTES
        else {},
        {"attribution": "path"} if job.streaming and job.recipe.attribution == "second-order" else {},
        {"streaming": True} if job.recipe.attribution != "second-order" else {},
        {"outputs": "alike"} if job.outputs else {},
        {"sequences": max(1, min(job.recipe.sequences, -(-4 * max(n for _, n in job.shapes.values()) // job.length)))},
        {"sequence_length": min(job.length, 1024)},
        {"attribution": "alone"} if job.recipe.attribution == "path" else {},
    ]
    for step in steps:
        new = {name: value for name, value in step.items() if _setting(tried, name) != value}
        if not new or not (memory_shortages(tried, find_stages(tried)) or refusals(tried)):
            continue
        before = peak(tried)
        candidate = replace(tried, recipe=tried.recipe.updated(**(changes | new)))
        if peak(candidate) < WORTH * before or len(refusals(candidate)) < len(refusals(tried)):
            tried, changes = candidate, changes | new
    text = ", ".join(f"{name}: {str(value).lower() if value is True else value}" for name, value in changes.items())
    if not memory_shortages(tried, find_stages(tried)) and not refusals(tried):
        return [f"in the recipe, {text}"]
    if text:
        machines.append(
            f"in the recipe, {text}: the peak is {peak(tried) / 1e9:,.1f} GB instead of {peak(job) / 1e9:,.1f} GB, still too much"
        )
    alike = "" if job.streaming else ", all outputs counting alike"
    machines.append(f"a machine of {_needed(job, job.recipe.outputs if job.streaming else 'alike')} for the recipe as it is{alike}")
    if job.recipe.outputs == "fisher" and not job.streaming:
        machines.append(f"a machine of {_needed(job, 'fisher')} with output Hessians")
    if text:
        alike = "" if tried.streaming else ", all outputs counting alike"
        needed = _needed(tried, tried.recipe.outputs if tried.streaming else "alike")
        machines.append(f"a machine of {needed} with those settings{alike}")
    return machines


def _setting(job: Counted, name: str) -> Any:
    return job.streaming if name == "streaming" else getattr(job.recipe, name)


def _needed(job: Counted, outputs: str) -> str:
    """The memory that a job needs, with the model's error on top; output Hessians take a share of the host's at most."""
    kronecker = outputs == "alike" and job.recipe.attribution == "kronecker"
    changed = {"outputs": outputs} | ({"attribution": "alone"} if kronecker else {})
    wide = replace(job, recipe=job.recipe.updated(**changed), machine=replace(job.machine, memory=10**18, host=10**18))
    resident_from = 4 * parameter_count(job.config) / WEIGHTS_SHARE

    def room(streaming: bool) -> tuple[float, float]:
        stages = find_stages(replace(wide, recipe=wide.recipe.updated(streaming=streaming)))
        return tuple((1 + MEMORY_ERROR) * max(getattr(s, side) for s in stages) for side in ("host", "device"))

    streaming, (host, device) = job.streaming, room(job.streaming)
    if streaming and job.recipe.streaming is None and host >= resident_from:  # on such a machine the weights would not stay on disk
        streaming, (host, device) = False, room(False)
        host = max(host, resident_from)
    if outputs == "fisher" and not streaming:
        host = max(host, 2 * wide.outputs / OUTPUTS_SHARE)
    on_host = f"{host / 1e9:,.0f} GB"
    return on_host if job.machine.kind == "cpu" else f"{device / 1e9:,.0f} GB on the device and {on_host} on its host"
