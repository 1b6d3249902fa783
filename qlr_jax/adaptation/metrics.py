"""The metrics that the text of an adaptation gives: for quantizing factors and backbones, and for comparing hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax import calibration
from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.rounding import metric_behind_signs
from qlr_jax.adaptation.student import ParameterTree, Student
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.hadamard import INPUT, OUTPUT
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.metric import Metric
from qlr_jax.core.requantize import Requantizer
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.models import SITES, Llama, input_of
from qlr_jax.progress import Progress

METRIC_TOKENS = 16384


@dataclass(frozen=True)
class TrainingMetrics:
    """What an adaptation measures errors by; each empty where nothing needs it.

    Attributes:
        factors: H (n, n) of the inputs, by matrix whose factors are trained.
        backbones: grid and metrics, by matrix whose backbone is trained.
        states: G (n, n) of the hidden state that leaves each block, where states are distilled.
    """

    factors: Mapping[str, np.ndarray] = field(default_factory=dict)
    backbones: Mapping[str, Requantizer] = field(default_factory=dict)
    states: tuple[jax.Array, ...] = ()


def measure_metrics(
    model: Llama,
    matrices: Mapping[str, QLRMatrix],
    student: Student,
    values: ParameterTree,
    tokens: np.ndarray,
    config: AdaptConfig,
    progress: Progress,
) -> TrainingMetrics:
    """The metrics on the text that is adapted to.

    Args:
        model: the compressed model.
        matrices: its packed matrices by name.
        student, values: its description and parameters.
        tokens: (rows, length).
        config: what is trained.
        progress: where it is shown.

    Raises:
        QLRError: hidden-state distillation of a family that normalises what a block's last matrix puts out.
    """
    factors = [name for name, matrix in student.matrices.items() if matrix.rank and "factors" in config.train]
    backbones = [name for name in student.matrices if "body" in values[name]]
    if config.states and model.config.traits.norms.after_mlp:
        raise QLRError(
            f"states {config.states:g} weighs hidden states by the gradients at a block's last matrix, but a "
            f"{model.config.traits.architecture} normalises what that puts out; pass states 0"
        )
    # what the last matrix of a block puts out is added to the hidden state, so that its G is the state's
    last = [f"model.layers.{i}.{SITES[-1].path}" for i in range(model.config.num_hidden_layers)] if config.states else []
    if not (factors or backbones or last):
        return TrainingMetrics()
    dense, inputs, outputs = model.densified(), {}, {}
    rows = calibration.subsample(tokens, METRIC_TOKENS)
    if factors or backbones:
        with progress.stage("metrics: inputs"):
            inputs = calibration.hessians(dense, rows)
    if backbones or last:
        with progress.stage("metrics: outputs", total=model.config.num_hidden_layers) as stage:
            names = list(dict.fromkeys((*backbones, *last)))
            outputs = calibration.output_hessians(dense, rows, names, seed=config.seed, progress=stage.advance)
    requantizers: dict[str, Requantizer] = {}
    shared: dict[Any, Metric] = {}
    for name in backbones:
        layout, own, of = matrices[name].layout, values[name], input_of(name)
        key = of, layout.seed, layout.rotation_block, student.matrices[name].rotated, name if "columns" in own else ""
        if key not in shared:
            shared[key] = backbone_metric(inputs[of], own.get("columns"), layout, INPUT)
        output = backbone_metric(outputs[name], own.get("rows"), layout, OUTPUT)
        requantizers[name] = Requantizer.of(matrices[name], shared[key], output)
    return TrainingMetrics(
        {name: inputs[input_of(name)] for name in factors},
        requantizers,
        tuple(jnp.asarray(outputs[name], jnp.float32) for name in last),
    )


def backbone_metric(metric: np.ndarray, signs: Any, layout: Layout, side: int) -> Metric:
    """H or G in the basis in which Q is stored.

    Args:
        metric: H (n, n) or G (m, m).
        signs: trained signs of that side, None where there are none.
        layout: of the matrix.
        side: INPUT for H, OUTPUT for G.
    """
    config = SolverConfig(rotation_block=layout.rotation_block)
    behind = np.asarray(metric_behind_signs(metric, signs))[None]
    return Metric.make(behind, layout.seed, config, Spec.parse(layout.spec).rotated, side)
