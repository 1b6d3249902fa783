"""What the matrices to compress are measured and solved by: their weights, and the metrics that calibration found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem

import numpy as np

from qlr_jax.core.lazy import Lazy
from qlr_jax.core.solver import Solution
from qlr_jax.engine import Call

Matrix = np.ndarray | Lazy
"""(out, in), in memory or read where it is used."""

SolveArguments = tuple[Matrix, np.ndarray, str, np.ndarray | None, Matrix | None]
"""(W, H, spec, G, Q) of one solve."""


@dataclass(frozen=True)
class Statistics:
    """The matrices to compress, and what calibration says of them.

    Attributes:
        weights: name -> W (out, in).
        hessians: name -> H of its input; matrices of one input share the array.
        outputs: name -> G of its output; empty where all outputs count alike.
        backbones: name -> Q, where backbones are given and only factors are to be found.
    """

    weights: Mapping[str, Matrix]
    hessians: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    backbones: Mapping[str, Matrix] = field(default_factory=dict)

    def weight(self, name: str) -> Call:
        """What stands for W in a piece."""
        return Call(getitem, (self.weights, name))

    def problem(self, name: str, spec: str) -> SolveArguments:
        """One matrix to solve, as `solve_many` takes it: (W, H, spec, G or None, Q or None)."""
        return self.weights[name], self.hessians[name], spec, self.outputs.get(name), self.backbones.get(name)


def final_error(solution: Solution) -> float:
    """The relative error that a solve minimised: output-weighted where it had a G."""
    return solution.stats.get("weighted_error", solution.stats["relative_error"])
