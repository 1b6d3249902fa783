"""What the job cost: time by stage, peak memory, device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.words import (
    is_number,
    part_of,
    size,
    stage_label,
)


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The stages with their seconds; an adaptation, which came after, last."""
    stages = [(stage_label(str(name)), value) for name, value in part_of(report, "seconds", "stages").items() if is_number(value)]
    adapted = part_of(report, "adapted").get("seconds")
    return [*stages, ("adaptation, afterwards", adapted)] if is_number(adapted) else stages


def machine_line(report: Mapping[str, Any]) -> str:
    """Time in all, peak memory, and what it ran on; empty where nothing of it is known."""
    seconds, memory, cores = part_of(report, "seconds").get("total"), report.get("peak_rss_bytes"), report.get("cores")
    device = str(report.get("device") or "")
    words = [duration(seconds)] if is_number(seconds) else []
    words += [f"peak memory {size(memory)}"] if is_number(memory) else []
    words += [f"on {'the CPU' if device == 'cpu' else device}"] if device else []
    words += (
        [f"{cores} {'core' if cores == 1 else 'cores'}{'' if device in ('', 'cpu') else ' beside it'}"] if is_number(cores) else []
    )
    return ", ".join(words)
