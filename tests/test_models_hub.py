"""Models by their hub name, from a hub that runs here: revisions, only the files that are read, the cache without a network."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlr_jax.cost.find import find_config
from qlr_jax.errors import QLRError
from qlr_jax.formats.card import card_of
from qlr_jax.models import Llama, LlamaConfig, find_folder, hub, load_model, save_model
from qlr_jax.models.identity import identity

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """owner/name with two commits, and owner/other with PyTorch files: {(repo, revision): (commit, {file: bytes})}."""
    parent, found = tmp_path_factory.mktemp("remote"), {}
    for number, revision in enumerate(("old", "main")):
        folder = save_model(Llama(LlamaConfig(**SIZES), jax.random.key(number)), parent / revision, "float32")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if revision == "main":  # as shards, beside what is not read
            arrays, names = load_file(folder / "model.safetensors"), {}
            for i, part in enumerate((list(arrays)[:5], list(arrays)[5:])):
                save_file({n: arrays[n] for n in part}, parent / "shard")
                files[f"model-{i}.safetensors"] = (parent / "shard").read_bytes()
                names |= dict.fromkeys(part, f"model-{i}.safetensors")
            files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
            del files["model.safetensors"]
        files |= dict.fromkeys(("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "eval.json"), b"x")
        found["owner/name", revision] = (str(number) * 40, files)
    found["owner/other", "main"] = ("c" * 40, {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    return found


@pytest.fixture
def served(remote, tmp_path, monkeypatch):
    """The list of files that were fetched; a fresh cache, and the hub's address set to a server of `remote`."""
    from huggingface_hub import constants

    fetched = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[0] == "api"
            repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            revision = rest[1] if len(rest) > 1 else "main"
            commit, files = next(
                (value for (name, known), value in remote.items() if name == repo and revision in (known, value[0])), (None, {})
            )
            if commit is None:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound" if repo == "a/b" else "RevisionNotFound"})
            if api and rest[0] == "tree":
                rows = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()]
                return self.answer(200, json.dumps(rows).encode())
            if api:
                found = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(found).encode())
            name = "/".join(rest[2:])
            if name not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            if self.command == "GET":
                fetched.append(name)
            tag = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

        def answer(self, status, content, headers=()):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield fetched
    server.shutdown()
    server.server_close()


def embedding(source):
    return np.asarray(load_model(source).tensors()["model.embed_tokens.weight"].get_value())


def test_only_what_is_read_is_fetched_and_then_comes_from_the_cache(served, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = find_folder("owner/name")
    wanted = {"config.json", "generation_config.json", "model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"}
    assert set(served) == {path.name for path in folder.iterdir()} == wanted
    assert all(path.is_symlink() for path in folder.iterdir()) and folder.name == "1" * 40
    first = embedding("owner/name")
    assert len(served) == len(wanted)
    known = identity(folder, "owner/name")
    assert (known["hub"], known["revision"]) == ("owner/name", "1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(embedding("owner/name"), first)
    np.testing.assert_array_equal(embedding(f"owner/name@{'1' * 40}"), first)
    assert find_config("owner/name")[0].hidden_size == 16
    with pytest.raises(QLRError, match=r"owner/name@old is neither a local folder nor a model that the hub delivers"):
        load_model("owner/name@old")
    os.remove(folder / "model.safetensors.index.json")
    with pytest.raises(QLRError, match="incomplete"):
        load_model("owner/name")


def test_a_revision_is_another_model(served):
    old, new = embedding("owner/name@old"), embedding("owner/name")
    assert np.abs(old - new).max() > 0
    np.testing.assert_array_equal(embedding(f"owner/name@{'0' * 40}"), old)
    assert served.count("model.safetensors") == 1 and "model.fp16.safetensors" not in served


def test_plan_fetches_the_config_alone(served, monkeypatch):
    from huggingface_hub import constants

    assert find_config("owner/name@old")[0].hidden_size == 16 and served == ["config.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_config("owner/name@old")[0].hidden_size == 16
    with pytest.raises(QLRError, match="cache without its weights, and the hub cannot be reached"):
        load_model("owner/name@old")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/other", r"neither model\.safetensors nor .*; it holds pytorch_model\.bin; give a model in safetensors"),
        ("owner/name@none", r"owner/name@none is neither a local folder nor a model that the hub delivers"),
        ("a/b", r"a/b is neither a local folder nor a model that the hub delivers"),
        ("a/b@", "folder a/b@ does not exist"),
    ],
)
def test_what_the_hub_does_not_have_is_said(served, name, says):
    with pytest.raises(QLRError, match=says) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_names():
    assert hub.parts("o/n@refs/pr/1") == ("o/n", "refs/pr/1")
    assert [hub.parts(text) for text in ("./o/n", "/o/n", "~/n", "o", "o/n/m", "o/n@", "..")] == [None] * 7
    assert "base_model: o/n\n" in card_of({}, "o/n@v1", target="dense", snippet="")
