"""The training loop: steps, validation, re-quantization, checkpoints; phase after phase, from the start or from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlr_jax.adaptation import checkpoint
from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.metrics import TrainingMetrics
from qlr_jax.adaptation.phases import (
    SIDES,
    Requantize,
    RequantizeScope,
    TrainingPhase,
    plan_phases,
    quantize_factors,
    requantization,
)
from qlr_jax.adaptation.rounding import QuantizedFactors
from qlr_jax.adaptation.sequences import Sequences, epoch_order
from qlr_jax.adaptation.student import ParameterTree, Student
from qlr_jax.adaptation.trainer import Trainer, learning_rates, make_trainer, merge_parameters
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama
from qlr_jax.progress import Progress, Stage


@dataclass(frozen=True)
class TrainingTask:
    """What a training works on; nothing of it changes.

    Attributes:
        student, frame: as `take_apart` gives them.
        config: the settings.
        sequences: text that is trained on.
        validation: text that decides which state is the best; None: the last.
        metrics: of factors, backbones and hidden states.
        folder: of checkpoints; None: none are kept.
        fingerprint: of model, text and settings, which a checkpoint must have.
    """

    student: Student
    frame: Llama
    config: AdaptConfig
    sequences: Sequences
    validation: Sequences | None
    metrics: TrainingMetrics
    folder: Path | None
    fingerprint: str


@dataclass(frozen=True)
class TrainingResult:
    """What a training found.

    Attributes:
        values: the best parameters, all factors on their grids.
        quantized: codes and scales of the factors.
        trained: how many numbers were trained.
        stopped_early: whether a phase ended before its last step.
        history: phase, step and loss of every step, and held_out of every validation step.
    """

    values: ParameterTree
    quantized: QuantizedFactors
    trained: int
    stopped_early: bool
    history: list[dict[str, Any]]


@dataclass
class TrainingState:
    """Where the training is: all that a checkpoint must hold."""

    trained: ParameterTree
    fixed: ParameterTree
    best: ParameterTree
    optimizer: Any
    quantized: QuantizedFactors
    run: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write a checkpoint, without the codes of the backbones: they are the model's own and do not change."""
        fixed = {
            name: {k: v for k, v in own.items() if not k.startswith("backbone.") and k != "rest"}
            for name, own in self.fixed.items()
        }
        trees = {"trained": self.trained, "fixed": fixed, "best": self.best, "rounded": self.quantized}
        checkpoint.save(folder, trees, self.optimizer, self.run)


def train(task: TrainingTask, values: ParameterTree, progress: Progress) -> TrainingResult:
    """Train all phases, from the checkpoint in the task's folder where there is one.

    Args:
        task: what is trained, on what.
        values: parameters of the student, as `take_apart` gives them.
        progress: where it is shown.

    Raises:
        QLRError: nothing to train, a checkpoint of other settings, devices that cannot share a batch, a loss that is no number.
    """
    student, config, hessians = task.student, task.config, task.metrics.factors
    loaded = checkpoint.load(task.folder, task.fingerprint) if task.folder else None
    run = _first_run(task.fingerprint) if loaded is None else loaded[2]
    phases, first = plan_phases(student, values, config), run["phase"]
    trainer = make_trainer(student, task.frame, phases[0].trained, task.sequences, config, task.metrics.states)
    quantized: QuantizedFactors = {}
    stopped = False
    with progress.stage("adapting", total=sum(phase.steps for phase in phases)) as stage:
        for number, phase in enumerate(phases[first:], first):
            trees, leaves = loaded[:2] if loaded is not None and number == first else ({}, None)
            if leaves is not None:
                values = merge_parameters(merge_parameters(values, trees.get("fixed", {})), trees["trained"])
                quantized = trees.get("rounded", {})
            elif number:
                values, quantized = quantize_factors(student, values, quantized, hessians, phase.quantized)
                run |= {"phase": number, "step": 0, "best": None, "since": 0}
            trained, fixed, optimizer = trainer.init(values)
            requantize = requantization(student, quantized, task.metrics, config)
            if requantize is not None and leaves is None:
                fixed = requantize(trained, fixed, RequantizeScope.ALL)
            state = TrainingState(trained, fixed, trained, optimizer, quantized, run)
            if leaves is not None:
                state.best, state.optimizer = trees["best"], jax.tree.unflatten(jax.tree.structure(optimizer), leaves)
                stage.advance(run["step"] + sum(before.steps for before in phases[:first]))
            stopped |= run_phase(task, trainer, phase, state, stage, requantize)
            values = merge_parameters(state.best, fixed)
    count = sum(int(values[n][k].size) for n, k in phases[0].trained)
    values, quantized = quantize_factors(student, values, quantized, hessians, SIDES)
    return TrainingResult(values, quantized, count, stopped, run["history"])


def run_phase(
    task: TrainingTask,
    trainer: Trainer,
    phase: TrainingPhase,
    state: TrainingState,
    stage: Stage,
    requantize: Requantize | None = None,
) -> bool:
    """One phase, from where `state` is; True if it ended early.

    Args:
        task, trainer, phase: what is trained, and how.
        state: changed step by step.
        stage: shows the steps.
        requantize: re-quantizes what is trained quantized.

    Raises:
        QLRError: a loss that is no number.
    """
    config, run, taken = task.config, state.run, task.config.batch * task.config.accumulate
    if task.validation is not None and run["best"] is None:
        _validate(trainer, task.validation, phase, state)
    while run["step"] < phase.steps and run["since"] < config.patience:
        index = epoch_order(config.seed, phase.start + run["step"], taken, len(task.sequences.tokens))
        rates = learning_rates(config, state.trained, phase.trained, run["step"], phase.steps)
        state.trained, state.optimizer, loss = trainer.step(state.trained, state.fixed, state.optimizer, rates, index)
        if not np.isfinite(loss):
            raise QLRError(
                f"the loss is {loss} at step {run['step']} of phase {phase.name!r}; pass a lower learning_rate or vector_rate"
            )
        run["step"] += 1
        run["history"].append({"phase": phase.name, "step": run["step"], "loss": loss})
        due = run["step"] % config.evaluate_every == 0 or run["step"] == phase.steps
        if requantize is not None and (scope := _scope(config, run["step"], due)) is not None:
            state.fixed = requantize(state.trained, state.fixed, scope)
        if task.validation is None:
            state.best = state.trained
        elif due:
            _validate(trainer, task.validation, phase, state)
        if task.folder is not None and due:
            state.save(task.folder)
        held_out = "" if run["best"] is None else f", held-out {run['best']:.4f}"
        stage.advance(note=f"{phase.name}: loss {loss:.4f}{held_out}")
    stage.advance(phase.steps - run["step"])
    return run["step"] < phase.steps


def _scope(config: AdaptConfig, step: int, due: bool) -> RequantizeScope | None:
    """What is re-quantized after a step: before a validation step all from the start, since that is what is stored."""
    if due:
        return RequantizeScope.ALL
    if step % config.reround_backbone == 0:
        return RequantizeScope.SAME_STATES
    return RequantizeScope.FACTORS if config.reround and step % config.reround == 0 else None


def _validate(trainer: Trainer, validation: Sequences, phase: TrainingPhase, state: TrainingState) -> None:
    """A validation step: the loss on held-out text, and whether it is the best."""
    run, loss = state.run, trainer.evaluate(state.trained, state.fixed, validation)
    run["history"].append({"phase": phase.name, "step": run["step"], "held_out": loss})
    better = run["best"] is None or loss < run["best"]
    run.update({"best": loss, "since": 0} if better else {"since": run["since"] + 1})
    state.best = state.trained if better else state.best


def _first_run(fingerprint: str) -> dict[str, Any]:
    return {"phase": 0, "step": 0, "best": None, "since": 0, "history": [], "fingerprint": fingerprint}
