"""What comes in from a Hugging Face folder: which file is the model, which setting counts, what is read past, what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlr_jax
from qlr_jax import job
from qlr_jax.cost.find import find_config
from qlr_jax.errors import QLRError
from qlr_jax.formats import save_packed
from qlr_jax.formats.qlr.packed import read_config
from qlr_jax.models import Llama, LlamaConfig, load_model, load_tokenizer, save_model
from qlr_jax.models.attributes import changes_no_logit
from qlr_jax.models.identity import digest_model
from qlr_jax.pipelines.evaluate import evaluate
from qlr_jax.report import summary
from qlr_jax.report.markdown import report_markdown
from qlr_jax.run.facts import completed, job_facts
from qlr_jax.settings.constraints import Constraints
from qlr_jax.settings.recipe import Recipe

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
SMALL = LlamaConfig(**SIZES)
LIGHT = Recipe(
    backbones=("int-3g32", "int-4g32"),
    ranks=(0,),
    include=("*.k_proj",),
    attribution="error",
    outputs="alike",
    iterations=1,
    sequences=8,
    sequence_length=32,
    measure_tokens=256,
    refine=0,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (1, 24))
run = jax.jit(lambda model, tokens: model(tokens))


def make(folder, seed=0):
    return save_model(Llama(SMALL, jax.random.key(seed)), folder, "float32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two folders of one config with other weights."""
    parent = tmp_path_factory.mktemp("pair")
    return make(parent / "one", 1), make(parent / "two", 2)


@pytest.fixture
def folder(pair, tmp_path):
    return shutil.copytree(pair[0], tmp_path / "model")


def embedding(model):
    return np.asarray(model.tensors()["model.embed_tokens.weight"].get_value())


def edit(folder, *drop, **change):
    """config.json with attributes added, or taken out."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {name: value for name, value in raw.items() if name not in drop} | change
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def rewrite(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")


def torch_logits(folder, **options):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def assert_as_transformers(folder):
    theirs = torch_logits(folder)
    ours = np.asarray(run(load_model(folder), jnp.asarray(TOKENS)))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# --- which file is the model -----------------------------------------------------------------------------------------------


def sharded(source, folder, name="model", index="model.safetensors.index.json"):
    """The weights of `source` in `folder` as two shards with an index."""
    arrays = load_file(source / "model.safetensors")
    names = sorted(arrays)
    where = {n: f"{name}-{1 + (i % 2):05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: arrays[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def test_the_single_file_counts_before_the_shards_of_another_model(pair, folder):
    sharded(pair[1], folder)
    said = []
    model = load_model(folder, note=said.append)
    np.testing.assert_array_equal(embedding(model), embedding(load_model(pair[0])))
    assert_as_transformers(folder)
    assert digest_model(folder) == digest_model(pair[0])  # nor do the others count anywhere else
    assert find_config(folder)[1] == (folder / "model.safetensors").stat().st_size
    assert len(said) == 1 and "model.safetensors is read" in said[0] and "model-00001-of-00002.safetensors" in said[0]
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(embedding(load_model(folder)), embedding(load_model(pair[1])))
    assert_as_transformers(folder)


def test_an_index_that_a_second_save_left_behind_is_not_read(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}})
    )
    assert_as_transformers(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(QLRError, match=r"model-00001-of-00009\.safetensors does not exist"):
        load_model(folder)


def test_a_file_that_the_config_names_counts_first(pair, folder):
    shutil.copyfile(pair[1] / "model.safetensors", folder / "best.safetensors")
    edit(folder, transformers_weights="best.safetensors")
    np.testing.assert_array_equal(embedding(load_model(folder)), embedding(load_model(pair[1])))
    assert_as_transformers(folder)
    sharded(pair[0], folder, "other", "other.safetensors.index.json")
    edit(folder, transformers_weights="other.safetensors.index.json")
    np.testing.assert_array_equal(embedding(load_model(folder)), embedding(load_model(pair[0])))
    for name in ("../one/model.safetensors", "pytorch_model.bin"):
        edit(folder, transformers_weights=name)
        with pytest.raises(QLRError, match=f"'transformers_weights' is '{name}'"):
            load_model(folder)


BESIDE = ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.gguf")


def test_what_lies_beside_the_model_is_said(folder):
    for name in BESIDE:
        (folder / name).write_bytes(b"\0")
    (folder / "original").mkdir()
    (folder / "training_args.bin").write_bytes(b"\0")
    said = []
    load_model(folder, note=said.append)
    assert len(said) == 1 and "consolidated.00.pth, consolidated.safetensors, model.fp16.safetensors and 3 more not" in said[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", r"found pytorch_model\.bin; only safetensors are read, convert it with transformers"),
        ("model.pt", r"found model\.pt; only safetensors"),
        ("consolidated.00.pth", r"found consolidated\.00\.pth; only safetensors"),
        ("model.fp16.safetensors", r"found the variant model\.fp16\.safetensors"),
        ("consolidated.safetensors", r"found consolidated\.safetensors, in another naming"),
    ],
)
def test_checkpoints_of_another_kind_are_named(folder, name, says):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(QLRError, match=rf"model\.safetensors does not exist \({says}"):
        load_model(folder)


def test_folders_of_another_kind_are_named(folder):
    with open(folder / "model.safetensors", "w") as file:
        file.write("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(QLRError, match=r"pointer of Git LFS, .*git lfs pull"):
        load_model(folder)
    (folder / "shard-00001-model-00001-of-00001.safetensors").touch()
    with pytest.raises(QLRError, match=r"distributed checkpoint .*save_pretrained"):
        load_model(folder)


def test_an_adapter_is_no_model_and_changes_the_one_beside_it(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(QLRError, match=r"LoRA adapter .*changes the one beside it; merge it"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(QLRError, match="is a LoRA adapter, not a model; merge it"):
        load_model(folder)


def test_a_tokenizer_that_only_sentencepiece_reads_is_named(folder):
    (folder / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(QLRError, match=r"as tokenizer\.model alone.* put the tokenizer\.json"):
        load_tokenizer(folder)


def test_pointers_in_place_of_small_files_are_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(QLRError, match=r"tokenizer\.json is a pointer of Git LFS"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(QLRError, match=r"config\.json is a pointer of Git LFS"):
        load_model(folder)


@pytest.mark.parametrize(
    ("end", "says"),
    [(".qweight", "GPTQ and AWQ"), (".weight.absmax", "bitsandbytes"), (".lora_A.weight", "not merged has; merge it")],
)
def test_tensors_of_another_kind_are_named_though_the_config_does_not(folder, end, says):
    name = "model.layers.0.self_attn.q_proj"
    rewrite(folder, lambda a: a.update({name + end: a.pop(f"{name}.weight")}))
    with pytest.raises(QLRError, match=rf"has tensors \*\{end}, as .*{says}"):
        load_model(folder)


# --- which setting counts --------------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def draw(rng):
    """A config.json that names things twice, in the spellings of versions 4 and 5."""
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    name = pick("Llama", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Olmo2")

    def rope(inside):
        kind = pick("default", "linear", "llama3")
        more = {"default": {}, "linear": {"factor": float(pick(2, 4))}, "llama3": dict(LLAMA3)}[kind]
        if kind == "llama3" and rng.random() < 0.3:
            del more["original_max_position_embeddings"]
        names = pick(({"type": kind}), ({"rope_type": kind}), ({"rope_type": kind, "type": pick("default", "linear")}))
        return names | more | ({"rope_theta": pick(1e3, 3e4)} if inside and rng.random() < 0.6 else {})

    raw = {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **SIZES, "max_position_embeddings": pick(32, 64)}
    raw |= pick({}, {"dtype": "float32"}, {"torch_dtype": "float16"}, {"dtype": "float32", "torch_dtype": "bfloat16"})
    raw |= pick({}, {"rope_theta": 500.0}, {"rope_theta": 20000})
    raw |= pick({"rope_scaling": None}, {"rope_scaling": {}}, {"rope_scaling": rope(True)}, {"rope_scaling": rope(True)})
    raw |= pick({}, {"rope_parameters": None}, {"rope_parameters": rope(True)}, {"rope_parameters": rope(True)})
    raw |= pick({}, {"head_dim": 6}) if name not in ("Qwen3", "Gemma") else {"head_dim": pick(6, 8)}
    raw |= {} if name in ("Mistral", "Gemma") else pick({}, {"num_key_value_heads": None})
    raw |= pick({"sliding_window": 5}, {"sliding_window": None}, {"sliding_window": 5, "use_sliding_window": False})
    if name in ("Llama", "Gemma", "Olmo2"):
        raw["sliding_window"] = None
    raw |= pick({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False})
    if name in ("Llama", "Qwen3", "Gemma", "Olmo2"):
        raw |= pick({}, {"attention_bias": True})
    if name == "Gemma":
        raw |= pick({}, {"hidden_act": "gelu"}, {"hidden_activation": "gelu_pytorch_tanh"})
    elif rng.random() < 0.5:
        raw["hidden_act"] = pick("silu", "swish")
    return raw


@pytest.mark.parametrize("seed", range(10))
def test_configs_are_resolved_as_in_transformers(seed, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = draw(np.random.default_rng(seed))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():  # weights large enough that a wrong angle or window shows
        for p in theirs.parameters():
            p.mul_(8 if p.ndim > 1 else 1).add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0)
        wanted = theirs(torch.tensor(TOKENS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copyfile(tmp_path / "theirs" / "model.safetensors", tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    ours = np.asarray(run(model, jnp.asarray(TOKENS)))
    assert np.abs(ours - wanted).max() <= 2e-5 * np.abs(wanted).max(), raw
    out = save_packed(tmp_path / "out", model, {}, source=tmp_path)  # written once, for every reader
    assert qlr_jax.load(out).config == model.config


def test_of_two_rope_spellings_the_former_counts_and_it_is_said(folder):
    edit(folder, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters={"rope_type": "default", "rope_theta": 7e4})
    said = []
    assert load_model(folder, note=said.append).config.rope_scaling.factor == 4.0
    assert len(said) == 1 and "rope_scaling counts" in said[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 32}, "is 32, and 16 among"),
        ({"rope_theta": None, "rope_parameters": None}, "rope_theta is None"),
        ({"rope_theta": "1e4", "rope_parameters": None}, "rope_theta is '1e4'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_parameters": {"rope_type": None}}, "rope type None"),
        ({"rope_parameters": 4}, "rope parameters 4"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"head_dim": 8.5}, "head_dim is 8.5"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": None}, "head_dim is None"),
    ],
)
def test_settings_that_contradict_or_are_no_numbers_are_refused(change, says):
    with pytest.raises(QLRError, match=says) as caught:
        LlamaConfig.from_hf(SMALL.to_hf() | change)
    assert "\n" not in str(caught.value)


def test_a_tied_head_may_be_stored_alone(folder):
    edit(folder, tie_word_embeddings=True)
    rewrite(folder, lambda a: a.pop("model.embed_tokens.weight"))
    assert_as_transformers(folder)


# --- what is read past -----------------------------------------------------------------------------------------------------

READ_PAST = {
    "unk_token_id": 0, "_model_name_or_path": "x", "license": "mit",
    "image_token_index": 7, "is_llama_config": True, "transformers.js_config": {"a": 1},
    "unsloth_tiled_mlp": True, "max_sequence_length": 2048, "model_max_length": 9, "hidden_dropout_prob": 0.5, "resid_pdrop": 0.1,
    "torch_version": "2.9", "tokenizer_class": "X", "min_p": 0.1, "use_flash_attention_2": True, "base_model_tp_plan": {"a": "b"},
    "initializer_cutoff_factor": 3, "name_or_path": "a/b", "_commit_hash": "0", "anything": None, "unk_token": "<u>",
}  # fmt: skip
MATTERS = {
    "qk_norm": True, "logit_scale": 2.0, "attn_logit_softcapping": 30.0, "embedding_multiplier": 12, "rope_version": 2,
    "use_parallel_residual": False, "num_experts": 4, "token_idle": 1, "use_bias": False, "clip_qkv": 8, "attention_type": "local",
    "final_norm": False, "layer_norm_eps": 1e-5, "n_layer": 3, "kv_heads": 1,
}  # fmt: skip


def test_what_changes_no_logit_is_read_past_by_kind():
    assert LlamaConfig.from_hf(SMALL.to_hf() | READ_PAST) == SMALL
    from transformers import GenerationConfig

    for name in GenerationConfig._get_default_generation_params():  # what transformers takes out of a config.json
        assert changes_no_logit(name, 1), name


@pytest.mark.parametrize("name", MATTERS)
def test_what_may_matter_is_refused_with_the_way_on(name):
    raw = SMALL.to_hf() | {name: MATTERS[name]}
    with pytest.raises(QLRError, match=rf"attribute '{name}' \(value .*--ignore-config {name}$"):
        LlamaConfig.from_hf(raw)
    assert LlamaConfig.from_hf(raw, ignore=[name]) == SMALL


def test_what_counts_cannot_be_ignored():
    for name in ("hidden_size", "rope_scaling", "model_type", "hidden_act", "layer_types", "quantization_config"):
        with pytest.raises(QLRError, match=f"'{name}' counts, so it cannot be ignored"):
            LlamaConfig.from_hf(SMALL.to_hf(), ignore=[name])
    raw = SMALL.to_hf() | {"rope_scaling": {"rope_type": "default", "beta": 2.0}}
    with pytest.raises(QLRError, match=r"rope parameter 'beta' .*--ignore-config beta"):
        LlamaConfig.from_hf(raw)
    assert LlamaConfig.from_hf(raw, ignore=["beta"]) == SMALL


def test_logits_are_compared_where_an_attribute_was_ignored(folder, monkeypatch, tmp_path):
    raw = edit(folder, sharpness=2.0, sliding_window=4, num_labels=3)
    said = []
    model = load_model(folder, ignore=["sharpness", "sliding_window", "absent"], note=said.append)
    assert (
        len(said) == 1 and "sharpness (2.0), sliding_window (4) ignored as asked; the logits of the first 1 blocks equal" in said[0]
    )
    out = save_packed(tmp_path / "out", model, {}, source=folder)
    kept = {name: value for name, value in raw.items() if name not in ("sharpness", "sliding_window")}
    assert read_config(out)[0] == kept | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert qlr_jax.load(out).config == model.config
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_model(folder, ignore=["sharpness", "sliding_window"], note=said.append)
    assert "because torch is not installed" in said[-1]
    edit(folder, per_layer_config={"0": {"hidden_act": "relu"}})
    monkeypatch.undo()
    load_model(folder, ignore=["sharpness", "sliding_window", "per_layer_config"], note=said.append)
    assert "because transformers cannot read" in said[-1]


def test_an_ignored_attribute_that_changes_logits_is_refused(pair, folder, monkeypatch):
    from qlr_jax.models import folder as importer
    from qlr_jax.models.parity import differs

    edit(folder, sharpness=2.0)
    monkeypatch.setattr(importer, "differs", lambda model, _: differs(model, pair[1]))  # a transformers that heeds it
    with pytest.raises(QLRError, match=r"without config.json's sharpness \(2.0\) the logits of the first 1 blocks differ from tr"):
        load_model(folder, ignore=["sharpness"])


def test_zero_biases_are_left_out(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda a: a.update({name: np.zeros(32, np.float32), "model.layers.0.mlp.up_proj.bias": np.zeros(40)}))
    said = []
    load_model(folder, note=said.append)
    assert len(said) == 1 and "2 biases are stored" in said[0]
    assert_as_transformers(folder)
    rewrite(folder, lambda a: a[name].__setitem__(3, 1e-3))
    with pytest.raises(QLRError, match=f"{name} is stored and not zero, .*attention_bias"):
        load_model(folder)


# --- float8 and other quantized weights ------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj.weight"  # (32, 40)
F8 = ml_dtypes.float8_e4m3fn
SCALES = {  # the name of the scale, its array, its block, W's factor by element
    "matrix": ("weight_scale", np.float32([0.5]), None, (1, 1)),
    "scalar": ("weight_scale", np.float32(0.5), None, (1, 1)),
    "rows": ("weight_scale", np.linspace(0.1, 2, 32, dtype=np.float32)[:, None], None, (32, 1)),
    "bf16 rows": ("weight_scale", np.linspace(0.1, 2, 32).astype(ml_dtypes.bfloat16), None, (32, 1)),
    "blocks": ("weight_scale_inv", np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 8, (16, 16), (2, 3)),
    "even blocks": ("weight_scale_inv", np.arange(1, 11, dtype=np.float32).reshape(2, 5) / 8, None, (2, 5)),
    "powers": ("weight_scale_inv", np.float32([[0.25, 2], [1, 4]]).astype(ml_dtypes.float8_e8m0fnu), None, (2, 2)),
    "bytes": ("weight_scale_inv", np.uint8([[125, 128], [127, 129]]), None, (2, 2)),
}


@pytest.mark.parametrize("case", SCALES)
def test_float8_weights_are_multiplied_out(case, folder):
    name, scale, block, grid = SCALES[case]
    codes = load_file(folder / "model.safetensors")[DOWN].__mul__(100).astype(F8)
    stem = DOWN.removesuffix("weight")
    rewrite(folder, lambda a: a.update({DOWN: codes, stem + name: scale, stem + "input_scale": np.float32([3])}))
    if block:
        edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    factors = 2.0 ** (scale.astype(np.float64) - 127) if scale.dtype == np.uint8 else np.asarray(scale, np.float64)
    height, width = (-(-n // g) if not block else b for n, g, b in zip((32, 40), grid, block or (0, 0), strict=True))
    wanted = np.array([[float(codes[i, j]) * factors.reshape(grid)[i // height, j // width] for j in range(40)] for i in range(32)])
    said = []
    for on_disk in (False, True):
        model = load_model(folder, on_disk=on_disk, note=said.append)
        found = model.block(0).tensors()[DOWN.removeprefix("model.layers.0.")].get_value()
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6)
    assert "1 weights are stored as float8" in said[0]
    if block:  # nothing of it is left in what is written
        out = save_packed(folder.parent / "out", model, {}, source=folder)
        assert "weight_block_size" not in (out / "config.json").read_text()


def test_logits_of_float8_weights_are_those_that_transformers_dequantizes(folder):
    from transformers import FineGrainedFP8Config

    def change(arrays):
        for name in [name for name in arrays if name.endswith("_proj.weight")]:
            m, n = arrays[name].shape
            blocks = arrays[name].reshape(m // 8, 8, n // 8, 8)
            scale = np.abs(blocks).max((1, 3), keepdims=True) / 448
            arrays |= {name: (blocks / scale).reshape(m, n).astype(F8), f"{name}_scale_inv": scale[:, 0, :, 0]}

    rewrite(folder, change)
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"})
    theirs = torch_logits(folder, quantization_config=FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True))
    ours = np.asarray(run(load_model(folder), jnp.asarray(TOKENS)))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({DOWN: np.zeros((32, 40), F8)}, "has type float8_e4m3fn; .*unquantized"),
        ({DOWN: np.zeros((32, 40), ml_dtypes.float8_e5m2)}, "has type float8_e5m2; .*unquantized"),
        ({DOWN: np.zeros((32, 40), F8), DOWN + "_scale_inv": np.ones((3, 3), np.float32)}, r"\(3, 3\) do not divide"),
        ({DOWN: np.zeros((32, 40), np.int8), DOWN + "_scale": np.ones(1, np.float32)}, "type int8; only float8"),
    ],
)
def test_float8_whose_meaning_is_not_told_is_refused(folder, change, says):
    rewrite(folder, lambda a: a.update(change))
    with pytest.raises(QLRError, match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, r"quantized already \(gptq\); .*--backbone-from"),
        ("quantization_config", {"quant_method": "awq"}, r"quantized already \(awq\); give the model that it was made of"),
        ("quantization_config", {"quant_method": "bitsandbytes"}, r"\(bitsandbytes\); give the original model"),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"\(compressed-tensors\)"),
        ("quantization_config", {"quant_method": "qlr"}, r"\(qlr\); give the original, or `qlr evaluate`"),
        ("quantization", {"group_size": 64, "bits": 4}, "'quantization' .*quantized already"),
    ],
)
def test_quantized_models_are_named(name, value, says):
    with pytest.raises(QLRError, match=says):
        LlamaConfig.from_hf(SMALL.to_hf() | {name: value})


def test_wrappers_of_several_models_are_named():
    wrapped = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": SMALL.to_hf()}
    with pytest.raises(QLRError, match=r"LlavaForConditional.*more than text.*text_config is a LlamaForCausalLM.* its own"):
        LlamaConfig.from_hf(wrapped)
    with pytest.raises(QLRError, match="text_config is a model of type 'gemma3_text'"):
        LlamaConfig.from_hf({"model_type": "gemma3", "architectures": None, "text_config": {"model_type": "gemma3_text"}})


# --- through the commands --------------------------------------------------------------------------------------------------


def test_ignored_attributes_are_recorded_and_serve_whoever_reads_the_original(tiny, text, tmp_path, monkeypatch):
    source, out = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "out"
    edit(source, sharpness=2.0)
    shutil.copyfile(source / "model.safetensors", source / "consolidated.safetensors")
    with pytest.raises(QLRError, match=r"'sharpness' .*--ignore-config sharpness"):
        job.compress(source, out, "4bpw", text, LIGHT)
    with pytest.raises(QLRError, match="'sharpness'"):
        find_config(source)
    assert find_config(source, ["sharpness"])[0].hidden_size == 32
    recipe = LIGHT.updated(ignore_config=["sharpness"])
    report = job.compress(source, out, "4bpw", text, recipe).report
    notes = report["import_notes"]
    assert len(notes) == 2 and "consolidated.safetensors not" in notes[0] and "sharpness (2.0) ignored as asked" in notes[1]
    assert Recipe.from_yaml(out / "recipe.yaml").ignore_config == ("sharpness",)
    for page in ((out / "report.html").read_text(), report_markdown(report), summary(report)):
        assert "sharpness (2.0) ignored as asked" in page
    assert "sharpness" not in read_config(out)[0]
    assert evaluate(out, text=[text], windows=1, drift=False)["tokens"] > 0  # it knows what to ignore
    edit(source, harshness=2.0)
    with pytest.raises(QLRError, match="'harshness'"):
        evaluate(out, text=[text], windows=1, drift=False)
    assert evaluate(out, text=[text], windows=1, drift=False, ignore_config=["harshness"])["tokens"] > 0


def test_a_job_goes_on_with_what_it_ignored_only():
    begun = job_facts({"digest": "0"}, SMALL, LIGHT, "a", "b", None, Constraints())
    other = job_facts({"digest": "0"}, SMALL, LIGHT.updated(ignore_config=["sharpness"]), "a", "b", None, Constraints())
    earlier = {**begun, "recipe": {k: v for k, v in begun["recipe"].items() if k != "ignore_config"}}
    assert begun != other and completed(json.loads(json.dumps(earlier))) == json.loads(json.dumps(begun))


@pytest.mark.parametrize("command", ["compress", "plan", "sensitivity", "evaluate", "verify", "generate", "adapt"])
def test_every_command_that_reads_a_model_takes_names_to_ignore(command):
    from typer.testing import CliRunner

    from qlr_jax.cli import app

    assert "--ignore-config" in CliRunner().invoke(app, [command, "--help"]).stdout


def test_plan_and_generate_pass_names_on(folder, tiny, tmp_path):
    from typer.testing import CliRunner

    from qlr_jax.cli import app

    source = shutil.copytree(tiny, tmp_path / "tiny")
    edit(source, sharpness=2.0)
    calls = (["plan", str(source), "--budget", "2bpw"], ["generate", str(source), "--prompt", "a", "--max-new-tokens", "1"])
    for call in calls:
        failed = CliRunner().invoke(app, [*call, "--json"])
        assert failed.exit_code == 1 and "--ignore-config sharpness" in json.loads(failed.stdout)["error"]
        assert CliRunner().invoke(app, [*call, "--json", "--ignore-config", "sharpness"]).exit_code == 0
