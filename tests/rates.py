"""Rates of cells for random matrices, whose other bytes may be any."""

import numpy as np

from qlr_jax.core.spec import Spec


def some_rates(spec, shape):
    """Uneven rates, as a matrix of this spec and shape would store them."""
    grid = Spec.parse(spec).quantizer(shape=tuple(shape))
    draw, (down, across) = np.random.default_rng(0), grid.tiles(*shape)
    (each,) = grid.metric_qparams(np.exp(draw.standard_normal((1, across))), np.exp(draw.standard_normal((1, down))))
    return grid.segments(each)
