"""Integers in the compressed-tensors format: loaded by transformers with compressed-tensors itself, and by a decoder in numpy."""

import json
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_formats import dense_in_place, logits, random_matrix, relative
from test_formats_peft import packed_folder, rounded_halves, run_card, torch_logits

from qlr_jax.core.quantizers import Integer
from qlr_jax.errors import QLRError
from qlr_jax.formats import check_files
from qlr_jax.formats.compressed_tensors import export_compressed_tensors, pack, quantization_config, split_ties
from qlr_jax.formats.peft import export_peft
from qlr_jax.formats.targets import CT_BITS, CT_GROUPS, find_target

SHAPES = dict(vocab_size=96, hidden_size=128, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4)
SPECS = [  # by layer, in the order of KINDS; down has 144 inputs: 13.5 words of 3 bits
    ["int-4g32+r8@bf16", "int-4g32", "int-4g32+r4@bf16", "int-8+r1@bf16", "int-2g64+r16@bf16", "int-2g64", "int-3"],
    ["int-2", "int-3g128+r2@bf16", None, "int-8g128", "bf16", "bf16+r8@bf16", "int-3+r4@bf16"],
]
FLAT = [[spec and spec.split("+")[0] for spec in layer] for layer in SPECS]
MADE = {"ranks": (SPECS, False), "flat": (FLAT, True)}  # untied and tied
TARGET = find_target("compressed-tensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("ct")
    return {name: packed_folder(parent, name, specs, tied=tied, shapes=SHAPES, g=2.0**-3) for name, (specs, tied) in MADE.items()}


@pytest.fixture(scope="module")
def wanted(folders):
    return {name: logits(dense_in_place(model, matrices)) for name, (_, model, matrices) in folders.items()}


def is_packed(matrix):
    return isinstance(matrix.spec.quantizer(), Integer)


def unpacked(arrays, bits, group):
    """The format's own definition, one bit at a time."""
    rows, cols = arrays["weight_shape"].tolist()
    words, scale = arrays["weight_packed"].astype(np.int64) & 0xFFFFFFFF, arrays["weight_scale"].astype(np.float32)
    weight = np.empty((rows, cols), np.float32)
    for j in range(cols):
        code = np.zeros(rows, np.int64)
        for k in range(j * bits, (j + 1) * bits):
            code |= ((words[:, k // 32] >> (k % 32)) & 1) << (k - j * bits)
        weight[:, j] = (code - 2 ** (bits - 1)) * scale[:, j // group if group else 0]
    return weight


@pytest.mark.parametrize("bits", CT_BITS)
@pytest.mark.parametrize("group", CT_GROUPS)
def test_packing(bits, group):
    spec, shape = f"int-{bits}" + (f"g{group}" if group else ""), (5, 256 if group else 77)
    matrix = random_matrix(spec, shape)
    matrix = replace(matrix, arrays={**matrix.arrays, "scale": jnp.full(1, 0.25, jnp.float32)})
    arrays = pack(matrix)
    assert arrays["weight_scale"].dtype == np.float16 and arrays["weight_packed"].shape == (5, -(-shape[1] * bits // 32))
    np.testing.assert_array_equal(unpacked(arrays, bits, group), matrix.dense())
    assert sum(a.nbytes for a in arrays.values()) == TARGET.nbytes(matrix.spec, shape)

    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    import torch

    codes = helpers.unpack_from_int32(torch.from_numpy(arrays["weight_packed"]), bits, shape).numpy()
    scales = np.repeat(arrays["weight_scale"].astype(np.float32), group or shape[1], axis=1)
    np.testing.assert_array_equal(codes * scales, matrix.dense())


@pytest.mark.parametrize("g", [2.0**-14, 0.3, 2.0**24])
def test_scales_beyond_float16_are_kept_in_float32(g):
    matrix = random_matrix("int-4g32", (8, 64))
    matrix = replace(matrix, arrays={**matrix.arrays, "scale": jnp.full(1, g, jnp.float32)})
    arrays = pack(matrix)
    assert arrays["weight_scale"].dtype == np.float32
    assert relative(unpacked(arrays, 4, 32), matrix.dense()) < 1e-6


@pytest.mark.parametrize("name", MADE)
def test_transformers_loads_it_exactly(folders, wanted, name, tmp_path):
    pytest.importorskip("compressed_tensors")
    dest = export_compressed_tensors(folders[name][0], tmp_path / "ct", dtype="float32", shard_bytes=50_000)
    error = relative(torch_logits(run_card(dest)), wanted[name])
    print(f"{name}: {error:.1e}")
    assert error < 1e-5
    assert (dest / "adapter").is_dir() == (name == "ranks")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_integers_stay_exact_in_any_type(folders, wanted, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, model, matrices = folders["ranks"]
    dest = export_compressed_tensors(out, tmp_path / "ct", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
    loaded.hf_quantizer.compressor.decompress_model(loaded)
    exact = torch_logits(PeftModel.from_pretrained(loaded, dest, subfolder="adapter"))
    error = relative(exact, logits(rounded_halves(model, matrices, dtype, kept=is_packed)))
    half = relative(torch_logits(run_card(dest)), wanted["ranks"])
    print(f"{dtype}: {error:.1e} in float32, {half:.1e} in {dtype}")
    assert error < 1e-5 and half < (0.03 if dtype == "bfloat16" else 0.005)


def test_uniform_rank(folders, wanted, tmp_path):
    pytest.importorskip("compressed_tensors")
    dest = export_peft(folders["ranks"][0], tmp_path / "ct", base="compressed-tensors", dtype="float32", uniform_rank=True)
    loaded = run_card(dest)
    assert relative(torch_logits(loaded), wanted["ranks"]) < 1e-5
    assert {m.r["default"] for m in loaded.modules() if hasattr(m, "lora_A")} == {16}


def test_files_of_the_folder(folders, tmp_path):
    out, model, matrices = folders["ranks"]
    dest = export_compressed_tensors(out, tmp_path / "ct")
    names = {path.name for path in dest.iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "generation_config.json", "checksums.json", "adapter"} <= names
    assert {path.name for path in (dest / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    }
    assert "adapter/adapter_model.safetensors" in json.loads((dest / "checksums.json").read_text())["files"]
    tensors, adapter = load_file(dest / "model.safetensors"), load_file(dest / "adapter" / "adapter_model.safetensors")
    for name, matrix in matrices.items():  # in the bytes that an allocation was priced with
        stored = sum(array.nbytes for key, array in {**tensors, **adapter}.items() if f"{name}." in key)
        assert stored == TARGET.nbytes(matrix.spec, matrix.shape), name
    rest = {name: array for name, array in tensors.items() if not name.rpartition(".")[2].startswith("weight_")}
    assert {array.dtype for array in rest.values()} == {np.dtype(ml_dtypes.bfloat16)}
    quantization = json.loads((dest / "config.json").read_text())["quantization_config"]
    targets = [name for group in quantization["config_groups"].values() for name in group["targets"]]
    assert sorted(targets + quantization["ignore"]) == sorted([*model.linears(), "lm_head"])
    widths = {n: g["weights"]["num_bits"] for g in quantization["config_groups"].values() for n in g["targets"]}
    assert widths == {name: m.spec.quantizer().width for name, m in matrices.items() if is_packed(m)}
    card = (dest / "README.md").read_text()
    assert "layer 1: q_proj int-2, k_proj int-3g128, v_proj bfloat16" in card and "compressed-tensors" in card


def test_matrices_that_vllm_joins():
    ties = TARGET.ties
    same = {f"model.layers.0.{part}_proj": "int-4g32" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")}
    assert split_ties(same, ties) == []
    assert split_ties(same | {"model.layers.0.mlp.gate_proj": "int-3", "model.layers.0.mlp.up_proj": "int-2"}, ties) == [
        "layer 0: gate_proj int-3, up_proj int-2"
    ]


def test_its_own_reader_accepts_the_config():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization_config({"a": "int-4g32", "b": "int-3"}, ["c"])
    read = quantization.QuantizationConfig.model_validate(config)
    assert [(g.weights.num_bits, g.weights.group_size, g.weights.strategy) for g in read.config_groups.values()] == [
        (4, 32, "group"),
        (3, None, "channel"),
    ]


@pytest.mark.parametrize("file", ["model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_flipped_byte_is_found(folders, file, tmp_path):
    dest = export_compressed_tensors(folders["ranks"][0], tmp_path / "ct")
    data = bytearray((dest / file).read_bytes())
    data[-1] ^= 1
    (dest / file).write_bytes(data)
    with pytest.raises(QLRError, match="has changed"):
        check_files((dest / file).parent)


BAD = {
    "int-4g32/rot": "rotated backbone",
    "int-4g32a": "no symmetric integer",
    "int-5": "no symmetric integer",
    "int-4g16": "groups of 32, 64, 128 or a row",
    "nf-4g32": "no symmetric integer",
    "none+r4@bf16": "no symmetric integer",
    "trellis-2+r4@bf16": "rotated backbone",
}


def test_refusals_write_nothing(tmp_path):
    shapes = SHAPES | dict(num_hidden_layers=1)
    for i, (spec, why) in enumerate(BAD.items()):
        parent = tmp_path / str(i)
        parent.mkdir()
        out, *_ = packed_folder(parent, "packed", [["int-4g32", spec, *[None] * 5]], tied=True, shapes=shapes)
        before = sorted(parent.iterdir())
        with pytest.raises(
            QLRError, match=rf"layers\.0\.self_attn\.k_proj: .*{why}.*it holds the backbones .*int-3g128.*int-8"
        ) as told:
            export_compressed_tensors(out, parent / "new")
        assert spec in str(told.value) and sorted(parent.iterdir()) == before
    out, *_ = packed_folder(tmp_path, "packed", [[*[None] * 6, "int-4g64"]], tied=True, shapes=shapes)
    with pytest.raises(QLRError, match="inputs in whole groups, and this matrix has 144"):
        export_compressed_tensors(out, tmp_path / "new")
    out, *_ = packed_folder(tmp_path, "plain", [["bf16", *[None] * 6]], tied=True, shapes=shapes)
    with pytest.raises(QLRError, match=r"no matrix of .* holds integers"):
        export_compressed_tensors(out, tmp_path / "new")
    with pytest.raises(QLRError, match="already holds"):
        export_compressed_tensors(out, tmp_path)
    assert not (tmp_path / "new").exists()


def test_exporting_needs_none_of_their_packages(folders, tmp_path):
    """And a tokenizer that is its file is read without torch: importing that takes some seconds of every command."""
    code = """
import sys
from qlr_jax.models import load_tokenizer
from qlr_jax.models.bundled import BUNDLED
load_tokenizer(BUNDLED)
assert "torch" not in sys.modules
for name in ("torch", "peft", "compressed_tensors", "accelerate"):
    sys.modules[name] = None  # importing it now fails, as where it is not installed
from qlr_jax.formats.peft import export_peft
for base in ("dense", "compressed-tensors"):
    export_peft(sys.argv[1], f"{sys.argv[2]}/{base}", base=base)
"""
    subprocess.run([sys.executable, "-c", code, str(folders["ranks"][0]), str(tmp_path)], check=True, timeout=300)
    assert (tmp_path / "dense" / "README.md").is_file() and (tmp_path / "compressed-tensors" / "adapter").is_dir()
