"""What one batch of solves is of: matrices of one shape and of specs of one kind, in the rotated basis, with their metrics."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.matrix import Layout
from qlr_jax.core.metric import Metric
from qlr_jax.core.objective import quadratic_by_rows
from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.sharding import HERE, Placement, one_by_one, sharded
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array

SMALLEST_PLAIN = 2.0**-10  # root mean square of the weights, above which float16 holds the scales of integers well as they are


@dataclass(frozen=True)
class MatrixProblem:
    """What does not change during the alternation, in the rotated basis and in units of `unit`: minimise tr(G E H Eᵀ).

    Attributes:
        specs: how each matrix is to be stored, of one kind (`kind_of_spec`).
        layouts: the same, as it is recorded with each.
        config: settings of the solver.
        original: W as given, (b, m, n).
        unit: (b,), the weights' sizes.
        metric: H of the inputs.
        output: G of the outputs; None is the identity.
        weight: U W Vᵀ / unit, (b, m, n); on several devices filled up as `Placement.place` does.
        energy: tr(G W H Wᵀ), (b,).
        backbones: the quantizers of Q.
        mask: 1 for the components that exist of each, of a bucket of ranks, (b, k); None at rank 0.
        placement: the devices that the matrices lie on.
    """

    specs: tuple[Spec, ...]
    layouts: tuple[Layout, ...]
    config: SolverConfig
    original: np.ndarray
    unit: np.ndarray
    metric: Metric
    output: Metric | None
    weight: Array
    energy: Array
    backbones: tuple[Quantizer, ...]
    mask: Array | None
    placement: Placement = HERE

    @classmethod
    def make(
        cls,
        weights: np.ndarray,
        metric: Metric,
        output: Metric | None,
        specs: Spec | Sequence[Spec],
        seed: int,
        config: SolverConfig,
        placement: Placement = HERE,
    ) -> MatrixProblem:
        """The problem of weights (b, m, n).

        Args:
            weights: W, checked.
            metric, output: H and G, one for all or one each, rotated by `seed` if the spec rotates.
            specs: how to store W, one for all or one each.
            seed: of the rotation's signs.
            config: settings.
            placement: where it is solved.
        """
        m, n = shape = weights.shape[1:]
        specs = [specs] * len(weights) if isinstance(specs, Spec) else list(specs)
        spec = specs[0]
        backbone = spec.quantizer(config.state_bits, shape)
        size = np.sqrt(np.einsum("bij,bij->b", weights, weights, dtype=np.float64) / (m * n))
        size = np.where(size > 0, size, 1.0)
        if not backbone.unit_scale:
            size = plain_unit(size) if spec.has_scale else np.ones_like(size)
        metric, output = metric.placed(placement), output and output.placed(placement)
        weight = placement.place(jax.device_put(weights / size.astype(np.float32)[:, None, None]))
        arrays = weight, metric.hessian, output and output.hessian
        if metric.rotation is None:
            energy = one_by_one(_energy, arrays)
        else:
            (u, u_block), (v, v_block) = hadamard.rotations((m, n), seed, config.rotation_block)
            weight, energy = one_by_one(_rotated, arrays, u, v, blocks=(u_block, v_block))
        specs += specs[-1:] * (len(weight) - len(specs))  # a mesh is filled up with the last one
        mask = placement.place(np.stack([component_mask(own.rank, shape) for own in specs])) if spec.rank else None
        layouts = tuple(Layout(str(own), shape, seed, config.rotation_block, config.state_bits) for own in specs)
        backbones = tuple(own.quantizer(config.state_bits, shape) for own in specs)
        return cls(tuple(specs), layouts, config, weights, size, metric, output, weight, energy, backbones, mask, placement)

    @property
    def spec(self) -> Spec:
        """One of the specs, for what all have in common."""
        return self.specs[0]

    @property
    def backbone(self) -> Quantizer:
        """One of the backbones' quantizers, for what all have in common."""
        return self.backbones[0]

    def with_backbone_bits(self, state_bits: int) -> MatrixProblem:
        """The same problem with a backbone of so many state bits, if it is a trellis."""
        return replace(self, backbones=tuple(spec.quantizer(state_bits, self.layouts[0].shape) for spec in self.specs))

    @property
    def output_metric(self) -> Array | None:
        """G in the rotated basis: with H, what results are evaluated in."""
        return self.output and self.output.hessian


def kind_of_spec(spec: Spec, shape: tuple[int, int]) -> Hashable:
    """What the specs of matrices must have in common to be solved together: one program, and parameters for each matrix.

    The ranks of one bucket, and the rates of backbones that store their own.

    Example:
        >>> specs = [Spec.parse(f"trellis-{text}@trellis-4") for text in ("2w+r8", "2.5w+r12", "2w+r32")]
        >>> first, *others = [kind_of_spec(spec, (64, 64)) for spec in specs]
        >>> [kind == first for kind in others]
        [True, False]
    """
    backbone = spec.quantizer(shape=shape)
    grid = backbone.name if backbone.traced() else backbone.static()
    if not spec.rank:
        return grid, spec.rotated, spec.by_rows
    factors = tuple(quantizer.static() for quantizer in spec.factor_quantizers())
    return grid, spec.rotated, spec.left, spec.right, factors, bucket(spec.rank, min(shape))


def component_mask(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    """1 for the components that exist, of a bucket of ranks in whole tiles: one program serves all of a bucket.

    Example:
        >>> component_mask(12, (64, 64)).sum(), len(component_mask(12, (64, 64)))
        (np.float32(12.0), 16)
    """
    columns = -(-bucket(rank, min(shape)) // 8) * 8
    return (np.arange(columns) < rank).astype(np.float32)


def plain_unit(size: np.ndarray) -> np.ndarray:
    """g of weights whose grid has scales of its own: a power of two, 1 where float16 holds such scales as they are.

    A power of two leaves them exact for formats that store no g.

    Args:
        size: root mean square of the weights, above 0.

    Example:
        >>> plain_unit(np.array([0.02, 2.0**-20])).tolist() == [1.0, 2.0**-20]
        True
    """
    return np.where((size > SMALLEST_PLAIN) & (size < 1 / SMALLEST_PLAIN), 1.0, 2.0 ** np.round(np.log2(size)))


@sharded
@partial(jax.jit, static_argnames=("blocks",))
def _rotated(
    weight: Array, hessian: Array, output: Array | None, u: Array, v: Array, blocks: tuple[int, int]
) -> tuple[Array, Array]:
    """U W Vᵀ, and its energy."""
    weight = hadamard.rotate(weight, v, blocks[1])
    weight = jnp.swapaxes(hadamard.rotate(jnp.swapaxes(weight, -1, -2), u, blocks[0]), -1, -2)
    return weight, quadratic_by_rows(weight, hessian, output)


_energy = sharded(jax.jit(quadratic_by_rows))
