"""A backbone re-quantized on the grid that it lies on: other codes, the same scales.

What lies on the grid is rounded to itself, to the bit, since no error is fed back. What training has moved off it takes other codes
only where they serve the metrics better, so that a backbone can be trained and remain what it is stored as.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.ldlq import column_block, ldlq, ldlq_rows, pad_to_tiles, row_group
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.metric import Metric
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Requantizer:
    """The grid of one matrix's backbone, and the metrics to round in.

    Attributes:
        quantizer, layout: of the backbone and the matrix.
        scale: g.
        qparams: those that are stored.
        metric: H of the inputs, rotated as the matrix is.
        output: G of the outputs; None is the identity.

    Example:
        >>> from qlr_jax.core.solver import SolverConfig, solve
        >>> eye = np.eye(32, dtype=np.float32)
        >>> value = solve(eye, None, "int-4g32").value
        >>> grid = Requantizer.of(value, Metric.make(eye[None], 0, SolverConfig(), False))
        >>> kept, codes = grid.round(value.dense() / grid.scale)
        >>> bool((kept * grid.scale == value.dense()).all()), sorted(grid.pack(codes))
        (True, ['backbone.codes', 'backbone.scales'])
    """

    quantizer: Quantizer
    layout: Layout
    scale: Float[Array, ""]
    qparams: QParams
    metric: Metric
    output: Metric | None

    @classmethod
    def of(cls, matrix: QLRMatrix, metric: Metric, output: Metric | None = None) -> Requantizer:
        """That of a stored matrix.

        Args:
            matrix: whose scales are kept.
            metric: H of its inputs, (n, n), rotated as the matrix is (signs of its seed).
            output: G of its outputs, (m, m); None is the identity.
        """
        layout = matrix.layout
        quantizer = matrix.spec.quantizer(layout.state_bits, layout.shape)
        scale = jnp.asarray(matrix.arrays["scale"][0], jnp.float32)
        return cls(quantizer, layout, scale, quantizer.stored_qparams(matrix.part("backbone"), layout.shape), metric, output)

    def round(
        self, wanted: Float[Array, "m n"], warm: Int[np.ndarray, "down across"] | None = None
    ) -> tuple[Float[Array, "m n"], Int[Array, "..."]]:
        """Q for which tr(G E H Eᵀ), E = `wanted` − Uᵀ Q V, is small: rounded with two-sided feedback, as in the solver.

        Args:
            wanted: a backbone over g, in the basis of W.
            warm: of `warm_start`, from the codes of a rounding before: half of the time for a trellis, and as good where the
                weights have moved little since. None: not known.

        Returns:
            Uᵀ Q V, and the codes as `pack` takes them.
        """
        height, layout = self.quantizer.tile[0], self.layout
        rows = None
        if self.output is not None:
            rows = self.output.factor(row_group(-(-layout.shape[0] // height) * height, height))
        sides, blocks = None, (0, 0)
        if Spec.parse(layout.spec).rotated:
            (u, u_block), (v, v_block) = hadamard.rotations(layout.shape, layout.seed, layout.rotation_block)
            sides, blocks = (u, v), (u_block, v_block)
        factor, static = self.metric.factor(column_block(self.quantizer)), self.quantizer.static()
        # always an array where there is one, and the host's, so that one program does all
        warm = self.quantizer.warm_start(*layout.shape) if warm is None else np.asarray(warm, np.int32)
        return _round(wanted, self.qparams, factor, rows, sides, warm, self.quantizer.traced(), static=static, blocks=blocks)

    def warm_start(self, codes: Int[Array, "..."]) -> Int[np.ndarray, "down across"] | None:
        """What the next `round` may start from; None where the grid's search starts from nothing."""
        return self.quantizer.warm_start(*self.layout.shape, codes)

    def pack(self, codes: Int[Array, "..."]) -> Mapping[str, np.ndarray]:
        """`backbone.*` as they are stored."""
        qparams: Any = tuple(np.asarray(s) for s in self.qparams)
        return {f"backbone.{name}": array for name, array in self.quantizer.pack(np.asarray(codes), qparams).items()}


@partial(jax.jit, static_argnames=("static", "blocks"))
def _round(
    wanted: Array,
    stored: QParams,
    factor: Array,
    rows: Array | None,
    sides: tuple[Array, Array] | None,
    warm: Array | None,
    traced: Traced,
    *,
    static: Quantizer,
    blocks: tuple[int, int],
) -> tuple[Array, Array]:
    (m, n), target = wanted.shape, wanted
    if sides is not None:
        target = hadamard.rotate(hadamard.rotate(target, sides[1], blocks[1]).T, sides[0], blocks[0]).T
    # the scale of the whole is that of the matrix, which is taken out already
    own = (jnp.ones((1, 1)), *stored) if static.unit_scale else stored
    qparams, padded = static.broadcast_qparams(own, n), pad_to_tiles(target, *static.tile)[None]
    qparams = tuple(g[None] for g in qparams)
    if warm is not None:  # of every weight that of its tile
        warm = jnp.repeat(jnp.repeat(warm, static.tile[0], axis=0), static.tile[1], axis=1)[None]
    if rows is None:
        found, codes = ldlq(padded, factor, qparams, traced, static, warm=warm)
    else:
        found, codes = ldlq_rows(padded, factor, rows, qparams, traced, static, warm=warm)
    found = found[0, :m, :n]
    if sides is not None:
        found = hadamard.unrotate(hadamard.unrotate(found, sides[1], blocks[1]).T, sides[0], blocks[0]).T
    return found, codes[0]
