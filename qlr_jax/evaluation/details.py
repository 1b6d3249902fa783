"""More on a comparison: an interval for each figure, and the token with the largest KL."""

from typing import Any

import numpy as np

from qlr_jax.evaluation import bootstrap
from qlr_jax.evaluation.bootstrap import Interval
from qlr_jax.evaluation.compare import Positions

LEAST_WINDOWS = 8
CONTEXT = 24  # tokens that are shown before the worst one


def intervals(
    measured: Positions, *, resamples: int = bootstrap.RESAMPLES, level: float = bootstrap.LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """A bootstrap interval of every figure, by its name in `Comparison`; both models are resampled together, window by window.

    Args:
        measured: the comparison, position by position.
        resamples: how many.
        level: share of the resampled figures inside an interval.
        seed: of the resamples.

    Returns:
        (low, high) by name; empty for fewer than 8 windows: of so few, intervals of this kind come out much too narrow.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    count = len(measured.windows)
    if count < LEAST_WINDOWS:
        return {}
    counts = bootstrap.draws(count, resamples, seed)
    original, compressed = bootstrap.of_mean(measured.nll_original, counts), bootstrap.of_mean(measured.nll, counts)
    with np.errstate(over="ignore", invalid="ignore"):
        samples = {
            "perplexity_original": np.exp(original),
            "perplexity": np.exp(compressed),
            "perplexity_ratio": np.exp(compressed - original),
            "kl": bootstrap.of_mean(measured.kl, counts),
            "kl_p99": bootstrap.of_quantile(measured.kl, counts, 0.99),
            "agreement": bootstrap.of_mean(measured.same, counts),
        }
        return {name: bootstrap.interval(values, level) for name, values in samples.items()}


def worst_token(measured: Positions, tokenizer: Any) -> dict[str, Any]:
    """Where the two distributions differ most.

    Args:
        measured: the comparison, position by position.
        tokenizer: shows the tokens as text.

    Returns:
        kl; window and position, from 0: the distributions are those of the token after it; before, the text up to there; next,
        the token that the text has there, None at the end of a window; original and compressed, the models' likeliest.
    """
    window, at = np.unravel_index(np.argmax(measured.kl), measured.kl.shape)
    row = measured.windows[window]

    def text(ids: Any) -> str:
        return tokenizer.decode([int(i) for i in np.atleast_1d(ids)])

    return {
        "kl": float(measured.kl[window, at]),
        "window": int(window),
        "position": int(at),
        "before": text(row[max(0, at + 1 - CONTEXT) : at + 1]),
        "next": text(row[at + 1]) if at + 1 < len(row) else None,
        "original": text(measured.top_original[window, at]),
        "compressed": text(measured.top[window, at]),
    }
