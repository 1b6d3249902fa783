"""The Llama import: logits against transformers' torch Llama, refusals, and the way back to a folder (other families apart)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlr_jax
from qlr_jax.errors import QLRError
from qlr_jax.models import (
    Llama,
    LlamaConfig,
    input_names,
    input_of,
    kind_of,
    layer_of,
    linear_names,
    load_model,
    load_tokenizer,
    save_model,
    shape_of,
    tensor_names,
)

BUNDLED = Path(qlr_jax.__file__).parent / "bundled"
SMALL = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "gqa1": {"num_key_value_heads": 1},
    "mha-odd": {"num_key_value_heads": 4, "intermediate_size": 37},
    "head_dim": {"head_dim": 16},
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 128},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "sharded": {"shard": "20KB"},
}


run = jax.jit(lambda model, tokens: model(tokens))


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    import torch
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    settings = dict(VARIANTS[variant])
    shard = settings.pop("shard", "1GB")
    base = dict(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(HFConfig(**(base | settings))).eval()
    with torch.no_grad():  # weights large enough that a wrong angle or group shows
        for p in theirs.parameters():
            p.mul_(8 if p.ndim > 1 else 1).add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (variant == "sharded")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 45))
    ours = run(load_model(tmp_path), jnp.asarray(tokens))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4)


def test_bundled_logits_equal_transformers():
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(BUNDLED)
    ids = tokenizer("def main():\n    return {key: value for key, value in items}\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    ours = run(load_model(BUNDLED), jnp.asarray([ids]))
    np.testing.assert_allclose(ours, torch_logits(theirs, [ids]), atol=1e-4)


def test_bundled_is_what_it_says():
    model, tokenizer = load_model(BUNDLED), load_tokenizer(BUNDLED)
    assert 5e6 <= sum(leaf.size for leaf in jax.tree.leaves(model)) <= 8e6
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) <= 16e6
    assert len(tokenizer) == model.config.vocab_size == 2048
    text = "class Ünïcode:\n\tpass  # 数\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tied, dtype, tmp_path):
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied, eos_token_id=(2, 3))
    model = Llama(config, jax.random.key(1), jnp.dtype(dtype))
    again = load_model(save_model(model, tmp_path, dtype), jnp.dtype(dtype))
    assert again.config == config
    for name, param in model.tensors().items():
        assert again.tensors()[name].get_value().dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(again.tensors()[name].get_value()), np.asarray(param.get_value()))
    tokens = jnp.arange(10).reshape(2, 5)
    assert run(again, tokens).dtype == jnp.float32
    np.testing.assert_array_equal(run(again, tokens), run(model, tokens))


def test_saved_folder_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = Llama(SMALL, jax.random.key(2))
    theirs = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path, "float32")).eval()
    tokens = np.arange(14).reshape(2, 7)
    np.testing.assert_allclose(run(model, jnp.asarray(tokens)), torch_logits(theirs, tokens), atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    """Stands for a compressed matrix: a pytree with dense()."""

    half: jax.Array

    def dense(self):
        return 2 * self.half


def test_packed_weights_are_decoded_in_the_forward():
    plain, packed = Llama(SMALL, jax.random.key(3)), Llama(SMALL, jax.random.key(3))
    for linear in packed.linears().values():
        linear.weight.set_value(Packed(linear.weight.get_value() / 2))
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(run(packed, tokens), run(plain, tokens), atol=1e-6)
    dense = packed.densified()
    assert isinstance(dense.linears()["model.layers.0.mlp.up_proj"].weight.get_value(), jax.Array)
    assert isinstance(packed.linears()["model.layers.0.mlp.up_proj"].weight.get_value(), Packed)
    np.testing.assert_allclose(run(dense, tokens), run(plain, tokens), atol=1e-6)


def test_blocks_share_one_compilation_and_make_up_the_model():
    model, tokens = Llama(SMALL, jax.random.key(4)), jnp.arange(12).reshape(2, 6)
    advance = jax.jit(lambda block, x, rope: block(x, rope))
    x = model.embed(tokens)
    for block in model.model.layers:
        x = advance(block, x, model.rope(6))
    assert advance._cache_size() == 1
    np.testing.assert_allclose(model.head(x), run(model, tokens), atol=1e-5)


def test_tap_and_adjust_see_every_linear():
    model, order = Llama(SMALL, jax.random.key(5)), {}

    @jax.jit
    def watched(model, tokens):
        inputs, outputs = {}, {}

        def adjust(name, y):
            outputs[name] = y
            return y

        model(tokens, tap=lambda name, x: inputs.setdefault(name, x), adjust=adjust)
        order.update(inputs=list(inputs), outputs=list(outputs))  # what jit returns is sorted
        return inputs, outputs

    found = watched(model, jnp.arange(12).reshape(2, 6))
    inputs, outputs = ({name: of[name] for name in order[key]} for key, of in zip(order, found, strict=True))
    assert list(inputs) == input_names(SMALL)
    assert list(outputs) == linear_names(SMALL) == list(model.linears())
    for name, y in outputs.items():
        m, n = shape_of(SMALL, name)
        w = np.asarray(model.linears()[name].weight.get_value(), np.float64)
        assert w.shape == (m, n)
        np.testing.assert_allclose(y, np.asarray(inputs[input_of(name)], np.float64) @ w.T, atol=1e-5)


def test_names():
    assert kind_of("model.layers.12.mlp.gate_proj") == "gate" and layer_of("model.layers.12.mlp.gate_proj") == 12
    assert input_of("model.layers.1.self_attn.v_proj") == "model.layers.1.self_attn.qkv"
    assert {n: p.get_value().shape for n, p in Llama(SMALL).tensors().items()} == tensor_names(SMALL)
    assert (kind_of("lm_head"), kind_of("model.embed_tokens")) == ("head", "embedding")
    for name in ("lm_head", "model.embed_tokens"):
        with pytest.raises(QLRError, match=name):
            layer_of(name)
    with pytest.raises(QLRError, match="x_proj"):
        kind_of("model.layers.0.mlp.x_proj")


# --- refusals --------------------------------------------------------------------------------------------------------------


def test_config_spellings_agree():
    base = SMALL.to_hf()
    new = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_scaling")} | {"rope_parameters": LLAMA3}
    old = {k: v for k, v in base.items() if k != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    older = old | {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in old["rope_scaling"].items()}}
    configs = [LlamaConfig.from_hf(c) for c in (new, old, older)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 5e5 and configs[0].rope_scaling.original_max_position_embeddings == 16
    assert LlamaConfig.from_hf(configs[0].to_hf()) == configs[0]


REFUSED = {
    "architecture": ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
    "model_type": ({"model_type": "qwen2"}, "LlamaForCausalLM with model_type 'qwen2'"),
    "unknown": ({"qk_norm": True}, "'qk_norm'"),
    "bias": ({"attention_bias": None}, "attention_bias is None"),
    "activation": ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    "window": ({"sliding_window": 4096}, "'sliding_window' is 4096"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    "rope missing": ({"rope_parameters": {"rope_type": "linear"}}, "'factor'"),
    "rope unknown": ({"rope_parameters": {"rope_type": "default", "beta": 2.0}}, "'beta'"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    "size": ({"hidden_size": 0}, "hidden_size is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refusals(case):
    change, message = REFUSED[case]
    with pytest.raises(QLRError, match=message) as caught:
        LlamaConfig.from_hf(SMALL.to_hf() | change)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return save_model(Llama(SMALL, jax.random.key(6)), tmp_path / "model", "float32")


def rewrite(folder, change):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {
    "missing": (lambda a: a.pop(UP), f"lacks tensor {UP}"),
    "extra": (lambda a: a.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(32, np.float32)}), "q_norm.weight"),
    "shape": (lambda a: a.update({UP: np.zeros((32, 40), np.float32)}), r"up_proj.weight has shape \(32, 40\)"),
    "nan": (lambda a: a[UP].__setitem__((3, 5), np.nan), f"{UP} holds NaN"),
    "inf": (lambda a: a[UP].__setitem__((3, slice(2)), [np.inf, -np.inf]), f"{UP} holds NaN"),
    "integers": (lambda a: a.update({UP: np.zeros((40, 32), np.int8)}), "has type int8"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights(case, folder):
    change, message = DAMAGE[case]
    rewrite(folder, change)
    with pytest.raises(QLRError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 2000, -7])
def test_truncated_file(keep, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(QLRError, match=r"model.safetensors is truncated"):
        load_model(folder)


def test_missing_things(folder, tmp_path):
    with pytest.raises(QLRError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(QLRError, match="is a file"):
        load_model(folder / "config.json")
    with pytest.raises(QLRError, match="no tokenizer"):
        load_tokenizer(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(QLRError, match=r"found pytorch_model.bin; only safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(QLRError, match="not valid JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(QLRError, match=r"config.json does not exist"):
        load_model(folder)


def test_tied_head_stored_twice(tmp_path):
    folder = save_model(Llama(dataclasses.replace(SMALL, tie_word_embeddings=True), jax.random.key(7)), tmp_path, "float32")
    rewrite(folder, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))
    load_model(folder)
    rewrite(folder, lambda a: a["lm_head.weight"].__setitem__((0, 0), 9.0))
    with pytest.raises(QLRError, match=r"lm_head.weight differs"):
        load_model(folder)


@pytest.mark.parametrize("window", [None, 5, 1])
def test_attention_in_parts(monkeypatch, window):
    """Parts of the queries, the last one shorter, give what one softmax over all keys in float64 gives, and so do its gradients."""
    from qlr_jax.models import attention

    monkeypatch.setattr(attention, "PART", 3)
    monkeypatch.setattr(attention, "PARTS", 4)
    draw = np.random.default_rng(0)
    q, k, v, g = (3 * draw.standard_normal((2, heads, 11, 4)) for heads in (4, 2, 2, 4))
    f32 = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]

    @jax.jit
    def forward_and_back(q, k, v, g):
        out, pull = jax.vjp(lambda *a: attention.causal_attention(*a, window), q, k, v)
        return out, pull(g)

    out, gradients = forward_and_back(*f32, jnp.asarray(g, jnp.float32))

    back = np.arange(11)[:, None] - np.arange(11)
    seen = (back >= 0) & (back < (window or 11))

    def exact(q, k, v):
        scores = np.where(seen, np.einsum("bgtd,bgsd->bgts", q, np.repeat(k, 2, 1)) / 2, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ np.repeat(v, 2, 1)

    np.testing.assert_allclose(out, exact(q, k, v), atol=4e-6)
    for at, pulled in enumerate(gradients):
        step: list = [0.0, 0.0, 0.0]
        step[at] = draw.standard_normal((q, k, v)[at].shape)
        moved = [exact(*(a + sign * 1e-6 * s for a, s in zip((q, k, v), step, strict=True))) for sign in (1, -1)]
        np.testing.assert_allclose(np.vdot(pulled, step[at]), np.vdot(g, moved[0] - moved[1]) / 2e-6, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_is_its_file_is_read_as_transformers_does():
    """Without torch, which AutoTokenizer imports, see tests/test_formats_compressed_tensors.py."""
    from transformers import AutoTokenizer

    own, auto = load_tokenizer(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    text = "def f(x):\n    return <s> x ** 2  # ünï\n"
    assert type(own) is type(auto) and own(text)["input_ids"] == auto(text)["input_ids"]
    assert (own.bos_token_id, own.eos_token_id, len(own)) == (auto.bos_token_id, auto.eos_token_id, len(auto))
