"""Groups of weights that share a stored scale, and the search for the scale of least squared error."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from qlr_jax.core.quantizers.base import QParams
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError


def check_group(group: int) -> None:
    """Refuse a group size that is not offered; 0 stands for a scale a row."""
    if group and not 16 <= group <= 256:
        raise QLRError(f"a group of {group} is not offered; pass 16 to 256 weights, or none for a scale a row")


def group_count(cols: int, group: int) -> int:
    """Groups in a row of `cols` weights."""
    return -(-cols // group) if group else 1


def split(x: Array, group: int) -> Array:
    """(*b, rows, cols) -> (*b, rows, groups, size); a partial group is filled with its own last weight: its range stays."""
    cols, size = x.shape[-1], group or x.shape[-1]
    groups = group_count(cols, group)
    missing = groups * size - cols
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge").reshape(*x.shape[:-1], groups, size)


def spread(per_group: Array, group: int, cols: int) -> Array:
    """(*b, rows, groups) -> (*b, rows, cols)."""
    return jnp.repeat(per_group, group or cols, axis=-1)[..., :cols]


def least_error(parts: Array, start: QParams, shrinks: np.ndarray, attempt: Callable[[Array], tuple[Array, QParams]]) -> QParams:
    """Of the qparams that `attempt(shrink)` gives, with the values it rounds `parts` to, the one of least squared error a group.

    Args:
        parts: (*b, groups, size).
        start: qparams of the right shapes and types.
        shrinks: candidates, fractions of the scale that just covers a group.
    """

    def compare(best: tuple[Array, QParams], shrink: Array) -> tuple[tuple[Array, QParams], None]:
        values, qparams = attempt(shrink)
        error = jnp.sum(jnp.square(values - parts), axis=-1)
        better = error < best[0]
        return (
            jnp.where(better, error, best[0]),
            tuple(jnp.where(better, a, b) for a, b in zip(qparams, best[1], strict=True)),
        ), None

    # a scan, not an unrolled loop: that one takes XLA minutes to compile
    worst = jnp.full(parts.shape[:-1], jnp.inf, parts.dtype)
    (_, found), _ = lax.scan(compare, (worst, start), jnp.asarray(shrinks, jnp.float32))
    return found
