"""The bundled model once, end to end, with little of everything: two matrices of its first and of its last block."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qlr_jax as qlr
from qlr_jax import calibration, job
from qlr_jax.models import load_model
from qlr_jax.models.forward import last_states
from qlr_jax.pipelines.run import with_weights
from qlr_jax.settings.recipe import Recipe

LIGHT = Recipe(
    budget="2.25bpw",
    backbones=("trellis-1.5", "trellis-2", "trellis-3"),
    state_bits=6,
    search_state_bits=6,
    ranks=(0, 8),
    iterations=1,
    sequences=12,
    sequence_length=64,
    measure_tokens=128,
    evaluation_tokens=512,
    factors=("trellis-2",),
    refine=1,
    include=("model.layers.[05].self_attn.[kv]_proj",),  # of one shape, which is not square: compiling takes most of the time
)


@pytest.fixture(scope="module", autouse=True)
def _short_texts():
    """Of two megabytes of text most would only be tokenized."""
    whole = calibration.standard_library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "standard_library", lambda split: whole(split)[:50_000])
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return job.demo(tmp_path_factory.mktemp("demo") / "out", recipe=LIGHT)


TOKENS = np.arange(24)[None] * 7


@pytest.fixture(scope="module")
def packed(done):
    """The model as it is delivered, and its logits, from Q, L and R as they are stored."""
    model = qlr.load(done.out)
    return model, np.asarray(jax.jit(lambda m, t: m(t))(model, TOKENS))


def test_bytes_are_those_promised_and_fit_the_budget(done):
    report = done.report
    stored = load_file(done.out / "model.safetensors")
    matrices = {row["name"]: row for row in report["matrices"]}
    assert len(matrices) == 4
    sizes = dict.fromkeys(matrices, 0)
    for key, array in stored.items():
        for name in matrices:
            if key.startswith(name + "."):
                sizes[name] += array.nbytes
    assert sizes == {name: row["bytes"] for name, row in matrices.items()}
    assert sum(sizes.values()) == report["bytes"]["compressed"] == report["points"][report["delivered"]]["bytes"]
    weights = sum(np.prod(row["shape"]) for row in matrices.values())
    assert report["bits_per_weight"] == pytest.approx(8 * sum(sizes.values()) / weights)
    assert report["bits_per_weight"] <= 2.25
    for row in matrices.values():
        assert row["bytes"] == qlr.Spec.parse(row["spec"]).nbytes(tuple(row["shape"]))


def test_report_is_complete_and_says_what_was_found(done):
    report = json.loads((done.out / "report.json").read_text())
    assert set(report["perplexity"]) == {"original", "allocated", "uniform", "rank0"}
    assert all(np.isfinite(v) and v > 1 for v in report["perplexity"].values())
    assert all(v > 0 for v in report["kl"].values())
    # by construction: what is delivered is never worse than uniform on the calibration text
    assert report["calibration_kl"][report["delivered"]] == min(report["calibration_kl"].values())
    assert report["allocation"]["bound"] is None or report["allocation"]["damage"] >= report["allocation"]["bound"] * (1 - 1e-9)
    assert report["peak_rss_bytes"] > 0 and report["seconds"]["total"] > 0
    assert 0.5 < report["prediction"]["median"] < 2
    html = (done.out / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert any(f"{report['bits_per_weight']:.{digits}f}" in html for digits in (2, 3, 4))  # 2.2396 is no 2.24
    assert Recipe.from_yaml(done.out / "recipe.yaml") == LIGHT


def test_delivered_model_equals_its_dense_matrices_in_jax(done, packed):
    model, got = packed
    compressed = {row["name"]: model.linears()[row["name"]].weight.get_value() for row in done.report["matrices"]}
    placed = with_weights(load_model(job.BUNDLED), compressed)
    (states,) = last_states(placed, [TOKENS])  # all blocks are alike, and share one program
    want = np.asarray(jax.jit(lambda top, x: top(x))(placed.top(), states))
    assert np.abs(want - got).max() <= 1e-3 * np.abs(want).max()


def test_delivered_model_loads_in_pytorch(done, packed):
    """In a process where neither jax nor qlr_jax can be imported: test_formats."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(done.out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        got = model(torch.from_numpy(TOKENS)).logits.numpy()
    want = packed[1]
    assert np.abs(want - got).max() <= 1e-3 * np.abs(want).max()


def test_evaluate_and_inspect_read_the_folder(done):
    found = job.evaluate(done.out, windows=2)
    assert found["tokens"] == 512 and found["kl"] > 0 and found["perplexity"] > 1 and "BOS" in found["protocol"]
    inside = job.inspect(done.out)
    assert inside["bits_per_weight"] == pytest.approx(done.report["bits_per_weight"])
    assert {m["name"]: m["spec"] for m in inside["matrices"]} == {m["name"]: m["spec"] for m in done.report["matrices"]}
