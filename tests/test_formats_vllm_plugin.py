"""The vLLM plugin without vLLM: what it says, how shards are loaded and multiplied, and vLLM's side of it with a stand-in."""

import importlib
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from test_formats import change_config, make_folder, random_matrix, to_torch

from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr import vllm_plugin
from qlr_jax.formats.qlr.vllm_plugin import rules

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402
from qlr_jax.formats.qlr.vllm_plugin import operators  # noqa: E402
from qlr_jax.formats.qlr.vllm_plugin.checks import check_folder  # noqa: E402
from qlr_jax.formats.qlr.vllm_plugin.shards import Shards  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "qlr_jax.formats.qlr.vllm_plugin"
QKV = ["a.q_proj", "a.k_proj", "a.v_proj"]
SPECS, ROWS, INPUTS = ["trellis-2+r4@trellis-2", "bf16", "int-4g32/rot"], [96, 32, 32], 64


def test_vllm_finds_it():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert declared == {"qlr": f"{PACKAGE}:register"} and callable(vllm_plugin.register)


def test_a_vllm_that_lacks_a_name_still_works(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.config", raising=False)
    vllm_plugin.register()
    assert "qlr folders cannot be loaded by this vLLM" in caplog.text


# ------------------------------------------------------------------------------------------------------- rules


def test_architectures_are_those_of_the_runtime():
    assert {plain.__name__: packed.__name__ for plain, packed in runtime.PACKED.items()}.items() <= {
        plain: packed for packed, plain in rules.ARCHITECTURES.items()
    }.items()


def test_names():
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert rules.stored_names("a.qkv_proj", fused) == QKV
    assert rules.stored_names("a.o_proj", fused) == ["a.o_proj"]
    assert [rules.shard_position(shard, QKV) for shard in ("q", "k", "v", 0, 2)] == [0, 1, 2, 0, 2]
    assert rules.shard_position(None, ["a.o_proj"]) == 0
    for shard in (None, 3, "w", (0, 1)):
        with pytest.raises(QLRError, match=r"is marked as shard .* of a\.q_proj, a\.k_proj, a\.v_proj"):
            rules.shard_position(shard, QKV)
    assert rules.embedding_name("", {"lm_head": {}}) == "model.embed_tokens"
    assert rules.embedding_name("model.embed_tokens", {}) == "model.embed_tokens"


def test_when_matrices_are_decoded():
    cases = [(None, False, True, False), ("", True, True, True), (None, False, False, True), ("packed", True, False, False)]
    for switch, in_config, on_processor, wanted in [*cases, ("dequantize", False, True, True)]:
        assert rules.decodes_at_load(switch, in_config, on_processor) == wanted
    with pytest.raises(QLRError, match="QLR_VLLM is 'yes'; set it to packed or dequantize"):
        rules.decodes_at_load("yes", False, True)


def test_refusals():
    rules.check_run(1, 1, False, False)
    rules.check_run(1, 1, True, True)
    for tensor, pipeline in ((2, 1), (1, 2)):
        with pytest.raises(QLRError, match=f"tensor_parallel_size={tensor}, pipeline_parallel_size={pipeline}; set both to 1"):
            rules.check_run(tensor, pipeline, False, True)
    with pytest.raises(QLRError, match="set QLR_VLLM=dequantize, or leave enable_lora out"):
        rules.check_run(1, 1, True, False)
    matrices = {"a": {"spec": "int-4"}, "b": {"spec": "bf16"}, "c": {"spec": "bf16+r4@bf16"}}
    rules.check_used(matrices, {"a", "c"}, "model")
    with pytest.raises(QLRError, match=r"no layer for a \(and 1 more\), which is packed"):
        rules.check_used(matrices, set(), "model")


# ------------------------------------------------------------------------------------------------------ shards


def matrices_of(specs, rows):
    """How each is packed, and its tensors."""
    found = []
    for i, (spec, count) in enumerate(zip(specs, rows, strict=True)):
        if spec == "bf16":
            found.append((None, {"weight": torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(i))}))
            continue
        made = random_matrix(spec, (count, INPUTS), seed=i)
        entry = {"spec": made.layout.spec, "shape": [count, INPUTS], "seed": i, "state_bits": made.layout.state_bits}
        entry["rotation_block"] = made.layout.rotation_block
        found.append((entry, {name: to_torch(array) for name, array in made.arrays.items()}))
    return found


STORED = matrices_of(SPECS, ROWS)


def make_shards(dtype=torch.float32, skip=None):
    shards = Shards(QKV, [entry for entry, _ in STORED], INPUTS, ROWS, dtype)
    for at, (_, tensors) in enumerate(STORED):
        for name, tensor in tensors.items():
            if (at, name) != skip:
                shards.load(at, name, tensor)
    return shards


def dense():
    """[W_q; W_k; W_v], each by its own layer."""
    found = []
    for entry, tensors in STORED:
        if entry is None:
            found.append(tensors["weight"])
            continue
        linear = runtime.QLRLinear(**entry)
        linear.load_state_dict(tensors)
        found.append(linear.dense())
    return torch.cat(found)


def test_shards_multiply():
    shards, x, bias = make_shards(), torch.randn(3, 5, INPUTS), torch.randn(sum(ROWS))
    shards.check()
    wanted = x @ dense().T
    assert torch.allclose(shards(x), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert torch.allclose(shards(x, bias), wanted + bias, atol=1e-4 * float(wanted.abs().max()))
    halves = make_shards(torch.bfloat16)(x.bfloat16(), bias.bfloat16())
    assert halves.dtype == torch.bfloat16
    assert torch.allclose(halves.float(), wanted + bias, atol=0.03 * float(wanted.abs().max()))


def test_the_runtime_works_in_float32_by_default(monkeypatch):
    """vLLM loads with torch's default type set to the model's, in which the runtime's tables would be rounded."""
    seen, before = [], torch.get_default_dtype()
    for name in ("__init__", "forward", "dense"):
        method = getattr(runtime.QLRLinear, name)
        watched = lambda self, *a, method=method, **k: (seen.append(torch.get_default_dtype()), method(self, *a, **k))[1]  # noqa: E731
        monkeypatch.setattr(runtime.QLRLinear, name, watched)
    torch.set_default_dtype(torch.bfloat16)
    try:
        shards = make_shards()
        shards(torch.randn(2, INPUTS, dtype=torch.float32))
        shards.dense(torch.float32)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert seen == [torch.float32] * 6


def test_what_is_missing_or_not_described_is_refused():
    with pytest.raises(QLRError, match=r"the folder lacks a\.v_proj\.backbone\.scales"):
        make_shards(skip=(2, "backbone.scales")).check()
    shards = make_shards()
    with pytest.raises(QLRError, match=r"the folder holds a\.k_proj\.backbone\.codes, which config\.json does not describe"):
        shards.load(1, "backbone.codes", torch.zeros(1))
    with pytest.raises(QLRError, match=r"a\.q_proj\.scale is torch\.float16 \[1\], but config\.json asks for torch\.float32"):
        shards.load(0, "scale", torch.ones(1, dtype=torch.float16))
    with pytest.raises(QLRError, match=r"gives a\.q_proj the shape \[96, 64\], but vLLM's layer has \[96, 32\]"):
        Shards(QKV, [entry for entry, _ in STORED], 32, ROWS, torch.float32)


def test_operators_are_compiled_whole(monkeypatch):
    shards = make_shards()
    monkeypatch.setattr(operators, "find_shards", {"a": shards}.__getitem__)
    x, bias = torch.randn(4, INPUTS), torch.randn(sum(ROWS))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.vllm_product, (x, bias, "a", sum(ROWS)), test_utils=checks)
    compiled = torch.compile(lambda x: 2 * operators.vllm_product(x, None, "a", sum(ROWS)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * shards(x))
    table = runtime.QLREmbedding("int-8g32", (40, INPUTS))
    table.backbone.codes.random_(0, 256)
    table.backbone.scales.fill_(0.1)
    table.scale.fill_(1.0)
    shards = Shards(["e"], [{"spec": "int-8g32", "shape": [40, INPUTS]}], INPUTS, [40], torch.float32, runtime.QLREmbedding)
    for name, tensor in table.state_dict().items():
        shards.load(0, name, tensor)
    monkeypatch.setattr(operators, "find_shards", {"e": shards}.__getitem__)
    tokens = torch.tensor([3, 39, 3])
    torch.library.opcheck(operators.vllm_rows, (tokens, "e", INPUTS, torch.bfloat16), test_utils=checks)
    assert torch.equal(operators.vllm_rows(tokens, "e", INPUTS, torch.float32), table.dense()[tokens])


# ------------------------------------------------------------------------------------------------------ checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("vllm"), "packed", tied=False, solve=False)[0]


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def check(path):
    config = AutoConfig.from_pretrained(path)
    check_folder(path, config, config.quantization_config["matrices"])


def test_a_damaged_folder_is_refused(copy):
    check(copy)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    name, tensor = tensors.popitem()
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"the folder lacks {name}"):
        check(copy)
    save_file(tensors | {name: tensor + 1}, shard)
    with pytest.raises(ValueError, match="has changed since it was written"):
        check(copy)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing, truncated or no safetensors file"):
        check(copy)


def test_another_architecture_is_refused(copy):
    change_config(copy, lambda config: config.update(architectures=["OtherForCausalLM"]))
    with pytest.raises(QLRError, match=r"a qlr folder holds one of LlamaForCausalLM, .*, not OtherForCausalLM"):
        check(copy)


def test_a_folder_that_transformers_saved(copy):
    (copy / "checksums.json").unlink()
    change_config(copy, lambda config: config.update(architectures=["QLRForCausalLM"]))
    check(copy)


# ------------------------------------------------------------------------------------- vLLM's side, with a stand-in


class Unquantized:
    """In place of vLLM's methods for dense layers."""

    def process_weights_after_loading(self, layer):
        layer.processed = True

    def tie_weights(self, layer, embed_tokens):
        layer.weight = embed_tokens.weight


class Quantization:
    def __init__(self):
        self.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class Linear(torch.nn.Module):
    """As much of vLLM's layer as the plugin uses."""

    def __init__(self, prefix):
        super().__init__()
        self.prefix, self.bias = prefix, None


class Vocabulary(torch.nn.Module):
    org_vocab_size, num_embeddings_padded, embedding_dim, params_dtype = 40, 64, INPUTS, torch.float32


class Head(Vocabulary):
    pass


@pytest.fixture
def plugin(monkeypatch):
    """`config` and `methods`, imported with a vLLM that has just the names that they use."""
    running = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        lora_config=None,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(tie_word_embeddings=True)),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    registered = {}
    layers, base = "vllm.model_executor.layers", SimpleNamespace(models={"LlamaForCausalLM": "llama", "OtherForCausalLM": "other"})
    names = {
        "vllm": {"ModelRegistry": base},
        "vllm.config": {"get_current_vllm_config": lambda: running},
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info_once=lambda *_: None)},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {"LinearMethodBase": object, "UnquantizedLinearMethod": Unquantized, "LinearBase": Linear},
        f"{layers}.quantization": {"register_quantization_config": lambda name: lambda made: registered.update({name: made})},
        f"{layers}.quantization.base_config": {"QuantizationConfig": Quantization, "QuantizeMethodBase": object},
        f"{layers}.vocab_parallel_embedding": {
            "UnquantizedEmbeddingMethod": Unquantized, "ParallelLMHead": Head, "VocabParallelEmbedding": Vocabulary,
        },
    }  # fmt: skip
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("methods", "config"):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
    config = importlib.import_module(f"{PACKAGE}.config")
    yield SimpleNamespace(config=config, running=running, registered=registered, registry=base.models)
    for name in ("methods", "config"):  # nobody else shall find them with the stand-in
        sys.modules.pop(f"{PACKAGE}.{name}", None)
        vars(vllm_plugin).pop(name, None)


def marked(tensor, shard):
    tensor = tensor.clone()
    tensor.shard_id = shard
    return tensor


def loaded(plugin, monkeypatch, switch):
    """A fused layer after vLLM loaded it."""
    monkeypatch.setenv(rules.SWITCH, switch)
    config = plugin.config.QLRVLLMConfig({"matrices": {n: e for n, (e, _) in zip(QKV, STORED, strict=True) if e}})
    layer = Linear("a.qkv_proj")
    layer.quant_method = config.get_quant_method(layer, layer.prefix)
    layer.quant_method.create_weights(layer, INPUTS, ROWS, INPUTS, sum(ROWS), torch.float32)
    pairs = [(n, marked(t, s)) for s, (_, tensors) in zip("qkv", STORED, strict=True) for n, t in tensors.items()]
    assert list(layer.load_weights(iter(pairs))) == [name for name, _ in pairs]
    layer.quant_method.process_weights_after_loading(layer)
    return config, layer


def test_registers_what_vllm_has(plugin):
    vllm_plugin.register()
    assert plugin.registered["qlr"] is plugin.config.QLRVLLMConfig
    assert plugin.registry["QLRForCausalLM"] == "llama" and len(plugin.registry) == 3


def test_a_fused_layer_packed_and_decoded(plugin, monkeypatch):
    x, wanted = torch.randn(2, INPUTS), dense()
    config, layer = loaded(plugin, monkeypatch, "packed")
    found = layer.quant_method.apply(layer, x)
    assert torch.allclose(found, x @ wanted.T, atol=1e-4 * float(found.abs().max()))
    assert plugin.running.compilation_config.static_forward_context == {"a.qkv_proj.qlr": layer.qlr}
    assert isinstance(config.get_quant_method(Linear("a.o_proj"), "a.o_proj"), Unquantized)
    assert config.get_quant_method(torch.nn.Module(), "a.attn") is None
    _, layer = loaded(plugin, monkeypatch, "dequantize")
    assert torch.equal(layer.weight, wanted) and layer.processed and not hasattr(layer, "qlr")
    assert isinstance(layer.quant_method, Unquantized)


@pytest.mark.parametrize("switch", ["packed", "dequantize"])
@pytest.mark.parametrize("asked", [True, False], ids=["Llama", "Gemma"])
def test_a_tied_head(plugin, monkeypatch, switch, asked):
    """vLLM's Gemma asks for no method for its embedding, so the head that is tied to it sees to that."""
    monkeypatch.setenv(rules.SWITCH, switch)
    entry, tensors = matrices_of(["int-4g32"], [40])[0]
    config, embedding, head = plugin.config.QLRVLLMConfig({"matrices": {"model.embed_tokens": entry}}), Vocabulary(), Head()
    if asked:
        embedding.quant_method = config.get_quant_method(embedding, "")
        embedding.quant_method.create_weights(embedding, INPUTS, [64], INPUTS, 64, torch.float32)
    else:
        embedding.quant_method, embedding.weight = Unquantized(), torch.nn.Parameter(torch.zeros(64, INPUTS))
    head.quant_method = config.get_quant_method(head, "lm_head")
    head.quant_method.create_weights(head, INPUTS, [64], INPUTS, 64, params_dtype=torch.float32)
    assert head.quant_method.tie_weights(head, embedding) is head
    list(embedding.load_weights(tensors.items()))
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    linear = runtime.QLRLinear(**entry)
    linear.load_state_dict(tensors)
    wanted, x = torch.nn.functional.pad(linear.dense(), (0, 0, 0, 24)), torch.randn(2, INPUTS)
    if switch == "dequantize":
        assert head.weight is embedding.weight and torch.equal(head.weight, wanted) and head.processed
        return
    assert torch.allclose(head.quant_method.apply(head, x), x @ wanted.T, atol=1e-4)
    tokens = torch.tensor([1, 39])
    assert torch.allclose(embedding.quant_method.embedding(embedding, tokens), wanted[tokens], atol=1e-6)


def test_parallel_runs_are_refused(plugin):
    config = plugin.config.QLRVLLMConfig({"matrices": {"a.o_proj": {"spec": "int-4", "shape": [4, 4]}}})
    plugin.running.parallel_config.tensor_parallel_size = 2
    with pytest.raises(QLRError, match="a qlr folder is served by one process"):
        config.get_quant_method(Linear("a.o_proj"), "a.o_proj")


def test_the_folder_is_checked_before_vllm_loads_it(plugin, copy):
    config = AutoConfig.from_pretrained(copy)
    made = plugin.config.QLRVLLMConfig.from_config(config.quantization_config)
    made.maybe_update_config(str(copy), hf_config=config)
    assert config.quantization_config["dequantize"] is False
    made.maybe_update_config("someone/something", hf_config=config)
    sorted(copy.glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        made.maybe_update_config(str(copy), hf_config=config)
