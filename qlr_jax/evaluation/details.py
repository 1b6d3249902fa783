"""What stands behind the figures of a comparison: an interval for each, and the token that came out worst."""

from typing import Any

import numpy as np

from qlr_jax.evaluation import bootstrap
from qlr_jax.evaluation.bootstrap import Interval
from qlr_jax.evaluation.compare import Positions

LEAST_WINDOWS = 8
CONTEXT = 24  # tokens that are shown before the worst one


def intervals(
    found: Positions, *, resamples: int = bootstrap.RESAMPLES, level: float = bootstrap.LEVEL, seed: int = 0
) -> dict[str, Interval]:
    """A bootstrap interval of every figure, by its name in `Comparison`; both models are resampled together, window by window.

    Empty for fewer than 8 windows: of so few, intervals of this kind come out much too narrow.
    """
    count = len(found.windows)
    if count < LEAST_WINDOWS:
        return {}
    counts = bootstrap.draws(count, resamples, seed)
    original, compressed = bootstrap.of_mean(found.nll_original, counts), bootstrap.of_mean(found.nll, counts)
    with np.errstate(over="ignore", invalid="ignore"):
        samples = {
            "perplexity_original": np.exp(original),
            "perplexity": np.exp(compressed),
            "perplexity_ratio": np.exp(compressed - original),
            "kl": bootstrap.of_mean(found.kl, counts),
            "kl_p99": bootstrap.of_quantile(found.kl, counts, 0.99),
            "agreement": bootstrap.of_mean(found.same, counts),
        }
        return {name: bootstrap.interval(values, level) for name, values in samples.items()}


def worst_token(found: Positions, tokenizer: Any) -> dict[str, Any]:
    """Where the two distributions differ most: KL, window and position, the text before, and what was expected after it.

    `position` counts from 0 in the window; the distributions are those of the token after it. `next` is the token that the
    text has there, None at the end of a window; `original` and `compressed` are the models' likeliest.
    """
    window, at = np.unravel_index(np.argmax(found.kl), found.kl.shape)
    row = found.windows[window]

    def shown(ids: Any) -> str:
        return tokenizer.decode([int(i) for i in np.atleast_1d(ids)])

    return {
        "kl": float(found.kl[window, at]),
        "window": int(window),
        "position": int(at),
        "before": shown(row[max(0, at + 1 - CONTEXT) : at + 1]),
        "next": shown(row[at + 1]) if at + 1 < len(row) else None,
        "original": shown(found.top_original[window, at]),
        "compressed": shown(found.top[window, at]),
    }
