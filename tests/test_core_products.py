"""x Ŵᵀ with a packed matrix, from its codes in C++ and by decoding it: both are what `dense()` says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rates import some_rates

from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.products import MOST_TOKENS, has_native, knows, packed_matmul
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.native import product

there = pytest.mark.skipif(product.library() is None, reason="the C++ library is not built")
SPECS = [
    *(
        "trellis-2",
        "trellis-2.5w+r4@trellis-2",
        "trellis-3.25+r8@trellis-4",
        "trellis-2+r6@trellis-2,int-8",
        "none+r8@trellis-4",
        "trellis-4/rows",
    ),
    *("int-4g32", "int-3a", "int-8g32/rot+r4@bf16", "nf-4g64+r4@nf-3", "nvfp4", "bf16+r4@bf16"),
]


def random_matrix(text, shape, seed=0, **layout):
    """Random codes: any byte is a valid one."""
    rng, spec, (m, n) = np.random.default_rng(seed), Spec.parse(text), shape
    parts = {"backbone": (spec.quantizer(shape=shape), m, n)}
    if spec.rank:
        left, right = spec.factor_quantizers()
        parts |= {"left": (left, spec.rank, m), "right": (right, spec.rank, n)}
    stored = {f"{name}.{key}": own for name, (q, rows, cols) in parts.items() for key, own in q.stored(rows, cols).items()}
    stored |= {"component_scale": ((spec.rank,), np.float16)} if spec.component_scales else {}
    stored |= {"scale": ((1,), np.float32)} if spec.has_scale else {}
    stored |= {"row_scales": ((m,), np.float16)} if spec.by_rows else {}
    arrays = {
        name: rng.integers(0, 256, size, np.uint8) if kind == np.uint8 else (0.02 * (rng.random(size) + 0.5)).astype(kind)
        for name, (size, kind) in stored.items()
    }
    arrays |= {name: some_rates(spec, shape) for name in arrays if name.endswith("rates")}
    return QLRMatrix(arrays, Layout(str(spec), shape, seed=seed, **layout))


@there
@pytest.mark.parametrize("tokens, shape", [(1, (64, 96)), (3, (48, 40)), (MOST_TOKENS + 5, (64, 96))])
@pytest.mark.parametrize("spec", SPECS)
def test_native_products_are_those_of_dense(spec, tokens, shape):
    matrix = random_matrix(spec, shape, seed=3, rotation_block=32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, tokens, shape[1])), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(matrix.dense(), np.float64).T
    found = packed_matmul(x, matrix, "native")
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    compiled = jax.jit(lambda x, m: packed_matmul(x, m))(x, jax.tree.map(jnp.asarray, matrix))
    np.testing.assert_allclose(compiled, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@there
@pytest.mark.parametrize("spec", ["trellis-2+r8@trellis-4", "int-4g32", "int-3a"])
def test_inexact_products_are_within_5e_5(spec):
    matrix, x = random_matrix(spec, (64, 96)), jnp.asarray(np.random.default_rng(1).standard_normal((2, 96)), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(matrix.dense(), np.float64).T
    found = packed_matmul(x, matrix, "native", exact=False)
    assert np.linalg.norm(found - want) < 5e-5 * np.linalg.norm(want)
    np.testing.assert_array_equal(packed_matmul(x, matrix, "xla", exact=False), packed_matmul(x, matrix, "xla"))


def test_xla_is_dense_and_what_is_not_there_is_refused():
    matrix, x = random_matrix("int-4g32", (48, 64)), jnp.ones((3, 64))
    np.testing.assert_allclose(packed_matmul(x, matrix, "xla"), matrix.dense().sum(1)[None].repeat(3, 0), rtol=1e-5, atol=1e-6)
    with pytest.raises(QLRError, match="implementation 'cuda' is not known; give xla, native, pallas, or None"):
        packed_matmul(x, matrix, "cuda")
    odd = random_matrix("e8-2", (48, 64))
    assert not knows(odd) and knows(matrix) == has_native()
    with pytest.raises(QLRError, match=r"the native product (does not know e8-2|is not built here)"):
        packed_matmul(x, odd, "native")
    np.testing.assert_allclose(packed_matmul(x, odd), packed_matmul(x, odd, "xla"))


@there
def test_other_devices_decode():
    matrix, x = jax.tree.map(jnp.asarray, random_matrix("int-4g32", (48, 64))), jnp.ones((1, 64))
    traced = jax.jit(packed_matmul).trace(x, matrix)
    lowered = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert "qlr_product" in lowered["cpu"] and not any("qlr_product" in lowered[name] for name in ("tpu", "cuda"))
