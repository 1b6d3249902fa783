"""What other formats hold: bytes against sums made here, ties, refusals; and a job for each of them."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlr_jax as qlr
from qlr_jax import job
from qlr_jax.calibration import read_hessians
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.formats.targets import TARGETS, find_target
from qlr_jax.models import LlamaConfig, linear_names, load_model, save_model, shape_of
from qlr_jax.pipelines.source import open_source
from qlr_jax.sensitivity import options, price
from qlr_jax.settings.recipe import Recipe

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
)
LIGHT = Recipe(
    budget="4.5bpw", ranks=(0, 4), iterations=1, sequences=8, sequence_length=32, measure_tokens=256, refine=0, state_bits=6
)


@pytest.mark.parametrize(
    ("target", "spec", "shape", "size"),
    [
        ("gguf", "int-4g32", (8, 64), 8 * 2 * 18),
        ("gguf", "int-8g32+r4@bf16", (8, 64), 8 * 2 * 34 + 2 * 4 * 72),
        ("gguf", "int-3g256", (8, 512), 8 * 2 * 110),
        ("gguf", "int-2g256", (8, 256), 8 * 84),
        ("gguf", "bf16", (8, 64), 2 * 8 * 64),
        ("compressed-tensors", "int-3g32", (8, 64), 8 * 24 + 8 * 2 * 2 + 16),
        ("compressed-tensors", "int-3", (8, 65), 8 * 4 * 7 + 8 * 2 + 16),
        ("compressed-tensors", "int-4g64+r2@bf16", (8, 64), 8 * 32 + 8 * 2 + 16 + 2 * 2 * 72),
        ("adapter", "bf16+r2@bf16", (8, 64), 2 * 2 * 72 + 4),
        ("adapter", "bf16", (8, 64), 0),
        ("qlr", "trellis-2", (64, 64), 64 * 64 // 4 + 4),
    ],
)
def test_bytes(target, spec, shape, size):
    assert find_target(target).nbytes(Spec.parse(spec), shape) == size and find_target(target).holds(Spec.parse(spec), shape)


@pytest.mark.parametrize(
    ("target", "spec", "shape", "says"),
    [
        ("gguf", "trellis-2", (8, 256), "a rotated backbone"),
        ("gguf", "int-4g64", (8, 256), "no block is int-4g64"),
        ("gguf", "int-3g256", (8, 128), "blocks of 256"),
        ("compressed-tensors", "int-4g32a", (8, 64), "no symmetric integer"),
        ("compressed-tensors", "int-5g32", (8, 64), "no symmetric integer"),
        ("compressed-tensors", "int-4g32/rot", (8, 64), "rotated"),
        ("compressed-tensors", "int-4g64", (8, 96), "whole groups"),
        ("compressed-tensors", "nf-4g64", (8, 64), "no symmetric integer"),
    ],
)
def test_what_is_not_held_is_refused_with_what_is(target, spec, shape, says):
    with pytest.raises(QLRError, match=says) as caught:
        find_target(target).check("model.x", Spec.parse(spec), shape)
    assert "model.x" in str(caught.value) and "it holds the backbones int-" in str(caught.value)
    assert not find_target(target).holds(Spec.parse(spec), shape)


def test_options_and_prices_are_those_of_the_target():
    shape, target = (64, 96), TARGETS["gguf"]
    offered = options(target.backbones, (0, 8), target.factors, shape, target.nbytes, target.holds)
    assert offered == ["int-8g32", "int-8g32+r8@bf16", "int-4g32", "int-4g32+r8@bf16", "bf16"]  # 96 inputs are no block of 256
    mixed = options(("int-4g32", "trellis-2"), (0,), ("bf16",), shape, target.nbytes, target.holds)
    assert mixed == ["int-4g32"]
    with pytest.raises(QLRError, match=r"none of the backbones fits a \(8, 16\); exclude it"):
        price(CONFIG, {"a": (8, 16)}, lambda shape: [], target.nbytes)
    recipe = Recipe(target="compressed-tensors")
    assert recipe.backbones == TARGETS["compressed-tensors"].backbones and recipe.factors == ("bf16",)
    assert Recipe().updated(target="gguf").backbones == TARGETS["gguf"].backbones
    assert Recipe(backbones=("int-4g32",)).updated(target="gguf", ranks=(0,)).backbones == ("int-4g32",)


@pytest.mark.parametrize("name", ["gguf", "compressed-tensors"])
def test_a_job_for_a_target(tiny, text, tmp_path, name):
    """Of two backbones that both hold, so that one compilation of each serves both jobs."""
    target, recipe = find_target(name), LIGHT.updated(target=name, backbones=("int-4g32", "int-8g32"))
    report = job.compress(tiny, tmp_path / "out", "5.5bpw", text, recipe).report
    for row in report["matrices"]:
        spec, shape = Spec.parse(row["spec"]), tuple(row["shape"])
        assert target.holds(spec, shape) and row["bytes"] == target.nbytes(spec, shape)
    assert 5 < report["bits_per_weight"] <= 5.5 and report["target"] == name
    backbones = {row["kind"]: Spec.parse(row["spec"]).backbone for row in report["matrices"]}
    for kinds in (("q", "k", "v"), ("gate", "up")) if target.ties else ():
        assert len({backbones[kind] for kind in kinds}) == 1
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").target == name
    assert 0.5 < report["prediction"]["median"] < 2


@pytest.fixture(scope="module")
def rounded(tiny, tmp_path_factory):
    """Somebody's 3-bit version of the tiny model."""
    folder, model = tmp_path_factory.mktemp("rounded") / "model", load_model(tiny)
    for linear in model.linears().values():
        w = np.asarray(linear.weight.get_value())
        step = np.abs(w).max(1, keepdims=True) / 4
        linear.weight.set_value(np.round(w / step) * step)
    save_model(model, folder)
    return folder


def test_factors_on_another_methods_backbone(tiny, rounded, text, tmp_path):
    recipe = LIGHT.updated(backbone_from=str(rounded), budget="2bpw", ranks=(0, 4, 8))
    report = job.compress(tiny, tmp_path / "out", calibration=text, recipe=recipe).report
    assert report["target"] == "adapter" and 0 < report["bits_per_weight"] <= 2
    if report["delivered"] == "allocated":
        assert report["calibration_kl"]["allocated"] < report["calibration_kl"]["rank0"]
    stored, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(rounded / "model.safetensors")
    for name, matrix in qlr.load(tmp_path / "out").linears().items():
        value = matrix.weight.get_value()
        q = value.backbone() if hasattr(value, "backbone") else value
        np.testing.assert_array_equal(np.asarray(q), np.asarray(base[f"{name}.weight"], np.float32))  # Q is theirs, to the bit
    ranked = [row for row in report["matrices"] if "+r" in row["spec"]]
    assert ranked and all(f"{row['name']}.left.codes" in stored for row in ranked)
    assert 0.9 < report["prediction"]["median"] < 1.1


def test_a_backbone_of_another_model_is_refused(tiny, rounded, text, tmp_path):
    tensors = load_file(rounded / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    folder = tmp_path / "folded"
    folder.mkdir()
    (folder / "config.json").write_text((rounded / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QLRError, match=r"model\.norm\.weight is not the original's"):
        open_source(tiny, LIGHT.updated(backbone_from=str(folder)))
    with pytest.raises(QLRError, match="exclude cannot be had with backbone_from"):
        Recipe(backbone_from="x", include=("*.mlp.*",))
    with pytest.raises(QLRError, match="give backbone_from"):
        Recipe(target="adapter")


# ------------------------------------------------------------------------------------------------ Hessians made elsewhere

SIZES = {name: shape_of(CONFIG, name)[1] for name in linear_names(CONFIG)}
INPUTS = {"self_attn.qkv": 32, "self_attn.o_proj": 32, "mlp.gate_up": 32, "mlp.down_proj": 32}


def metrics(activations):
    return {f"model.layers.0.{name}": activations(n, i).astype(np.float32) for i, (name, n) in enumerate(INPUTS.items())}


def write(folder, arrays, form):
    folder.mkdir()
    if form == "one file":
        np.savez(folder / "all.npz", **arrays)
        return folder / "all.npz"
    for name, array in arrays.items():
        if form == "npy":
            np.save(folder / f"{name}.npy", array)
        elif form == "npz":
            np.savez(folder / f"{name}.npz", H=array)
        else:  # by a layer that reads the input, under its own name
            linear = name.replace("qkv", "k_proj").replace("gate_up", "up_proj")
            save_file({f"{linear}.weight": np.ascontiguousarray(array)}, folder / f"part{len(list(folder.iterdir()))}.safetensors")
    return folder


@pytest.mark.parametrize("form", ["one file", "npy", "npz", "safetensors"])
def test_hessians_are_read(activations, tmp_path, form):
    arrays = metrics(activations)
    found = read_hessians(write(tmp_path / "h", arrays, form), SIZES)
    assert set(found) == set(SIZES)
    for name, h in found.items():
        want = next(a for key, a in arrays.items() if key == name or re.sub(r"(q|k|v)_proj$", "qkv", name) == key
                    or re.sub(r"(gate|up)_proj$", "gate_up", name) == key)  # fmt: skip
        np.testing.assert_allclose(h, want, rtol=1e-6)
    assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]


def test_hessians_that_cannot_be_used(activations, tmp_path):
    arrays = metrics(activations)
    with pytest.raises(QLRError, match="does not exist"):
        read_hessians(tmp_path / "nowhere", SIZES)
    fewer = {name: a for name, a in arrays.items() if "down" not in name}
    with pytest.raises(QLRError, match=r"no Hessian of model\.layers\.0\.mlp\.down_proj"):
        read_hessians(write(tmp_path / "fewer", fewer, "npy"), SIZES)
    wrong = arrays | {"model.layers.0.mlp.down_proj": -arrays["model.layers.0.mlp.down_proj"]}
    with pytest.raises(QLRError, match=r"down_proj.*indefinite"):
        read_hessians(write(tmp_path / "wrong", wrong, "npz"), SIZES)
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(QLRError, match=r"bad\.npz cannot be read"):
        read_hessians(tmp_path / "bad.npz", SIZES)


def test_a_job_with_hessians_made_elsewhere(tiny, text, tmp_path, activations):
    source = write(tmp_path / "h", metrics(activations), "npz")
    recipe = LIGHT.updated(hessians_from=str(source), outputs="alike", backbones=("int-2g16", "int-3g16"), ranks=(0,))
    report = job.compress(tiny, tmp_path / "out", "3.5bpw", text, recipe).report
    found = qlr.load(tmp_path / "out").linears()
    original = load_model(tiny).linears()
    hessians = read_hessians(source, SIZES)
    for row in report["matrices"]:
        w, h = (np.asarray(x, np.float64) for x in (original[row["name"]].weight.get_value(), hessians[row["name"]]))
        e = w - np.asarray(found[row["name"]].weight.get_value().dense(), np.float64)
        assert row["relative_error"] == pytest.approx(np.sqrt(np.sum(e @ h * e) / np.sum(w @ h * w)), rel=1e-3)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["hessians_from"] == str(source)
