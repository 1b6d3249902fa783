"""What one should know of a plan beside its figures."""

from __future__ import annotations

from qlr_jax.cost.counted import Counted
from qlr_jax.cost.memory import temporary
from qlr_jax.cost.rates import Work
from qlr_jax.cost.work import reads, work
from qlr_jax.models import parameter_count
from qlr_jax.progress import duration
from qlr_jax.settings.limits import OUTPUTS_SHARE

FITTED = 30_000_000  # parameters of the largest model that a job was measured on


def notes(job: Counted) -> list[str]:
    """What else one should know, a sentence each."""
    found = []
    if job.own_rates is None and job.rates.measured and parameter_count(job.config) > FITTED:
        found.append(
            f"seconds were compared with jobs of up to {FITTED / 1e6:.0f} million parameters, and single matrices of up to 4096 × "
            "4096: for larger models, more cores or another processor they are extrapolated"
        )
    if job.recipe.outputs == "fisher" and not job.outputs:
        found.append(
            f"output Hessians would take {job.settings.output_bytes / 1e9:,.1f} GB while they are summed, more than "
            f"{OUTPUTS_SHARE:g} of the host's {job.machine.host / 1e9:,.1f} GB: the job goes on without them, and all outputs "
            "count alike"
        )
    found += _compiling(job)
    found += _on_disk(job)
    if job.recipe.backbone_from:
        found.append(
            "with backbone_from only factors are solved for: the seconds of its solves have not been compared with real jobs"
        )
    if job.machine.hosts > 1:
        found.append(
            f"{job.machine.hosts} hosts share the work as workers of a Dask cluster (--cluster); memory is that of a process that "
            "does all of it. How evenly they end has not been measured on real machines"
        )
    return found


def _compiling(job: Counted) -> list[str]:
    """What a second job of the same shapes need not do again."""
    functions = sum(amount.compiled for amount in work(job).values())
    if job.machine.kind != "cpu" or not functions:
        return []
    spent = duration(job.rates.cpu(Work(compiled=functions)))
    return [f"about {spent} are compiling, and what is compiled is kept: another job of these shapes needs little of that"]


def _on_disk(job: Counted) -> list[str]:
    """What files are used in place of memory, and that the seconds know nothing of a disk."""
    found = []
    if states := temporary(job):
        found.append(
            f"hidden states at all blocks take {states / 1e9:,.1f} GB of the temporary folder (TMPDIR) for a backward pass, and "
            "fewer tokens take less; that folder must lie on a disk, not in memory"
        )
    if job.streaming:
        times = sum(reads(job).values())
        found.append(
            f"the weights are read about {times} times ({2e-9 * times * job.linear_weights:,.0f} GB of bf16): the seconds hold "
            "their conversion, but not the disk's own time, which has not been measured"
        )
    return found
