"""The divisors of rotary frequencies that a GGUF file stores, as the four numbers of llama3's scaling.

    1 / d = k + (1 − k) / factor        k = clip((O p − low) / (high − low), 0, 1)        p = f / 2π, periods a token

divides a frequency f by d. k depends on O / (high − low) and low / (high − low) alone: low is taken as 1, as in published models.
"""

from __future__ import annotations

import numpy as np

from qlr_jax.errors import QLRError

TOLERANCE = 1e-4  # relative: converters compute frequencies in float32, and what errs by 1e-6 there errs by factor times that here
USUAL = (8192, 2048, 4096, 16384, 32768)  # original contexts to try first, with high = 4


def llama3_scaling(divisors: np.ndarray, theta: float) -> dict[str, float | int | str] | None:
    """`rope_scaling` of config.json for a file's rope_freqs.weight; None where it divides by one everywhere.

    Args:
        divisors: (head_dim / 2,).
        theta: base of the frequencies.

    Raises:
        QLRError: divisors that llama3's rule does not give.

    Example:
        >>> wanted = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
        >>> divided = llama3_divisors(16, 1e4, **wanted)
        >>> llama3_scaling(divided, 1e4) == {"rope_type": "llama3", **wanted}
        True
    """
    found = np.asarray(divisors, np.float64)
    if np.array_equal(found, np.ones_like(found)):
        return None
    for factor, high, original in _guesses(found, theta):
        numbers = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if np.allclose(llama3_divisors(len(found), theta, **numbers), found, rtol=TOLERANCE, atol=0):
            return {"rope_type": "llama3", **numbers}
    raise QLRError(
        "rope_freqs.weight divides the rotary frequencies in another way than llama3's scaling does, which is the one that is "
        "supported; give a model with plain, linear or llama3 rotary positions"
    )


def llama3_divisors(
    half: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """What llama3's scaling divides the frequencies theta^(−i / half) by; float64 (half,)."""
    periods = original_max_position_embeddings * theta ** (-np.arange(half) / half) / (2 * np.pi)
    keep = np.clip((periods - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return 1 / (keep + (1 - keep) / factor)


def _guesses(divisors: np.ndarray, theta: float) -> list[tuple[float, float, int]]:
    """(factor, high, original context) to try: what the divisors between one and the largest say, then what is usual."""
    factor = _short(float(divisors.max()))
    half = len(divisors)
    periods = theta ** (-np.arange(half) / half) / (2 * np.pi)
    keep = (1 / divisors - 1 / factor) / (1 - 1 / factor) if factor != 1 else np.ones(half)
    usual = [(factor, 4.0, original) for original in USUAL]
    between = np.flatnonzero((divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6)))
    if len(between) > 1:  # keep = a · periods − b, a line
        first, last = between[0], between[-1]
        a = float((keep[first] - keep[last]) / (periods[first] - periods[last]))
        b = float(a * periods[first] - keep[first])
        return [*usual, (factor, _short(1 + 1 / b), round(a / b)), (factor, 1 + 1 / b, round(a / b))] if b > 0 else usual
    # Few numbers lie between, so many rules give them: O below which nothing is kept, and a high to meet the one between.
    scaled = np.flatnonzero(divisors >= factor * (1 - 1e-6))
    kept = np.flatnonzero(divisors <= 1 + 1e-6)
    least = 1 / periods[kept[-1]] if len(kept) else 1.0
    most = 1 / periods[scaled[0]] if len(scaled) else 4 * least
    found = []
    for original in np.unique(np.geomspace(max(least, 1), max(most, 1), 64).round().astype(int)):
        at = original * periods
        highs = [1 + float((at[i] - 1) / keep[i]) for i in between] or [float(at[kept[-1]]) if len(kept) else 4.0]
        found += [(factor, high, int(original)) for high in highs if high > 1]
    return usual + found


def _short(value: float) -> float:
    """The shortest number that is the same in float32's precision or nearly."""
    near = round(value, 3)
    return near if abs(near - value) <= 1e-4 * abs(value) else value
