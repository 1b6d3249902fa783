"""A metric where the matrices lie that are judged by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from qlr_jax.core.ldlq import echo
from qlr_jax.core.metric import Metric, _cholesky, ldl
from qlr_jax.core.sharding import place, spread
from qlr_jax.core.typing import Array


@dataclass(frozen=True)
class PlacedMetric(Metric):
    """`Metric` on a mesh: H of each matrix with its matrix, factored there; one H for all is factored once and then copied.

    Attributes:
        source: the metric on one device, where one H serves all.
    """

    source: Metric | None = None
    mesh: Mesh | None = None

    @classmethod
    def of_metric(cls, metric: Metric, mesh: Mesh) -> PlacedMetric:
        """The metric on the mesh, its entries repeated as `place` does where they do not fill it."""
        hessian, regular = place(metric.hessian, mesh), place(metric.regular, mesh)
        source = metric if len(metric.original) == 1 else None  # else it would keep the room of all on one device
        return cls(metric.original, hessian, regular, metric.sides, metric.damping, source=source, mesh=mesh)

    def root(self) -> Array:
        if 0 not in self._factors:
            found = place(self.source.root(), self.mesh) if self.source else spread(_cholesky, factors=True)(self.regular)
            self._factors[0] = found, np.zeros(0)
        return self._factors[0][0]

    def _made(self, width: int) -> tuple[Array, np.ndarray]:
        if width not in self._factors:
            if self.source:
                self._factors[width] = place(self.source.factor(width), self.mesh), self.source.echo(width)
            else:
                factor = spread(ldl, factors=True)(self.hessian, self.damping, width=width)
                self._factors[width] = factor, np.asarray(spread(echo, factors=True)(factor))
        return self._factors[width]
