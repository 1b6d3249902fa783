"""The phases of a training: where each begins, what it trains, and how far it is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.adaptation import checkpoint, rounding
from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.student import Student, Values
from qlr_jax.adaptation.train import KINDS, Text, Trainer, joined, order, rates
from qlr_jax.core.requantize import Regrid
from qlr_jax.errors import QLRError
from qlr_jax.progress import Stage


class Extent(enum.Enum):
    """What is rounded anew while it is trained: always the factors, and"""

    FACTORS = "nothing else"
    NEAR = "backbones, every walk of a trellis closing where it did before"
    ALL = "backbones, searched from the start"


Shift = Callable[[Values, Values, Extent], Values]
"""(trained, fixed, what is rounded anew) -> fixed, with what rounding adds to factors and backbones."""
SIDES = ("right", "left")  # in the order in which they are rounded
SHARES = {"left": 0.2, "scales": 0.1}  # of the steps, where factors are rounded to few bits


@dataclass
class State:
    """Where the training is: all that a checkpoint must hold."""

    trained: Values
    fixed: Values
    best: Values
    optimizer: Any
    rounded: rounding.Rounded
    run: dict[str, Any]

    def save(self, folder: Path) -> None:
        # the backbone is the model's own and does not change
        small = lambda own: {k: v for k, v in own.items() if not k.startswith("backbone.") and k != "rest"}  # noqa: E731
        fixed = {name: small(own) for name, own in self.fixed.items()}
        trees = {"trained": self.trained, "fixed": fixed, "best": self.best, "rounded": self.rounded}
        checkpoint.save(folder, trees, self.optimizer, self.run)


def run_phase(
    state: State,
    tools: Trainer,
    phase: Phase,
    text: Text,
    others: Text | None,
    config: AdaptConfig,
    folder: Path | None,
    stage: Stage,
    shift: Shift | None = None,
) -> bool:
    """One phase, from where `state` is; True if it ended early. `shift` rounds anew what is trained rounded."""
    run, taken = state.run, config.batch * config.accumulate

    def look() -> None:
        found = tools.judge(state.trained, state.fixed, others)
        run["history"].append({"phase": phase.name, "step": run["step"], "held_out": found})
        better = run["best"] is None or found < run["best"]
        run.update({"best": found, "since": 0} if better else {"since": run["since"] + 1})
        state.best = state.trained if better else state.best

    if others is not None and run["best"] is None:
        look()
    while run["step"] < phase.steps and run["since"] < config.patience:
        index = order(config.seed, phase.start + run["step"], taken, len(text.tokens))
        now = rates(config, state.trained, phase.trained, run["step"], phase.steps)
        state.trained, state.optimizer, loss = tools.step(state.trained, state.fixed, state.optimizer, now, index)
        if not np.isfinite(loss):
            raise QLRError(
                f"the loss is {loss} at step {run['step']} of phase {phase.name!r}; pass a lower learning_rate or vector_rate"
            )
        run["step"] += 1
        run["history"].append({"phase": phase.name, "step": run["step"], "loss": loss})
        due = run["step"] % config.evaluate_every == 0 or run["step"] == phase.steps
        # what is judged, and kept, is what rounding from the start gives
        extent = Extent.ALL if due else Extent.FACTORS if run["step"] % config.reround_backbone else Extent.NEAR
        again = bool(config.reround) and run["step"] % config.reround == 0
        if shift is not None and (again or extent is not Extent.FACTORS):
            state.fixed = shift(state.trained, state.fixed, extent)
        if others is None:
            state.best = state.trained
        elif due:
            look()
        if folder is not None and due:
            state.save(folder)
        told = "" if run["best"] is None else f", held-out {run['best']:.4f}"
        stage.advance(note=f"{phase.name}: loss {loss:.4f}{told}")
    stage.advance(phase.steps - run["step"])
    return run["step"] < phase.steps


@dataclass(frozen=True)
class Phase:
    """A part of the training: which sides are put on their grids before it, and which (matrix or norm, array) it trains."""

    name: str
    start: int
    steps: int
    rounded: tuple[str, ...]
    trained: set[tuple[str, str]]


def plan_phases(student: Student, values: Values, config: AdaptConfig) -> list[Phase]:
    trained = {(n, k) for n, own in values.items() for k in own if KINDS.get(k) in config.train}
    trained = {(n, k) for n, k in trained if k != "component" or student.sites[n].spec.component_scales}
    if not trained:
        raise QLRError(f"this model has nothing of {', '.join(config.train)} to train; pass fresh, or train norms and scales")
    if not coarse(student, config) or config.reround:
        return [Phase("all", 0, config.steps, (), trained)]
    plans = [("all", trained), ("left", {t for t in trained if t[1] != "right"})]
    if rest := {t for t in trained if t[1] not in SIDES}:
        plans.append(("scales", rest))
    steps = [max(1, round(SHARES[name] * config.steps)) for name, _ in plans[1:]]
    steps = [max(1, config.steps - sum(steps)), *steps]
    return [Phase(n, sum(steps[:i]), steps[i], SIDES[:i], t) for i, (n, t) in enumerate(plans)]


def shifting(
    student: Student, rounded: rounding.Rounded, hessians: Mapping[str, np.ndarray], regrids: Mapping[str, Regrid]
) -> Shift:
    """The function that rounds anew: factors, in the Hessians of their inputs, and backbones on their grids."""

    def shift(trained: Values, fixed: Values, extent: Extent) -> Values:
        values, fixed = joined(trained, fixed), dict(fixed)
        for name, site in student.sites.items():
            if name in hessians:
                fixed[name] = fixed[name] | rounding.shifts(site, values[name], hessians[name], rounded.get(name, {}))
            if name in regrids and extent is not Extent.FACTORS:
                fixed[name] = fixed[name] | rounding.body_shift(values[name], regrids[name], extent is Extent.ALL)
        return fixed

    return shift


def coarse(student: Student, config: AdaptConfig) -> bool:
    """Whether factors are trained whose grid is coarse enough to train on about what is rounded."""
    grids = {grid for s in student.sites.values() if s.rank for grid in (s.spec.left, s.spec.right)}
    return "factors" in config.train and bool(grids - {"bf16"})


def round_sides(
    student: Student, values: Values, rounded: rounding.Rounded, hessians: Mapping[str, np.ndarray], sides: tuple[str, ...]
) -> tuple[Values, rounding.Rounded]:
    """These sides of all factors on their grids, but for what is there already."""
    for side in sides if hessians else ():
        for name, site in student.sites.items():
            if site.rank and f"{side}.codes" not in rounded.get(name, {}):
                new, codes = rounding.ROUNDERS[side](site, values[name], hessians[name])
                values, rounded = values | {name: new}, joined(rounded, {name: codes})
    return values, rounded
