"""L and R as a LoRA adapter: loaded by transformers and PEFT, base and adapter together are dense()."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_formats import TOKENS, dense_in_place, logits, random_matrix, relative

from qlr_jax.errors import QLRError
from qlr_jax.formats import check_files, export_dense, save_packed
from qlr_jax.formats.adapter import adapter_config, backbone
from qlr_jax.formats.card import card_of, card_text
from qlr_jax.formats.peft import export_peft
from qlr_jax.models import KINDS, Llama, LlamaConfig, load_model, parts_of, save_model, shape_of

BUNDLED = Path(__file__).parents[1] / "qlr_jax" / "bundled"
SHAPES = dict(vocab_size=96, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
SPECS = [  # by layer, in the order of KINDS; None is left as it was
    ["trellis-2+r4@trellis-4", "int-4g16+r8@bf16", "int-3g16a/rot", "bf16+r2@bf16", "trellis-2.5", "none+r16@int-8", "trellis-2"],
    ["e8-2+r4@e8-4", "bf16", "nf-4g16+r1@bf16", "bf16/rot", "trellis-2+r12@int-8,bf16", "none+r16@nf-4", None],
]


def packed_folder(parent, name, specs, *, tied, shapes=SHAPES, g=1.0, report=None):
    """A packed folder of random codes with a real tokenizer, its model and its matrices."""
    config = LlamaConfig(**shapes, num_key_value_heads=2, tie_word_embeddings=tied)
    source = parent / f"{name}-source"
    save_model(Llama(config, jax.random.key(3)), source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / file, source / file)
    model, matrices = load_model(source), {}
    for linear in model.linears():
        layer, kind = parts_of(linear)
        if spec := specs[layer][KINDS.index(kind)]:
            shape = shape_of(config, linear)
            matrix = random_matrix(spec, shape, seed=layer + 5, state_bits=8, rotation_block=16 * layer)
            if matrix.spec.has_scale:
                matrix = replace(matrix, arrays={**matrix.arrays, "scale": g * matrix.arrays["scale"]})
            matrices[linear] = matrix
    files = {"report.json": json.dumps(report)} if report else {}
    out = save_packed(parent / name, model, matrices, source=source, settings={"base_model": "org/tiny"}, files=files)
    return out, model, matrices


def rounded_halves(model, matrices, dtype, kept=lambda matrix: False):
    """The model that an export in `dtype` should be: every stored tensor rounded, the products of factors not.

    `kept` says whose backbone the export stores exactly.
    """

    def cast(x):
        return np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32)

    copied = jax.tree.map(lambda leaf: leaf, model)
    for param in copied.tensors().values():
        param.set_value(cast(param.get_value()))
    for name, matrix in matrices.items():
        base = backbone(matrix)
        weight = np.asarray(base.dense() if hasattr(base, "dense") else base)
        weight = weight if kept(matrix) else cast(weight)
        if matrix.spec.rank:
            left, right = matrix.unrotated_factors()
            weight = weight + cast(left) @ cast(right)
        copied.linears()[name].weight.set_value(weight)
    return copied


def run_card(dest):
    """The model that the code on the card loads."""
    code = re.search(r"```python\n(.*?)```", (dest / "README.md").read_text(), re.DOTALL)[1]
    scope = {}
    exec(code.replace("path/to/this/folder", str(dest)), scope)
    assert scope["tokenizer"]("def f():").input_ids
    return scope["model"]


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("peft")
    return {name: packed_folder(parent, name, SPECS, tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def wanted(folders):
    return {name: logits(dense_in_place(model, matrices)) for name, (_, model, matrices) in folders.items()}


@pytest.mark.parametrize("uniform", [False, True], ids=["ranks", "uniform"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_base_and_adapter_are_dense(folders, wanted, name, uniform, tmp_path):
    pytest.importorskip("peft")
    out, _, matrices = folders[name]
    dest = export_peft(out, tmp_path / "peft", dtype="float32", uniform_rank=uniform, shard_bytes=10**9 if uniform else 50_000)
    loaded = run_card(dest)
    error = relative(torch_logits(loaded), wanted[name])
    print(f"{name} uniform={uniform}: {error:.1e}")
    assert error < 1e-5
    ranks = {n: m.spec.rank for n, m in matrices.items() if m.spec.rank}
    layers = {n: m for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(ranks)
    assert {n: m.r["default"] for n, m in layers.items()} == (dict.fromkeys(ranks, 16) if uniform else ranks)
    assert {m.scaling["default"] for m in layers.values()} == {1.0}
    for layer in layers.values():
        layer.enable_adapters(False)
    assert relative(torch_logits(loaded), wanted[name]) > 1e-3  # the adapter had a part in it


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_what_is_stored_is_rounded(folders, wanted, dtype, tmp_path):
    pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    out, model, matrices = folders["tied" if dtype == "float16" else "untied"]
    dest = export_peft(out, tmp_path / "peft", dtype=dtype)
    exact = torch_logits(AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32))
    error = relative(exact, logits(rounded_halves(model, matrices, dtype)))
    half = relative(torch_logits(run_card(dest)), wanted["tied" if dtype == "float16" else "untied"])
    print(f"{dtype}: {error:.1e} in float32, {half:.1e} in {dtype}")
    assert error < 1e-5 and half < (0.03 if dtype == "bfloat16" else 0.005)


def test_peft_attaches_it_to_another_copy_of_the_base(folders, wanted, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    dest = export_peft(folders["untied"][0], tmp_path / "peft", dtype="float32")
    base = LlamaForCausalLM(TorchConfig.from_pretrained(dest)).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in load_file(dest / "model.safetensors").items()}
    assert set(base.load_state_dict(state, strict=False).missing_keys) == set()
    model = peft.PeftModel.from_pretrained(base, dest)
    assert relative(torch_logits(model), wanted["untied"]) < 1e-5
    assert relative(torch_logits(model.merge_and_unload()), wanted["untied"]) < 1e-5
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(dest, dtype=torch.float32)  # with room for the tokenizer's other tokens
    assert relative(torch_logits(auto)[..., :96], wanted["untied"]) < 1e-5


def test_files_of_the_folder(folders, tmp_path):
    out, _, matrices = folders["untied"]
    dest = export_peft(out, tmp_path / "peft")
    names = {path.name for path in dest.iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors"} <= names
    assert check_files(dest) == len(names) - 1
    index = json.loads((dest / "model.safetensors.index.json").read_text())  # without it vLLM reads the adapter as weights
    assert set(index["weight_map"]) == set(load_file(dest / "model.safetensors"))
    adapter = load_file(dest / "adapter_model.safetensors")
    ranked = {n: m for n, m in matrices.items() if m.spec.rank}
    assert sum(a.nbytes for a in adapter.values()) == sum(2 * m.spec.rank * sum(m.shape) for m in ranked.values())
    assert not (load_file(dest / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]).any()  # none: factors alone
    config = json.loads((dest / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16 and config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["target_modules"]) == set(ranked)
    damaged = bytearray((dest / "adapter_model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (dest / "adapter_model.safetensors").write_bytes(damaged)
    with pytest.raises(QLRError, match=r"adapter_model.safetensors has changed"):
        check_files(dest)


def test_one_rank_for_all_needs_no_patterns():
    config = adapter_config({"a": 8, "b": 8})
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == 8


def test_refusals_write_nothing(folders, tmp_path):
    out = folders["tied"][0]
    flat, *_ = packed_folder(tmp_path, "flat", [["int-4g16", *[None] * 6], [None] * 7], tied=True)
    shapes = SHAPES | dict(hidden_size=640, num_hidden_layers=1, num_attention_heads=4, vocab_size=32)
    wide, *_ = packed_folder(tmp_path, "wide", [["none+r513@int-2", *[None] * 6]], tied=True, shapes=shapes)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("")
    before = sorted(tmp_path.iterdir())
    for why, options in {
        "no matrix of .* has a rank": dict(out=flat),
        "rank 513, and the largest uniform rank is 512": dict(out=wide, uniform_rank=True),
        "base 'gguf'": dict(base="gguf"),
        "dtype 'int8'": dict(dtype="int8"),
        "compressed-tensors cannot hold trellis-2.*it holds the backbones int-2g32, int-2g64": dict(base="compressed-tensors"),
    }.items():
        with pytest.raises(QLRError, match=why):
            export_peft(**{"out": out, "dest": tmp_path / "new"} | options)
    with pytest.raises(QLRError, match="already holds kept"):
        export_peft(out, tmp_path / "full")
    assert sorted(tmp_path.iterdir()) == before and [p.name for p in (tmp_path / "full").iterdir()] == ["kept"]


# ------------------------------------------------------------------------------------------------------ the card


def test_dense_card_loads_the_dense_folder(folders, wanted, tmp_path):
    dest = export_dense(folders["untied"][0], tmp_path / "dense", "float32")
    assert relative(torch_logits(run_card(dest)), wanted["untied"]) < 1e-5
    size = sum(array.nbytes for array in load_file(dest / "model.safetensors").values())
    assert f"{size / 1e3:.2f} kB" in (dest / "README.md").read_text() and check_files(dest) == len(list(dest.iterdir())) - 1


REPORT = {
    "model": "org/tiny",
    "budget": "2.25bpw",
    "command": "qlr compress org/tiny out --budget 2.25bpw",
    "versions": {"qlr-jax": "9.9"},
    "bits_per_weight": 2.2497,
    "bytes": {"before": 10_490_000, "after": 2_380_000},
    "perplexity": {"original": 12.1, "allocated": 12.5, "uniform": 13.25},
    "kl": {"allocated": 0.0306, "uniform": 0.05},
    "agreement": {"allocated": 0.899},
    "delivered": "uniform",
    "evaluation": {"text": "held|out.txt", "tokens": 32768, "window": 256},
}


def test_card_says_what_the_report_says(tmp_path):
    import yaml

    out, *_ = packed_folder(tmp_path, "out", SPECS, tied=True, report=REPORT)
    text = card_text(out, target="dense", snippet="load()", notes=["a note"], size=1234)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "org/tiny" and head["library_name"] == "transformers" and "qlr-jax" in head["tags"]
    for said in ("2.2497", "10.49 MB → 2.38 MB", "1.23 kB", "| 12.1 | 13.25 |", "0.05", r"held\|out.txt", "32768 tokens", "9.9"):
        assert said in text, said
    assert "12.5" not in text and "89.9" not in text  # of the model that was not delivered
    assert "```python\nload()\n```" in text and "- a note" in text and "qlr compress org/tiny" in text


def test_card_without_a_report(tmp_path, monkeypatch):
    text = card_text(tmp_path, target="gguf", snippet="x = '```'")
    assert "base_model" not in text and "Perplexity" not in text and "None" not in text and "````python" in text
    (tmp_path / "org" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for local in ("org/llama", str(tmp_path / "llama"), "./llama"):  # folders of this machine are no names on the hub
        text = card_of({"kl": {"allocated": float("nan")}, "bytes": None}, local, target="dense", snippet="")
        assert "base_model" not in text and "# llama, compressed" in text and "nan" not in text and str(tmp_path) not in text
    assert "0.25 nats" in card_of({"calibration_kl": {"allocated": 0.25}}, None, target="dense", snippet="")
