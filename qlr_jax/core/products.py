"""x Ŵᵀ with a packed matrix: from its codes where the C++ library is built, or in a Pallas kernel, else by decoding it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from qlr_jax import native
from qlr_jax.core import hadamard
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError
from qlr_jax.native.product import MOST_TOKENS, Format, Kind

PARTS = ("backbone", "left", "right")
ARRAYS = (("codes",), ("scales",), ("zeros", "rates"))  # of a part, or what is passed in its place
OTHERS = ("component_scale", "scale", "row_scales", "output_signs", "input_signs")
Implementation = Literal["xla", "native", "pallas"]
Formats = tuple[tuple[Format, int, int], ...]
"""(format, rows, cols) of backbone, left and right."""


def packed_matmul(
    x: Float[Array, "*batch n"], matrix: QLRMatrix, implementation: Implementation | None = None, exact: bool = True
) -> Array:
    """y = x Ŵᵀ, Ŵ = g · Uᵀ (Q + L diag(s) R) V, in float32. For inference: JAX raises where the native product is differentiated.

    Args:
        x: (*b, n).
        matrix: Ŵ (m, n).
        implementation: "xla" decodes Ŵ and multiplies; "native" is one call in C++ for at most `MOST_TOKENS` rows of x, and
            for more decodes there, on a CPU; "pallas" is one kernel for TPUs and NVIDIA GPUs that decodes and multiplies band by
            band, all quantizers but e8 from their codes: not run or measured on a device so far, and interpreted elsewhere, so
            slowly that there it is for tests; None: native on a CPU where it is built and knows the quantizers, else xla.
        exact: float32 throughout. Else the native product may round x, in the rotated basis, to 16 bits in blocks of columns for
            at most 8 rows of x: 2e-5 of y's norm more error, and 1.3 to 3 times as fast.

    Returns:
        (*b, m).

    Raises:
        QLRError: an implementation that is not there, or native for quantizers that it does not know.

    Example:
        >>> import qlr_jax as qlr
        >>> matrix = qlr.solve(np.eye(32, dtype=np.float32), None, "int-4g32").value
        >>> y = packed_matmul(jnp.ones((1, 32)), matrix)
        >>> bool(jnp.allclose(y, matrix.dense().sum(1), atol=1e-5))
        True
    """
    if implementation not in (None, "xla", "native", "pallas"):
        raise QLRError(f"implementation {implementation!r} is not known; give xla, native, pallas, or None")
    if implementation == "pallas":
        arrays = {name: jnp.asarray(array) for name, array in matrix.arrays.items()}
        return _in_pallas(x.astype(jnp.float32), arrays, layout=matrix.layout)
    formats = _formats(matrix) if implementation != "xla" and has_native() else None
    if implementation == "native" and formats is None:
        why = f"does not know {matrix.layout.spec}" if has_native() else "is not built here"
        raise QLRError(f"the native product {why}; give implementation xla or None")
    if formats is None:
        return _in_xla(x, matrix)
    arrays = {name: jnp.asarray(array) for name, array in matrix.arrays.items()}
    return _product(x.astype(jnp.float32), arrays, layout=matrix.layout, formats=formats, exact=exact)


@lru_cache
def has_native() -> bool:
    """Whether products on a CPU can run in C++."""
    return native.registered("qlr_product", "qlr_decode")


def knows(matrix: QLRMatrix) -> bool:
    """Whether products with it run in C++ on a CPU."""
    return has_native() and _formats(matrix) is not None


_primitive = Primitive("packed_product")
"""(x, *arrays) -> y. `lax.platform_dependent` would trace the decoder of every matrix too, only to leave it out."""


@partial(jax.jit, static_argnames=("layout", "formats", "exact"))
def _product(x: Array, arrays: dict[str, Array], *, layout: Layout, formats: Formats, exact: bool) -> Array:
    names, own = zip(*sorted(arrays.items()), strict=True)
    return _primitive.bind(x, *own, names=names, layout=layout, formats=formats, exact=exact)


def _to_cpp(x: Array, *arrays: Array, names: tuple[str, ...], layout: Layout, formats: Formats, exact: bool) -> Array:
    return _in_cpp(x, QLRMatrix(dict(zip(names, arrays, strict=True)), layout), formats, exact)


def _to_xla(x: Array, *arrays: Array, names: tuple[str, ...], layout: Layout, formats: Formats, exact: bool) -> Array:
    return _in_xla(x, QLRMatrix(dict(zip(names, arrays, strict=True)), layout))


_primitive.def_impl(_to_xla)  # where jit is disabled
_primitive.def_abstract_eval(lambda x, *_, layout, **__: x.update(shape=(*x.shape[:-1], layout.shape[0])))
mlir.register_lowering(_primitive, mlir.lower_fun(_to_xla, multiple_results=False))
mlir.register_lowering(_primitive, mlir.lower_fun(_to_cpp, multiple_results=False), platform="cpu")


def _formats(matrix: QLRMatrix) -> Formats | None:
    """(format, rows, cols) of every part; None where there is one that the library does not know."""
    (m, n), spec, bits = matrix.shape, matrix.spec, matrix.layout.state_bits
    own = [(spec.quantizer(bits, matrix.shape), m, n)]
    if spec.rank:
        left, right = spec.factor_quantizers(bits)
        own += [(left, spec.rank, m), (right, spec.rank, n)]
    found = [(quantizer.native_format(rows, cols), rows, cols) for quantizer, rows, cols in own]
    known = [(form, rows, cols) for form, rows, cols in found if form is not None]
    return (*known, *[(Format(Kind.NONE), 0, 0)] * (3 - len(known))) if len(known) == len(found) else None


def _in_xla(x: Array, matrix: QLRMatrix) -> Array:
    return jnp.matmul(x.astype(jnp.float32), matrix.dense().T, precision="highest")


def _in_cpp(x: Array, matrix: QLRMatrix, formats: Formats, exact: bool) -> Array:
    if x.size // x.shape[-1] > MOST_TOKENS:
        return _by_decoding(x, matrix, formats)
    (m, n), layout, spec = matrix.shape, matrix.layout, matrix.spec
    blocks = [hadamard.block_size(size, layout.rotation_block) for size in (n, m)]
    numbers = [m, n, spec.rank, layout.seed, spec.rotated or spec.by_rows, spec.rotated, *blocks]
    arrays = [array for name in PARTS for array in _arrays(matrix, name)]
    arrays += [matrix.arrays.get(name, _nothing()) for name in OTHERS]
    call = jax.ffi.ffi_call("qlr_product", jax.ShapeDtypeStruct((*x.shape[:-1], m), jnp.float32))
    parts = [number for form, rows, cols in formats for number in form.numbers(rows, cols)]
    floats = [value for form, _, _ in formats for value in form.floats()]
    return call(x, *arrays, numbers=_longs(numbers), parts=_longs(parts), floats=np.array(floats, np.float32), exact=exact)


def _by_decoding(x: Array, matrix: QLRMatrix, formats: Formats) -> Array:
    """The same for many rows of x: Q, L and R are decoded, and dense products take them in the rotated basis."""
    spec = matrix.spec

    def part(index: int) -> Array:
        form, rows, cols = formats[index]
        call = jax.ffi.ffi_call("qlr_decode", jax.ShapeDtypeStruct((rows, cols), jnp.float32))
        return call(
            *_arrays(matrix, PARTS[index]), numbers=_longs(form.numbers(rows, cols)), floats=np.array(form.floats(), np.float32)
        )

    def times(x: Array, weight: Array) -> Array:
        return jnp.matmul(x, weight, precision="highest")

    def product(x: Array) -> Array:
        y = jnp.zeros((*x.shape[:-1], matrix.shape[0])) if formats[0][0].kind == Kind.NONE else times(x, part(0).T)
        if not spec.rank:
            return y
        z = times(x, part(2).T)
        return y + times(z * matrix.arrays["component_scale"].astype(jnp.float32) if spec.component_scales else z, part(1))

    return _rotated(x, matrix, product)


@partial(jax.jit, static_argnames="layout")
def _in_pallas(x: Array, arrays: dict[str, Array], *, layout: Layout) -> Array:
    from qlr_jax.core.pallas import rotated_product  # it takes Pallas, which nothing else needs

    matrix = QLRMatrix(arrays, layout)

    def product(x: Array) -> Array:
        return rotated_product(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], -1)

    return _rotated(x, matrix, product)


def _rotated(x: Array, matrix: QLRMatrix, product: Callable[[Array], Array]) -> Array:
    """g · Uᵀ product(V x): `product` is with Q + L diag(s) R."""
    spec = matrix.spec
    (u, u_block), (v, v_block) = matrix.rotations
    y = product(hadamard.rotate(x, v, v_block) if spec.rotated or spec.by_rows else x)
    y = y * matrix.arrays["scale"][0] if "scale" in matrix.arrays else y
    y = y * matrix.arrays["row_scales"].astype(jnp.float32) if spec.by_rows else y
    return hadamard.unrotate(y, u, u_block) if spec.rotated else y


def _arrays(matrix: QLRMatrix, part: str) -> list[Any]:
    own = matrix.part(part)
    return [next((own[name] for name in names if name in own), _nothing()) for names in ARRAYS]


def _nothing() -> Array:
    return jnp.zeros((0,), jnp.float16)


def _longs(numbers: Sequence[int]) -> np.ndarray:
    return np.array([int(number) for number in numbers], np.int64)
