"""A backbone rounded anew on the grid that it lies on: other codes, the same scales.

What lies on the grid is rounded to itself, to the bit, since no error is fed back. What training has moved off it takes other codes
only where they serve the metrics better, so that a backbone can be trained and remain what it is stored as.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.ldlq import column_block, ldlq, ldlq_rows, pad_to_tiles, row_group
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.metric import Metric
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.quantizers.trellis import Trellis
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Regrid:
    """The grid of one matrix's backbone, and the metrics to round in.

    Example:
        >>> from qlr_jax.core.solver import SolverConfig, solve
        >>> eye = np.eye(32, dtype=np.float32)
        >>> value = solve(eye, None, "int-4g32").value
        >>> grid = Regrid.of(value, Metric.make(eye[None], 0, SolverConfig(), False))
        >>> kept, codes = grid.round(value.dense() / grid.scale)
        >>> bool((kept * grid.scale == value.dense()).all()), sorted(grid.pack(codes))
        (True, ['backbone.codes', 'backbone.scales'])
    """

    quantizer: Quantizer
    layout: Layout
    scale: Float[Array, ""]
    scales: QParams
    metric: Metric
    output: Metric | None

    @classmethod
    def of(cls, matrix: QLRMatrix, metric: Metric, output: Metric | None = None) -> Regrid:
        """That of a stored matrix.

        Args:
            metric: H of its inputs, rotated as the matrix is (signs of its seed).
            output: G of its outputs; None is the identity.
        """
        layout = matrix.layout
        quantizer = matrix.spec.quantizer(layout.state_bits, layout.shape)
        scale = jnp.asarray(matrix.arrays["scale"][0], jnp.float32)
        return cls(quantizer, layout, scale, quantizer.stored_qparams(matrix.part("backbone")), metric, output)

    def round(
        self, wanted: Float[Array, "m n"], seams: Int[np.ndarray, "down across"] | None = None
    ) -> tuple[Float[Array, "m n"], Int[Array, "..."]]:
        """Q for which tr(G E H Eᵀ), E = `wanted` − Uᵀ Q V, is small: rounded with two-sided feedback, as in the solver.

        Args:
            wanted: a backbone over g, in the basis of W.
            seams: of a trellis, the last state of every walk, from the codes of a rounding before: half of the time, and as good
                where the weights have moved little since. Negative, or None: not known.

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
        if isinstance(self.quantizer, Trellis):  # always an array, and the host's, so that one program does all
            tiles = self.quantizer.tiles(*layout.shape)
            seams = np.full(tiles, -1, np.int32) if seams is None else np.asarray(seams, np.int32)
        return _round(wanted, self.scales, factor, rows, sides, seams, self.quantizer.traced(), static=static, blocks=blocks)

    def seams(self, codes: Int[Array, "..."]) -> Int[np.ndarray, "down across"] | None:
        """The last state of every walk, as `round` takes them; None where the grid is no trellis."""
        return np.asarray(codes[..., -1], np.int32) if isinstance(self.quantizer, Trellis) else None

    def pack(self, codes: Int[Array, "..."]) -> Mapping[str, np.ndarray]:
        """`backbone.*` as they are stored."""
        scales = tuple(np.asarray(s) for s in self.scales)
        return {f"backbone.{name}": array for name, array in self.quantizer.pack(np.asarray(codes), scales).items()}


@partial(jax.jit, static_argnames=("static", "blocks"))
def _round(
    wanted: Array,
    scales: QParams,
    factor: Array,
    rows: Array | None,
    sides: tuple[Array, Array] | None,
    seams: Array | None,
    traced: Traced,
    *,
    static: Quantizer,
    blocks: tuple[int, int],
) -> tuple[Array, Array]:
    (m, n), target = wanted.shape, wanted
    if sides is not None:
        target = hadamard.rotate(hadamard.rotate(target, sides[1], blocks[1]).T, sides[0], blocks[0]).T
    # a unit grid's scale is that of the matrix, which is taken out already
    own = (jnp.ones((1, 1)),) if static.unit_scale else scales
    qparams, padded = static.broadcast_qparams(own, n), pad_to_tiles(target, *static.tile)[None]
    if seams is not None:  # of every weight that of its walk
        qparams = (*qparams, jnp.repeat(jnp.repeat(seams, static.tile[0], axis=0), static.tile[1], axis=1))
    qparams = tuple(g[None] for g in qparams)
    found, codes = (
        ldlq(padded, factor, qparams, traced, static) if rows is None else ldlq_rows(padded, factor, rows, qparams, traced, static)
    )
    found = found[0, :m, :n]
    if sides is not None:
        found = hadamard.unrotate(hadamard.unrotate(found, sides[1], blocks[1]).T, sides[0], blocks[0]).T
    return found, codes[0]
