"""A job stage by stage: what each needs while it runs, with what earlier ones keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlr_jax.cost.counted import Counted
from qlr_jax.cost.memory import CODE, RUNTIME, STAGES, Part, memory
from qlr_jax.cost.rates import Work
from qlr_jax.cost.work import work

MEMORY_ERROR = 0.3  # of the peak, found on real jobs
ALONE = ("load", "save")  # every host reads the model, the job's own process writes; all else is shared among them


@dataclass(frozen=True)
class Stage:
    """What one stage of a job needs: bytes at its highest, seconds of all processors together and on the wall."""

    name: str
    host: int
    device: int
    cpu_seconds: float
    seconds: float
    parts: tuple[Part, ...]


def find_stages(job: Counted) -> tuple[Stage, ...]:
    """The stages of a job in their order, each with its memory and time."""
    parts, amounts, rates = memory(job), work(job), job.rates
    found, kept_host, kept_device, compiled = [], RUNTIME, 0, 0.0
    cpu = job.machine.kind == "cpu"
    for name in STAGES:
        own = [part for part in parts if part.stage == name]
        amount = amounts.get(name, Work())
        if not own and name not in amounts:
            continue
        compiled += amount.compiled
        host = kept_host + int(CODE * compiled) + sum(part.host for part in own)
        device = kept_device + sum(part.device for part in own)
        kept_host += sum(part.host for part in own if part.kept)
        kept_device += sum(part.device for part in own if part.kept)
        host, device = (host + device, host + device) if cpu else (host, device)
        hosts = 1 if name in ALONE else job.machine.hosts
        once = Work(compiled=amount.compiled)  # by every host
        divided = amount + once * -1
        wall = rates.wall(once, job.machine.cores) + rates.wall(divided, job.machine.cores) / hosts
        found.append(Stage(name, host, device, rates.cpu(divided + once * hosts), wall, tuple(own)))
    return tuple(found)


def resident(stages: Sequence[Stage], at: Stage, side: str, kind: str) -> list[tuple[str, int]]:
    """What lies in memory during a stage, with its bytes.

    Args:
        stages: all of the job, in their order.
        at: the stage.
        side: "host" or "device".
        kind: of the machine; on a CPU both sides are one.
    """
    found = []
    for stage in stages:
        for part in stage.parts:
            if part.kept or stage is at:
                found.append((part.what, part.host + part.device if kind == "cpu" else getattr(part, side)))
        if stage is at:
            return found
    return found


def peak(job: Counted) -> int:
    """The most bytes that any stage needs on one side."""
    stages = find_stages(job)
    return max(max(s.host for s in stages), max(s.device for s in stages))
