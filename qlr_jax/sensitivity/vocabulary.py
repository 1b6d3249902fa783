"""The options of embedding and head: errors of a sample of rows, since rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.rows import row_energies, solve_rows
from qlr_jax.core.spec import Spec
from qlr_jax.sensitivity.predict import grid_error

SAMPLED = 2048  # rows, drawn by what they weigh
PROBE_BITS = 4  # about, of the spec that KL is attributed for


def vocabulary_probe(offered: Sequence[Spec]) -> str:
    """The spec that stands for all options of an embedding or a head while KL is attributed: one that is quickly found.

    Example:
        >>> vocabulary_probe([Spec.parse(text) for text in ("bf16", "trellis-4/rows", "int-8g32", "int-4g32")])
        'int-4g32'
    """
    quantized = [spec for spec in offered if not spec.quantizer().plain] or list(offered)
    return str(min(quantized, key=lambda s: (s.quantizer().search_cost.states > 0, abs(s.quantizer().bits - PROBE_BITS))))


def row_errors(
    weight: np.ndarray,
    hessian: np.ndarray,
    row_weights: np.ndarray,
    specs: Sequence[Spec],
    config: SolverConfig,
    search: SolverConfig,
    seed: int,
) -> dict[str, float]:
    """The relative error √(Σ g_i e_i H e_iᵀ / Σ g_i w_i H w_iᵀ) of every spec.

    Rows are drawn in proportion to g_i w_i H w_iᵀ; the mean of their own squared relative errors is then that of all. Grids that
    are rounded to at once are solved on them; of those that are searched one rate is, and the others follow its rate curve.

    Args:
        weight: W (rows, n).
        hessian: H (n, n).
        row_weights: g, (rows,).
        specs: the options.
        config: of the final solves.
        search: of this one.
        seed: of the sample and of rotations.
    """
    weight = np.asarray(weight)
    energies = row_energies(weight, hessian)
    shares = np.maximum(np.asarray(row_weights, np.float64) * energies, 0.0)
    if not shares.sum():
        return {str(spec): 0.0 for spec in specs}
    drawn = np.random.default_rng(seed).choice(len(shares), SAMPLED, p=shares / shares.sum())
    rows, times = np.unique(drawn, return_counts=True)
    sample, own = weight[rows], times / energies[rows]
    found: dict[str, float] = {}
    anchored: dict[type, tuple[Spec, float]] = {}
    for spec in sorted(specs, key=lambda s: abs(s.quantizer().bits - PROBE_BITS)):
        quantizer = spec.quantizer()
        if quantizer.search_cost.states and type(quantizer) in anchored:
            anchor, error = anchored[type(quantizer)]
            ratio = grid_error(quantizer, config.state_bits) / grid_error(anchor.quantizer(), search.state_bits)
            found[str(spec)] = error * ratio**0.5
            continue
        error = solve_rows(sample, hessian, spec, row_weights=own, seed=seed, config=search).stats["weighted_error"]
        if quantizer.search_cost.states:
            anchored[type(quantizer)] = spec, error
            error *= (grid_error(quantizer, config.state_bits) / grid_error(quantizer, search.state_bits)) ** 0.5
        found[str(spec)] = error
    return found
