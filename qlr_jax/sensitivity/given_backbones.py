"""The option table of factors on given backbones: what each rank takes from each matrix's error, and what that is worth."""

from __future__ import annotations

from dataclasses import replace
from operator import getitem
from typing import Any

import numpy as np

from allocators import Option, OptionTable
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.objective import relative_error
from qlr_jax.core.reconstruction import factors_only
from qlr_jax.core.spec import Spec
from qlr_jax.engine import HERE, Call, Engine
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama
from qlr_jax.progress import Progress
from qlr_jax.sensitivity.attribution import Case, attribute
from qlr_jax.sensitivity.measure import Sensitivity, matrix_note, measured_profiles, measured_table
from qlr_jax.sensitivity.predict import predict
from qlr_jax.sensitivity.statistics import Statistics


def measure_given(
    model: Llama,
    statistics: Statistics,
    reference: Reference,
    table: OptionTable,
    *,
    config: SolverConfig,
    seed: int,
    method: str,
    progress: Progress,
    engine: Engine = HERE,
) -> Sensitivity:
    """Damage of every rank on a given backbone Q, E = W − Q:

        damage(r) = KL(Q) · (tr(G E H Eᵀ) − Σ_{i ≤ r} λ_i) / tr(G E H Eᵀ)

    λ the leading eigenvalues of C_Gᵀ E H Eᵀ C_G, less what coarse factors take back of them. The errors of the backbones are at
    hand, so nothing is solved for.

    Args:
        model: the original.
        statistics: of the matrices to compress; `backbones` has a Q for every row of the table.
        reference: the original's log-probabilities on calibration text.
        table: the options, from `price`.
        config: of the final solves.
        seed: of the subspace iterations, and of noise where the method draws it.
        method: one of `ATTRIBUTIONS`.
        progress: where stages go.
        engine: where its pieces run.
    """
    largest = max((option.rank or 0 for row in table.rows for option in row.options), default=0)
    pairs = {name: (statistics.weight(name), Call(getitem, (statistics.backbones, name))) for name in table.index}
    errors = {name: Call(_difference, (weight, backbone)) for name, (weight, backbone) in pairs.items()}
    profiles = measured_profiles(errors, statistics, largest, config=config, seed=seed, progress=progress, engine=engine)
    metrics = statistics.hessians, statistics.outputs
    asked = {
        name: engine.submit(_backbone_error, *pair, metrics[0][name], metrics[1].get(name), title="spectra")
        for name, pair in pairs.items()
    }
    base = dict(engine.results(asked))
    with progress.stage("sensitivity", total=len(errors)) as stage:
        changes = {name: Call(_difference, (backbone, weight)) for name, (weight, backbone) in pairs.items()}
        case = Case(model, changes, reference, *metrics)
        kl = attribute(method, case, seed=seed, on_done=lambda n: stage.advance(note=n), engine=engine).kl
    coefficient = {n: kl[n] / base[n] ** 2 if base[n] > 0 else 0.0 for n in errors}

    def with_damage(name: str, option: Option) -> Option:
        text = factors_only(option.spec)
        left = predict(profiles[name], Spec.parse(text), config.state_bits) if text else 1.0
        return replace(option, damage=coefficient[name] * (base[name] * left) ** 2, measured=not text)

    rows = tuple(replace(row, options=tuple(with_damage(row.name, option) for option in row.options)) for row in table.rows)
    matrices = {
        n: matrix_note(n, statistics.weights[n].shape, profiles[n], coefficient[n], "bf16", base[n], float(kl[n])) for n in errors
    }
    return measured_table(table, rows, matrices, method, config.state_bits)


def _difference(one: Any, other: Any) -> np.ndarray:
    return np.asarray(one) - np.asarray(other)


def _backbone_error(weight: Any, backbone: Any, hessian: np.ndarray, output: np.ndarray | None) -> float:
    """The relative error that a given backbone leaves."""
    given = np.asarray(weight)[None], np.asarray(backbone)[None]
    return float(relative_error(*given, hessian[None], None if output is None else output[None])[0])
