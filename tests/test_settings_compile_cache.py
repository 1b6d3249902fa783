"""Compiled programs on disk: where, for whom, how many, and that nothing fails for them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qlr_jax.settings import compile_cache
from qlr_jax.settings.host import prepare

OPTIONS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax import monitoring
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
from qlr_jax.settings.host import prepare
assert not jax.config.values["jax_compilation_cache_dir"]
print(prepare(*sys.argv[1:]), end="")
jax.jit(lambda x: 2 * jnp.sin(x))(jnp.ones(3)).block_until_ready()
print(sum(name.endswith("cache_hits") for name in events))
"""


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """JAX as a user has it who has set nothing, a home of its own, and all as before afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (None, True, 1.0), strict=True):
        jax.config.update(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder():
    return jax.config.values["jax_compilation_cache_dir"]


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, "-c", PROGRAM, *args], env=environment, capture_output=True, text=True, check=True
    )
    assert run().stdout == "0\n"
    kept = tmp_path / "qlr-jax" / "compiled" / compile_cache.kind()
    assert any(kept.iterdir()) and kept.stat().st_mode & 0o077 == 0
    assert int(run().stdout) >= 1  # small programs are kept as well
    for path in kept.glob("*-cache"):  # cut off while it was written
        path.write_bytes(path.read_bytes()[:40])
    damaged = run()
    assert damaged.stdout == "0\n" and "Error reading" in damaged.stderr


def test_where(unset, monkeypatch, tmp_path):
    assert prepare() == "" and folder() == str(tmp_path / "cache" / "qlr-jax" / "compiled" / compile_cache.kind())
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "other"))
    before = folder()
    assert prepare() == "" and folder() == before  # set already
    assert prepare(str(tmp_path / "option")) == "" and folder() == str(tmp_path / "option" / compile_cache.kind())
    jax.config.update("jax_compilation_cache_dir", None)
    assert prepare() == "" and folder() == str(tmp_path / "other" / compile_cache.kind())
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of JAX"))
    assert prepare() == "" and folder() == str(tmp_path / "of JAX")


@pytest.mark.parametrize("by", ["option", "variable"])
def test_none(unset, monkeypatch, tmp_path, by):
    monkeypatch.setenv(compile_cache.VARIABLE, "none" if by == "variable" else "")
    assert prepare("none" if by == "option" else None) == ""
    assert not jax.config.values["jax_enable_compilation_cache"]
    assert prepare() == "" and folder() is None and not (tmp_path / "cache").exists()  # a job's own call changes nothing


def test_a_folder_that_cannot_be_written_fails_nothing(unset, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be" not in prepare() and folder()
    jax.config.update("jax_compilation_cache_dir", None)
    said = prepare(str(tmp_path / "file"))
    assert str(tmp_path / "file") in said and "pass a folder that can be written, or none" in said and folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert prepare() == "" and folder() is None  # nobody asked for it
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert prepare() == "" and folder() is None


def test_processors_and_versions_have_folders_of_their_own(monkeypatch):
    names, text = set(), "processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: {}\nflags\t\t: sse{}\n\nprocessor\t: 1\n"
    for clock, more in ((1, ""), (2, ""), (1, " avx512f")):
        monkeypatch.setattr(Path, "read_text", lambda self, c=clock, m=more: text.format(c, m))
        names.add(compile_cache.kind())
    assert len(names) == 2
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert compile_cache.kind() not in names


def test_what_was_used_longest_ago_goes_first(unset, monkeypatch, tmp_path):
    folder = tmp_path / compile_cache.kind()
    folder.mkdir()
    for day, name in enumerate("abcd"):
        (folder / name).write_bytes(b"0" * 100)
        os.utime(folder / name, (day * 86400, 0))
    os.utime(folder / "a", (9 * 86400, 0))
    monkeypatch.setattr(compile_cache, "LARGEST", 250)
    assert prepare(str(tmp_path)) == ""
    assert sorted(path.name for path in folder.iterdir()) == ["a", "d"]
