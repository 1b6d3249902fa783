"""How far measured losses depart from predicted damages: a factor a row, by Bayesian linear regression."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

SCALE = 1.0  # prior variance of the factor that all rows share
VARIANCES = (0.01, 0.04, 0.16)  # prior variances of a group's factor to choose from; a row's own is half of it
MISFITS = (1e-3, 3e-3, 1e-2)  # relative errors of the model to choose from
RANGE = (0.1, 10.0)  # factors are kept within


def damage_factors(damage: np.ndarray, loss: np.ndarray, groups: Collection[Sequence[int]]) -> np.ndarray:
    """The factor by which each row's damage differs from its prediction, estimated from measured losses.

        loss_k ≈ Σ_i θ_i d_i(x_k),   θ_i = 1 + u + Σ_(groups g of i) u_g + u_i,   all u independent and normal

    The posterior mean of θ, for the prior variance of the u and the misfit of largest evidence. One allocation determines the
    common factor, the next ones how the groups differ; rows in no group differ alone.

    Args:
        damage: predicted damage of row i in the measured allocation k, (allocations, rows).
        loss: measured loss of each, (allocations,).
        groups: sets of row numbers that are likely to err alike.

    Returns:
        θ, (rows,), kept within RANGE.

    Source:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), chapters 2 and 5

    Example:
        >>> damage = np.array([[1.0, 1.0], [2.0, 0.5], [0.5, 2.0]])
        >>> damage_factors(damage, damage @ [1.0, 1.5], []).round(1).tolist()
        [1.0, 1.5]
    """
    rows = damage.shape[1]
    alike = np.zeros((rows, rows))
    for group in groups:
        alike[np.ix_(list(group), list(group))] += 1.0
    alike += 0.5 * np.eye(rows)
    surprise, best, theta = loss - damage.sum(axis=1), -np.inf, np.ones(rows)
    for variance in VARIANCES:
        prior = damage @ (SCALE + variance * alike)
        for misfit in MISFITS:
            spans = prior @ damage.T + np.diag((misfit * loss) ** 2 + np.finfo(float).tiny)
            weight = np.linalg.lstsq(spans, surprise, rcond=None)[0]
            evidence = -float(surprise @ weight) - float(np.linalg.slogdet(spans)[1])
            if evidence > best:
                best, theta = evidence, 1 + prior.T @ weight
    return np.clip(theta, *RANGE)
