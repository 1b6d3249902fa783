"""The PyTorch runtime: what transformers does with a packed folder, decoding once, compiling, and refusing what is damaged."""

import json
import math
import re
import shutil
import weakref
from pathlib import Path

import pytest
from test_formats import TOKENS, change_config, logits, make_folder, random_matrix, relative, to_torch

from qlr_jax.errors import QLRError
from qlr_jax.formats import check_files, load, read_matrices

torch = pytest.importorskip("torch")
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402

from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402

INPUT = torch.tensor(TOKENS)
SPECS = [
    "trellis-2.25+r16@trellis-2", "trellis-2w", "int-4g32", "int-3g16a/rot", "nf-4g32", "nvfp4/rot+r4@nvfp4", "e8-3+r4@e8-2,bf16",
    "none+r12@int-8",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("runtime"), "packed", tied=False, solve=False)[0]


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def wanted(folder):
    return run(get(folder))


def get(path, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def run(model):
    with torch.no_grad():
        return model(INPUT).logits.float()


def packed(model):
    return [module for module in model.modules() if isinstance(module, runtime.QLRLinear)]


@pytest.fixture(autouse=True)
def registered():
    """Other tests load folders' own copies of the runtime, and the last one that is imported serves all.

    Beside another test process threads that wait for each other take several times as long.
    """
    runtime.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_linear(spec, shape, **layout):
    matrix = random_matrix(spec, shape, **layout)
    linear = runtime.QLRLinear(
        matrix.layout.spec, shape, matrix.layout.seed, matrix.layout.rotation_block, matrix.layout.state_bits
    )
    linear.load_state_dict({name: to_torch(array) for name, array in matrix.arrays.items()})
    return linear


# ------------------------------------------------------------------------------------------------ in transformers


def test_generates_what_the_decoded_model_does(folder):
    """Greedy, with a cache and without: the prefill and the steps of one token agree."""
    model, dense = get(folder), get(folder)
    dense.dequantize()
    for cache in (True, False):
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=cache)
        tokens = model.generate(INPUT[:, :3], **options)
        assert tokens.shape == (2, 11) and torch.equal(tokens, dense.generate(INPUT[:, :3], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, wanted, dtype):
    model = get(folder, dtype)
    assert model.dtype == dtype and model(INPUT).logits.dtype == dtype
    assert relative(run(model), wanted) < (0.03 if dtype == torch.bfloat16 else 0.005)
    scales = {name: t.dtype for name, t in model.state_dict().items() if name.endswith("scales")}
    assert scales and set(scales.values()) == {torch.float16}  # as they are saved, whatever the model's type
    assert model.generate(INPUT[:, :3], max_new_tokens=3, pad_token_id=0).shape == (2, 6)


def test_saves_what_it_loaded(folder, tmp_path):
    model = get(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    again = get(tmp_path / "again", torch.bfloat16)
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items())
    assert check_files(tmp_path / "again") > 2 and read_matrices(tmp_path / "again").keys() == read_matrices(folder).keys()


def test_saving_over_a_folder_leaves_no_stale_list(copy, wanted):
    model = get(copy)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    model.save_pretrained(copy)  # one file where there were shards
    assert not (copy / "model.safetensors.index.json").exists() and len(list(copy.glob("*.safetensors"))) == 1
    assert check_files(copy) == 2
    assert relative(run(get(copy)), 2 * wanted) < 1e-5 and relative(logits(load(copy).densified()), 2 * wanted) < 1e-5


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("dequantize", [False, True])
def test_device_map(folder, wanted, where, dequantize):
    pytest.importorskip("accelerate")  # without it transformers asks for it in a sentence
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = dequantize
    model = get(folder, config=config, device_map=where)
    assert bool(packed(model)) != dequantize
    assert torch.allclose(run(model), wanted, rtol=1e-4, atol=1e-6) if dequantize else torch.equal(run(model), wanted)


# ------------------------------------------------------------------------------------------------- decoding once


def by_argument(folder):
    with pytest.warns(UserWarning, match="dequantize"):  # transformers says that it counts
        return get(folder, quantization_config=runtime.QLRConfig(dequantize=True))


def by_config(folder):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    return get(folder, config=config)


def by_file(folder):
    change_config(folder, lambda config: config["quantization_config"].update(dequantize=True))
    return get(folder)


def by_method(folder):
    model = get(folder)
    model.dequantize()
    return model


@pytest.mark.parametrize("way", [by_argument, by_config, by_file, by_method], ids=lambda way: way.__name__)
def test_dequantize(copy, wanted, tmp_path, way):
    model = way(copy)
    assert type(model) is LlamaForCausalLM and not packed(model)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    assert relative(run(model), wanted) < 1e-5
    model.save_pretrained(tmp_path / "dense")
    assert {p.name for p in (tmp_path / "dense").iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert not {"quantization_config", "auto_map"} & json.loads((tmp_path / "dense" / "config.json").read_text()).keys()
    plain = get(tmp_path / "dense")
    assert type(plain) is LlamaForCausalLM and torch.equal(run(plain), run(model))


def test_dequantized_is_as_large_as_any_model_of_its_type(folder, wanted):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    model = get(folder, torch.bfloat16, config=config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    plain = LlamaForCausalLM(model.config).to(torch.bfloat16)
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in plain.parameters())
    assert relative(run(model), wanted) < 0.05


def test_dequantize_frees_as_it_goes(folder, monkeypatch):
    """Of the layers decoded before, none is still held when the next one is decoded."""
    decode, decoded = runtime.QLRLinear.dense, []

    def watched(self, *arguments):
        assert not any(layer() for layer in decoded)
        decoded.append(weakref.ref(self))
        return decode(self, *arguments)

    monkeypatch.setattr(runtime.QLRLinear, "dense", watched)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    get(folder, config=config)
    assert len(decoded) > 10


@pytest.mark.parametrize("spec", SPECS)
def test_dense_needs_no_product_with_the_identity(spec, monkeypatch):
    linear = make_linear(spec, (40, 96))
    wanted = linear(torch.eye(96)).T
    monkeypatch.setattr(runtime.QLRLinear, "forward", None)
    assert relative(linear.dense(), wanted) < 1e-5
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(linear.dense(dtype), linear.dense().to(dtype))


# ------------------------------------------------------------------------------------------ compiling, gradients


# every decoder, and a type that is not the layer's own where both factors and a rotation are multiplied in it
COMPILED = [*((spec, torch.float32) for spec in SPECS), ("nvfp4/rot+r4@nvfp4", torch.bfloat16)]


@pytest.mark.parametrize(("spec", "dtype"), COMPILED)
def test_a_layer_compiles_without_breaks(spec, dtype, monkeypatch):
    monkeypatch.setattr(runtime, "TILE_WEIGHTS", 3100)  # two tiles or more
    monkeypatch.setattr(runtime, "native_products", lambda: None)
    torch._dynamo.reset()
    linear = make_linear(spec, (64, 96))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5):
        x = torch.randn(tokens, 96).to(dtype)
        assert relative(compiled(x).float(), linear(x).float()) < 1e-6


def test_a_layer_compiles_to_machine_code():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    linear, x = make_linear("trellis-2+r4@trellis-2", (64, 96)), torch.randn(3, 96)
    assert relative(torch.compile(linear, fullgraph=True)(x).detach(), linear(x)) < 1e-5


def test_copies_of_the_runtime_share_its_operators():
    """A folder's own copy is imported beside ours: what layers were compiled with stays."""
    version, names = runtime.RUNTIME_VERSION, ("decode_lattice", "decode_trellis")
    before = [getattr(torch.ops.qlr, f"{name}_v{version}").default for name in names]
    exec(compile(Path(runtime.__file__).read_text(encoding="utf-8"), "copy", "exec"), {"__name__": "copy"})
    runtime.register()
    assert [getattr(torch.ops.qlr, f"{name}_v{version}").default for name in names] == before


def test_a_model_compiles(folder, wanted):
    torch._dynamo.reset()
    compiled = torch.compile(get(folder), backend="aot_eager", fullgraph=True)
    assert relative(run(compiled), wanted) < 1e-5


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_the_input(spec):
    """After a first call in inference mode too: what that keeps serves a backward pass."""
    linear = make_linear(spec, (40, 96), seed=77)
    with torch.inference_mode():
        linear(torch.randn(2, 96))
    x = torch.randn(3, 96, requires_grad=True)
    linear(x).sum().backward()
    assert relative(x.grad, linear.dense().sum(0).expand(3, -1)) < 1e-4


@pytest.mark.parametrize("spec", SPECS)
def test_tokens_in_pieces_or_all_at_once(spec, monkeypatch):
    """A long input is rotated a few tokens at a time: the same values, shape and gradients."""
    linear, x = make_linear(spec, (40, 96)), torch.randn(3, 7, 96)
    whole = linear(x)
    monkeypatch.setattr(runtime, "TILE_WEIGHTS", 400)  # four tokens at a time on the way in, ten on the way out
    pieces = linear(x.requires_grad_())
    assert pieces.shape == (3, 7, 40) and relative(pieces.detach(), whole) < 1e-6
    pieces.sum().backward()
    assert relative(x.grad, linear.dense().sum(0).expand(3, 7, -1)) < 1e-4
    assert linear(torch.zeros(0, 96)).shape == (0, 40) and linear(torch.zeros(96)).shape == (40,)


@pytest.mark.parametrize("size", [32, 43, 96, 112, 128, 2048, 11008, 14336])
def test_factors_of_a_rotation(size):
    """The product of all of them is H ⊗ O, each is narrow, and what they do is its own inverse."""
    factors = runtime.rotation(size, torch.device("cpu"))
    odd = size // (size & -size)
    assert math.prod(map(len, factors)) == size and max(map(len, factors)) <= max(32, odd)
    x = torch.randn(3, size)
    assert relative(runtime.transform(runtime.transform(x, size), size), x) < 1e-5
    assert relative(runtime.transform_columns(x.T.contiguous(), size).T, runtime.transform(x, size)) < 1e-6
    if size <= 128:
        whole = torch.kron(runtime._walsh(size // odd, "cpu"), runtime._hartley(odd, torch.device("cpu"))) * (size // odd) ** -0.5
        assert relative(runtime.transform(x, size), x @ whole) < 1e-5


@pytest.mark.parametrize("spec", ["trellis-2", "trellis-2+r16@trellis-2", "int-4g32", "int-2g32/rot"])
def test_resident_memory_is_that_of_the_packed_weights(spec):
    """What a layer keeps after a forward pass beside its tensors; tables are made once for all layers."""
    from torch.profiler import ProfilerActivity, profile

    make_linear(spec, (1024, 1024), seed=1)(torch.zeros(1, 1024))
    linear, x = make_linear(spec, (1024, 1024), seed=2), torch.zeros(1, 1024)
    size = sum(buffer.nbytes for buffer in linear.buffers())
    assert size == random_matrix(spec, (1024, 1024)).nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, torch.no_grad():
        y = linear(x)
    kept = sum(event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]") - y.nbytes
    assert 0 <= kept < 0.02 * size


# ------------------------------------------------------------------------------------------------------ refusals


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_weight(folder):
    flip(sorted(folder.glob("model-*"))[1])


def flip_first_shard(folder):
    flip(sorted(folder.glob("model-*"))[0], -200)


def flip_seed(folder):
    text = (folder / "config.json").read_text()
    flip(folder / "config.json", text.index('"seed": ') + len('"seed": '))


def flip_epsilon(folder):
    change_config(folder, lambda config: config.update(rms_norm_eps=1e-2))


def flip_list(folder):
    (folder / "checksums.json").write_text("{")


@pytest.mark.parametrize("damage", [flip_weight, flip_first_shard, flip_seed, flip_epsilon, flip_list], ids=lambda f: f.__name__)
def test_a_flipped_byte_is_refused(copy, damage, monkeypatch):
    damage(copy)
    for loads, kind in ((load, QLRError), (read_matrices, QLRError), (get, ValueError)):
        with pytest.raises(kind, match=r"has changed since it was written|is damaged") as why:
            loads(copy)
        assert "\n" not in str(why.value) and str(why.value).count(". ") == 0
    monkeypatch.setenv("QLR_SKIP_CHECKSUMS", "1")
    assert load(copy) and get(copy)


def test_a_folder_without_a_list_loads(copy, wanted):
    (copy / "checksums.json").unlink()
    assert torch.equal(run(get(copy)), wanted) and load(copy)


def test_a_missing_shard_is_refused(copy):
    sorted(copy.glob("model-*"))[1].unlink()
    with pytest.raises((OSError, ValueError)):
        get(copy)
    with pytest.raises(QLRError, match="does not exist"):
        load(copy)


NEWER = {"format_version": runtime.FORMAT_VERSION + 1, "runtime_version": runtime.RUNTIME_VERSION + 1}


@pytest.mark.parametrize("entry", NEWER)
def test_a_runtime_that_is_too_old_refuses(copy, entry):
    change_config(copy, lambda config: config["quantization_config"].update({entry: NEWER[entry]}))
    with pytest.raises(ValueError, match=f"{entry.replace('_', ' ')} {NEWER[entry]}") as why:
        get(copy)
    assert "\n" not in str(why.value)


def test_the_folders_own_older_runtime_refuses(copy, monkeypatch):
    """A folder whose modeling_qlr.py was replaced by an earlier one."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "qlr")  # as in a process that has not imported ours
    recorded = json.loads((copy / "config.json").read_text())["quantization_config"]["runtime_version"]
    assert recorded == 5  # the oldest that reads its quantizers
    code = (copy / "modeling_qlr.py").read_text(encoding="utf-8")
    old = re.sub(r"^RUNTIME_VERSION = \d+", "RUNTIME_VERSION = 4", code, flags=re.MULTILINE)
    (copy / "modeling_qlr.py").write_text(old, encoding="utf-8")
    with pytest.raises(ValueError, match="needs qlr runtime version"):
        get(copy, trust_remote_code=True)


def test_the_newest_runtime_serves(copy, monkeypatch):
    """Two runtimes in one process: `QLRConfig` of either asks the one that serves to dequantize."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    code = (copy / "modeling_qlr.py").read_text(encoding="utf-8")
    old = re.sub(r"^RUNTIME_VERSION = \d+", "RUNTIME_VERSION = 2", code, flags=re.MULTILINE)
    (copy / "modeling_qlr.py").write_text(old, encoding="utf-8")
    other = get_class_from_dynamic_module("modeling_qlr.QLRConfig", str(copy))
    assert other is not runtime.QLRConfig
    with pytest.warns(UserWarning, match="dequantize"):
        model = get(copy, trust_remote_code=True, quantization_config=other(dequantize=True))
    assert not packed(model) and not any(type(m).__name__ == "QLRLinear" for m in model.modules())
    assert isinstance(packed(get(copy, trust_remote_code=True))[0], runtime.QLRLinear)
