"""Integer grids as values of qwix (github.com/google/qwix), whose products take them as they are: extra `qwix`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qlr_jax.core import hadamard
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.packing import unpack_stream
from qlr_jax.core.quantizers.integer import Integer
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError


def qarrays(matrix: QLRMatrix) -> dict[str, Any]:
    """The parts of Ŵ = Uᵀ (Q + L R) V as `qwix.QArray`: codes as they are stored, g among the scales.

    Args:
        matrix: Ŵ (m, n), whose grids are integers, in groups that divide their rows.

    Returns:
        "backbone", Q (m, n), and of a matrix with rank "left", Lᵀ (rank, m), and "right", R (rank, n). Codes are int4 up to 4 bits
        a weight, else int8; scales are float32. U and V are the identity unless the spec says `/rot` (`times` rotates).

    Raises:
        QLRError: a grid that is no integer, groups that do not divide the columns, or no qwix.

    Example:
        >>> import numpy as np, qlr_jax as qlr
        >>> q = qarrays(qlr.solve(np.eye(32, dtype=np.float32), None, "int-4g32").value)["backbone"]
        >>> q.qvalue.shape, str(q.qvalue.dtype), q.scale.shape
        ((32, 32), 'int4', (32, 1))
    """
    (m, n), spec = matrix.shape, matrix.spec
    scale = matrix.arrays["scale"][0] if "scale" in matrix.arrays else jnp.ones(())
    found = {"backbone": _qarray(matrix, "backbone", spec.quantizer(matrix.layout.state_bits, matrix.shape), (m, n), scale)}
    if spec.rank:
        left, right = spec.factor_quantizers(matrix.layout.state_bits)
        found["left"] = _qarray(matrix, "left", left, (spec.rank, m), scale)
        found["right"] = _qarray(matrix, "right", right, (spec.rank, n), jnp.ones(()))
    return found


def times(x: Float[Array, "*b n"], matrix: QLRMatrix) -> Array:
    """y = x Ŵᵀ by qwix's products: (x Vᵀ) Qᵀ and ((x Vᵀ) Rᵀ) Lᵀ, rotated back where the spec says `/rot`.

    Args:
        x: (*b, n).
        matrix: as for `qarrays`.

    Returns:
        (*b, m), in float32.
    """
    qwix, parts = _qwix(), qarrays(matrix)
    (u, u_block), (v, v_block) = matrix.rotations
    turned = hadamard.rotate(x, v, v_block) if matrix.spec.rotated else x

    def product(x: Any, other: Any, axis: int) -> Any:
        numbers = (((x.ndim - 1,), (axis,)), ((), ()))
        return qwix.dot_general(x, other, numbers, precision=jax.lax.Precision.HIGHEST)

    y = product(turned, parts["backbone"], 1)
    if "left" in parts:
        y = y + product(product(turned, parts["right"], 1), parts["left"], 0)
    return hadamard.unrotate(y, u, u_block) if matrix.spec.rotated else y


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise QLRError("this needs qwix, which is not installed; run: pip install 'qlr-jax[qwix]'") from None
    return qwix


def _qarray(matrix: QLRMatrix, part: str, quantizer: Any, shape: tuple[int, int], scale: Any) -> Any:
    spec, (_, cols) = matrix.layout.spec, shape
    if not isinstance(quantizer, Integer):
        raise QLRError(f"{spec}: {quantizer.name} is no integer grid, and qwix multiplies those alone; pass e.g. int-4g32")
    if quantizer.group and cols % quantizer.group:
        raise QLRError(f"{spec}: groups of {quantizer.group} do not divide the {cols} columns of the {part}, as qwix needs them to")
    own, width = matrix.part(part), quantizer.width
    kind, middle = (jnp.int4 if width <= 4 else jnp.int8), 2 ** (width - 1)
    codes = unpack_stream(own["codes"], width, cols)
    scales, zeros = jnp.asarray(own["scales"]).astype(jnp.float32) * scale, None
    if quantizer.asymmetric:
        zeros = (jnp.asarray(own["zeros"]).astype(jnp.int32) - middle).astype(kind)
    elif width == 1:  # ± half a scale: the middle between two codes is none
        codes, middle, scales = 2 * codes, 1, scales / 2
    return _qwix().QArray((codes - middle).astype(kind), scales, zeros)


__all__ = ["qarrays", "times"]
