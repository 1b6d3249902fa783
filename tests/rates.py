"""Rates of segments for random matrices, whose other bytes may be any."""

import numpy as np

from qlr_jax.core.quantizers import segmented
from qlr_jax.core.spec import Spec


def some_rates(spec, shape):
    """Uneven rates, as a matrix of this spec and shape would store them."""
    grid = Spec.parse(spec).quantizer(shape=tuple(shape))
    across = grid.tiles(*shape)[1]
    costs, sizes = (
        np.exp(np.random.default_rng(0).standard_normal(min(segmented.SEGMENTS, across))),
        np.diff(segmented.bounds(across)),
    )
    return segmented.water_filled(costs, sizes, grid.sixteenths, grid.state_bits).astype(np.uint8)
