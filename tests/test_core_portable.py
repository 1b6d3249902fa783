"""Everything that the core compiles lowers for TPU and CUDA, on a machine that has neither."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from qlr_jax.core import backbone, low_rank, metric, objective, problem
from qlr_jax.core.factors import fit_factors
from qlr_jax.core.ldlq import column_block, noise_gain
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.spec import Spec

B, M, N, K, BITS = 2, 32, 64, 8, 6
F32 = jnp.float32


def array(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


WEIGHT, HESSIAN, BASIS = array(B, M, N), array(1, N, N), array(B, M, K)
GRIDS = ["bf16", "int-3g16a", "nf-3g16", "e8-2", "e8-3", "e8-4", "trellis-2.25", "trellis-2.25w"]


def lowered(function, *arguments, **static):
    """The module for both platforms: one text, checked by JAX as it is made."""
    # factorizations call vendor libraries, which JAX does not promise to keep: here they only have to exist
    vendor = ("cusolver_geqrf_ffi", "cusolver_orgqr_ffi", "cusolver_syevd_ffi", "cusolver_potrf_ffi", "Qr")
    calls = [export.DisabledSafetyCheck.custom_call(name) for name in (*vendor, "ProductOfElementaryHouseholderReflectors")]
    made = export.export(jax.jit(function, static_argnames=tuple(static)), platforms=["tpu", "cuda"], disabled_checks=calls)
    module = made(*arguments, **static)
    assert set(module.platforms) == {"tpu", "cuda"}
    return module.mlir_module()


def data(quantizer):
    return tuple(jax.ShapeDtypeStruct(jnp.shape(d), jnp.asarray(d).dtype) for d in quantizer.traced())


@pytest.mark.parametrize("name", GRIDS)
def test_backbone_lowers(name):
    quantizer = parse_quantizer(name, state_bits=BITS)
    text = lowered(
        backbone.round_backbone, WEIGHT, HESSIAN, array(B), HESSIAN, array(1), data(quantizer),
        static=quantizer.static(), refit=True,
    )  # fmt: skip
    assert "f64" not in text  # float32 is enough, and TPUs have no more


@pytest.mark.parametrize("names", [("trellis-4", "trellis-2"), ("e8-4", "e8-4"), ("int-8", "bf16"), ("nf-4", "nf-3g16")])
def test_factors_lower(names):
    spec = Spec.parse(f"trellis-2+r{K}@{names[0]},{names[1]}")
    left, right = spec.factor_quantizers(BITS)
    assert column_block(right) in (1, 8, 64)
    text = lowered(
        fit_factors, WEIGHT, WEIGHT, HESSIAN, HESSIAN, BASIS, array(K), (data(left), data(right)), 2, (HESSIAN, array(B), None),
        statics=(left.static(), right.static()), inner=2, one_scale=False,
    )  # fmt: skip
    assert "f64" not in text


@pytest.mark.parametrize("function, arguments, static", [
    (metric.ldl, (HESSIAN, 0.01), {"width": 16}),
    (metric._rotate, (HESSIAN, array(N)), {"block": N}),
    (problem._rotated, (WEIGHT, HESSIAN, None, array(M), array(N)), {"blocks": (M, N)}),
    (backbone.downdated, (HESSIAN, array(B, K, N), 0.9), {}),
    (noise_gain, (HESSIAN,), {}),
    (low_rank.top_subspace, (WEIGHT, HESSIAN, BASIS, 3), {}),
    (objective.relative_error, (WEIGHT, WEIGHT, HESSIAN), {}),
])  # fmt: skip
def test_half_steps_lower(function, arguments, static):
    lowered(function, *arguments, **static)


@pytest.mark.parametrize(
    "spec", ["trellis-2.25+r4@trellis-4", "trellis-2.25w", "e8-3+r4@e8-4", "int-3g16a/rot+r4@bf16", "nf-4g16+r4@int-8"]
)
def test_dense_lowers(spec):
    from qlr_jax.formats.qlr.packed import array_shapes

    layout = Layout(str(Spec.parse(spec)), (M, N), 1, 0, BITS)
    matrix = QLRMatrix({k: jax.ShapeDtypeStruct(*v) for k, v in array_shapes(layout).items()}, layout)
    made = export.export(jax.jit(lambda q: q.dense()), platforms=["tpu", "cuda"])(matrix)
    assert made.out_avals[0].shape == (M, N)
