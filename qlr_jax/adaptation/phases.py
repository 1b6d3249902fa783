"""The phases of a training: where each begins and what it trains; and re-quantization in and between them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qlr_jax.adaptation import rounding
from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.metrics import TrainingMetrics
from qlr_jax.adaptation.student import ParameterTree, Student
from qlr_jax.adaptation.trainer import PARAMETER_GROUPS, Parameter, merge_parameters
from qlr_jax.errors import QLRError

SIDES = ("right", "left")  # in the order in which they are quantized
SHARES = {"left": 0.2, "scales": 0.1}  # of the steps, where factors are quantized to few bits


@dataclass(frozen=True)
class TrainingPhase:
    """A part of the training.

    Attributes:
        name: as the history has it.
        start: step of the whole training at which it begins.
        steps: at most.
        quantized: sides of the factors that are put on their grids before it.
        trained: (matrix, norm or embedding, array) of what it trains.
    """

    name: str
    start: int
    steps: int
    quantized: tuple[str, ...]
    trained: set[Parameter]


class RequantizeScope(enum.Enum):
    """What is re-quantized while it is trained: always the factors, and"""

    FACTORS = "nothing else"
    SAME_STATES = "backbones, every sequence of a trellis with the tail-biting state that it had"
    ALL = "backbones, searched from the start"


Requantize = Callable[[ParameterTree, ParameterTree, RequantizeScope], ParameterTree]
"""(trained, fixed, scope) -> fixed, with what quantization adds to factors and backbones."""


def plan_phases(student: Student, values: ParameterTree, config: AdaptConfig) -> list[TrainingPhase]:
    """One phase; or three, where low-bit factors are trained as real numbers: all, then with R fixed, then with L fixed as well.

    Args:
        student, values: description and parameters.
        config: what is trained, and for how many steps.

    Raises:
        QLRError: the model has nothing of what is to be trained.
    """
    trained = {(n, k) for n, own in values.items() for k in own if PARAMETER_GROUPS.get(k) in config.train}
    trained = {(n, k) for n, k in trained if k != "component" or student.matrices[n].spec.component_scales}
    if not trained:
        raise QLRError(f"this model has nothing of {', '.join(config.train)} to train; pass fresh, or train norms and scales")
    if not trains_low_bit_factors(student, config) or config.reround:
        return [TrainingPhase("all", 0, config.steps, (), trained)]
    plans = [("all", trained), ("left", {t for t in trained if t[1] != "right"})]
    if rest := {t for t in trained if t[1] not in SIDES}:
        plans.append(("scales", rest))
    steps = [max(1, round(SHARES[name] * config.steps)) for name, _ in plans[1:]]
    steps = [max(1, config.steps - sum(steps)), *steps]
    return [TrainingPhase(n, sum(steps[:i]), steps[i], SIDES[:i], t) for i, (n, t) in enumerate(plans)]


def trains_low_bit_factors(student: Student, config: AdaptConfig) -> bool:
    """Whether factors are trained whose grid is coarse enough to be trained quantized."""
    grids = {grid for m in student.matrices.values() if m.rank for grid in (m.spec.left, m.spec.right)}
    return "factors" in config.train and bool(grids - {"bf16"})


def requantization(
    student: Student, quantized: rounding.QuantizedFactors, metrics: TrainingMetrics, config: AdaptConfig
) -> Requantize | None:
    """The function that re-quantizes what is trained quantized: factors and backbones; None where nothing is.

    Args:
        student: description.
        quantized: factors that are on their grids already.
        metrics: of factors and backbones.
        config: whether factors are trained quantized.
    """
    hessians = metrics.factors if config.reround and trains_low_bit_factors(student, config) else {}
    if not (hessians or metrics.backbones):
        return None

    def requantize(trained: ParameterTree, fixed: ParameterTree, scope: RequantizeScope) -> ParameterTree:
        values, fixed = merge_parameters(trained, fixed), dict(fixed)
        for name, matrix in student.matrices.items():
            own = fixed.get(name, {})
            if name in hessians:
                own = own | rounding.factor_shifts(matrix, values[name], hessians[name], quantized.get(name, {}))
            if name in metrics.backbones and scope is not RequantizeScope.FACTORS:
                own = own | rounding.backbone_shift(values[name], metrics.backbones[name], scope is RequantizeScope.ALL)
            if own:
                fixed[name] = own
        return fixed

    return requantize


def quantize_factors(
    student: Student,
    values: ParameterTree,
    quantized: rounding.QuantizedFactors,
    hessians: Mapping[str, np.ndarray],
    sides: tuple[str, ...],
) -> tuple[ParameterTree, rounding.QuantizedFactors]:
    """These sides of all factors on their grids, but for those that are there already.

    Args:
        student, values: description and parameters.
        quantized: codes of what is on its grid.
        hessians: H (n, n) of the inputs, by matrix; empty where factors are not trained.
        sides: of SIDES.

    Returns:
        The parameters and the codes after it.
    """
    for side in sides if hessians else ():
        for name, matrix in student.matrices.items():
            if matrix.rank and f"{side}.codes" not in quantized.get(name, {}):
                new, codes = rounding.QUANTIZE_SIDE[side](matrix, values[name], hessians[name])
                values, quantized = values | {name: new}, merge_parameters(quantized, {name: codes})
    return values, quantized
