"""Packed folders: JAX, PyTorch and dense() agree; nothing loads that is not whole; dense export."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from rates import some_rates
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import qlr_jax
from qlr_jax.core import hadamard
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.quantizers import QUANTIZERS, normal_float
from qlr_jax.core.quantizers import e8 as lattice
from qlr_jax.core.quantizers.search import code_values
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.formats import check_files, export_dense, load, read_matrices, save_packed
from qlr_jax.formats.qlr.packed import CODES, FORMAT_VERSION, _runtime_version, array_shapes
from qlr_jax.models import KINDS, Llama, LlamaConfig, linear_names, load_model, parts_of, save_model, shape_of

SHAPES = dict(vocab_size=96, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
TEXTS = ("def f(x): return x", "import os")
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9))
SOLVED = {"q": "trellis-2"}  # of layer 0; solving with a rank takes long to compile, so the others hold random codes
SPECS = [  # by layer, in the order of KINDS
    ["trellis-2", "int-4g16+r4@bf16", "int-3g16a/rot", "trellis-1.5", "trellis-2.5", "none+r16@int-8", "trellis-2+r4@trellis-4"],
    ["e8-2+r4@e8-4", "bf16", "nf-4g16+r4@bf16", "bf16/rot", "e8-3", "none+r16@nf-4", "trellis-2w"],
]


def random_matrix(spec, shape, seed=1, size=0.2, **layout):
    """A matrix of random codes: any byte stream is a valid one, so nothing needs to be solved."""
    layout = Layout(str(Spec.parse(spec)), tuple(shape), seed=seed, **layout)
    rng = np.random.default_rng(zlib.crc32(repr(layout).replace(", signs=False", "").encode()))  # draws older than signs
    parsed = Spec.parse(spec)
    bits = {"backbone": parsed.quantizer().bits}
    if parsed.rank:
        bits |= dict(zip(("left", "right"), (q.bits for q in parsed.factor_quantizers()), strict=True))
    arrays = {}
    for name, (dims, kind) in array_shapes(layout).items():
        if name.endswith("rates"):
            array = some_rates(spec, shape)
        elif kind == np.uint8:
            array = rng.integers(0, 256, dims) if not name.endswith("zeros") else rng.integers(0, 4, dims)
        elif name == "scale":
            array = np.full(dims, size if parsed.quantizer().unit_scale else 1.0)
        elif name.endswith("scales"):
            array = rng.uniform(1.0, 2.0, dims) * size / 2 ** bits[name.split(".")[0]]
        else:
            array = rng.standard_normal(dims) * (0.1 if name.startswith("component") else size)
        arrays[name] = jax.device_put(array.astype(kind))  # jnp.asarray would compile a program for each shape
    return QLRMatrix(arrays, layout)


def on_host(matrix):
    """The same in numpy's arrays, which are decoded by one program and not op by op; the last bit of a product may differ."""
    return QLRMatrix({name: np.asarray(array) for name, array in matrix.arrays.items()}, matrix.layout)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def make_folder(parent, name, *, tied, solve):
    config = LlamaConfig(**SHAPES, num_key_value_heads=2, tie_word_embeddings=tied)
    source = parent / f"{name}-source"
    save_model(Llama(config, jax.random.key(3)), source)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    model = load_model(source)
    matrices = {}
    for linear, layer in model.linears().items():
        i, kind = parts_of(linear)
        spec = SPECS[i][KINDS.index(kind)]
        if linear == "model.layers.1.mlp.down_proj":
            continue  # one linear layer is left as it was
        if solve and i == 0 and kind in SOLVED:
            weight = np.asarray(layer.weight.get_value())
            matrices[linear] = qlr_jax.solve(weight, None, SOLVED[kind], seed=1, state_bits=6, iterations=2).value
        else:
            block = 32 if i else 0
            matrices[linear] = random_matrix(spec, shape_of(config, linear), seed=i + 5, state_bits=8, rotation_block=block)
    out = save_packed(
        parent / name, model, matrices, source=source, files={"report.json": "{}"},
        settings={"budget": "2bpw"}, extra_config={"base_model": "none"}, shard_bytes=10**9 if tied else 20_000,
    )  # fmt: skip
    return out, model, matrices


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("export")
    return {name: make_folder(parent, name, tied=name == "tied", solve=name == "untied") for name in ("tied", "untied")}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the sharded folder, to be damaged."""
    return Path(shutil.copytree(folders["untied"][0], tmp_path / "copy"))


def dense_in_place(model, matrices, as_stored=on_host):
    """The model with every matrix decoded; what is rounded afterwards has to be decoded where an export decodes it."""
    copied = jax.tree.map(lambda leaf: leaf, model)
    for name, linear in copied.linears().items():
        if name in matrices:
            linear.weight.set_value(as_stored(matrices[name]).dense())
    return copied


run = jax.jit(lambda model, tokens: model(tokens))


def logits(model):
    return np.asarray(run(model, TOKENS))


@pytest.fixture(scope="module")
def wanted(folders):
    """Logits with every dense() put in its place, by folder."""
    return {name: logits(dense_in_place(model, matrices)) for name, (_, model, matrices) in folders.items()}


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------ decode, in torch

DECODED = [
    *(f"trellis-{rate}" for rate in (1, 1.5, 2.0625, 2.25, 3.5, 4)),
    *(f"int-{bits}{rest}" for bits, rest in zip(range(1, 9), ("", "g16", "g32a", "a", "g16a", "", "g32", "g20"), strict=True)),
    "int-3g16a/rot", "bf16", "bf16/rot", "none+r3@int-3", "none+r12@trellis-4,bf16", "int-4g16+r10@trellis-2.5",
    "trellis-2+r8@trellis-4", "nf-2", "nf-3g20", "nf-4g32/rot+r5@nf-4g16,nf-3", "e8-2", "e8-3", "e8-4", "e8-2+r6@e8-4",
    "int-3+r3@e8-3,nf-2", "nf-4+r7@bf16,e8-2", "nvfp4", "nvfp4/rot+r5@nvfp4", "trellis-5.5625", "trellis-6+r4@trellis-4.5",
]  # fmt: skip
SETTINGS = [(0, 6), (32, 12), (16, 16)]  # rotation block, state bits


@pytest.mark.parametrize("index", range(len(DECODED)), ids=DECODED)
def test_torch_decodes_as_dense(index, monkeypatch):
    import torch

    from qlr_jax.formats.qlr import modeling_qlr

    monkeypatch.setattr(modeling_qlr, "TILE_WEIGHTS", 1000)  # several tiles, the last one partial
    (block, state_bits), shape = SETTINGS[index % 3], (41, 96)  # rotations over 41 and 96 or 3 times 32
    signs = index % 2 == 0 and Spec.parse(DECODED[index]).rotated  # stored or made from the seed
    matrix = random_matrix(DECODED[index], shape, seed=2**31 + 7, rotation_block=block, state_bits=state_bits, signs=signs)
    linear = modeling_qlr.QLRLinear(matrix.layout.spec, shape, 2**31 + 7, block, state_bits, signs)
    state = {k: to_torch(v) for k, v in matrix.arrays.items()}
    assert {k: (v.shape, v.dtype) for k, v in linear.state_dict().items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    linear.load_state_dict(state)
    dense = np.asarray(on_host(matrix).dense())
    wanted = dense.astype(np.float64)
    assert relative(linear.dense(), wanted) < 1e-6
    for name, quantizer, rows, cols in parts_of_spec(matrix):  # what is stored means the same to the bit
        decoded = torch.cat([rows for _, _, rows in linear.get_submodule(name).tiles()])
        assert decoded.dtype == torch.float32
        exact = jax.jit(quantizer.decode, static_argnums=(1, 2))(matrix.part(name), rows, cols)
        np.testing.assert_array_equal(decoded, exact, strict=True)
    if not matrix.spec.rotated and not matrix.spec.rank:
        np.testing.assert_array_equal(linear.dense(), dense)
    x = np.random.default_rng(1).standard_normal((2, 3, shape[1]), np.float32)
    assert relative(linear(torch.from_numpy(x)), x.astype(np.float64) @ wanted.T) < 1e-6


def parts_of_spec(matrix):
    """(name, quantizer, rows, cols) of everything that is stored on a grid."""
    (rows, cols), spec, state_bits = matrix.shape, matrix.spec, matrix.layout.state_bits
    parts = [("backbone", spec.quantizer(state_bits, (rows, cols)), rows, cols)] if spec.backbone != "none" else []
    if spec.rank:
        left, right = spec.factor_quantizers(state_bits)
        parts += [("left", left, spec.rank, rows), ("right", right, spec.rank, cols)]
    return parts


def to_torch(array):
    import torch

    array = np.asarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy())


def test_constants_are_one_and_the_same():
    import torch

    from qlr_jax.formats.qlr import modeling_qlr as runtime

    assert runtime.FORMAT_VERSION == FORMAT_VERSION and runtime.CODES == CODES
    assert max(quantizer.runtime_version for quantizer in QUANTIZERS.values()) <= runtime.RUNTIME_VERSION
    assert json.loads(json.dumps(CODES)) == CODES  # as config.json keeps them
    for seed, salt, size in ((0, 0, 5), (123456789, 1, 1000), (2**32 - 1, 1, 4096)):
        assert np.array_equal(runtime.signs(seed, salt, size).numpy(), hadamard.signs(seed, salt, size))
    values = runtime.state_values(80, 16).numpy()  # a walk of 256 weights at 2.5 bits
    every = np.arange(2**16)
    np.testing.assert_array_equal(values, jax.jit(code_values)(every, Spec.parse("trellis-2.5").quantizer().gain))
    for sixteenths in range(16, 97):
        gain = np.float32(Spec.parse(f"trellis-{sixteenths / 16:g}").quantizer().gain) / np.float32(147.8)
        assert runtime.state_gain(2 * sixteenths) == gain
    for bits in (2, 3, 4):
        np.testing.assert_array_equal(np.float32(runtime.normal_levels(bits)), normal_float.levels(bits))
    magnitudes, _, _, roots = (table.numpy() for table in runtime.lattice_tables())
    np.testing.assert_array_equal(magnitudes, lattice.magnitudes())
    np.testing.assert_array_equal(roots, lattice.roots())
    code = torch.arange(2**16)
    points = runtime.shifted_points((code & 255).byte(), (code >> 8).byte())
    np.testing.assert_array_equal(points, jax.jit(lattice.shifted_points)(every))  # every point there is


def test_a_folder_asks_for_the_runtime_that_decodes_its_rates():
    def of(*specs):
        names = (f"model.layers.{i}.mlp.up_proj" for i in range(len(specs)))
        return _runtime_version({name: random_matrix(spec, (16, 32)) for name, spec in zip(names, specs, strict=True)})

    assert of("trellis-4", "int-8g32", "bf16") == 5 < of("trellis-4", "trellis-2+r4@trellis-4.0625") == 7


def test_working_memory_is_as_stated(monkeypatch):
    """The peak of a decoded tile, as torch's own profiler counts allocations."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from qlr_jax.formats.qlr import modeling_qlr as runtime

    a_weight = runtime.TILE_BYTES / runtime.TILE_WEIGHTS
    monkeypatch.setattr(runtime, "TILE_WEIGHTS", 2**16)
    for spec in ("trellis-2.25", "trellis-4", "int-3g32a", "nf-3g20", "e8-2", "e8-3", "e8-4"):
        linear = runtime.QLRLinear(spec, (1024, 512), state_bits=16)
        for _ in linear.backbone.tiles():
            pass  # tables are made once for all layers
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, torch.no_grad():
            for _ in linear.backbone.tiles():
                pass
        held = peak = 0
        for event in found.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert 0 < peak <= a_weight * 2**16 + 2**14, (spec, peak / 2**16)


# -------------------------------------------------------------------------------------------------------- in JAX


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_jax_round_trip(folders, wanted, name):
    out, _, matrices = folders[name]
    loaded = load(out)
    assert relative(logits(loaded), wanted[name]) < 1e-5
    assert relative(logits(loaded.densified()), wanted[name]) < 1e-5
    found = read_matrices(out)
    assert set(found) == set(matrices)
    for name, matrix in matrices.items():
        assert found[name].layout == matrix.layout
        for key, array in matrix.arrays.items():
            assert np.asarray(found[name].arrays[key]).tobytes() == np.asarray(array).tobytes()
        if matrix.layout.spec != "bf16":
            assert isinstance(loaded.linears()[name].weight.get_value(), QLRMatrix)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_bytes_are_what_the_specs_promise(folders, name):
    out, model, matrices = folders[name]
    stored = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "numpy") as handle:
            stored |= {name: handle.get_tensor(name).nbytes for name in handle.keys()}  # noqa: SIM118
    of_matrices = sum(size for name, size in stored.items() if any(name.startswith(f"{m}.") for m in matrices))
    assert of_matrices == sum(m.nbytes for m in matrices.values()) == sum(m.spec.nbytes(m.shape) for m in matrices.values())
    rest = [n for n in model.tensors() if n.removesuffix(".weight") not in matrices]
    assert sum(stored.values()) - of_matrices == sum(2 * model.tensors()[n].get_value().size for n in rest)


def test_folder_is_complete(folders):
    out, _, _ = folders["untied"]
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "report.json"} <= names
    assert {"modeling_qlr.py", "checksums.json", "model.safetensors.index.json"} <= names and len(list(out.glob("model-*"))) > 2
    assert "model.safetensors" in {p.name for p in folders["tied"][0].iterdir()}
    assert check_files(out) == len(names) - 1
    assert [p.name for p in out.parent.iterdir() if "partial" in p.name] == []
    config = json.loads((out / "config.json").read_text())
    assert config["base_model"] == "none" and config["quantization_config"]["settings"] == {"budget": "2bpw"}


# ---------------------------------------------------------------------------------------------------- in PyTorch

RUNTIME = r"""
import sys, os, json, warnings, logging
for name in ("jax", "jaxlib", "flax", "qlr_jax", "allocators"):
    sys.modules[name] = None  # importing it now fails, as where it is not installed
import io, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
log = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(log))
results = {}
settings = json.loads(sys.argv[1])
for out, dest in settings["folders"]:
    def check(model, key):
        tokens = torch.tensor(settings["tokens"])
        with torch.no_grad():
            np.save(os.path.join(dest, key + ".npy"), model(tokens).logits.float().numpy())
        return model
    get = lambda path, **kw: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kw)
    model = check(get(out, dtype=torch.float32), "float32")
    types = {name: str(t.dtype) for name, t in model.state_dict().items()}
    packed = [m for m in model.modules() if type(m).__name__ == "QLRLinear"]
    grown = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.save_pretrained(os.path.join(dest, "again"))
    check(get(os.path.join(dest, "again"), dtype=torch.float32), "again")
    for dtype in (torch.bfloat16, torch.float16):
        half = check(get(out, dtype=dtype), str(dtype)[6:])
        assert {n: str(t.dtype) for n, t in half.state_dict().items() if not n.endswith("weight")} \
            == {n: t for n, t in types.items() if not n.endswith("weight")}
        assert all(t.dtype == dtype for n, t in half.state_dict().items() if n.endswith("weight"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cast = check(get(out, dtype=torch.float32).to(torch.bfloat16).to(torch.float32), "cast")
    assert all(torch.equal(t, before[n]) for n, t in cast.state_dict().items() if not n.endswith("weight"))
    model.dequantize()
    assert not any(type(m).__name__ == "QLRLinear" for m in model.modules())
    check(model, "dequantized")
    results[out] = dict(types=types, packed=len(packed), generated=grown.shape[1], kind=type(half).__name__,
                        memory=sum(b.nbytes for m in packed for b in m.buffers()))
results["log"] = log.getvalue()
if settings["evaluated"]:  # what lm_eval's command does, but for reading the thousands of files of its own tasks
    from transformers.quantizers import auto
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        del mapping["qlr"]  # as in a process that has loaded no folder
    import lm_eval, lm_eval.tasks
    manager = lm_eval.tasks.TaskManager(include_path=settings["tasks"], include_defaults=False)
    arguments = f"pretrained={settings['evaluated']},trust_remote_code=True,dtype=float32"
    done = lm_eval.simple_evaluate("hf", arguments, tasks=["local_text"], task_manager=manager, device="cpu", batch_size=1)
    results["scores"] = done["results"]["local_text"]
print("RESULT" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def in_torch(folders, tmp_path_factory):
    """Both folders loaded, saved again, cast and run, and one evaluated by lm_eval, in a process that cannot import jax or ours."""
    parent = tmp_path_factory.mktemp("torch")
    settings = {"tokens": TOKENS.tolist(), "folders": [], "evaluated": None}
    for name, (out, _, _) in folders.items():
        (parent / name).mkdir()
        settings["folders"].append([str(out), str(parent / name)])
    if find_spec("lm_eval"):
        settings |= evaluation(parent)
    env = os.environ | {"HF_MODULES_CACHE": str(parent / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"HF_DATASETS_CACHE": str(parent / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME, json.dumps(settings)],
        capture_output=True, text=True, cwd=parent, env=env, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return parent, json.loads(done.stdout.split("RESULT")[-1])


def evaluation(parent):
    """A packed folder with a real tokenizer, and a task of lm_eval."""
    from test_formats_peft import SHAPES, SPECS, packed_folder

    tasks = parent / "tasks"
    tasks.mkdir()
    (tasks / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = {
        "task": "local_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "t.jsonl")}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    }  # fmt: skip
    (tasks / "t.yaml").write_text(yaml.safe_dump(task))
    out = packed_folder(parent, "evaluated", SPECS, tied=False, shapes=SHAPES | {"vocab_size": 2048})[0]
    return {"evaluated": str(out), "tasks": str(tasks)}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_torch_without_jax(folders, wanted, in_torch, name):
    out, _, matrices = folders[name]
    parent, results = in_torch
    found = {path.stem: relative(np.load(path), wanted[name]) for path in (parent / name).glob("*.npy")}
    print(name, {k: f"{v:.1e}" for k, v in found.items()})
    assert all(found[key] < 1e-5 for key in ("float32", "again", "dequantized")), found
    assert found["cast"] < 0.03 and found["bfloat16"] < 0.03 and found["float16"] < 0.005, found
    packed = {n: m for n, m in matrices.items() if m.layout.spec != "bf16"}
    got = results[str(out)]
    assert got["packed"] == len(packed) and got["memory"] == sum(m.nbytes for m in packed.values())
    assert got["generated"] == 7 and got["kind"] == "QLRForCausalLM"
    for n, m in packed.items():
        for key, array in m.arrays.items():
            assert got["types"][f"{n}.{key}"] == f"torch.{np.asarray(array).dtype}"
    assert results["log"] == ""  # neither missing keys nor an unknown quantization


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_saved_by_torch_loads_in_jax(folders, in_torch, name):
    out, _, matrices = folders[name]
    again = in_torch[0] / name / "again"
    assert (again / "modeling_qlr.py").read_bytes() == (out / "modeling_qlr.py").read_bytes()
    assert relative(logits(load(again)), logits(load(out))) == 0
    assert {n: m.layout for n, m in read_matrices(again).items()} == {n: m.layout for n, m in matrices.items()}


def test_lm_eval_runs(in_torch):
    """The scores of a process that knows nothing of this library are those of one that imported the runtime first."""
    pytest.importorskip("lm_eval")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlr_jax.formats.qlr.torch_runtime as runtime

    runtime.register()
    out = in_torch[0] / "evaluated"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), AutoTokenizer.from_pretrained(out)
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            total += float(torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None]).sum())
    found = in_torch[1]["scores"]["byte_perplexity,none"]
    assert found == pytest.approx(np.exp(-total / sum(map(len, TEXTS))), rel=1e-5)


def test_plain_from_pretrained_once_registered(folders, wanted, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    import qlr_jax.formats.qlr.torch_runtime as runtime

    out, _, _ = folders["untied"]
    runtime.register()  # a folder's own runtime, loaded by another test, has taken its place
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(loaded, runtime.QLRForCausalLM)
    with torch.no_grad():
        assert relative(loaded(torch.tensor(TOKENS)).logits, wanted["untied"]) < 1e-5
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_qlr.py").is_file()


def test_importing_is_light():
    """One after the other in one process: what a module may not bring in, none before it has.

    And the former addresses name the new ones, each once.
    """
    never = {"jax", "vllm", "qlr_jax.models", "qlr_jax.core"}
    steps = [("", {"torch", "transformers"}), (".rules", {"torch"}), (".shards", set()), (".checks", set())]
    plugin = "qlr_jax.formats.qlr.vllm_plugin"
    lines = [f"import {plugin}{name}\nassert not set({sorted(never | own)}) & sys.modules.keys(), {name!r}" for name, own in steps]
    code = """
import sys, warnings, qlr_jax.formats
print("jax" in sys.modules, "torch" in sys.modules)
PLUGIN
import qlr_jax.formats.qlr.torch_runtime as runtime
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import qlr_jax.export
    for _ in range(2):
        import qlr_jax.export.torch_runtime
        from qlr_jax.export import torch_runtime
    assert torch_runtime.use_kernels is runtime.use_kernels
    print("jax" in sys.modules, "flax" in sys.modules)
    for _ in range(2):
        from qlr_jax.export import check_files, load
    assert set(qlr_jax.export.__all__) == set(qlr_jax.formats.__all__) and load is qlr_jax.formats.load
print(*(f"{w.category.__name__} {w.filename} {w.message}" for w in said if "qlr_jax" in str(w.message)), sep="\\n")
"""
    code = code.replace("PLUGIN", "\n".join(lines))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, *said = done.stdout.splitlines()
    assert first == second == "False False"
    assert said == [
        "FutureWarning <string> qlr_jax.export.torch_runtime is now qlr_jax.formats.qlr.torch_runtime: import it from there",
        "FutureWarning <string> qlr_jax.export is now qlr_jax.formats: import check_files from there",
    ]


# ------------------------------------------------------------------------------------------------------ refusals


def drop_tensor(folder):
    path = sorted(folder.glob("model-*"))[1]
    tensors = load_file(path)
    tensors.pop(sorted(n for n in tensors if "codes" in n)[0])
    save_file(tensors, path, metadata={"format": "pt"})


def drop_norm(folder):
    for path in folder.glob("model-*"):
        tensors = load_file(path)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, path, metadata={"format": "pt"})


def drop_shard(folder):
    sorted(folder.glob("model-*"))[1].unlink()


def truncate(folder):
    path = sorted(folder.glob("model-*"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def reshape(folder):
    for path in folder.glob("model-*"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("q_proj.backbone.codes"):
                tensors[name] = np.ascontiguousarray(tensors[name][..., :-1])
                save_file(tensors, path, metadata={"format": "pt"})
                return


def retype(folder):
    for path in folder.glob("model-*"):
        tensors = load_file(path)
        if any(n.endswith("scales") for n in tensors):
            tensors = {n: t.astype(np.float32) if n.endswith("scales") else t for n, t in tensors.items()}
            save_file(tensors, path, metadata={"format": "pt"})
            return


def newer(folder):
    change_config(folder, lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1))


def other_code(folder):
    change_config(folder, lambda c: c["quantization_config"]["trellis"].update(multiplier=3))


def other_lattice(folder):
    change_config(folder, lambda c: c["quantization_config"]["lattice"]["scales"].update({"2": [1.0, 0.0]}))


def made_up(folder):
    change_config(folder, lambda c: c["quantization_config"]["matrices"].update({"model.layers.9.mlp.up_proj": FAKE}))


def unknown_spec(folder):
    change_config(folder, lambda c: c["quantization_config"]["matrices"]["model.layers.0.mlp.up_proj"].update(spec="hex-2"))


FAKE = {"spec": "int-4g32", "shape": [112, 48], "seed": 0, "rotation_block": 0, "state_bits": 12}
DAMAGE = {
    drop_tensor: "lacks",
    drop_norm: "lacks (tensor )?model.norm.weight",
    drop_shard: "missing|does not exist",
    truncate: "truncated",
    reshape: "asks for",
    retype: "asks for",
    newer: "format version 2",
    other_code: "trellis code",
    other_lattice: "lattice code",
    made_up: "layers.9",
    unknown_spec: "hex-2",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_folders_are_refused(copy, damage, monkeypatch):
    """Without the help of checksums.json, which a folder need not have."""
    import torch
    from transformers import AutoModelForCausalLM

    import qlr_jax.formats.qlr.torch_runtime  # noqa: F401

    monkeypatch.setenv("QLR_SKIP_CHECKSUMS", "1")
    damage(copy)
    with pytest.raises(QLRError, match=DAMAGE[damage]) as in_jax:
        load(copy)
    with pytest.raises((ValueError, OSError), match=DAMAGE[damage]) as in_torch:
        AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    print(f"{damage.__name__}\n   jax: {in_jax.value}\n   torch: {in_torch.value}")
    assert "\n" not in str(in_jax.value)
    with pytest.raises(QLRError):
        check_files(copy)


def test_a_flipped_byte_is_found(copy):
    path = sorted(copy.glob("model-*"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for check in (check_files, load, read_matrices):
        with pytest.raises(QLRError, match="has changed"):
            check(copy)


def test_what_is_no_qlr_folder(tmp_path, folders):
    source = folders["tied"][0].parent / "tied-source"
    for path in (tmp_path / "nothing", tmp_path, source):
        with pytest.raises(QLRError, match=r"does not exist|not a qlr folder"):
            load(path)


def test_saving_is_all_or_nothing(folders, tmp_path):
    out, model, matrices = folders["tied"]
    source = out.parent / "tied-source"
    name = linear_names(model.config)[0]
    with pytest.raises(QLRError, match="already holds"):
        save_packed(out, model, matrices, source=source)
    bad = {
        "no linear layer": {"model.layers.0.mlp.x_proj": matrices[name]},
        "shape": {name: matrices["model.layers.0.mlp.up_proj"]},
    }
    for why, given in bad.items():
        with pytest.raises(QLRError, match=why):
            save_packed(tmp_path / "new", model, given, source=source)
    with pytest.raises(TypeError):  # in the middle of writing
        save_packed(tmp_path / "new", model, matrices, source=source, settings={"x": object()})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new" / "job").mkdir(parents=True)  # a job's own folder may be there
    (tmp_path / "new" / "job" / "kept").write_text("")
    save_packed(tmp_path / "new", model, matrices, source=source)
    assert (tmp_path / "new" / "job" / "kept").is_file() and relative(logits(load(tmp_path / "new")), logits(load(out))) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


# -------------------------------------------------------------------------------------------------- dense export


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_export(folders, dtype, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    out, model, matrices = folders["tied" if dtype == "bfloat16" else "untied"]
    dest = export_dense(out, tmp_path / "dense", dtype, shard_bytes=50_000)
    rounded = dense_in_place(model, matrices, jax.device_put)
    for param in rounded.tensors().values():
        param.set_value(np.asarray(param.get_value()).astype(dtype).astype(np.float32))
    wanted = logits(rounded)
    assert relative(logits(load_model(dest)), wanted) < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert relative(loaded(torch.tensor(TOKENS)).logits, wanted) < 1e-5
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {p.name for p in dest.iterdir()}
    assert check_files(dest) > 3 and hashlib.sha256((dest / "tokenizer.json").read_bytes()).hexdigest()
    with pytest.raises(QLRError, match="already holds"):
        export_dense(out, dest, dtype)


def test_dense_export_refuses(folders, tmp_path):
    out = folders["tied"][0]
    with pytest.raises(QLRError, match="int8"):
        export_dense(out, tmp_path / "a", "int8")
    with pytest.raises(QLRError, match="not a qlr folder"):
        export_dense(out.parent / "tied-source", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
