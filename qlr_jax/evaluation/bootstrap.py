"""How sure a figure is: percentile intervals from windows drawn with replacement (Efron and Tibshirani, 1993, chapter 13)."""

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000
LEVEL = 0.95

Interval = tuple[float, float]


def draws(windows: int, resamples: int = RESAMPLES, seed: int = 0) -> Int[np.ndarray, "resamples windows"]:
    """How often each window is in each resample of as many windows; the tokens of one window are not independent, windows are.

    Args:
        windows: how many there are.
        resamples: how many are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(windows, np.full(windows, 1 / windows), size=resamples)


def of_mean(values: Float[np.ndarray, "windows time"], counts: Int[np.ndarray, "resamples windows"]) -> np.ndarray:
    """The mean over all tokens, in every resample.

    Example:
        >>> of_mean(np.asarray([[1.0, 3.0], [5.0, 7.0]]), np.asarray([[1, 1], [2, 0]])).tolist()
        [4.0, 2.0]
    """
    return counts @ values.astype(np.float64).mean(axis=1) / counts.shape[1]


def of_quantile(
    values: Float[np.ndarray, "windows time"], counts: Int[np.ndarray, "resamples windows"], share: float
) -> np.ndarray:
    """The quantile over all tokens (linear between neighbours, as numpy's), in every resample; the tokens are sorted once.

    Args:
        values: of every token, (windows, time).
        counts: as `draws` gives them.
        share: of tokens below the quantile.

    Example:
        >>> of_quantile(np.asarray([[1.0, 3.0], [5.0, 7.0]]), np.asarray([[1, 1], [2, 0]]), 0.5).tolist()
        [4.0, 2.0]
    """
    order = np.argsort(values, axis=None)
    ranked, window = values.ravel()[order].astype(np.float64), order // values.shape[1]
    place = share * (values.size - 1)
    low, rest = int(place), place - int(place)
    quantiles = np.empty(len(counts))
    for at, row in enumerate(counts):
        ranks = np.cumsum(row[window])  # how many tokens of the resample are up to here
        below, above = ranked[np.searchsorted(ranks, [low, min(low + 1, values.size - 1)], side="right")]
        quantiles[at] = below + rest * (above - below)
    return quantiles


def interval(samples: Float[np.ndarray, "resamples"], level: float = LEVEL) -> Interval:
    """The middle `level` of the resampled figures.

    Example:
        >>> interval(np.arange(101.0), 0.5)
        (25.0, 75.0)
    """
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
