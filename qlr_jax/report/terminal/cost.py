"""What a job will need, as text: sizes, the budget's place in its range, memory and time by stage, and what would make it run."""

from __future__ import annotations

from qlr_jax.cost import MEMORY_ERROR, Part, Plan, Stage
from qlr_jax.progress import duration
from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import bits, size, stage_label
from qlr_jax.settings.limits import WEIGHTS_SHARE


def plan_text(plan: Plan) -> str:
    """Everything that `cost.plan_job` found, about forty lines.

    Example:
        >>> from qlr_jax.cost import Machine, plan_job
        >>> from qlr_jax.models import known_config
        >>> from qlr_jax.settings.recipe import Recipe
        >>> plan = plan_job(known_config("Llama-2-7B"), Recipe(), Machine.parse("cpu:24GiB,cores=2"), model="Llama-2-7B")
        >>> print(plan_text(plan).splitlines()[0])
        Llama-2-7B: 6.74 billion parameters, planned for 2.25bpw on a cpu with 25.8 GB and 2 cores
    """
    title = f"{plan.model or 'model'}: {_count(plan.parameters)} parameters, planned for {plan.budget['text']} on {_machine(plan)}"
    lines = [title, "", *_sizes(plan), "", _budget(plan), _weights(plan), "", *_stages(plan), "", *_totals(plan), ""]
    lines.append("this job can run here" if plan.fits else "this job cannot run here as it is")
    lines += [f"  {problem}" for problem in plan.problems]
    if plan.remedies:
        lines += ["what would make it run:", *[f"  {remedy}" for remedy in plan.remedies]]
    return "\n".join([*lines, *[f"note: {note}" for note in plan.notes]])


def _machine(plan: Plan) -> str:
    machine = plan.machine
    host = "" if machine.kind == "cpu" else f", a host with {size(machine.host)}"
    return f"a {machine.kind} with {size(machine.memory)}{host} and {machine.cores} cores"


def _count(number: int) -> str:
    """A number of parameters as people say it.

    >>> _count(70_553_706_496), _count(5_249_280)
    ('70.6 billion', '5.25 million')
    """
    value, word = (number / 1e9, "billion") if number >= 1e9 else (number / 1e6, "million")
    return f"{value:.3g} {word}"


def _sizes(plan: Plan) -> list[str]:
    rows = [[part, size(sizes["before"]), size(sizes["after"])] for part, sizes in plan.sizes.items() if sizes["before"]]
    return columns(["stored", "before, bf16", "after"], rows).splitlines()


def _budget(plan: Plan) -> str:
    budget = plan.budget
    ends = f"{bits(budget['least_bits'])} to {bits(budget['most_bits'])} bits a weight"
    ends += f" ({size(budget['least_bytes'])} to {size(budget['most_bytes'])} of matrices)"
    if not budget["within"]:
        return f"budget: {budget['text']} is not within what the recipe offers, {ends}"
    if budget["keeps_original"]:
        return f"budget: {budget['text']} holds the original as it is; nothing need be compressed (the recipe offers {ends})"
    return f"budget: {budget['text']} leaves {bits(budget['limit_bits'])} bits a weight, within what the recipe offers, {ends}"


def _weights(plan: Plan) -> str:
    """Where the weights are while the job runs, and what decided it."""
    where = "stay on disk, read block by block" if plan.streaming else "are kept in memory"
    if plan.recipe.streaming is not None:
        return f"weights: {where}, because the recipe says streaming: {str(plan.recipe.streaming).lower()}"
    room, relation = size(WEIGHTS_SHARE * plan.machine.host), "more" if plan.streaming else "no more"
    whose = "the memory" if plan.machine.kind == "cpu" else "the host's memory"
    share = "half of" if WEIGHTS_SHARE == 0.5 else f"{WEIGHTS_SHARE:g} of"
    return f"weights: {where}, because in float32 they take {size(4 * plan.parameters)}, {relation} than {share} {whose} ({room})"


def _stages(plan: Plan) -> list[str]:
    """A row a stage: memory, seconds, and the part that takes most of it."""
    split, rows = plan.machine.kind != "cpu", []
    for stage in plan.stages:
        room = [size(stage.device), size(stage.host)] if split else [size(stage.host)]
        time = f"to {duration(plan.refine_seconds)}" if stage.name == "refine" else duration(stage.seconds)
        rows.append([stage_label(stage.name), *room, time, _largest(stage)])
    header = ["stage", *(["device", "host"] if split else ["memory"]), "time", "of it"]
    table = columns(header, rows).splitlines()
    if not split:  # what of the peak is kept from stage to stage
        kept = [part for stage in plan.stages for part in stage.parts if part.kept and part.host + part.device]
        table += ["", "kept until the end: " + ", ".join(f"{part.what} {size(part.host + part.device)}" for part in kept)]
        return table
    for side in ("device", "host"):
        kept = [part for stage in plan.stages for part in stage.parts if part.kept and getattr(part, side)]
        table += ["" if side == "device" else None, f"kept on the {side}: " + ", ".join(_part(part, side) for part in kept)]
    return [line for line in table if line is not None]


def _part(part: Part, side: str) -> str:
    return f"{part.what} {size(getattr(part, side))}"


def _largest(stage: Stage) -> str:
    own = [part for part in stage.parts if part.host + part.device]
    if not own:
        return ""
    part = max(own, key=lambda part: part.host + part.device)
    return f"{part.what} {size(part.host + part.device)}"


def _totals(plan: Plan) -> list[str]:
    rates, machine = plan.rates, plan.machine
    low, high = plan.seconds / rates.error, plan.seconds * rates.error
    known = "" if rates.measured else "NOT measured: "
    span = f"{known}about {duration(plan.seconds)} ({duration(low)} to {duration(high)})"
    if machine.kind == "cpu":
        span += f", {duration(plan.cpu_seconds)} of processor time"
    refined = f"; refining may add about {duration(plan.refine_seconds)}" if plan.refine_seconds else ""
    lines = [f"time: {span}{refined}; rates {rates.says}"]
    peak = size(plan.host) if machine.kind == "cpu" else f"{size(plan.device)} on the device, {size(plan.host)} on the host"
    found = (
        f"measured jobs lay within {100 * MEMORY_ERROR:.0f} %"
        if rates.measured
        else "counted for a CPU's copies, not measured here"
    )
    lines.append(f"memory: {peak}, per host; {found}")
    disk = plan.disk
    whole = sum(disk.values())
    lasting = f"{size(disk['job'])} of finished matrices"
    lasting += f" and {size(disk['statistics'])} of Hessians" if disk["statistics"] else ""
    line = f"disk: {size(disk['original'])} of the original, {size(disk['output'])} of the output, {lasting} while the job lasts"
    line += f", {size(disk['temporary'])} in the temporary folder for a time" if disk["temporary"] else ""
    lines.append(f"{line}; {size(whole)} in all")
    return lines
