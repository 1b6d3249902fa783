"""The gate: every check passes and fails on its own; damaged folders; and what `evaluate` and `generate` give of a folder."""

import dataclasses
import doctest
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from test_formats import random_matrix

import qlr_jax
from qlr_jax import report
from qlr_jax.calibration import standard_library
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import compare, drift, generate, windows
from qlr_jax.formats import load, save_packed
from qlr_jax.models import Llama, LlamaConfig, load_model, load_tokenizer, save_model
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.pipelines import evaluate as evaluating
from qlr_jax.pipelines import generate as generating
from qlr_jax.pipelines import verify as gate
from qlr_jax.pipelines.verify import verify
from qlr_jax.settings import thresholds
from qlr_jax.settings.recipe import Recipe
from qlr_jax.settings.thresholds import Thresholds

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
SOLVED, LEFT = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
REPORT = {"matrices": [{"name": SOLVED, "relative_error": 0.004}, {"name": LEFT, "relative_error": 0.25}]}
NO_PARITY = {"parity": None}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(original, good folder, bad folder, text): one matrix at 8 bits, and three of random codes."""
    parent = tmp_path_factory.mktemp("gate")
    model = Llama(CONFIG, jax.random.key(0))
    for param in model.tensors().values():
        param.set_value(param.get_value() * (5 if param.get_value().ndim > 1 else 1))
    source = save_model(model, parent / "original", tokenizer_from=BUNDLED)
    model = load_model(source)  # as bf16 keeps it
    solved = qlr_jax.solve(np.asarray(model.linears()[SOLVED].weight.get_value()), None, "int-8").value
    random = {n: random_matrix("int-4g16", w.weight.get_value().shape) for n, w in list(model.linears().items())[:3]}
    settings, files = {"base_model": str(source)}, {"report.json": json.dumps(REPORT)}
    good = save_packed(parent / "good", model, {SOLVED: solved}, source=source, settings=settings, files=files)
    bad = save_packed(parent / "bad", model, random, source=source, settings=settings)
    text = parent / "text.txt"
    text.write_text(standard_library("heldout")[:3000], encoding="utf-8")
    return source, good, bad, text


def named(verdict):
    return {check["name"]: check for check in verdict["checks"]}


# ------------------------------------------------------------------------------------------------- thresholds


def test_thresholds_from_yaml(tmp_path):
    file = tmp_path / "thresholds.yaml"
    file.write_text("kl: 0.05\nparity: null\nchecksums: true\n")
    assert Thresholds.from_yaml(file) == dataclasses.replace(Thresholds(), kl=0.05, parity=None)
    file.write_text("budget: 2bpw\nthresholds: {agreement: 0.95}\n")
    assert Thresholds.from_yaml(file).agreement == 0.95
    for without in ("", "budget: 2bpw", Recipe().to_yaml()):
        file.write_text(without)
        assert Thresholds.from_yaml(file) == Thresholds()
    file.write_text(Recipe(thresholds={"kl": 0.05, "drift": None}).to_yaml())
    assert Thresholds.from_yaml(file) == dataclasses.replace(Thresholds(), kl=0.05, drift=None)
    assert Recipe.from_yaml(file).thresholds == {"kl": 0.05, "drift": None}
    with pytest.raises(QLRError, match=r"recipe: thresholds: 'kld' is unknown; known are kl,"):
        Recipe(thresholds={"kld": 1})
    with pytest.raises(QLRError, match=r"recipe: thresholds is 0.05; give a mapping such as \{kl: 0.05\}"):
        Recipe(thresholds=0.05)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("kld: 0.1", "'kld' is unknown; known are kl, perplexity_ratio, agreement, drift, relative_error, checksums, parity"),
        ("thresholds: {kL: 1}", "'kL' is unknown"),
        ("kl: low", "threshold kl is 'low'"),
        ("kl: -0.1", "threshold kl is -0.1"),
        ("kl: .nan", "threshold kl is nan"),
        ("drift: true", "threshold drift is True"),
        ("agreement: 90", "agreement is 90; it is a share"),
        ("checksums: 1", "checksums is 1; give true, or null"),
        ("[1, 2]", "a mapping of kl"),
        ("kl: [", "not valid YAML"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(tmp_path, content, says):
    file = tmp_path / "thresholds.yaml"
    file.write_text(content)
    with pytest.raises(QLRError, match=says):
        Thresholds.from_yaml(file)
    with pytest.raises(QLRError, match=r"none\.yaml cannot be read"):
        Thresholds.from_yaml(tmp_path / "none.yaml")


def test_examples():
    flags = doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(thresholds, optionflags=flags) == (0, 2)


def test_a_folder_is_held_to_its_own_recipe(parts, tmp_path):
    folder = shutil.copytree(parts[1], tmp_path / "folder")
    left_out = dict.fromkeys(("kl", "perplexity_ratio", "agreement", "drift", "parity"))
    recipe = Recipe(thresholds={"relative_error": 0.1, **left_out})
    (folder / gate.RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    checks = named(verify(folder))
    assert {name: check["threshold"] for name, check in checks.items()} == {"checksums": True, "relative_error": 0.1}
    assert checks["checksums"]["passed"] and not checks["relative_error"]["passed"]


# ------------------------------------------------------------------------------------------------- verdicts


def test_a_good_folder_passes_with_its_margins(parts):
    pytest.importorskip("torch")
    source, good, _, text = parts
    verdict = verify(good, text=[text])
    found = named(verdict)
    assert verdict["passed"] and list(found) == [field.name for field in dataclasses.fields(Thresholds)], verdict
    tokenizer, pair = load_tokenizer(good), (load_model(source), load(good).densified())
    rows = windows(text.read_text(), tokenizer, 32)
    direct = compare(*pair, rows)
    assert found["kl"]["value"] == pytest.approx(direct.kl, rel=1e-4) and direct.kl > 0
    assert found["agreement"]["margin"] == pytest.approx(direct.agreement - 0.8)
    assert found["perplexity_ratio"]["margin"] == pytest.approx(1.1 - direct.perplexity_ratio)
    assert (
        found["drift"]["value"] == pytest.approx(max(drift(*pair, rows).layers), rel=1e-4) and "block 1" in found["drift"]["says"]
    )
    np.testing.assert_allclose(drift(pair[0], load(good), rows[:1], 1).layers, drift(*pair, rows[:1]).layers, rtol=1e-4)  # packed
    assert found["relative_error"]["value"] == 0.25 and LEFT in found["relative_error"]["says"]
    assert found["checksums"]["value"] >= 5 and found["parity"]["value"] < 1e-5
    assert "95 % interval" in found["kl"]["says"]
    table = report.verdict_text(verdict)
    assert "NO" not in table and table.endswith("passed: 7 checks") and "≥ 0.800" in table
    json.dumps(verdict, allow_nan=False)


def test_each_check_fails_on_its_own(parts):
    _, good, _, text = parts
    limits = {"kl": 1e-9, "perplexity_ratio": 0.5, "agreement": 1.0, "drift": 1e-9, "relative_error": 0.2}
    evaluation = verify(good, text=[text], thresholds=NO_PARITY)["evaluation"] | {"agreement": 0.97}
    for name, limit in limits.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate, "evaluate", lambda *args, **kwargs: evaluation)
            verdict = verify(good, thresholds={name: limit, **NO_PARITY})
        failed = [check["name"] for check in verdict["checks"] if not check["passed"]]
        assert failed == [name] and not verdict["passed"] and named(verdict)[name]["margin"] < 0
        assert f"{name.replace('_', ' ')}: " in report.verdict_text(verdict) and "failed: 1 of 6" in report.verdict_text(verdict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "evaluate", lambda *args, **kwargs: evaluation | {"kl": float("nan")})
        assert not named(verify(good, thresholds=NO_PARITY))["kl"]["passed"]


def test_a_folder_of_random_codes_fails(parts):
    _, _, bad, text = parts
    found = named(verify(bad, text=[text], thresholds=NO_PARITY))
    assert not found["kl"]["passed"] and not found["drift"]["passed"] and found["checksums"]["passed"]
    assert found["relative_error"] == {
        "name": "relative_error", "value": None, "threshold": 0.6, "passed": False, "margin": None,
        "says": "report.json names no errors of matrices; set relative_error to null",
    }  # fmt: skip


def test_of_damaged_files_nothing_is_run(parts, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(parts[1], copy)
    (copy / "modeling_qlr.py").write_text("raise SystemExit('must not run')\n")
    monkeypatch.setattr(gate, "evaluate", None)
    verdict = verify(copy, text=[parts[3]])
    assert not verdict["passed"] and not any(check["passed"] for check in verdict["checks"])
    assert "modeling_qlr.py has changed" in named(verdict)["checksums"]["says"]
    assert "not measured, since the files are damaged" in report.verdict_text(verdict)
    assert len(verdict["checks"]) == 7


def test_parity_sees_a_difference_and_fails_without_torch(parts, monkeypatch):
    pytest.importorskip("torch")
    only = dict.fromkeys(("kl", "perplexity_ratio", "agreement", "drift", "relative_error"))
    assert verify(parts[1], thresholds=only)["passed"]  # neither text nor original is needed
    model = load(parts[1])
    weight = model.linears()[LEFT].weight
    weight.set_value(weight.get_value() * 1.01)
    with monkeypatch.context() as patch:
        patch.setattr(gate, "load", lambda out: model)
        check = named(verify(parts[1], thresholds=only))["parity"]
    assert not check["passed"] and check["value"] > 1e-4
    monkeypatch.setitem(sys.modules, "torch", None)
    check = named(verify(parts[1], thresholds=only))["parity"]
    assert not check["passed"] and check["value"] is None and "torch is not installed" in check["says"]
    assert verify(parts[1], thresholds=only | NO_PARITY)["passed"]


def test_what_is_missing_is_an_error_not_a_verdict(parts, tmp_path):
    with pytest.raises(QLRError, match=r"no text was given .* pass --text FILE"):
        verify(parts[1], thresholds=NO_PARITY)
    with pytest.raises(QLRError, match="not a qlr folder"):
        verify(parts[0])
    with pytest.raises(QLRError, match="does not exist"):
        verify(tmp_path / "none")


# ------------------------------------------------------------------------------------------------- evaluate, generate


def test_evaluate_tells_every_choice_of_its_protocol(parts):
    _, good, _, text = parts
    found = evaluating.evaluate(good, text=[text], windows=9, drift=False)
    whole = windows(text.read_text(), load_tokenizer(good), 32)
    assert found["windows"] == 9 and found["windows_in_text"] == len(whole) and found["window"] == 32 and found["tokens"] == 288
    assert found["bos"] == "<s>" and 0 <= found["dropped_tokens"] < 32 and "drift" not in found
    for word in ("tokenizer", "one BOS (<s>)", f"9 of {len(whole)} windows of 32", "dropped", "mean over windows"):
        assert word in found["protocol"]
    assert found["intervals"]["kl"][0] <= found["kl"] <= found["intervals"]["kl"][1]
    narrow = evaluating.evaluate(good, text=[text], window=16, drift=False)
    assert narrow["window"] == 16 and narrow["windows"] == narrow["windows_in_text"] >= 2 * len(whole)
    with pytest.raises(QLRError, match="windows of 64 tokens are asked for, and the model takes 32"):
        evaluating.evaluate(good, text=[text], window=64)
    text = report.evaluation(found)
    assert "95 % interval" in text and "worst token: KL" in text and "protocol: the whole text" in text


def test_evaluate_on_tasks_alone(parts, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "few.jsonl").write_text('{"q": "import", "a": 0}\n{"q": "def", "a": 1}\n')
    (tmp_path / "few.yaml").write_text(
        "task: few\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'few.jsonl'}}}}}\n"
        "doc_to_choice: [os, f]\ndoc_to_target: a\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = evaluating.evaluate(parts[1], tasks=["few"], task_path=tmp_path)
    metric = found["zero_shot"]["tasks"]["few"]["metrics"]["acc"]
    assert list(found) == ["zero_shot"] and set(metric) == {"original", "compressed", "difference", "stderr"}
    assert "few" in report.evaluation(found)


def test_generate_from_a_compressed_folder_and_from_its_original(parts):
    source, good, *_ = parts
    tokenizer = load_tokenizer(good)
    for folder, model in ((good, load(good)), (source, load_model(source))):
        ids = generate(model, [tokenizer.encode("import")], max_new_tokens=8)[0]
        assert "".join(generating.generate(folder, "import", max_new_tokens=8)) == tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(QLRError, match="max_new_tokens of at most"):
        generating.generate(good, "import", max_new_tokens=100)
