"""Added components within a budget of bytes: which matrices are given how many, and where their R begins."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.adaptation.student import with_factors
from qlr_jax.core import hadamard
from qlr_jax.core.low_rank import start_basis, top_subspace
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError

CHUNK = 4  # components: a trellis takes its sequences across so many
MOST = 64  # components added to a matrix, at most


def added_components(
    matrices: Mapping[str, QLRMatrix], gradients: Mapping[str, np.ndarray], budget: int, grid: str | None, *, seed: int = 0
) -> dict[str, Array]:
    """R (k, n) of added components in the rotated basis, for the matrices and ranks that the gradient G = ∂loss/∂W asks for.

    The top k right singular vectors of G are where L R lowers the loss fastest from L = 0, and the sum of their σ² is how fast.
    Chunks of 4 components go to the matrices by σ² a byte until `budget` bytes are spent.

    Args:
        matrices: all compressed matrices.
        gradients: G (m, n) of each in the basis of W.
        budget: bytes that all added components may take, everything stored counted.
        grid: of the factors; None: each matrix's own, ADDED_GRID where it has none.
        seed: of the start of the subspace iteration.

    Raises:
        QLRError: the budget is less than the smallest chunk takes.

    Source: LoRA-GA, arXiv 2407.05000, section 3.
    """
    bases: dict[str, tuple[Array, np.ndarray]] = {}
    queue: list[tuple[float, str, int]] = []
    for name, matrix in matrices.items():
        rows, cols = matrix.shape
        most = min(MOST, min(rows, cols) - matrix.spec.rank) // CHUNK * CHUNK
        if most > 0:
            basis, energy = top_subspace(
                jnp.asarray(gradients[name]).T, jnp.eye(rows), jnp.asarray(start_basis(cols, most, seed)), 8
            )
            bases[name] = basis, np.asarray(energy).reshape(-1, CHUNK).sum(axis=1)
            heapq.heappush(queue, (-bases[name][1][0] / _price(matrix, 0, grid), name, 0))
    cheapest = min((_price(matrices[name], 0, grid) for name in bases), default=budget + 1)
    if budget < cheapest:
        raise QLRError(f"added components within {budget} bytes fit no matrix; the smallest take {cheapest} bytes, so give more")
    ranks: dict[str, int] = {}
    while queue:
        _, name, chunks = heapq.heappop(queue)
        price = _price(matrices[name], chunks, grid)
        if price > budget:
            continue  # another matrix may be small enough
        budget -= price
        ranks[name] = (chunks + 1) * CHUNK
        if chunks + 1 < len(bases[name][1]):
            gain = bases[name][1][chunks + 1] / _price(matrices[name], chunks + 1, grid)
            heapq.heappush(queue, (-gain, name, chunks + 1))
    return {name: _rotated(bases[name][0][:, :rank].T, matrices[name]) for name, rank in ranks.items()}


def _price(matrix: QLRMatrix, chunks: int, grid: str | None) -> int:
    """Bytes that one more chunk takes after `chunks` added ones; the first may change the grid of the components there are."""

    def size(count: int) -> int:
        if not count:
            return matrix.nbytes
        return Spec.parse(with_factors(matrix.layout, matrix.spec.rank + count * CHUNK, grid).spec).nbytes(matrix.shape)

    return size(chunks + 1) - size(chunks)


def _rotated(right: Array, matrix: QLRMatrix) -> Array:
    """Rows of size 1 in the basis in which R is stored."""
    right = right * right.shape[1] ** 0.5
    if not matrix.spec.rotated:
        return right
    _, (v, block) = matrix.rotations
    return jax.jit(hadamard.rotate, static_argnames="block")(right, 1 / v, block=block)
