"""GGUF files as models: the same logits as the original's, whatever the block type; names and rows by llama.cpp's own tables."""

import dataclasses
import json
import struct
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_families import LINEAR, LLAMA3, TOKENS, make, run, torch_logits

from qlr_jax.cost import find_config
from qlr_jax.errors import QLRError
from qlr_jax.models import LlamaConfig, find_folder, load_model, load_tokenizer
from qlr_jax.models.gguf import tensors as reading
from qlr_jax.models.gguf.file import read_gguf
from qlr_jax.models.gguf.rope import llama3_divisors, llama3_scaling
from qlr_jax.models.llama import frequencies

KINDS = gguf.GGMLQuantizationType
BLOCKS = [kind.name for kind in KINDS if kind.name not in ("F32", "F16", "F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0")]
ARCH = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA", "olmo2": "OLMO2"}
FILES = [
    "llama", "llama mlp_bias", "mistral null", "qwen2 tied", "qwen3", "qwen3 attention_bias", "gemma", "olmo2",
]  # fmt: skip


def interleaved(rows, heads):
    """llama.cpp's order: its row 2 i + j of a head is row i + j d/2."""
    half = len(rows) // heads // 2
    return rows[[h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in range(2)]]


def write(path, config, state, quantize=None, without=(), keys=(), split=0):
    """A GGUF file as llama.cpp's own converter writes it: names by the gguf package's table, q and k of llamas interleaved.

    `config` is a dictionary in transformers' spelling, `state` name -> float32 array, `quantize(name)` the name of a type.
    """
    arch = gguf.MODEL_ARCH[ARCH[config["model_type"]]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split)
    rope = config.get("rope_parameters") or {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    numbers = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"], "head_count_kv": config["num_key_value_heads"], "key_length": head,
        "value_length": head, "layer_norm_rms_eps": config["rms_norm_eps"], "rope_freq_base": rope.get("rope_theta", 1e4),
        "rope_dimension_count": head, "vocab_size": config["vocab_size"],
    }  # fmt: skip
    for key, value in numbers.items():
        if key not in without:
            getattr(writer, f"add_{key}")(value)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for key, value in keys:
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_array if isinstance(value, list) else writer.add_bool if isinstance(value, bool) else add)(key, value)
    tensors = {}
    for name, array in state.items():
        stem = name.rsplit(".", 1)[0]
        if arch == gguf.MODEL_ARCH.LLAMA and stem.endswith(("q_proj", "k_proj")):
            array = interleaved(array, config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"])
        if arch == gguf.MODEL_ARCH.GEMMA and stem.endswith("norm"):
            array = array + 1
        tensors[names.get_name(name, (".weight", ".bias")) or name] = np.ascontiguousarray(array, np.float32)
    if rope.get("rope_type") == "llama3":
        numbers = {key: rope[key] for key in rope if key not in ("rope_type", "rope_theta")}
        tensors["rope_freqs.weight"] = llama3_divisors(head // 2, rope["rope_theta"], **numbers).astype(np.float32)
    for name, array in tensors.items():
        kind = KINDS[quantize(name) if quantize and array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def arrays(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """case -> (transformers' model, its config.json as a dictionary, its arrays without a tied head's copy)."""
    found = {}

    def get(case):
        if case not in found:
            folder = tmp_path_factory.mktemp("original")
            theirs = make(case, folder)
            config = json.loads((folder / "config.json").read_text())
            state = arrays(theirs)
            if config.get("tie_word_embeddings"):
                del state["lm_head.weight"]
            found[case] = theirs, config, state
        return found[case]

    return get


def close(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


# --------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("case", FILES)
def test_logits_are_the_originals(case, originals, tmp_path):
    theirs, config, state = originals(case)
    path = write(tmp_path / "m.gguf", config, state)
    wanted = torch_logits(theirs, TOKENS)
    model = load_model(path)
    assert close(run(model, jnp.asarray(TOKENS)), wanted), case
    assert {n: p.get_value().shape for n, p in model.tensors().items()} == {n: a.shape for n, a in state.items()}
    for name, param in load_model(path.parent, on_disk=True).tensors().items():
        value = np.asarray(param.get_value())
        np.testing.assert_allclose(value, state[name], rtol=0, atol=2e-7 * np.abs(state[name]).max() + 2e-7, err_msg=name)


@pytest.mark.parametrize("case", ["llama", "qwen2 tied"])
def test_logits_are_those_of_transformers_own_reading(case, originals, tmp_path):
    """Of quantized blocks, without rope scaling (transformers reads neither rope.scaling.* nor rope_freqs.weight)."""
    import torch
    from transformers import AutoModelForCausalLM

    _, config, state = originals(case)
    config = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    kinds = iter(["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"] * 9)
    chosen = {}

    def quantize(name):
        cols = config["intermediate_size"] if "ffn_down" in name else 32 * (not name.startswith("blk") or "output" not in name)
        return chosen.setdefault(name, "F16" if cols % 32 or not cols else next(kinds))

    path = write(tmp_path / "m.gguf", config, state, quantize)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert close(run(load_model(path), jnp.asarray(TOKENS)), torch_logits(theirs, TOKENS))
    assert len(set(chosen.values())) == 7


VOCABULARY = [
    ("tokenizer.ggml.model", "gpt2"),
    ("tokenizer.ggml.pre", "gpt-2"),
    ("tokenizer.ggml.tokens", [chr(33 + i) for i in range(92)] + ["!!", "Ġ", "Ċ", "<e>"]),
    ("tokenizer.ggml.token_type", [1] * 95 + [3]),
    ("tokenizer.ggml.merges", ["! !"]),
    ("tokenizer.ggml.eos_token_id", 95),
]
IN_LLAMA_CPP = {"llama3": ("llama", LLAMA3), "linear": ("llama", LINEAR), "qwen3": ("qwen3", None), "gemma": ("gemma", None)}


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_logits_are_those_of_llama_cpp(name, originals, tmp_path):
    """Where transformers cannot tell: it reads no rope scaling, no Gemma, and of Qwen3 heads of 128 only."""
    from test_formats_gguf import log_probabilities, serve

    case, scaling = IN_LLAMA_CPP[name]
    _, config, state = originals(case)
    config = config | ({"rope_parameters": scaling} if scaling else {})
    path = write(tmp_path / "m.gguf", config, state, keys=VOCABULARY)
    model, tokens = load_model(path), TOKENS[0].tolist()
    assert np.allclose(frequencies(model.config), frequencies(LlamaConfig.from_hf(config)), rtol=1e-6)

    def places(config):
        model.config = config
        return np.asarray(jax.nn.log_softmax(run(model, jnp.asarray([tokens]))[0]))[[0, 3, 7, len(tokens) - 1]]

    found, ours = log_probabilities(serve(path), tokens, 96), places(model.config)
    assert np.abs(found - ours).max() < 1e-2, name
    if scaling:  # it matters here
        assert np.abs(found - places(dataclasses.replace(model.config, rope_scaling=None))).max() > 0.1


# ---------------------------------------------------------------------------------------------------- rope factors


@pytest.mark.parametrize("half", [4, 16, 32, 64])
@pytest.mark.parametrize(
    "numbers", [(8.0, 1.0, 4.0, 8192, 5e5), (32.0, 1.0, 4.0, 8192, 5e5), (4.0, 2.0, 3.0, 100, 1e4), (3.0, 1.5, 40.0, 5000, 1e6)]
)
def test_divisors_become_llama3s_numbers(half, numbers):
    """Exactly those of published models, and of others such that give the same divisors."""
    *scaling, theta = numbers
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    divisors = llama3_divisors(half, theta, **dict(zip(names, scaling, strict=True))).astype(np.float32)
    found = llama3_scaling(divisors, theta)
    assert found.pop("rope_type") == "llama3"
    np.testing.assert_allclose(llama3_divisors(half, theta, **found), divisors, rtol=1e-4)
    if half >= 32 and theta == 5e5:
        assert list(found.values()) == scaling


def test_other_divisors_are_refused():
    assert llama3_scaling(np.ones(8), 1e4) is None
    for wrong in (np.linspace(1, 2, 8), np.linspace(8, 1, 8), np.array([1, 1, 3, 8, 8, 5, 8, 8.0])):
        with pytest.raises(QLRError, match="another way than llama3"):
            llama3_scaling(wrong, 1e4)


# -------------------------------------------------------------------------------------------------- types of blocks


def test_every_type_of_block(tmp_path, monkeypatch):
    """All that the gguf package dequantizes, read in pieces of rows."""
    monkeypatch.setattr(reading, "CHUNK", 1024)
    rng, wanted = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in BLOCKS:
        size = gguf.GGML_QUANT_SIZES[KINDS[name]][1]
        raw = rng.integers(0, 60, (7, 512 // gguf.GGML_QUANT_SIZES[KINDS[name]][0] * size)).astype(np.uint8)  # scales stay finite
        wanted[name] = gguf.quants.dequantize(raw, KINDS[name])
        writer.add_tensor(name, raw, raw_dtype=KINDS[name])
    for name, kind in (("F32", np.float32), ("F16", np.float16)):
        wanted[name] = rng.standard_normal((3, 5)).astype(kind)
        writer.add_tensor(name, wanted[name])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = read_gguf(tmp_path / "m.gguf").tensors
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, array in wanted.items():
        value = reading.dequantized(found[name])
        assert np.isfinite(value).all() and (name == "F32" or np.abs(value).max() > 0), name
        np.testing.assert_array_equal(value, array.astype(np.float32), err_msg=name, strict=True)


# ------------------------------------------------------------------------------------------------- files and folders


@pytest.fixture(scope="module")
def plain(originals, tmp_path_factory):
    """A small llama's file, its config.json and arrays."""
    _, config, state = originals("llama")
    return write(tmp_path_factory.mktemp("plain") / "model.gguf", config, state, keys=VOCABULARY), config, state


def test_shards_are_one_model(originals, tmp_path):
    _, config, state = originals("llama")
    write(tmp_path / "m.gguf", config, state, keys=VOCABULARY, split=8)
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 3 and find_folder(tmp_path) == find_folder(shards[2]) == shards[0]
    assert read_gguf(shards[0]).paths == shards
    for name, param in load_model(shards[1]).tensors().items():
        np.testing.assert_allclose(param.get_value(), state[name], atol=1e-6)
    assert find_config(tmp_path)[1] == sum(path.stat().st_size for path in shards)
    shards[1].rename(tmp_path / "other")
    with pytest.raises(QLRError, match=r"-00002-of-00003.gguf does not exist"):
        load_model(tmp_path)


def test_which_file_a_path_means(plain, tmp_path):
    path = plain[0]
    assert find_folder(path) == find_folder(path.parent) == find_folder(str(path)) == path
    blob = tmp_path / "sha256-abc"  # as some tools keep them, without a suffix
    blob.write_bytes(path.read_bytes())
    assert find_folder(blob) == blob and LlamaConfig.from_hf(blob) == LlamaConfig.from_hf(path)
    (tmp_path / "a.gguf").write_bytes(path.read_bytes())
    assert find_folder(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    with pytest.raises(QLRError, match=r"several GGUF files \(a.gguf, adapter.gguf\); give one"):
        find_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()  # a folder of Hugging Face, with conversions beside
    assert find_folder(tmp_path) == tmp_path


HEADS = "llama.attention.head_"
REFUSED = {  # what differs from the plain file, and the sentence
    "architecture": (dict(keys=[]), lambda d: d.replace(b"llama", b"phi33"), "'phi33' is not supported; known are llama, qwen2"),
    "experts": (dict(keys=[("llama.expert_count", 8)]), None, "llama.expert_count is 8: its MLP is a mixture of experts"),
    "key": (dict(keys=[("llama.attention.new_idea", 3)]), None, r"'llama.attention.new_idea' \(3\) is unknown"),
    "value": (dict(keys=[("llama.attention.causal", False)]), None, "'llama.attention.causal' is False; only True"),
    "missing": (dict(without=["context_length"]), None, "llama.context_length is None; a whole number"),
    "heads": (dict(keys=[(f"{HEADS}count", [4, 2])], without=["head_count"]), None, "head_count differs from layer to layer"),
    "rotary": (dict(keys=[("llama.rope.dimension_count", 4)], without=["rope_dimension_count"]), None, "count is 4 in heads of 8"),
    "rope": (dict(keys=[("llama.rope.scaling.type", "yarn")]), None, "rope.scaling.type is 'yarn'; only linear"),
    "window": (dict(keys=[("llama.attention.sliding_window", 7)]), None, "sliding_window is 7, below the context"),
    "adapter": (dict(keys=[("general.type", "adapter")]), None, "holds no model .* 'adapter'"),
    "shard": (dict(keys=[("split.count", 3)]), None, "is one of 3 shards"),
    "magic": ({}, lambda d: b"version https://git-lfs.github.com/spec/v1\n", "is no GGUF file; .* Git LFS"),
    "empty": ({}, lambda d: b"", "is no GGUF file"),
    "version": ({}, lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "is truncated or damaged"),
    "order": ({}, lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "damaged|other byte order"),
    "short": ({}, lambda d: d[:-500], "is truncated or damaged"),
    "shorter": ({}, lambda d: d[:900], "is truncated or damaged"),
    "shortest": ({}, lambda d: d[:20], "is truncated or damaged"),
    "extra": (dict(more="blk.0.attn_q.scale"), None, "has unexpected tensor blk.0.attn_q.scale"),
    "lacking": (dict(less="model.layers.1.mlp.up_proj.weight"), None, "lacks tensor model.layers.1.mlp.up_proj.weight"),
    "shape": (dict(shape="model.layers.1.mlp.up_proj.weight"), None, r"up_proj.weight has shape \(40, 24\)"),
    "nan": (dict(nan="model.norm.weight"), None, "model.norm.weight holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, plain, tmp_path):
    _, config, state = plain
    settings, change, message = REFUSED[case]
    state, settings = dict(state), dict(settings)
    if less := settings.pop("less", None):
        del state[less]
    if shape := settings.pop("shape", None):
        state[shape] = state[shape][:, :24]
    if nan := settings.pop("nan", None):
        state[nan] = state[nan] * np.nan
    if more := settings.pop("more", None):
        state[more] = np.ones(1, np.float32)
    path = write(tmp_path / "m.gguf", config, state, **settings)
    if change:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(QLRError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"), [(KINDS.F64, "type F64, which the gguf package does not dequantize"), (999, "does not know .*999")]
)
def test_types_that_are_not_read(kind, message, plain, tmp_path):
    path, name = tmp_path / "m.gguf", b"blk.1.attn_norm.weight"
    data = plain[0].read_bytes()
    at = data.index(name) + len(name) + 4 + 8  # after the number of axes and the one axis
    path.write_bytes(data[:at] + struct.pack("<I", int(kind)) + data[at + 4 :] + bytes(200))
    with pytest.raises(QLRError, match=message):
        load_model(path)


def test_the_package_is_asked_for(plain, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(plain[0].read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(QLRError, match=r"reading GGUF needs the gguf package: pip install 'qlr-jax\[gguf\]'"):
        load_model(path)


# -------------------------------------------------------------------------------------------------------- tokenizer


def test_a_way_of_cutting_that_is_not_known(plain, tmp_path):
    """Nothing is guessed: the sentence says what to put beside the file, which is taken if its tokens are the file's."""
    _, config, state = plain
    keys = [(key, "superbpe" if key.endswith(".pre") else value) for key, value in VOCABULARY]
    path = write(tmp_path / "m.gguf", config, state, keys=keys)
    with pytest.raises(QLRError, match=r"cuts text in the way 'superbpe' .*put the original's tokenizer.json"):
        load_tokenizer(path)
    original = load_tokenizer(plain[0])
    original.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a!!b")["input_ids"] == original("a!!b")["input_ids"]
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["model"]["vocab"] |= {"a": other["model"]["vocab"]["b"], "b": other["model"]["vocab"]["a"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(QLRError, match="has other tokens"):
        load_tokenizer(path)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("pre", "default", "does not say how its tokenizer cuts"), ("model", "bert", "vocabulary is of kind 'bert'"),
    ("merges", ["! Z!"], "the vocabulary is damaged"), ("model", "llama", "no scores"),
])  # fmt: skip
def test_vocabularies_that_are_refused(key, value, message, plain, tmp_path):
    _, config, state = plain
    keys = [(name, value if name.endswith(f".{key}") else old) for name, old in VOCABULARY]
    with pytest.raises(QLRError, match=message) as caught:
        load_tokenizer(write(tmp_path / "m.gguf", config, state, keys=keys))
    assert "\n" not in str(caught.value)


def test_ends_and_templates(plain, tmp_path):
    _, config, state = plain
    more = [("tokenizer.ggml.eot_token_id", 3), ("tokenizer.ggml.bos_token_id", 1), ("tokenizer.ggml.padding_token_id", 2**32 - 1)]
    more += [
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_eos_token", True),
        ("tokenizer.chat_template", "a{{ x }}"),
    ]
    path = write(tmp_path / "m.gguf", config, state, keys=[*VOCABULARY, *more, ("tokenizer.chat_template.tool_use", "b")])
    config, tokenizer = LlamaConfig.from_hf(path), load_tokenizer(path)
    assert (config.bos_token_id, config.eos_token_id) == (1, (95, 3))
    assert tokenizer("x<e>")["input_ids"] == [1, 87, 95, 95] and tokenizer.pad_token is None
    assert tokenizer.chat_template == {"default": "a{{ x }}", "tool_use": "b"} and tokenizer.model_max_length == 2048
