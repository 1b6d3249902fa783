"""The metric of one side of a solve: H (or G) as given, rotated, and its feedback factors, made once for all that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.bounds import block_norms
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.ldlq import feedback, noise_gain, pad_metric, unit_blocks
from qlr_jax.core.objective import damped
from qlr_jax.core.sharding import HERE, Placement, one_by_one, sharded
from qlr_jax.core.typing import Array


@dataclass(frozen=True)
class Metric:
    """H of the inputs (or G of the outputs) for a batch of matrices: one for all, (1, n, n), or one each, (b, n, n).

    Attributes:
        original: as given, divided by `unit`: errors are relative, so no digit changes, and float32 stays in range.
        unit: a power of two for each.
        hessian: the same in the rotated basis: what results are evaluated in.
        regular: the same, damped: what factors are fitted in.
        rotation: signs and block of the rotation of this side; None where there is none.
        damping: fraction of the mean diagonal that is added before H is factored.
        side: `hadamard.INPUT`, or `hadamard.OUTPUT`, of which a root is kept beside each factor.
        placement: where `hessian` and `regular` lie.
        source: the metric on one device, where one H serves all on several.
    """

    original: np.ndarray
    unit: np.ndarray
    hessian: Array
    regular: Array
    rotation: tuple[np.ndarray, int] | None
    damping: float
    side: int = hadamard.INPUT
    placement: Placement = HERE
    source: Metric | None = field(default=None, repr=False)
    _factors: dict[int, tuple[Array, np.ndarray, np.ndarray, Array | None]] = field(default_factory=dict, repr=False)
    _norms: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def make(cls, hessians: np.ndarray, seed: int, config: SolverConfig, rotated: bool, side: int = hadamard.INPUT) -> Metric:
        """The metric of the matrices given.

        Args:
            hessians: H of each, (b, n, n), or one for all, (1, n, n).
            seed: of the rotation's signs.
            config: of which `damping` and `rotation_block` count.
            rotated: whether it is rotated.
            side: `hadamard.INPUT` for H of the inputs, `hadamard.OUTPUT` for G of the outputs.
        """
        n = hessians.shape[-1]
        peak = np.abs(hessians).max(axis=(1, 2))
        unit = np.exp2(np.round(np.log2(np.where(peak > 0, peak, 1.0)))).astype(np.float32)
        original = hessians / unit[:, None, None]
        rotation = (hadamard.signs(seed, side, n), hadamard.block_size(n, config.rotation_block)) if rotated else None
        sign, block = rotation or (None, 0)
        hessian, regular = one_by_one(_prepared, (original,), sign, config.damping, block=block)
        return cls(original, unit, hessian, regular, rotation, config.damping, side)

    def of(self, i: int) -> np.ndarray:
        """H of one matrix of the batch, as given."""
        return self.original[min(i, len(self.original) - 1)]

    def factor(self, width: int) -> Array:
        """F of LDLQ at `width` columns a block."""
        return self._made(width)[0]

    def noise_gain(self, width: int) -> np.ndarray:
        """φ: what feedback with that factor adds to what is rounded."""
        return self._made(width)[1]

    def spread(self, width: int) -> np.ndarray:
        """tr(D_k) of that factor's column blocks, (b or 1, blocks): what rounding noise in each of them costs."""
        return self._made(width)[2]

    def root(self, width: int) -> Array:
        """C, lower triangular, with C Cᵀ = the damped H, from the factorization at `width`; of the outputs' metric alone."""
        root = self._made(width)[3]
        assert root is not None, "of the inputs' metric no root is kept"
        return root

    def block_norms(self, i: int, width: int) -> np.ndarray:
        """λ_max of the diagonal blocks of the damped H's LDLᵀ factor, of one entry, in float64 (`bounds.block_norms`)."""
        if (i, width) not in self._norms:
            self._norms[i, width] = block_norms(np.asarray(self.regular[i], np.float64), width)
        return self._norms[i, width]

    def placed(self, placement: Placement) -> Metric:
        """The metric where the matrices lie: H of each is factored there; one H for all is factored once, and then copied."""
        if placement.mesh is None:
            return self
        hessian, regular = placement.place(self.hessian), placement.place(self.regular)
        source = self if len(self.original) == 1 else None  # else it would keep the room of all on one device
        return replace(self, hessian=hessian, regular=regular, placement=placement, source=source, _factors={}, _norms={})

    def _made(self, width: int) -> tuple[Array, np.ndarray, np.ndarray, Array | None]:
        if width not in self._factors:
            if self.source:
                factor, gain, spread, root = self.source._made(width)
                place = self.placement.place
                self._factors[width] = place(factor), gain, spread, root if root is None else place(root)
            else:
                factor, gain, spread, root = one_by_one(_ldl_and_gain, (self.regular,), width=width)
                kept = root if self.side == hadamard.OUTPUT else None
                self._factors[width] = factor, np.asarray(gain), np.asarray(spread), kept
        return self._factors[width]


def rotated_hessian(hessian: np.ndarray, rotation: tuple[np.ndarray, int] | None) -> Array:
    """V H Vᵀ."""
    return _rotate(jnp.asarray(hessian), *rotation) if rotation else jnp.asarray(hessian)


@partial(jax.jit, static_argnames=("block",))
def _prepared(hessian: Array, sign: Array | None, damping: float, block: int) -> tuple[Array, Array]:
    """V H Vᵀ, H itself without signs, and the same damped."""
    hessian = hessian if sign is None else hadamard.rotate_hessian(hessian, sign, block)
    return hessian, damped(hessian, damping)


@partial(jax.jit, static_argnames=("block",))
def _rotate(hessian: Array, sign: Array, block: int) -> Array:
    return hadamard.rotate_hessian(hessian, sign, block)


@partial(sharded, factors=True)
@partial(jax.jit, static_argnames=("width",))
def _ldl_and_gain(regular: Array, width: int) -> tuple[Array, Array, Array, Array]:
    """F of the damped H, padded to whole blocks, its φ, the traces of its D, and C, the root of the damped H."""
    n = regular.shape[-1]
    lower = jnp.linalg.cholesky(pad_metric(regular, width))
    factor, traces = unit_blocks(lower, width)
    return factor, noise_gain(factor), traces, lower[..., :n, :n]


@partial(sharded, factors=True)
@partial(jax.jit, static_argnames=("width",))
def ldl(hessian: Array, damping: float, width: int) -> Array:
    """F of the damped H, padded to whole blocks (`feedback`).

    Args:
        hessian: H, (*b, n, n).
        damping: fraction of the mean diagonal that is added.
        width: columns a block.
    """
    return feedback(pad_metric(damped(hessian, damping), width), width)[0]


def outlier_channels(hessians: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """H restricted to the input channels of the largest mean square, zero elsewhere: (b, n, n).

    Args:
        hessians: H, (b, n, n).
        counts: how many channels of each.
    """
    diagonal = np.diagonal(hessians, axis1=-2, axis2=-1)
    place = np.argsort(np.argsort(-diagonal, axis=-1), axis=-1)
    kept = (place < np.asarray(counts)[:, None]).astype(hessians.dtype)
    return hessians * kept[:, :, None] * kept[:, None, :]
