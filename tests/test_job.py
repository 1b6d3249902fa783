"""A job on a tiny model: tables that are kept, what it leaves alone, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import allocators
import qlr_jax as qlr
from allocators import AllocationError, OptionTable
from qlr_jax import job
from qlr_jax.errors import QLRError
from qlr_jax.models import load_model
from qlr_jax.models.identity import digest_model
from qlr_jax.pipelines.source import open_source, saved_table
from qlr_jax.pipelines.stages import calibrate
from qlr_jax.progress import silent
from qlr_jax.settings import resolved
from qlr_jax.settings.constraints import Constraints
from qlr_jax.settings.recipe import Recipe

LIGHT = Recipe(
    budget="2.25bpw",
    backbones=("trellis-1", "trellis-1.5", "trellis-2", "trellis-2.5", "trellis-3", "trellis-4"),
    state_bits=6,
    search_state_bits=6,
    ranks=(0, 4),
    iterations=1,
    sequences=8,
    sequence_length=32,
    measure_tokens=256,
    evaluation_tokens=1024,
    factors=("trellis-2",),
    refine=1,
)


def damaged(tiny, folder, **change):
    """A copy of the tiny model with one thing wrong."""
    shutil.copytree(tiny, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if "nan" in change:
        tensors[change["nan"]] = np.full_like(tensors[change["nan"]], np.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if "truncate" in change:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    (folder / "config.json").write_text(json.dumps(config | change.get("config", {})))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"truncate": True}, "truncated"),
        ({"nan": "model.layers.0.mlp.up_proj.weight"}, "up_proj.weight holds NaN"),
        ({"config": {"architectures": ["OPTForCausalLM"], "model_type": "opt"}}, "OPT|opt"),
        ({"config": {"clip_qkv": 3.0}}, "clip_qkv"),
    ],
)
def test_a_damaged_model_is_refused_and_nothing_is_written(tiny, text, tmp_path, change, says):
    folder = damaged(tiny, tmp_path / "model", **change)
    with pytest.raises(QLRError, match=says):
        job.compress(folder, tmp_path / "out", "2.25bpw", text)
    assert not (tmp_path / "out").exists()


def test_budgets_out_of_range_name_both_ends(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(job.stages, "calibrate", None)  # refused before the work begins
    for budget, side in (("0.5bpw", "below"), ("16.5bpw", "above")):
        with pytest.raises(AllocationError, match=rf"{side} the table's range; pass [\d.]+bpw to [\d.]+bpw"):
            job.compress(tiny, tmp_path / "out", budget, text, LIGHT)
    with pytest.raises(AllocationError, match="below what this model can be stored in; pass"):
        job.compress(tiny, tmp_path / "out", "1KB", text, LIGHT)
    with pytest.raises(QLRError, match="budget"):
        job.compress(tiny, tmp_path / "out", "cheap", text, LIGHT)
    assert not (tmp_path / "out").exists()


def test_missing_folder_occupied_folder_and_poor_text_are_refused(tiny, text, tmp_path):
    with pytest.raises(QLRError, match="nowhere does not exist"):
        job.compress(tmp_path / "nowhere", tmp_path / "out", "2.25bpw", text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(QLRError, match=r"already holds thesis\.tex"):
        job.compress(tiny, tmp_path / "full", "2.25bpw", text)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    for content, says in (("", "empty"), ("import os", "more text")):
        (tmp_path / "poor.txt").write_text(content)
        with pytest.raises(QLRError, match=says):
            job.compress(tiny, tmp_path / "out", "2.25bpw", tmp_path / "poor.txt")
    with pytest.raises(QLRError, match="no calibration text"):
        job.compress(tiny, tmp_path / "out", "2.25bpw")
    with pytest.raises(QLRError, match="no linear layer is left"):
        job.compress(tiny, tmp_path / "out", "2.25bpw", text, Recipe(include=("*.nothing",)))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def measured(tiny, text, tmp_path_factory):
    """A table of the tiny model, and its folder."""
    out = tmp_path_factory.mktemp("measured") / "out"
    return job.sensitivity(tiny, out, text, LIGHT), OptionTable.from_json((out / "table.json").read_text())


def test_sensitivity_writes_a_table_with_pictures(measured, tiny):
    told, table = measured
    out = Path(told["out"])
    assert told["matrices"] == len(table.rows) == 9 and told["options"] == sum(len(row.options) for row in table.rows)
    assert {p.name for p in out.iterdir()} >= {"table.json", "sensitivity.html", "damage.svg", "spectra.svg", "error.svg"}
    assert table.notes["attribution"] == "path" and table.notes["model"] == str(tiny)
    assert [row.name for row in table.rows if not row.counted] == ["model.embed_tokens", "lm_head"]
    for row in table.rows:
        note = table.notes["matrices"][row.name]
        if not row.counted:
            assert note["layer"] is None and note["coefficient"] > 0 and not note["spectrum"]
            damages = {option.spec: option.damage for option in row.options}
            assert damages["bf16"] == 0 < damages["int-8g32"] < damages["trellis-4/rows"] < damages["trellis-2/rows"]
            continue
        assert all(o.damage >= 0 for o in row.options) and note["coefficient"] >= 0 and 0 < sum(note["spectrum"]) < 1.01
        measured_options = [o for o in row.options if o.measured]
        assert {o.spec for o in measured_options} >= {"trellis-2", "trellis-2+r4@trellis-2"}
        by_rate = [o.damage for o in row.options if o.rank == 0]
        assert by_rate[0] >= by_rate[2] >= by_rate[-1]  # 1, 2, 4 bits


def test_a_saved_table_is_used_and_held_to_its_model(measured, tiny, text, tmp_path):
    table = measured[1]
    held = Constraints.parse(lock=["*v_proj=trellis-3"], at_least=["*down_proj=2.5"], tie=["*gate_proj,*up_proj"])
    done = job.compress(tiny, tmp_path / "out", "2.25bpw", text, LIGHT, table=table, constraints=held).report
    specs = {row["kind"]: row["spec"] for row in done["matrices"]}
    if done["delivered"] != "uniform":
        assert specs["v"] == "trellis-3"
        assert qlr.Spec.parse(specs["gate"]).backbone == qlr.Spec.parse(specs["up"]).backbone
        assert qlr.Spec.parse(specs["down"]).bits((32, 32)) >= 2.5
    assert done["seconds"]["stages"]["measure"] < 1 and done["bits_per_weight"] <= 2.25
    assert done["refined"]["tried"] <= LIGHT.refine and done["refined"]["measured"] <= done["refined"]["start"]
    with pytest.raises(AllocationError, match="nothing_proj"):
        wrong = Constraints.parse(["nothing_proj=int-2"])
        job.compress(tiny, tmp_path / "no", "2.25bpw", text, LIGHT, table=table, constraints=wrong)
    with pytest.raises(QLRError, match="is not to be compressed here; measure this model again"):
        job.compress(tiny, tmp_path / "no", "2.25bpw", text, LIGHT.updated(include=("*.mlp.*",)), table=table)
    with pytest.raises(QLRError, match="notes say nothing"):
        job.compress(tiny, tmp_path / "no", "2.25bpw", text, LIGHT, table=dataclasses.replace(table, notes={}))
    assert not (tmp_path / "no").exists()


def test_budgets_of_the_whole_model_compress_embedding_and_head(measured, tiny, text, tmp_path):
    light = LIGHT.updated(refine=0)
    report = job.compress(tiny, tmp_path / "out", "4bpw:all", text, light, table=measured[1], evaluate_on=text).report
    rows = {row["kind"]: row for row in report["matrices"]}
    assert {"embedding", "head"} < set(rows) and rows["head"]["layer"] is None and rows["embedding"]["spec"] != "bf16"
    assert report["whole_model_bits_per_weight"] <= 4.0 and report["fit"]["fits"]
    assert report["whole_model_bits_per_weight"] > 3.9  # nothing is left over
    linear = [row for row in report["matrices"] if row["layer"] is not None]
    weights = sum(row["shape"][0] * row["shape"][1] for row in linear)
    assert report["bits_per_weight"] == pytest.approx(8 * sum(row["bytes"] for row in linear) / weights)
    parts = {part["part"]: part["after"] for part in report["bytes"]["parts"]}
    assert parts["embeddings"] == rows["embedding"]["bytes"] and parts["head"] == rows["head"]["bytes"]
    packed = qlr.load(tmp_path / "out")
    assert packed.lm_head.weight.get_value().nbytes == rows["head"]["bytes"]
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["bytes"]["after"] <= stored < report["bytes"]["after"] + 20_000  # beside names and shapes
    page = (tmp_path / "out" / "report.html").read_text()
    assert report["kl"]["allocated"] < 1 and "lm_head" in page and f"Embedding: {rows['embedding']['spec']}" in page
    with pytest.raises(AllocationError, match=r"1bpw:all is below the table's range; pass [\d.]+bpw:all to"):
        job.compress(tiny, tmp_path / "no", "1bpw:all", text, light)


def test_what_is_offered_for_them_is_for_the_recipe_to_say(tiny):
    shapes = lambda **settings: set(open_source(tiny, LIGHT.updated(**settings)).prices.index)  # noqa: E731
    both = {"model.embed_tokens", "lm_head"}
    assert both < shapes(budget="4bpw:all") and not both & shapes(budget="2.25bpw")
    assert not both & shapes(budget="4bpw:all", vocabulary=("bf16",))
    assert not both & shapes(budget="60KB", target="compressed-tensors", backbones=("int-4g32",), factors=("bf16",))
    assert both & shapes(budget="4bpw:all", exclude=("lm_head",)) == {"model.embed_tokens"}
    prices = open_source(tiny, LIGHT.updated(budget="70.5KB", target="gguf", backbones=(), factors=())).prices
    assert [o.spec for o in prices["lm_head"].options] == ["bf16", "int-8g32", "int-4g32"]  # blocks of 256 do not fit 32 columns
    with pytest.raises(QLRError, match=r"vocabulary: single rows .* trellis-3 \(trellis-3/rows is\)"):
        LIGHT.updated(vocabulary=("trellis-3",))


def test_a_strategy_that_is_asked_for_is_delivered_as_it_is(measured, tiny, text, tmp_path):
    recipe, table = LIGHT.updated(strategy="greedy"), measured[1]
    done = job.compress(tiny, tmp_path / "out", "2.25bpw", text, recipe, table=table).report
    counted = saved_table(table, open_source(tiny, recipe), silent())  # a plain budget leaves embedding and head as they are
    wanted = allocators.greedy(counted, allocators.Budget.parse("2.25bpw").on(counted).limit)
    assert {row["name"]: row["spec"] for row in done["matrices"]} == wanted.specs
    assert done["delivered"] == "allocated" and done["refined"] is None and done["recipe"]["strategy"] == "greedy"
    assert set(done["calibration_kl"]) == {"allocated", "uniform", "rank0"}
    kept = json.loads((tmp_path / "out" / "allocation.json").read_text())["allocated"]
    assert kept["method"] == "greedy" and "greedy" not in kept["baselines"] and "allocated" in kept["baselines"]
    assert "strategy: greedy" in (tmp_path / "out" / "recipe.yaml").read_text()
    for name in ("report.html", "report.md"):
        page = (tmp_path / "out" / name).read_text()
        assert "Delivered as asked for: greedy" in page and "greedy, as asked" in page


def test_without_room_for_output_hessians_outputs_count_alike(tiny, text, monkeypatch):
    monkeypatch.setattr(resolved, "machine_memory", lambda: 1000)
    said = []
    progress = silent()
    monkeypatch.setattr(type(progress), "say", lambda self, line: said.append(line))
    source = open_source(tiny, LIGHT.updated(streaming=False))
    statistics, _ = calibrate(source, text.read_text(), progress)
    assert statistics.outputs == {} and "all outputs count alike" in said[0]


def test_a_budget_that_the_original_fits_keeps_bf16(tiny, text, tmp_path, monkeypatch):
    light = LIGHT.updated(backbones=("trellis-2",), ranks=(0,), budget="1GB")
    monkeypatch.chdir(tiny.parent)
    result = job.compress(tiny.name, tmp_path / "out", calibration=text, recipe=light)
    known = result.report["original"]  # what evaluate, verify and adapt look for, wherever they are called
    assert known == {"name": tiny.name, "path": str(tiny), "hub": None, "revision": None, "digest": digest_model(tiny)}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["settings"]
    assert settings["original"]["digest"] == known["digest"] and str(tiny) not in json.dumps(settings)
    assert {row["spec"] for row in result.report["matrices"]} == {"bf16"}
    logits = jax.jit(lambda model: model(np.arange(10)[None]))
    np.testing.assert_allclose(logits(qlr.load(tmp_path / "out")), logits(load_model(tiny)), atol=1e-5, rtol=0)


def test_include_leaves_the_rest_as_it_is(tiny, text, tmp_path):
    light = LIGHT.updated(backbones=("int-2g16", "int-3g16"), ranks=(0,), budget="3.5bpw", include=("*.mlp.*",))
    result = job.compress(tiny, tmp_path / "out", calibration=text, recipe=light, evaluate_on=text)
    assert {row["kind"] for row in result.report["matrices"]} == {"gate", "up", "down"}
    kept = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(kept, load_file(tiny / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"])


def test_a_gguf_file_is_compressed_as_its_folder(tiny, text, tmp_path):
    """The same weights, config and tokenizer come out; what needs the original again takes the file again."""
    from qlr_jax.formats import export_gguf, save_packed
    from qlr_jax.models import LlamaConfig, load_tokenizer
    from qlr_jax.pipelines.evaluate import evaluate
    from qlr_jax.pipelines.generate import generate

    whole = save_packed(tmp_path / "whole", load_model(tiny), {}, source=tiny)
    file = export_gguf(whole, tmp_path / "gguf") / "model.gguf"
    light = LIGHT.updated(backbones=("int-2g16", "int-3g16"), ranks=(0,), budget="3.5bpw", include=("*.mlp.*",))
    out = job.compress(file, tmp_path / "out", calibration=text, recipe=light).out
    original, config = load_model(tiny), LlamaConfig.from_hf(tiny)
    for name, param in load_model(file).tensors().items():
        np.testing.assert_array_equal(original.tensors()[name].get_value(), param.get_value(), err_msg=name)
    ids = {"bos_token_id": 0, "eos_token_id": (0, 2)}  # the tokenizer's own come first, and a file keeps all that end a text
    assert qlr.load(out).config == dataclasses.replace(config, **ids)
    content = text.read_text()
    assert load_tokenizer(out)(content)["input_ids"] == load_tokenizer(tiny)(content)["input_ids"]
    assert evaluate(out, text=[text], windows=2, drift=False)["kl"] > 0  # the report says where the file lies
    assert "".join(generate(file.parent, "def", max_new_tokens=1)) == "".join(generate(tiny, "def", max_new_tokens=1)) != ""
