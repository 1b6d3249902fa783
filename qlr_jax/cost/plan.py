"""The plan of a job: memory, disk and seconds, whether it fits, and why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlr_jax.cost.advice import disk_shortages, memory_shortages, refusals, remedies
from qlr_jax.cost.counted import Counted
from qlr_jax.cost.machine import Machine
from qlr_jax.cost.memory import probed, temporary
from qlr_jax.cost.notes import notes
from qlr_jax.cost.rates import Rates
from qlr_jax.cost.sizes import budget_and_sizes
from qlr_jax.cost.stages import MEMORY_ERROR, Stage, find_stages
from qlr_jax.models import LlamaConfig, parameter_count
from qlr_jax.settings.recipe import Recipe

COUNTS = (
    "sequences",
    "sequence_length",
    "measure_tokens",
    "output_tokens",
    "state_bits",
    "hessians",
    "outputs",
    "attribution",
    "refine",
)
BESIDE = 300_000  # bytes of an output folder beside its weights: runtime, report, tokenizer


@dataclass(frozen=True)
class Plan:
    """What a job will need; `to_dict` for JSON.

    Attributes:
        sizes: bytes by part of the model, {"before", "after"} each, and "whole".
        budget: its limit and the table's range in bytes and bits a weight; "within", and "why" where it is not.
        host, device: the highest bytes of all stages; a CPU's are one sum, under both names.
        streaming: whether weights and statistics stay on disk.
        disk: bytes of the original, of the output, while it lasts of finished matrices in job/ and of statistics there, and of
            the temporary folder.
        seconds, cpu_seconds: of all stages, refining aside; `refine_seconds`: what that may add.
        fits: whether it can run as it is: memory, budget, the disk where it is known, and all that would be refused.
        problems: why not, a sentence each; remedies: what would make it run; notes: what else one should know.
    """

    model: str
    machine: Machine
    recipe: Recipe
    parameters: int
    streaming: bool
    sizes: Mapping[str, Mapping[str, int]]
    budget: Mapping[str, Any]
    stages: tuple[Stage, ...]
    host: int
    device: int
    disk: Mapping[str, int]
    seconds: float
    cpu_seconds: float
    refine_seconds: float
    rates: Rates
    fits: bool
    problems: tuple[str, ...]
    remedies: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the recipe by its budget and counts alone."""
        recipe = {name: getattr(self.recipe, name) for name in ("budget", "target", *COUNTS)}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("machine", "recipe", "stages", "rates")}
        rates = asdict(self.rates) | {"memory_error": MEMORY_ERROR}
        rates["searches"] = {states: asdict(search) for states, search in self.rates.searches.items()}
        return {
            **plain,
            "machine": asdict(self.machine) | {"text": str(self.machine)},
            "recipe": recipe,
            "stages": [asdict(stage) for stage in self.stages],
            "rates": rates,
        }


# what it takes and what it may refuse is most of it
def plan_job(
    config: LlamaConfig,
    recipe: Recipe,
    machine: Machine,
    *,
    model: str = "",
    original_bytes: int | None = None,
    out: str | Path | None = None,
    rates: Rates | None = None,
) -> Plan:
    """What a job needs of a machine.

    Args:
        config: the model's shapes.
        recipe: of the job.
        machine: what it is to run on.
        model: its name, to be shown.
        original_bytes: of its files, where they are here; two bytes a parameter where not given.
        out: the folder that the job would write, on this machine; its disk must have the room then. It need not exist.
        rates: of the machine, where they were measured (`measured_rates`).

    Raises:
        QLRError: patterns that leave no matrix, or backbones that fit none.

    Example:
        >>> from qlr_jax.models import known_config
        >>> plan = plan_job(known_config("Llama-3-8B"), Recipe(), Machine.parse("cpu:24GiB,cores=2"))
        >>> plan.parameters, plan.fits, plan.problems[0].split(":")[0]
        (8030261248, False, 'memory')
    """
    job = Counted(config, recipe, machine, rates)
    budget, sizes = budget_and_sizes(job)
    stages = find_stages(job)
    disk = {
        "original": 2 * parameter_count(config) if original_bytes is None else original_bytes,
        "output": sizes["whole"]["after"] + BESIDE,
        **_working_files(job, budget, stages),
    }
    refused = [*([budget["why"]] if not budget["within"] else []), *refusals(job)]
    lacking, full = memory_shortages(job, stages), disk_shortages(disk, Path(out)) if out is not None else []
    return Plan(
        model=model,
        machine=machine,
        recipe=recipe,
        parameters=parameter_count(config),
        streaming=job.streaming,
        sizes=sizes,
        budget=budget,
        stages=stages,
        host=max(s.host for s in stages),
        device=max(s.device for s in stages),
        disk=disk,
        seconds=sum(s.seconds for s in stages),
        cpu_seconds=sum(s.cpu_seconds for s in stages),
        # a trial that is under way is not broken off
        refine_seconds=recipe.refine_seconds + sum(s.seconds / 3 for s in stages if s.name == "judge") if recipe.refines else 0.0,
        rates=job.rates,
        fits=not (lacking or refused or full),
        problems=(*lacking, *full, *refused),
        remedies=tuple(remedies(job) if lacking or refusals(job) else ()),
        notes=tuple(notes(job)),
    )


def _working_files(job: Counted, budget: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, int]:
    """Bytes of files while the job lasts: finished matrices in job/, statistics there, the temporary folder."""
    needed = budget["limit_bytes"] or budget["least_bytes"]
    statistics = sum(part.disk for stage in stages for part in stage.parts if part.kept)
    if job.machine.hosts > 1:
        statistics = job.hessians + job.outputs  # on the workers' disks, where their memories do not hold them
    plans = len(job.plans) * needed + (probed(job) if job.recipe.target == "qlr" else needed)
    return {"job": plans, "statistics": statistics, "temporary": temporary(job)}
