"""What the stages of a job hand on: the run, which none of them changes, and the candidates for delivery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

import allocators
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.lazy import Lazy, LazyMap, handle
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.solution import Solution
from qlr_jax.engine import HERE, Call, Engine
from qlr_jax.evaluation import Comparison, Reference
from qlr_jax.models import Llama
from qlr_jax.models.forward import Parts
from qlr_jax.models.llama import shallow_copy
from qlr_jax.pipelines.source import Source
from qlr_jax.progress import Progress, silent
from qlr_jax.run.workspace import Key
from qlr_jax.sensitivity import Sensitivity, Statistics
from qlr_jax.settings.recipe import Recipe
from qlr_jax.settings.resolved import Settings


class Solver(Protocol):
    """`solve_many`, or what calls it and keeps what is solved."""

    def __call__(
        self,
        problems: Mapping[Key, Any],
        *,
        seed: int,
        config: SolverConfig,
        on_done: Callable[[Key, Solution], None] | None = None,
    ) -> Mapping[Key, Solution]: ...


@dataclass(frozen=True)
class Run:
    """Everything that a stage of a job takes and none changes.

    Attributes:
        source: the original model, its recipe, and what of it is compressed.
        statistics: weights, and the Hessians of their inputs and outputs.
        reference: the original's log-probabilities on a part of the calibration text.
        progress: where stages report how far they are.
        solver: "probe", "final", "control" or "sequential" -> what solves such matrices.
        note: is given by name what is known so far.
        engine: where all other pieces run.
    """

    source: Source
    statistics: Statistics
    reference: Reference
    progress: Progress = field(default_factory=silent)
    solver: Callable[[str], Solver] = lambda kind: solve_many
    note: Callable[..., None] = lambda **facts: None
    engine: Engine = HERE

    @property
    def original(self) -> Llama:
        return self.source.model

    @property
    def recipe(self) -> Recipe:
        return self.source.recipe

    @property
    def settings(self) -> Settings:
        return self.source.settings


@dataclass(frozen=True)
class Candidate:
    """A plan, its matrices, and how good they are.

    Attributes:
        plan: which spec each matrix gets.
        solutions: name -> the matrix solved for that spec; each is read when it is used.
        calibration: against the original on calibration text.
        held_out: on held-out text.
    """

    plan: allocators.Allocation
    solutions: Mapping[str, Solution]
    calibration: Comparison | None = None
    held_out: Comparison | None = None

    @property
    def kl(self) -> float:
        """KL(original ‖ compressed) on calibration text, nats a token; infinite before it is measured."""
        return float("inf") if self.calibration is None else self.calibration.kl

    @property
    def matrices(self) -> LazyMap[str, QLRMatrix]:
        """The compressed matrices, each taken from its solution when it is used."""
        return LazyMap(self.plan.specs, lambda name: self.solutions[name].value)

    def parts(self, original: Llama) -> Parts:
        """The original with these matrices in place of its own, as pieces are given it."""
        return Parts(original, {name: Call(_matrix_of, (handle(self.solutions, name),)) for name in self.solutions})

    def model(self, original: Llama) -> Llama:
        """The original with these matrices decoded in place of its own."""
        return with_weights(original, self.matrices)

    def replace(self, **changes: Any) -> Candidate:
        return replace(self, **changes)


@dataclass(frozen=True)
class Outcome:
    """What a job has found, to be saved.

    Attributes:
        problem: the option table under its budget.
        sensitivity: what the table's damages follow from.
        candidates: by the name of their strategy.
        delivered: the name of the one that is written.
        refined: what refining tried; None where it was not asked for.
    """

    problem: allocators.Problem
    sensitivity: Sensitivity
    candidates: Mapping[str, Candidate]
    delivered: str
    refined: allocators.Refined | None = None


def _matrix_of(solution: Solution) -> QLRMatrix:
    return solution.value


def with_weights(model: Llama, matrices: Mapping[str, QLRMatrix]) -> Llama:
    """A copy of the model with these matrices decoded in place of its own; everything else is shared.

    Where a model's weight stays on disk, the matrix is looked up, and decoded, whenever the weight is used.
    """
    copy = shallow_copy(model)
    own = copy.matrices()
    for name in matrices:
        weight = own[name].weight
        before: Any = weight.get_value()
        if isinstance(before, Lazy):
            weight.set_value(Lazy(before.shape, lambda name=name: np.asarray(matrices[name].dense()), before.dtype))
        else:
            weight.set_value(matrices[name].dense().astype(before.dtype))
    return copy
