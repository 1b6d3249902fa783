"""Families beside Llama, each against transformers' torch model: logits, windows, folders, statistics; and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_formats import random_matrix

import qlr_jax
from qlr_jax.calibration import hessians, output_hessians, squared_gradients
from qlr_jax.errors import QLRError
from qlr_jax.formats import save_packed
from qlr_jax.models import (
    FAMILIES,
    LlamaConfig,
    input_of,
    known_config,
    linear_names,
    load_model,
    parameter_count,
    save_model,
    shape_of,
    tensor_names,
)
from qlr_jax.models.families import UNSUPPORTED

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {  # the prefix of transformers' classes, and what differs from SIZES
    "llama": ("Llama", {}),
    "llama attention_bias": ("Llama", {"attention_bias": True}),
    "llama mlp_bias": ("Llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral null": ("Mistral", {"sliding_window": None, "rope_parameters": LLAMA3}),
    "mistral long": ("Mistral", {"sliding_window": 45, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral one": ("Mistral", {"sliding_window": 1, "head_dim": 16}),
    "qwen2": ("Qwen2", {"sliding_window": 4}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen3 attention_bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma untied": ("Gemma", {"head_dim": 8, "tie_word_embeddings": False, "attention_bias": True, "rope_parameters": LINEAR}),
    "olmo2": ("Olmo2", {}),
    "olmo2 tied": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}
FEW = ["llama mlp_bias", "mistral", "qwen2", "qwen3", "gemma", "olmo2"]  # one of every family, biases everywhere once
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 45))
run = jax.jit(lambda model, tokens: model(tokens))


def make(case, folder):
    """transformers' model of random weights, norms and biases, and its folder."""
    import torch
    import transformers

    name, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # weights large enough that a wrong angle, window or bias shows
        for p in theirs.parameters():
            p.mul_(8 if p.ndim > 1 else 1).add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0)
    theirs.save_pretrained(folder)
    return theirs


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def assert_close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_there_and_back(case, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = make(case, tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    wanted = torch_logits(theirs, TOKENS)
    assert model.config.traits.architecture == type(theirs).__name__
    assert {n: tuple(p.shape) for n, p in theirs.named_parameters()} == tensor_names(model.config)
    assert parameter_count(model.config) == sum(p.numel() for p in theirs.parameters())
    assert_close(run(model, jnp.asarray(TOKENS)), wanted)

    again = load_model(save_model(model, tmp_path / "ours", "float32"))
    assert again.config == model.config == LlamaConfig.from_hf(model.config.to_hf())
    assert {n: p.get_value().shape for n, p in model.tensors().items()} == tensor_names(model.config)
    for name, param in model.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name].get_value(), param.get_value())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(read) is type(theirs)
    np.testing.assert_array_equal(torch_logits(read, TOKENS), wanted)


@pytest.mark.parametrize("case", FEW)
def test_packed_round_trip_keeps_biases_and_head_norms(case, tmp_path):
    make(case, tmp_path / "source")
    model = load_model(tmp_path / "source")
    names = [f"model.layers.{i}.{part}" for i, part in ((0, "self_attn.q_proj"), (0, "mlp.down_proj"), (1, "self_attn.k_proj"))]
    matrices = {name: random_matrix("int-4g16", shape_of(model.config, name)) for name in names}
    out = save_packed(tmp_path / "out", model, matrices, source=tmp_path / "source")
    loaded = qlr_jax.load(out)
    assert loaded.config == model.config
    for name, param in model.tensors().items():
        value = param.get_value()
        if name.removesuffix(".weight") in matrices:
            value = matrices[name.removesuffix(".weight")].dense()
        else:
            value = np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float32)
        found = loaded.tensors()[name].get_value()
        np.testing.assert_array_equal(np.asarray(found.dense() if hasattr(found, "dense") else found), value)
        param.set_value(jnp.asarray(value))
    wanted = run(model, jnp.asarray(TOKENS))
    assert_close(run(loaded, jnp.asarray(TOKENS)), wanted)
    check_in_pytorch(out, wanted, tmp_path / "again")


def check_in_pytorch(out, wanted, again):
    """The packed folder in transformers, by its own runtime; saved there, decoded there, and back here."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert type(theirs).__name__.startswith("QLR") and any(type(m).__name__ == "QLRLinear" for m in theirs.modules())
    assert_close(torch_logits(theirs, TOKENS), wanted)
    theirs.save_pretrained(again)
    assert_close(run(qlr_jax.load(again), jnp.asarray(TOKENS)), wanted)
    assert_close(torch_logits(theirs.dequantize(), TOKENS), wanted)


def test_window():
    """A token sees so many positions, its own included; a window that is not shorter than the text changes nothing."""
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 1}), family="mistral")
    model = qlr_jax.models.Llama(config, jax.random.key(0))
    for linear in model.linears().values():
        linear.weight.set_value(10 * linear.weight.get_value())
    tokens = jnp.asarray(TOKENS[:1, :12])
    plain = run(model, tokens)
    for window in (12, 4096):
        np.testing.assert_array_equal(run(windowed(model, window), tokens), plain)
    narrow = windowed(model, 5)
    changed = run(narrow, tokens.at[0, 3].add(1)) != run(narrow, tokens)
    assert list(np.flatnonzero(np.asarray(changed[0]).any(-1))) == [3, 4, 5, 6, 7]


def windowed(model, window):
    copy = jax.tree.map(lambda leaf: leaf, model)
    for block in copy.model.layers:
        block.self_attn.window = window
    return copy


# --- statistics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
def test_hessians_equal_those_of_captured_inputs(case, tmp_path):
    import torch

    theirs = make(case, tmp_path)
    config, inputs = LlamaConfig.from_hf(tmp_path), {}
    for name in linear_names(config):
        module = theirs.get_submodule(name)
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0].double().numpy()))
    with torch.no_grad():
        theirs(torch.tensor(TOKENS))
    found = hessians(load_model(tmp_path), TOKENS, batch=2)
    assert set(found) == {input_of(name) for name in inputs}
    for name, x in inputs.items():
        rows = x.reshape(TOKENS.size, -1)
        assert_close(found[input_of(name)], rows.T @ rows / len(rows))


@pytest.mark.parametrize("case", ["llama mlp_bias", "qwen3", "gemma", "olmo2"])  # biases, head norms, activation, norms after
def test_gradients_at_outputs_equal_torch(case, tmp_path):
    import torch

    theirs, outputs = make(case, tmp_path), {}
    model = load_model(tmp_path)

    def keep(name, y):
        y.retain_grad()
        outputs[name] = y

    for name in linear_names(model.config):
        theirs.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: keep(name, y))
    tokens = torch.tensor(TOKENS)
    logp = theirs(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    (-logp.sum()).backward()
    for name, found in squared_gradients(model, TOKENS, batch=2).items():
        assert_close(found, outputs[name].grad.square().sum(-1).numpy(), 1e-4)
    for name, g in output_hessians(model, TOKENS, batch=2).items():
        assert g.shape == (shape_of(model.config, name)[0],) * 2 and np.trace(g) > 0
        np.testing.assert_array_equal(g, g.T)


# --- configurations --------------------------------------------------------------------------------------------------------

ROPE = {"rope_theta": 1e6, "rope_scaling": None}
PUBLISHED = {  # the numbers of published config.json files, and how many parameters their weights hold
    "mistral": ("Mistral", (32000, 4096, 14336, 32, 32, 8), {"sliding_window": 4096}, 7_241_732_096),
    "qwen2 7B": ("Qwen2", (152064, 3584, 18944, 28, 28, 4), {"sliding_window": 131072, **ROPE}, 7_615_616_512),
    "qwen2 0.5B": ("Qwen2", (151936, 896, 4864, 24, 14, 2), {"tie_word_embeddings": True, **ROPE}, 494_032_768),
    "qwen3 8B": ("Qwen3", (151936, 4096, 12288, 36, 32, 8), {"head_dim": 128, "attention_bias": False, **ROPE}, 8_190_735_360),
    "gemma 2B": ("Gemma", (256000, 2048, 16384, 18, 8, 1), {"hidden_act": "gelu", "hidden_activation": None}, 2_506_172_416),
    "olmo2 7B": ("Olmo2", (100352, 4096, 11008, 32, 32, 32), {"rope_theta": 500000, "attention_bias": False}, 7_298_617_344),
    "gemma 7B": ("Gemma", (256000, 3072, 24576, 28, 16, 16), {"head_dim": 256}, 8_537_680_896),
}


def config_json(name, sizes=None, **extra):
    sizes = sizes or SIZES.values()
    head = {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "torch_dtype": "bfloat16"}
    return head | dict(zip(SIZES, sizes, strict=True)) | extra


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_configs(case):
    name, sizes, extra, count = PUBLISHED[case]
    config = LlamaConfig.from_hf(config_json(name, sizes, **extra))
    assert parameter_count(config) == count
    assert config.sliding_window == (4096 if name == "Mistral" else None)


KNOWN = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_configs(name):
    config = known_config(name.upper())
    assert parameter_count(config) == KNOWN[name]
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert (config.rope_scaling is not None) == (name == "Llama-3.1-405B") == (config.max_position_embeddings == 131072)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(QLRError, match=r"'Llama-9' .* give one of Llama-2-7B, .*, Llama-3\.1-405B, or a model folder"):
        known_config("Llama-9")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Olmo2"])
def test_what_config_json_leaves_out_is_as_in_transformers(name):
    import transformers

    written = config_json(name, num_attention_heads=32, hidden_size=64)
    del written["num_key_value_heads"]
    ours, theirs = LlamaConfig.from_hf(written), getattr(transformers, f"{name}Config")(**written)
    for field in ("num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "sliding_window"):
        assert getattr(ours, field) == getattr(theirs, field, None), field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)


REFUSED = {
    "mixtral": ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM .*mixture of experts"),
    "qwen2 moe": (
        {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]},
        "Qwen2MoeForCausalLM .*mixture of experts",
    ),
    "phi": ({"model_type": "phi", "architectures": ["PhiForCausalLM"]}, "PhiForCausalLM .*side by side"),
    "phi3": ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM .*as one matrix"),
    "falcon": ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "FalconForCausalLM .*side by side"),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel .*no gated MLP"),
    "gemma2": ({"model_type": "gemma2", "architectures": None}, "model_type 'gemma2' .*other places"),
    "vision": ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "more than text"),
    "unheard": ({"model_type": "new", "architectures": ["NewForCausalLM"]}, "NewForCausalLM is not supported; give one of Llama"),
    "mismatch": ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM with model_type 'qwen2'"),
    "classifier": ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification is not supported"),
    "no type": ({"model_type": None}, "Qwen2ForCausalLM with model_type None"),
    "odd type": ({"model_type": ["qwen2"], "architectures": None}, r"model_type \['qwen2'\]"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"'quantization_config'.*quantized already \(gptq\)"),
    "older": ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compression_config'.*compressed-tensors"),
    "own name": ({"family": "llama"}, "'family' .* unknown in a Qwen2ForCausalLM"),
    "windows": ({"use_sliding_window": True}, "'use_sliding_window' is True"),
    "layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types' is .*only 'full_attention'"),
    "bias": ({"attention_bias": True}, "'attention_bias' is True"),
    "qk_norm": ({"qk_layernorm": True}, "'qk_layernorm'"),
    "rope": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
    "activation": ({"hidden_act": "gelu_pytorch_tanh"}, "only 'silu'"),
    "code": ({"auto_map": {"AutoModel": "modeling_x.X"}}, "'auto_map'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    change, message = REFUSED[case]
    with pytest.raises(QLRError, match=message) as caught:
        LlamaConfig.from_hf(config_json("Qwen2") | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("Mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}, "only 'sliding_attention'"),
        ("Mistral", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("Llama", {"sliding_window": 8}, "'sliding_window' is 8"),
        ("Llama", {"attention_bias": 2}, "attention_bias is 2"),
        ("Gemma", {"hidden_act": "silu"}, "only 'gelu_pytorch_tanh'"),
        ("Gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("Qwen3", {"mlp_bias": True}, "'mlp_bias' is True"),
    ],
)
def test_refusals_by_family(name, change, message):
    with pytest.raises(QLRError, match=message):
        LlamaConfig.from_hf(config_json(name) | change)


def test_switches_that_a_family_lacks_are_refused():
    config = LlamaConfig(**SIZES)
    for change in ({"sliding_window": 4}, {"family": "qwen2", "attention_bias": True}, {"family": "gemma", "mlp_bias": True}):
        with pytest.raises(QLRError, match="does not have"):
            dataclasses.replace(config, **change)
    with pytest.raises(QLRError, match="'phi' is unknown; pass one of llama, mistral, qwen2, qwen3, gemma, olmo2"):
        dataclasses.replace(config, family="phi")


def test_the_table_contradicts_neither_itself_nor_transformers():
    from transformers import CONFIG_MAPPING

    assert not FAMILIES.keys() & UNSUPPORTED.keys()
    for name, family in FAMILIES.items():
        assert name in CONFIG_MAPPING and family.model_type == name


def test_the_runtime_has_a_row_for_every_family():
    from qlr_jax.formats.qlr import modeling_qlr as runtime
    from qlr_jax.formats.qlr.packed import runtime_class

    wanted = [family.architecture for family in FAMILIES.values()]
    assert list(runtime.ARCHITECTURES) == wanted
    for architecture, (plain, packed) in zip(wanted, runtime.PACKED.items(), strict=True):
        assert plain.__name__ == architecture and packed is getattr(runtime, runtime_class(architecture))


def test_hidden_states_are_not_compared_behind_a_norm():
    from qlr_jax.adaptation import AdaptConfig, adapt

    model = qlr_jax.models.Llama(LlamaConfig(**SIZES, family="olmo2"), jax.random.key(0))
    linear = next(iter(model.linears().values()))
    original = jax.tree.map(lambda leaf: leaf, model)
    linear.weight.set_value(qlr_jax.solve(np.asarray(linear.weight.get_value()), None, "int-4g16", seed=1, iterations=1).value)
    with pytest.raises(QLRError, match=r"states 1 .* Olmo2ForCausalLM normalises .* pass states 0"):
        adapt(model, TOKENS, AdaptConfig(loss="kl", states=1.0, steps=1), teacher=original)


def test_norms_multiply_in_the_type_that_they_do_in_transformers():
    import torch
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    weight = np.linspace(0.3, 3, 32, dtype=np.float32)
    norm = qlr_jax.models.llama.RMSNorm(jnp.asarray(weight, jnp.bfloat16), 1e-5, wide=True)
    theirs = Olmo2RMSNorm(32, 1e-5).to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        wanted = theirs(torch.tensor(x).to(torch.bfloat16)).float().numpy()
    np.testing.assert_array_equal(np.asarray(norm(jnp.asarray(x, jnp.bfloat16)), np.float32), wanted)


def test_missing_biases_are_missed(tmp_path):
    from safetensors.numpy import load_file, save_file

    make("qwen2", tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.bias"
    save_file({n: a for n, a in arrays.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(QLRError, match=f"lacks tensor {name}"):
        load_model(tmp_path)
    save_file(arrays | {name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(QLRError, match=rf"{name} has shape \(3,\)"):
        load_model(tmp_path)
