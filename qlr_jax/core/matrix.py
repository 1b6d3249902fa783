"""QLRMatrix: a compressed matrix as it is stored, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core import hadamard
from qlr_jax.core.quantizers import DEFAULT_STATE_BITS, Quantizer
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array


@dataclass(frozen=True)
class Layout:
    """What is needed beside the arrays to read them: recorded with every matrix.

    Attributes:
        spec: canonical spec.
        shape: (out, in).
        seed: of the rotation's signs.
        rotation_block: 0 for full-width rotations, else the block of a block-diagonal one.
        state_bits: of trellis codes.
        signs: whether the rotations' sign vectors are stored, relaxed to real numbers, in place of those that the seed makes.
    """

    spec: str
    shape: tuple[int, int]
    seed: int = 0
    rotation_block: int = 0
    state_bits: int = DEFAULT_STATE_BITS
    signs: bool = False


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QLRMatrix:
    """W ≈ g · Uᵀ (Q + L diag(s) R) V, packed; `dense()` is the specification of every packer, exporter and kernel.

    Arrays, by name (`<part>.<array>`; which are there follows from the spec):
        backbone.codes, backbone.scales, backbone.zeros     Q (m, n), as its quantizer stores it
        left.*, right.*                                      Lᵀ (rank, m) and R (rank, n), one row a component
        component_scale                                      s, float16 (rank,)
        scale                                                g, float32 (1,)
        row_scales                                           g of every row, float16 (m,); of `/rows` alone
        output_signs, input_signs                            diagonals of U (m,) and V (n,), float16; only where `layout.signs`

    Example:
        >>> import numpy as np, qlr_jax as qlr
        >>> value = qlr.solve(np.eye(32, dtype=np.float32), None, "int-4g32").value
        >>> value.dense().shape, value.nbytes == qlr.Spec.parse("int-4g32").nbytes((32, 32))
        ((32, 32), True)
    """

    arrays: Mapping[str, Array]
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.layout.shape

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        return Spec.parse(self.layout.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(int(a.nbytes) for a in self.arrays.values())

    @property
    def bits(self) -> float:
        """Bits per weight, as stored."""
        rows, cols = self.shape
        return 8 * self.nbytes / (rows * cols)

    def part(self, name: str) -> dict[str, Array]:
        """The arrays of `backbone`, `left` or `right`, by their own names."""
        return {key.split(".", 1)[1]: value for key, value in self.arrays.items() if key.startswith(name + ".")}

    @property
    def rotations(self) -> tuple[tuple[Array | np.ndarray, int], tuple[Array | np.ndarray, int]]:
        """(signs, block) of U and of V: `hadamard.unrotate` with them leads back to the basis of W, real numbers among them too."""
        (u, u_block), (v, v_block) = hadamard.rotations(self.shape, self.layout.seed, self.layout.rotation_block)
        if self.layout.signs:
            u, v = (self.arrays[name].astype(jnp.float32) for name in ("output_signs", "input_signs"))
        return (u, u_block), (v, v_block)

    sides = rotations  # another name of it, for callers outside of this library

    def backbone(self) -> Array:
        """g · Q (m, n) in the rotated basis."""
        rows, cols = self.shape
        found = _decoded(self.spec.quantizer(self.layout.state_bits, self.shape), self.part("backbone"), rows, cols)
        return self.arrays["scale"][0] * found if "scale" in self.arrays else found

    def factors(self) -> tuple[Array, Array]:
        """g · L diag(s) (m, rank) and R (rank, n), in the rotated basis."""
        rows, cols = self.shape
        spec = self.spec
        of_left, of_right = spec.factor_quantizers(self.layout.state_bits)
        left = _decoded(of_left, self.part("left"), spec.rank, rows).T * self.arrays["scale"][0]
        if spec.component_scales:
            left = left * self.arrays["component_scale"].astype(jnp.float32)
        return left, _decoded(of_right, self.part("right"), spec.rank, cols)

    def unrotated_factors(self) -> tuple[Array, Array]:
        """(Uᵀ L, R V): factors of the same product in the basis of W, with no rotation left in them."""
        left, right = self.factors()
        if not self.spec.rotated:
            return left, right
        (u, ub), (v, vb) = self.rotations
        return hadamard.unrotate(left.T, u, ub).T, hadamard.unrotate(right, v, vb)

    @property
    def is_by_rows(self) -> bool:
        """Whether `rows` reads some rows without the others: no factors, and no rotation of the outputs."""
        return not (self.spec.rank or self.spec.rotated)

    def rows(self, index: Array | np.ndarray) -> Array:
        """Rows of Ŵ, float32 (*b, n), of which no others are decoded but those of their tiles; `is_by_rows` only.

        Args:
            index: numbers of rows, (*b,).
        """
        flat, n = jnp.ravel(index), self.shape[1]
        grid = self.spec.quantizer(self.layout.state_bits, self.shape)
        height, part = grid.tile[0], self.part("backbone")
        # a tile's rows lie together along the first axis of every array
        taken = {key: jnp.take(jnp.asarray(array), flat // height, axis=0) for key, array in part.items()}
        tiles = grid.decode(taken, height * len(flat), n).reshape(len(flat), height, n)
        found = jnp.take_along_axis(tiles, (flat % height)[:, None, None], axis=1)[:, 0]
        found = found * self.arrays["scale"][0] if "scale" in self.arrays else found
        return self._by_rows(found, flat).reshape(*jnp.shape(index), n)

    def _by_rows(self, q: Array, index: Array | slice = slice(None)) -> Array:
        """diag(g) q V, where rows have scales of their own; q itself elsewhere."""
        if not self.spec.by_rows:
            return q
        _, (v, block) = self.rotations
        scales = self.arrays["row_scales"]
        scales = scales if isinstance(q, np.ndarray) else jnp.asarray(scales)
        return hadamard.unrotate(q, v, block) * scales[index, None].astype(jnp.float32)

    def dense(self) -> Array:
        """Ŵ (m, n) in float32."""
        total = self._by_rows(self.backbone())
        if self.spec.rank:
            left, right = self.factors()
            host = isinstance(left, np.ndarray) and isinstance(right, np.ndarray)
            total = total + (left @ right if host else jnp.matmul(left, right, precision="highest"))
        if not self.spec.rotated:
            return total
        (u, ub), (v, vb) = self.rotations
        return hadamard.unrotate(hadamard.unrotate(total, v, vb).T, u, ub).T

    def without_factors(self) -> QLRMatrix:
        """The backbone alone, as a matrix of its own."""
        text = str(replace(self.spec, rank=0, left="", right=""))
        kept = {k: v for k, v in self.arrays.items() if not k.startswith(("left.", "right.", "component_"))}
        return QLRMatrix(kept, replace(self.layout, spec=text))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """For JAX: a pytree of its arrays."""
        names = tuple(sorted(self.arrays))
        return [(jax.tree_util.DictKey(n), self.arrays[n]) for n in names], (names, self.layout)

    @classmethod
    def tree_unflatten(cls, aux: Any, leaves: Any) -> QLRMatrix:
        """The inverse of `tree_flatten_with_keys`."""
        names, layout = aux
        return cls(dict(zip(names, leaves, strict=True)), layout)


def _decoded(quantizer: Quantizer, arrays: Mapping[str, Array], rows: int, cols: int) -> Any:
    """What a part's arrays mean; of arrays on the host it comes to lie there, and is made by numpy or by one program."""
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        return quantizer.decode(arrays, rows, cols)
    return np.asarray(quantizer.decode(arrays, rows, cols) if quantizer.decodes_on_host else _decode(arrays, quantizer, rows, cols))


@partial(jax.jit, static_argnames=("quantizer", "rows", "cols"))
def _decode(arrays: Mapping[str, Array], quantizer: Quantizer, rows: int, cols: int) -> Array:
    return quantizer.decode(arrays, rows, cols)
