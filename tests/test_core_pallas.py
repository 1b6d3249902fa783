"""x Ŵᵀ by Pallas kernels, interpreted: what XLA and `dense()` in float64 say, for all quantizers; TPUs and GPUs get a kernel."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_core_products import SPECS, random_matrix

from qlr_jax.core import pallas
from qlr_jax.core.products import packed_matmul

ALL = [
    *((spec, {}) for spec in SPECS),
    *((spec, {}) for spec in ("e8-2", "e8-3", "e8-4", "nf-2", "int-2g16", "int-5a", "int-1", "bf16", "nvfp4/rows", "e8-2/rows")),
    *((spec, {}) for spec in ("trellis-6", "trellis-1", "trellis-1.0625", "none+r5@nf-2g16,e8-2", "none+r3@nvfp4")),
    *((spec, {}) for spec in ("trellis-2+r5@trellis-3", "e8-3+r8@e8-4,int-5a", "int-4+r6@trellis-2,bf16")),
    *((f"trellis-{rate}", {"state_bits": bits}) for rate in ("2w", "6w+r4@trellis-1.0625") for bits in (16, 6)),
    ("trellis-2.5w+r4@int-4g32a", {"signs": True}),
]


def some(spec, shape, tokens, seed=3, **layout):
    """A matrix, and as many rows of x."""
    matrix = random_matrix(spec, shape, seed=seed, rotation_block=32, **layout)
    rng = np.random.default_rng(1)
    if layout.get("signs"):
        sizes = {"output_signs": shape[0], "input_signs": shape[1]}
        signs = {name: rng.standard_normal(size).astype(np.float16) for name, size in sizes.items()}
        matrix = type(matrix)({**matrix.arrays, **signs}, matrix.layout)
    return matrix, jnp.asarray(rng.standard_normal((*tokens, shape[1])), jnp.float32)


def for_a_gpu():
    """JAX from 0.11 on asks for a GPU, real or named, where it hands a kernel to Triton."""
    from jax._src import mesh

    if jax.__version_info__ < (0, 11):
        return nullcontext()
    named = mesh.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=named))


def close(found, x, matrix):
    """To the XLA path and to float64."""
    want = np.asarray(x, np.float64) @ np.asarray(matrix.dense(), np.float64).T
    assert found.shape == want.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    np.testing.assert_allclose(found, packed_matmul(x, matrix, "xla"), atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("spec, layout", ALL)
def test_products_are_those_of_dense(spec, layout):
    """Of 5 rows, the matrix an argument of a program, whose rates are then not known; nothing fills whole tiles."""
    matrix, x = some(spec, (48, 90), (5,), **layout)
    close(jax.jit(lambda x, m: packed_matmul(x, m, "pallas"))(x, jax.tree.map(jnp.asarray, matrix)), x, matrix)


@pytest.mark.parametrize("spec", ["trellis-2.5w+r4@trellis-2", "int-4g32", "e8-2/rows"])
def test_one_row_with_a_matrix_on_the_host(spec):
    matrix, x = some(spec, (64, 40), (1, 1))
    close(packed_matmul(x, matrix, "pallas"), x, matrix)


@pytest.mark.parametrize("rate", [25, 34, 59, 77, 95])
def test_rates_in_sixteenths(rate):
    matrix, x = some(f"trellis-{rate / 16:g}", (37, 53), (2,), state_bits=6 + rate % 10)
    close(packed_matmul(x, matrix, "pallas"), x, matrix)


@pytest.mark.parametrize("spec", ["trellis-2.5w+r20@int-8g16", "trellis-3+r68@trellis-2", "int-3g24a+r20@nf-4g20", "bf16+r20@bf16"])
def test_many_steps_and_tokens(spec, monkeypatch):
    """Several chunks of columns, of a segment too, and of components; several blocks of tokens, the last one cut; shares."""
    monkeypatch.setattr(pallas, "INTERPRETED", pallas.Blocking(16, 16))
    matrix, x = some(spec, (96, 600), (3, 13), seed=7)  # programs are kept by layout: no other test has this seed
    close(packed_matmul(x, matrix, "pallas"), x, matrix)


@pytest.mark.parametrize("spec, layout", ALL)
def test_tpus_and_gpus_get_one_kernel(spec, layout):
    """Lowering alone: nothing is compiled for them or run."""
    matrix, x = jax.tree.map(jnp.asarray, some(spec, (48, 40), (1, 1), **layout))
    kernels = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
    for platform, name in kernels.items():
        with for_a_gpu() if platform == "cuda" else nullcontext():
            traced = jax.jit(lambda x, m: packed_matmul(x, m, "pallas")).trace(x, matrix)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count(name) == 1 and not any(other in text for other in kernels.values() if other != name)
