"""NVFP4 from a recipe to an adapted folder: as backbone and factors, in JAX and in PyTorch."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from test_formats import relative
from test_job import LIGHT

import qlr_jax as qlr
from qlr_jax import job
from qlr_jax.adaptation import AdaptConfig
from qlr_jax.core.quantizers import NVFP4
from qlr_jax.formats import read_matrices
from qlr_jax.pipelines import adapt as adapting
from qlr_jax.pipelines.evaluate import evaluate

torch = pytest.importorskip("torch")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402

TOKENS = np.arange(12)[None]
RECIPE = LIGHT.updated(
    backbones=("nvfp4", "nvfp4/rot"), factors=("nvfp4",), budget="5.2bpw", refine=0, include=("*.gate_proj", "*.down_proj")
)
CONFIG = AdaptConfig(
    train=("norms", "scales", "factors", "backbone"), steps=2, batch=5, evaluate_every=1, compute="float32", devices=1
)


@jax.jit
def forward(model, tokens):
    return model(tokens)


def agrees(folder):
    """PyTorch's logits, packed and decoded once, are those of JAX; float8 scales stay so whatever the model's type."""
    wanted = np.asarray(forward(qlr.load(folder), TOKENS))
    once = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    once.quantization_config["dequantize"] = True
    with torch.no_grad():
        for options in ({}, {"config": once}):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, **options)
            assert relative(model(torch.from_numpy(TOKENS)).logits.numpy(), wanted) < 1e-4
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True)
        assert relative(half(torch.from_numpy(TOKENS)).logits.float().numpy(), wanted) < 0.05
    kinds = {t.dtype for name, t in half.state_dict().items() if name.endswith("scales")}
    assert kinds == {torch.float8_e4m3fn}


def test_from_recipe_to_adapted_folder(tiny, text, tmp_path):
    out = tmp_path / "out"
    report = job.compress(tiny, out, calibration=text, recipe=RECIPE).report
    specs = {qlr.Spec.parse(row["spec"]) for row in report["matrices"]}
    assert {spec.backbone for spec in specs} == {"nvfp4"} and any(spec.left == "nvfp4" for spec in specs), specs
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert NVFP4.runtime_version == quantization["runtime_version"] <= runtime.RUNTIME_VERSION
    assert all(m.arrays["backbone.scales"].dtype == ml_dtypes.float8_e4m3fn for m in read_matrices(out).values())
    agrees(out)
    assert evaluate(out, text=[text], original=tiny, windows=4, drift=False)["kl"] < 1e-4

    told = adapting.adapt(out, tmp_path / "adapted", [text], CONFIG, evaluation_tokens=256)
    assert np.isfinite(told["after"]["kl"]) and told["bits_per_weight"] == told["bits_per_weight_before"]
    agrees(tmp_path / "adapted")
