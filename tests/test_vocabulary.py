"""Ids beyond the vocabulary are refused wherever tokens come in: an array lookup would clamp them and report figures."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from qlr_jax import cli, evaluation, job
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.scoring import scores
from qlr_jax.formats.qlr.packed import load, save_packed
from qlr_jax.models import load_model, load_tokenizer
from qlr_jax.models.vocabulary import check_tokens
from qlr_jax.pipelines import verify

NAMED = r"'<extra>' \(id 2048\) is not in the model's vocabulary of 2048; .* the 2049 tokens"


@pytest.fixture(scope="module")
def overgrown(tiny, tmp_path_factory):
    """The model with a token more in its tokenizer, the folder that is compressed of it, and texts with and without that token."""
    parent = tmp_path_factory.mktemp("overgrown")
    shutil.copytree(tiny, parent / "model")
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(parent / "model")
    save_packed(parent / "out", load_model(tiny), {}, source=parent / "model", settings={"base_model": str(parent / "model")})
    (parent / "good.txt").write_text("import os\n" * 2000)
    (parent / "bad.txt").write_text("import os\n" * 1999 + "<extra>\n")
    return parent


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails the test where a model runs."""
    monkeypatch.setattr("qlr_jax.models.llama.Attention.__call__", lambda *args: pytest.fail("a model runs"))


def test_no_command_begins(overgrown, tmp_path, nothing_runs):
    model, out, good, bad = (overgrown / name for name in ("model", "out", "good.txt", "bad.txt"))
    doors = (
        ("compress", model, tmp_path / "new", "--budget", "3bpw", "--calibration", bad),
        ("compress", model, tmp_path / "new", "--budget", "3bpw", "--calibration", good, "--evaluate-on", bad),
        ("sensitivity", model, tmp_path / "new", "--calibration", bad),
        ("evaluate", out, "--text", bad),
        ("verify", out, "--text", bad),
        ("adapt", out, tmp_path / "new", "--text", bad),
        ("adapt", out, tmp_path / "new", "--text", good, "--held-out", bad),
        ("generate", out, "--prompt", "import <extra>"),
    )
    (overgrown / "thresholds.yaml").write_text("parity: null\nchecksums: null\nrelative_error: null\n")
    for door in doors:
        more = ["--thresholds", overgrown / "thresholds.yaml"] if door[0] == "verify" else []
        done = CliRunner().invoke(cli.app, [*map(str, (*door, *more)), "--json"])
        error = json.loads(done.stdout)["error"]
        with pytest.raises(QLRError, match=NAMED):
            raise QLRError(error)
        assert done.exit_code == 1 and not (tmp_path / "new").exists(), door


def test_no_door_of_the_library_clamps(overgrown, monkeypatch):
    model, tokenizer = load(overgrown / "out"), load_tokenizer(overgrown / "model")
    rows = np.full((1, 8), 2048, np.int32)
    for call in (
        lambda: model(jnp.asarray(rows)),
        lambda: model(np.asarray([[-1, 3]])),
        lambda: evaluation.perplexity(model, rows),
        lambda: scores(model, [([1, 2], [2048])]),
        lambda: evaluation.generate(model, rows.tolist(), max_new_tokens=1),
    ):
        with pytest.raises(QLRError, match="is not in the model's vocabulary of 2048"):
            call()
    assert jax.eval_shape(lambda t: model(t), jax.ShapeDtypeStruct((1, 4), jnp.int32)).shape == (1, 4, 2048)
    tokenizer.bos_token = "<extra>"  # put before the text, so it counts too
    with pytest.raises(QLRError, match=NAMED):
        evaluation.windows("import os", tokenizer, 2, 2048)
    check_tokens(np.asarray([0, 2047]), 2048, tokenizer)
    check_tokens(np.zeros((0,)), 2048)


def test_zero_shot_names_the_token(overgrown):
    harness = pytest.importorskip("qlr_jax.evaluation.harness")
    model = harness.HarnessModel(load_model(overgrown / "model"), load_tokenizer(overgrown / "model"))
    context = model.tok_encode("import <extra>")
    with pytest.raises(QLRError, match=NAMED):
        model._loglikelihood_tokens([(None, context, [1])])


def test_pytorch_raises_by_itself(overgrown):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(overgrown / "out"), trust_remote_code=True)
    with pytest.raises(IndexError):
        model(torch.tensor([[2048]]))


def test_a_tokenizer_with_more_tokens_than_are_used_is_fine(overgrown):
    """Many checkpoints have some; what counts is what the text holds."""
    found = job.evaluate(overgrown / "out", text=[overgrown / "good.txt"], windows=1, drift=False)
    assert found["kl"] < 1e-3
    verdict = verify.verify(overgrown / "out", thresholds={"parity": None, "relative_error": None, "drift": None}, windows=1,
                            text=[overgrown / "good.txt"])  # fmt: skip
    assert verdict["passed"]
