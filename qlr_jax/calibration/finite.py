"""Sequences with an activation or a gradient that is not finite: they are left out and reported; too many of them are an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from qlr_jax.errors import QLRError

Info = tuple[Mapping[int, str], list[float]]
"""Of one batch: what is left out of it, as of `CalibrationResult`, and how much of every weighting is left."""

SHARE = 0.01  # of the sequences may be left out; where there are more, the model is wrong and not the text


class CalibrationResult(dict[str, np.ndarray]):
    """Name -> array, and which sequences are left out.

    A sequence is in all arrays up to the block where it stops being finite (counted in the direction of the pass), and in none
    from there on; every array is the mean over the sequences that are in it.

    Attributes:
        sequences: how many were given.
        left_out: row -> where it was first not finite, e.g. "the activations that enter model.layers.3.mlp.down_proj".

    Example:
        >>> result = CalibrationResult({"a": np.eye(2)}, 200, {17: "the activations that enter model.layers.3.mlp.down_proj"})
        >>> list(result), result.summary()
        (['a'], '1 of 200 sequences is left out: the activations that enter model.layers.3.mlp.down_proj are not finite there')
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], sequences: int, left_out: Mapping[int, str]):
        super().__init__(arrays)
        self.sequences, self.left_out = sequences, dict(sorted(left_out.items()))

    def summary(self) -> str:
        """One line on what is left out and why; empty where nothing is."""
        if not self.left_out:
            return ""
        count, places = len(self.left_out), [place for place, _ in Counter(self.left_out.values()).most_common()]
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        verb = "is" if count == 1 else "are"
        return f"{count} of {self.sequences} sequences {verb} left out: {places[0]}{more} are not finite there"


class Tally:
    """Which sequences are left out of one pass so far.

    Attributes:
        sequences: how many there are.
        left_out: as of `CalibrationResult`.

    Example:
        >>> tally = Tally(200)
        >>> tally.add(np.array([False, True]), 16, "the hidden states that leave block model.layers.3")
        >>> tally.left_out
        {17: 'the hidden states that leave block model.layers.3'}
    """

    def __init__(self, sequences: int, left_out: Mapping[int, str] | None = None):
        self.sequences, self.left_out = sequences, dict(left_out or {})

    def add(self, rows: Bool[np.ndarray, "batch"], start: int, place: str) -> None:
        """Note sequences that are not finite; those that fill up the last batch do not count.

        Args:
            rows: True where the sequence is not finite.
            start: the number of the first.
            place: where that was seen, as `CalibrationResult.left_out` has it.
        """
        self.left_out = left_out_of(rows, start, self.sequences, place, self.left_out)

    def check(self) -> None:
        """Refuse a pass that too little is left of.

        Raises:
            QLRError: where more than `SHARE` of the sequences are left out.
        """
        count = len(self.left_out)
        if count <= SHARE * self.sequences:
            return
        place, most = Counter(self.left_out.values()).most_common(1)[0]
        share = 100 * count / self.sequences
        raise QLRError(
            f"{place} are not finite in {most} of {self.sequences} sequences (in all {share:.3g} % of them are not, and at most "
            f"{100 * SHARE:g} % can be left out); check the checkpoint, load it in float32, or give other calibration text"
        )


def left_out_of(rows: Bool[np.ndarray, "batch"], start: int, end: int, place: str, known: Mapping[int, str]) -> dict[int, str]:
    """What was known to be left out, and these rows of a batch that begins with sequence `start`; from `end` on are repeats."""
    return {**{row: place for row in (start + np.flatnonzero(rows)).tolist() if row < end}, **known}


def checked(infos: Sequence[Info], sequences: int) -> tuple[Tally, list[float]]:
    """What all batches leave out together, and what of every weighting is left.

    Raises:
        QLRError: as `Tally.check`.
    """
    tally = Tally(sequences, {row: place for left_out, _ in infos for row, place in left_out.items()})
    tally.check()
    return tally, [sum(parts) for parts in zip(*(left for _, left in infos), strict=True)]


def finite_rows(x: Array) -> Bool[Array, "batch"]:
    """Which rows (batch, ...) have a finite sum of squares: no NaN, no infinity, nothing whose square overflows."""
    return jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))


def finite_on_host(x: np.ndarray) -> Bool[np.ndarray, "batch"]:
    """Which rows (batch, ...) have a finite sum: no NaN and no infinity."""
    with np.errstate(all="ignore"):
        return np.isfinite(np.sum(x, axis=tuple(range(1, x.ndim)), dtype=np.float32))


def zeroed(rows: Bool[np.ndarray, "batch"], x: np.ndarray) -> np.ndarray:
    """A copy of x (batch, ...) that is zero where `rows` is True; x itself where it nowhere is."""
    if not rows.any():
        return x
    out = np.array(x)
    out[rows] = 0
    return out
