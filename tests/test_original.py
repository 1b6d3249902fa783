"""Which original: the model that a folder was compressed from is found again from anywhere, and no other is taken for it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from qlr_jax import cli, job
from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr.packed import save_packed
from qlr_jax.models import identity as identities
from qlr_jax.models import load_model
from qlr_jax.models.identity import digest_files, digest_model, identity
from qlr_jax.pipelines import adapt
from qlr_jax.pipelines.original import find_original, recorded
from qlr_jax.pipelines.source import open_source, saved_table
from qlr_jax.settings.recipe import Recipe


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """home/llama and home/out, compressed of it; home/text.txt; elsewhere/llama, a fine-tune of it that differs inside alone."""
    parent = tmp_path_factory.mktemp("original")
    home, elsewhere = parent / "home", parent / "elsewhere"
    for folder in (home, elsewhere):
        shutil.copytree(tiny, folder / "llama")
    weights = elsewhere / "llama" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    (home / "text.txt").write_text("import os\n" * 2000)
    known = identity(home / "llama", "llama")
    report = {"report.json": json.dumps({"original": known})}
    settings = {"base_model": "llama", "original": {key: known[key] for key in ("hub", "revision", "digest")}}
    save_packed(home / "out", load_model(tiny), {}, source=tiny, settings=settings, files=report)
    save_packed(home / "before", load_model(tiny), {}, source=tiny, settings={"base_model": "llama"})
    return parent


@pytest.fixture
def moved(made, tmp_path):
    shutil.copytree(made / "home", tmp_path / "home")
    shutil.copytree(made / "elsewhere", tmp_path / "elsewhere")
    report = tmp_path / "home" / "out" / "report.json"
    report.write_text(report.read_text().replace(str(made), str(tmp_path)))
    return tmp_path


def test_a_digest_tells_models_of_the_same_shapes_apart(made, tmp_path, monkeypatch):
    one, other = made / "home" / "llama", made / "elsewhere" / "llama"
    assert digest_model(one) != digest_model(other)
    shutil.copytree(one, tmp_path / "renamed")
    assert digest_model(tmp_path / "renamed") == digest_model(one) and digest_model(one).startswith("sha256:")
    data = np.random.default_rng(0).integers(0, 255, 400_000, np.uint8)
    monkeypatch.setattr(identities, "WHOLE", 10)
    monkeypatch.setattr(identities, "BLOCK", 64)
    (tmp_path / "large").write_bytes(data.tobytes())
    before = digest_files([tmp_path / "large"])
    data[200_000:201_000] ^= 1  # a matrix somewhere in the middle
    (tmp_path / "large").write_bytes(data.tobytes())
    assert digest_files([tmp_path / "large"]) != before


def test_the_cache_of_the_hub_names_model_and_revision(tiny, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--llama-1b" / "snapshots" / "abc123"
    shutil.copytree(tiny, snapshot)
    known = identity(snapshot, "org/llama-1b")
    assert (known["hub"], known["revision"], known["path"]) == ("org/llama-1b", "abc123", str(snapshot))
    assert identity(tiny, "x")["hub"] is None


def test_from_another_directory_the_recorded_model_is_taken(made, monkeypatch):
    monkeypatch.chdir(made / "elsewhere")  # where another model has the relative name
    assert find_original(made / "home" / "out") == made / "home" / "llama"
    found = job.evaluate(made / "home" / "out", text=[made / "home" / "text.txt"], windows=1, drift=False)
    assert found["kl"] < 1e-3
    assert recorded(made / "home" / "out")["path"] == str(made / "home" / "llama")


def test_another_model_is_refused_by_name(made, moved, monkeypatch, tmp_path):
    out, other, text = moved / "home" / "out", moved / "elsewhere" / "llama", moved / "home" / "text.txt"
    says = rf"{other} is another model than .*home/out was compressed from.*llama, at .*home/llama"
    with pytest.raises(QLRError, match=says):
        job.evaluate(out, text=[text], original=other)
    with pytest.raises(QLRError, match=says):
        adapt.adapt(out, tmp_path / "new", [text], original=other)
    (tmp_path / "t.yaml").write_text("{checksums: null, relative_error: null, parity: null}")
    args = ["--text", str(text), "--original", str(other), "--thresholds", str(tmp_path / "t.yaml")]
    done = CliRunner().invoke(cli.app, ["verify", str(out), *args, "--json"])
    assert done.exit_code == 1 and "another model" in json.loads(done.stdout)["error"]
    monkeypatch.setenv("QLR_SKIP_CHECKSUMS", "1")
    assert find_original(out, other) == other
    monkeypatch.delenv("QLR_SKIP_CHECKSUMS")
    shutil.copy(other / "model.safetensors", moved / "home" / "llama" / "model.safetensors")  # written over since
    with pytest.raises(QLRError, match="another model"):
        find_original(out)


def test_where_it_is_gone_the_option_is_named_and_a_moved_one_is_found(moved, monkeypatch):
    out = moved / "home" / "out"
    (moved / "home" / "llama").rename(moved / "llama")
    monkeypatch.chdir(moved / "elsewhere")
    with pytest.raises(QLRError, match="another model"):
        find_original(out)
    monkeypatch.chdir(moved / "home")
    with pytest.raises(QLRError, match=r"the recorded original of .*out, llama, at .*home/llama, is not there .*--original MODEL"):
        find_original(out)
    assert find_original(out, moved / "llama") == moved / "llama"
    monkeypatch.chdir(moved)  # it lies by its old name here, and is the same
    assert find_original(out) == moved / "llama"


def test_a_config_that_gives_the_weights_another_meaning_is_refused(moved):
    config = moved / "home" / "llama" / "config.json"
    raw = json.loads(config.read_text())
    for key in ("rope_parameters", "rope_scaling"):
        raw.pop(key, None)
    config.write_text(json.dumps({**raw, "rope_theta": 5e5, "eos_token_id": 7}))
    with pytest.raises(QLRError, match=r"rope_theta is 500000.0, and .* compressed from a model with 10000.0"):
        job.evaluate(moved / "home" / "out", text=[moved / "home" / "text.txt"])
    config.write_text(json.dumps({**raw, "rope_theta": 1e4, "eos_token_id": 7}))
    job.evaluate(moved / "home" / "out", text=[moved / "home" / "text.txt"], windows=1, drift=False)


def test_folders_from_before_go_on_as_they_did(moved, monkeypatch):
    monkeypatch.chdir(moved / "elsewhere")
    assert find_original(moved / "home" / "before") == moved / "elsewhere" / "llama"
    monkeypatch.chdir(moved)
    with pytest.raises(QLRError, match=r"recorded original of .*before, llama, is not there .*--original MODEL"):
        find_original(moved / "home" / "before")


def test_it_is_said_whose_a_table_is(tiny, made):
    source, said = open_source(made / "elsewhere" / "llama", Recipe(backbones=("int-4g16",), ranks=(0,))), []
    progress = type("Says", (), {"say": lambda self, line: said.append(line)})()
    for digest in (source.identity["digest"], None, digest_model(tiny)):
        matrices = {name: {"coefficient": 1.0, "shape": shape} for name, shape in source.settings.matrices.items()}
        notes = {"original": {"digest": digest, "path": "there"}, "matrices": matrices}
        saved_table(dataclasses.replace(source.prices, notes=notes), source, progress)
    assert len(said) == 1 and "measured on there, another model" in said[0]
