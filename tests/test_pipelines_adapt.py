"""`qlr adapt`: a folder in, a folder out, with what it won; refusals that leave nothing behind."""

import json

import jax
import numpy as np
import pytest
from test_formats import random_matrix
from typer.testing import CliRunner

import qlr_jax as qlr
from qlr_jax import cli, job
from qlr_jax.adaptation import AdaptConfig
from qlr_jax.calibration import standard_library
from qlr_jax.errors import QLRError
from qlr_jax.formats import check_files, read_matrices, save_packed
from qlr_jax.models import Llama, LlamaConfig, save_model
from qlr_jax.pipelines import adapt as tuning

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
)
FEW = AdaptConfig(
    train=("norms", "scales", "embeddings"), steps=4, batch=2, vector_rate=3e-2, evaluate_every=2, compute="float32", devices=1
)

RESULT = {
    "out": "o", "dest": "d", "tokens": 512, "judged_on": "other.txt", "steps": 7, "verdict": "fine",
    "before": {"kl": 0.04, "perplexity": 12.0, "agreement": 0.9}, "after": {"kl": 0.03, "perplexity": 11.9, "agreement": 0.91},
    "bits_per_weight_before": 2.0, "bits_per_weight": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The original; its compressed folder, as a job leaves it; a text."""
    parent = tmp_path_factory.mktemp("tuning")
    model = Llama(CONFIG, jax.random.key(0))
    save_model(model, parent / "model", tokenizer_from=job.BUNDLED)
    matrices = {}
    for i, (name, linear) in enumerate(model.linears().items()):
        if not name.endswith(("q_proj", "up_proj")):
            continue  # less to compile
        spec = "int-4g16+r4@bf16" if i % 2 else "int-3g16"
        matrices[name] = random_matrix(spec, linear.weight.get_value().shape, seed=i, size=0.1)
    rows = [{"name": n, "spec": str(m.spec), "shape": list(m.shape), "bytes": m.nbytes} for n, m in matrices.items()]
    report: dict = {
        "model": str(parent / "model"),
        "adapted": {"command": "qlr adapt first out"},
        "bytes": {"before": 10**6, "after": 10**5, "compressed": 10**4},
        "matrices": rows,
    }
    files = {"report.json": json.dumps(report), "recipe.yaml": "budget: 3bpw\n"}
    settings = {"base_model": str(parent / "model")}
    save_packed(parent / "out", model, matrices, source=parent / "model", settings=settings, files=files)
    (parent / "text.txt").write_text(standard_library("calibration")[:34000], encoding="utf-8")
    return parent


def test_a_folder_is_adapted(folders, tmp_path):
    told = tuning.adapt(
        folders / "out", tmp_path / "dest", [folders / "text.txt"], FEW, evaluation_tokens=512, command="qlr adapt out dest"
    )
    assert told["after"]["kl"] < told["before"]["kl"] and told["bits_per_weight"] == told["bits_per_weight_before"]
    report = json.loads((tmp_path / "dest" / "report.json").read_text())
    assert report["adapted"]["after"] == told["after"] and report["bytes"]["after"] == 10**5
    assert "qlr adapt first out\nqlr adapt out dest\n" in (tmp_path / "dest" / "report.md").read_text()  # adapted before as well
    assert check_files(tmp_path / "dest") > 4 and (tmp_path / "dest" / "recipe.yaml").read_text() == "budget: 3bpw\n"
    assert not (tmp_path / "dest" / "job").exists()
    before, after = read_matrices(folders / "out"), read_matrices(tmp_path / "dest")
    moved = False
    for name, matrix in before.items():
        assert after[name].layout == matrix.layout
        assert np.array_equal(matrix.arrays["backbone.codes"], after[name].arrays["backbone.codes"])
        moved |= not np.array_equal(matrix.arrays["scale"], after[name].arrays["scale"])
    assert moved
    logits = jax.jit(lambda model, tokens: model(tokens))(qlr.load(tmp_path / "dest"), np.arange(12)[None])
    assert np.isfinite(np.asarray(logits)).all()
    settings = json.loads((tmp_path / "dest" / "config.json").read_text())["quantization_config"]["settings"]
    assert settings["base_model"] == str(folders / "model")  # so that qlr evaluate finds it


def test_trained_embeddings_are_in_the_folder_in_pytorch_and_in_what_is_exported(folders, tmp_path):
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    import qlr_jax.formats.qlr.torch_runtime  # noqa: F401
    from qlr_jax.formats import export_dense, export_peft

    config, dest = AdaptConfig(**{**vars(FEW), "train": ("embeddings",)}), tmp_path / "dest"
    told = tuning.adapt(folders / "out", dest, [folders / "text.txt"], config, evaluation_tokens=512)
    assert told["trained"] == ["embeddings"] and told["after"]["kl"] < told["before"]["kl"]
    old, new = (qlr.load(folder).tensors() for folder in (folders / "out", dest))
    export_dense(dest, tmp_path / "dense")
    export_peft(dest, tmp_path / "peft")
    exported = [load_file(tmp_path / name / "model.safetensors") for name in ("dense", "peft")]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = (np.asarray(tensors[name].get_value()) for tensors in (old, new))
        assert not np.array_equal(before, after)
        for tensors in exported:
            np.testing.assert_array_equal(tensors[name].astype(np.float32), after)
    tokens = np.arange(12)[None]
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)(torch.from_numpy(tokens)).logits.numpy()
    want = np.asarray(jax.jit(lambda model, tokens: model(tokens))(qlr.load(dest), tokens))
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_without_the_original_text_alone(folders, tmp_path):
    config = AdaptConfig(**{**vars(FEW), "loss": "text"})
    out = tmp_path / "out"
    out.mkdir()
    for path in (folders / "out").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"]["settings"] = {}
    (out / "config.json").write_text(json.dumps(raw))
    (out / "checksums.json").unlink()
    told = tuning.adapt(out, tmp_path / "dest", [folders / "text.txt"], config, evaluation_tokens=512)
    assert set(told["before"]) == {"perplexity"} and told["after"]["perplexity"] < told["before"]["perplexity"]
    with pytest.raises(QLRError, match="--original"):
        tuning.adapt(out, tmp_path / "other", [folders / "text.txt"], FEW)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("steps, rows", [(3, 6), (1000, None)])
def test_the_teacher_is_asked_about_no_more_than_is_read(folders, tmp_path, monkeypatch, steps, rows):
    """Spread over the text; all of it but what is for early stopping where training reads more."""

    class Enough(Exception):
        pass

    def seen(model, training, config, *, held_out, **_):
        raise Enough(training, held_out)

    monkeypatch.setattr(tuning.adaptation, "fine_tune", seen)
    with pytest.raises(Enough) as found:
        config = AdaptConfig(**{**vars(FEW), "steps": steps})
        tuning.adapt(folders / "out", tmp_path / "dest", [folders / "text.txt"], config, evaluation_tokens=128)
    training, stopping = found.value.args
    assert len(stopping) == -(-(len(stopping) + len(training)) // tuning.STOPPING) if rows is None else len(training) == rows
    assert not {row.tobytes() for row in training} & {row.tobytes() for row in stopping}


def test_refusals(folders, tmp_path):
    with pytest.raises(QLRError, match="no text was given to adapt to"):
        tuning.adapt(folders / "out", tmp_path / "dest", None, FEW)
    (tmp_path / "short.txt").write_text("import os")
    with pytest.raises(QLRError, match="give more text"):
        tuning.adapt(folders / "out", tmp_path / "dest", [tmp_path / "short.txt"], FEW)
    with pytest.raises(QLRError, match="already holds"):
        tuning.adapt(folders / "out", folders / "out", [folders / "text.txt"], FEW)
    (tmp_path / "begun" / "job" / "adapt").mkdir(parents=True)
    with pytest.raises(QLRError, match="--resume"):
        tuning.adapt(folders / "out", tmp_path / "begun", [folders / "text.txt"], FEW)
    assert not (tmp_path / "dest").exists()


def test_command(folders, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(tuning, "adapt", lambda *args, **kwargs: seen.update(args=args, **kwargs) or RESULT)
    result = CliRunner().invoke(cli.app, ["adapt", "o", "d", "--text", "t.txt", "--held-out", "other.txt", "--steps", "7"])
    assert result.exit_code == 0, result.output
    assert seen["args"][3].train == ("norms", "scales", "embeddings") and seen["args"][3].steps == 7
    assert "25.0 % of the KL is won back in 7 steps" in result.stdout and "written: d" in result.stdout
    result = CliRunner().invoke(cli.app, ["adapt", "o", "d", "--factors", "trellis-4", "--json"])
    assert json.loads(result.stdout)["steps"] == 7 and "factors" in seen["args"][3].train
    result = CliRunner().invoke(cli.app, ["adapt", "o", "d", "--loss", "mse"])
    assert result.exit_code == 1 and "pass text, kl or mix" in result.stderr


@pytest.mark.parametrize(
    "added, hidden, steps",
    [("--added", "--hidden-states", "--requantize-backbone"), ("--fresh", "--states", "--reround-backbone")],
)
def test_settings_have_a_name_for_people_and_keep_their_earlier_one(monkeypatch, added, hidden, steps):
    seen = {}
    monkeypatch.setattr(tuning, "adapt", lambda *args, **kwargs: seen.update(config=args[3]) or RESULT)
    typed = ["adapt", "o", "d", "--text", "t", added, "20kB", hidden, "1.5", steps, "7"]
    assert CliRunner().invoke(cli.app, typed).exit_code == 0
    config = seen["config"]
    assert (config.fresh, config.states, config.reround_backbone) == ("20kB", 1.5, 7)
