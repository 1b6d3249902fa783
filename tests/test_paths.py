"""Paths that a person gives, places that cannot be written, and two jobs in one place."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlr_jax import cli, job, locks, paths
from qlr_jax.errors import QLRError
from qlr_jax.formats import export_dense
from qlr_jax.formats.files import staged
from qlr_jax.formats.qlr.packed import save_packed
from qlr_jax.models import load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.paths import LOCK, PARTIAL, local, output_file, output_folder
from qlr_jax.pipelines import adapt, inspect
from qlr_jax.run.session import Session


def qlr(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """A folder as a job writes it, with nothing compressed in it."""
    return save_packed(tmp_path_factory.mktemp("packed") / "out", load_model(tiny), {}, source=tiny)


# What is given ---------------------------------------------------------------------------------------------------------------


def test_local_is_what_a_person_means(tmp_path, monkeypatch):
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "far" / "here.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    (tmp_path / "blob").write_text("")
    (tmp_path / "text.jsonl").symlink_to(tmp_path / "blob")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local("~/far") == local("far") == local("./far/") == local(Path("far")) == tmp_path / "far"
    assert local("link/../here.txt") == tmp_path / "far" / "here.txt"  # above what the link leads to, as the system has it
    assert local("far/../text.jsonl").name == local("text.jsonl").name == "text.jsonl"  # the name says what is inside
    assert local("link/..") == tmp_path / "far"
    for bad, says in (("", "empty path"), (" ", "empty path"), ("a\0b", "null character"), ("~nobody-of-this-name/x", "home")):
        with pytest.raises(QLRError, match=says):
            local(bad)


@pytest.mark.parametrize("how", ["home", "relative", "above", "link", "script"])
def test_commands_that_read_take_every_spelling(packed, tmp_path, monkeypatch, how):
    named = tmp_path / "модель на диске 模型"
    named.symlink_to(packed)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(packed.parent))
    monkeypatch.chdir(packed.parent)
    (packed.parent.parent / "x").mkdir(exist_ok=True)
    given = {"home": "~/out", "relative": "out", "above": f"../x/../{packed.parent.name}/out", "script": named}
    given["link"] = tmp_path / "link" / named.name
    done = qlr("inspect", given[how], "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["safetensors_bytes"] == (packed / "model.safetensors").stat().st_size
    assert load_tokenizer(given[how]) and inspect.inspect(given[how])["matrices"] == []


def test_texts_recipes_tables_and_thresholds_take_a_home(tiny, text, tmp_path, monkeypatch):
    from qlr_jax.calibration import read_text
    from qlr_jax.settings.recipe import Recipe
    from qlr_jax.settings.thresholds import Thresholds

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("some text")
    (tmp_path / "r.yaml").write_text("seed: 3\nthresholds: {kl: 0.5}\nhessians_from: h\n")
    (tmp_path / "h").mkdir()
    assert read_text("~/t.txt") == "some text" and Recipe.of("~/r.yaml").seed == 3 and Thresholds.from_yaml("~/r.yaml").kl == 0.5
    monkeypatch.chdir(tmp_path)
    assert Recipe.of("r.yaml").located().hessians_from == str(tmp_path / "h")
    done = qlr("allocate", "~/none.json", "--budget", "2bpw")
    assert done.exit_code == 1 and f"{tmp_path / 'none.json'} does not exist" in done.stderr


def test_a_variable_that_is_not_set_is_no_folder(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(packed)  # which an empty path would mean
    for args in (["inspect", ""], ["export", "", tmp_path / "x", "--to", "dense"], ["export", packed, "", "--to", "dense"],
                 ["compress", packed, "", "--budget", "3bpw"], ["demo", "--out", ""]):  # fmt: skip
        done = qlr(*args)
        assert done.exit_code == 2 and "it is empty" in done.output, args
    assert qlr("inspect", ".").exit_code == 0 and not (tmp_path / "x").exists()


# Where it is written ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_begins(monkeypatch):
    """Fails the test where a model is loaded or text is read."""

    def begun(*args, **kwargs):
        pytest.fail("work has begun")

    for module in ("job", "pipelines.measure"):
        monkeypatch.setattr(f"qlr_jax.{module}.open_source", begun)
    for name in ("job", "pipelines.measure"):
        monkeypatch.setattr(f"qlr_jax.{name}.Texts.read", begun)
    monkeypatch.setattr("qlr_jax.pipelines.adapt.load", begun)
    for name in ("dense", "peft", "compressed_tensors", "gguf.export"):
        monkeypatch.setattr(f"qlr_jax.formats.{name}.load", begun)


def refused(tmp_path, tiny, packed, place, monkeypatch):
    """(OUT that cannot be written, why)"""
    if place == "a file in its way":
        (tmp_path / "file").write_text("")
        return tmp_path / "file", "is a file"
    if place == "a file above it":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "x" / "out", "since .*file is a file"
    if place == "no permission":
        (tmp_path / "closed").mkdir()
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and Path(path) != tmp_path / "closed")
        return tmp_path / "closed" / "out", "Permission denied"
    if place == "a read-only disk":
        made = os.mkdir

        def mkdir(path, *args, **kwargs):
            if str(path).startswith(str(tmp_path)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return made(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", mkdir)
        return tmp_path / "out", "Read-only file system"
    if place == "a long name":
        return tmp_path / ("x" * 300) / "out", "File name too long"
    if place == "inside, by ..":
        return tiny / ".." / tiny.name / "sub" / ".." / "out", "lies inside .* which is read"
    (tmp_path / "link").symlink_to(packed if place == "inside, by a link" else tiny)
    if place == "inside, by a link":
        return tmp_path / "link" / "out", "lies inside .* which is read"
    return tmp_path / "link", "already holds"


PLACES = ("a file in its way", "a file above it", "no permission", "a read-only disk", "a long name")


@pytest.mark.parametrize("place", [*PLACES, "inside, by ..", "the model itself"])
@pytest.mark.parametrize("command", ["compress", "sensitivity", "demo"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    tiny, packed, text, tmp_path, monkeypatch, nothing_begins, place, command
):
    out, says = refused(tmp_path, tiny, packed, place, monkeypatch)
    before = sorted(p.name for p in tiny.iterdir())
    args = [tiny, out, "--calibration", text] + (["--budget", "3bpw"] if command == "compress" else [])
    if command == "demo":
        args, out = ["--out", out if place in PLACES else BUNDLED / "out"], BUNDLED / "out"
        says = says if place in PLACES else "lies inside"
    done = qlr(command, *args, "--json")
    assert done.exit_code == 1 and list(json.loads(done.stdout)) == ["error"], done.output
    with pytest.raises(AssertionError, match=says):  # the sentence, as a pattern
        raise AssertionError(json.loads(done.stdout)["error"])
    assert sorted(p.name for p in tiny.iterdir()) == before and not (BUNDLED / "out").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(PARTIAL) or p.name == LOCK]


@pytest.mark.parametrize("place", [*PLACES, "inside, by a link"])
def test_adapt_and_exports_refuse_what_cannot_be_written(tiny, packed, text, tmp_path, monkeypatch, nothing_begins, place):
    out, says = refused(tmp_path, tiny, packed, place, monkeypatch)
    with pytest.raises(QLRError, match=says):
        adapt.adapt(packed, out, [text])
    for to in ("dense", "peft", "compressed-tensors", "gguf"):
        done = qlr("export", packed, out, "--to", to, "--json")
        assert done.exit_code == 1 and list(json.loads(done.stdout)) == ["error"], done.output


def test_plans_and_pictures_are_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr("qlr_jax.pipelines.allocate.read_table", lambda path: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "none" / "plans.json", tmp_path / "file" / "plans.json"):
        done = qlr("allocate", tmp_path, "--budget", "2bpw", "--out", out, "--json")
        assert done.exit_code == 1 and str(tmp_path) in json.loads(done.stdout)["error"]
    assert qlr("frontier", tmp_path, "--out", tmp_path / "file", "--json").exit_code == 1
    assert output_file(tmp_path / "file") == tmp_path / "file"  # it may be replaced


def test_a_link_and_a_disk_of_its_own_are_written_into(tmp_path, packed, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    assert output_folder(tmp_path / "dangling") == tmp_path / "later" and not (tmp_path / "later").exists()
    inode = (tmp_path / "disk").stat().st_ino  # a mount point cannot be replaced by another folder
    export_dense(packed, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk").stat().st_ino == inode
    assert load_model(tmp_path / "disk").config.hidden_size == 32
    assert sorted(p.name for p in (tmp_path / "disk").iterdir() if p.name.startswith(".")) == []


def test_a_disk_that_fails_while_it_is_written_is_one_sentence(tmp_path, packed):
    for number, says in ((errno.ENOSPC, "is full"), (errno.EROFS, "cannot be written any more .*Read-only")):
        with pytest.raises(QLRError, match=says), staged(tmp_path / "out"):
            raise OSError(number, os.strerror(number))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job").write_text("no folder")  # where a job would keep what is finished
    with pytest.raises(QLRError, match="already holds job"):
        Session(tmp_path / "out", "")


def test_what_fails_while_it_is_moved_leaves_nothing(tmp_path, monkeypatch):
    replaced = os.replace

    def replace(source, target):
        if Path(target).name == "b":
            raise OSError(errno.ENAMETOOLONG, "input/output error")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="input"), staged(tmp_path / "out") as folder:
        for name in "abc":
            (folder / name).write_text("")
    assert not (tmp_path / "out").exists()


# Two at once -----------------------------------------------------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
from qlr_jax import locks
locks.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process at work in tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_job_at_work_is_named_and_a_dead_one_is_not(tiny, text, tmp_path, other, nothing_begins):
    out = tmp_path / "out"
    for flags in ([], ["--resume"]):
        done = qlr("compress", tiny, out, "--budget", "3bpw", "--calibration", text, *flags, "--json")
        error = json.loads(done.stdout)["error"]
        assert done.exit_code == 1 and "another job is at work in" in error and f"process {other.pid} on" in error
        assert time.strftime("%Y-%m-%d") in error and "interrupted" not in error
    for command in (["sensitivity", tiny, out, "--calibration", text], ["demo", "--out", out]):
        assert "another job is at work" in qlr(*command).stderr
    with pytest.raises(QLRError, match="at work"), staged(out):
        pass
    os.kill(other.pid, signal.SIGKILL)  # and not waited for: a dead process that its parent has not looked at
    time.sleep(0.2)
    (out / f"{PARTIAL}left").mkdir()
    with Session(out, "") as session:
        session._space = type("Space", (), {"finish": lambda self: None})()
        assert (out / LOCK).exists() and not (out / f"{PARTIAL}left").exists()
        with pytest.raises(QLRError, match="another job of this process"):
            Session(out, "")
    assert not (out / LOCK).exists()


def test_a_lock_of_another_machine_is_stale_once_nobody_touches_it(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "machine": "other", "started": "5", "since": time.time()}))
    with pytest.raises(QLRError, match=r"since \d{4}-\d\d-\d\d .*process 1 on elsewhere"):
        locks.take(tmp_path)
    os.utime(lock, (time.time() - 2 * locks.LOST,) * 2)
    with locks.locked(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists() and tmp_path.exists()


def test_a_lock_is_not_mistaken_for_that_of_a_later_process_of_its_number(tmp_path):
    card = {"pid": os.getppid(), "host": locks.platform.node(), "machine": locks._machine(), "since": 0}
    for started, alive in ((locks._started(os.getppid()), True), ("1", False)):
        (tmp_path / LOCK).write_text(json.dumps({**card, "started": started}))
        assert (locks._owner(tmp_path / LOCK) is not None) == alive
    (tmp_path / LOCK).write_text("half")  # just touched: somebody is writing it
    with pytest.raises(QLRError, match="who does not say"):
        locks.take(tmp_path)


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from qlr_jax import locks\n"
        "sys.stdin.readline()\n"
        "try: locks.take(Path(sys.argv[1])); print('mine', flush=True)\n"
        "except ValueError: print('refused', flush=True)\n"
        "sys.stdin.readline()"
    )
    out = tmp_path / "a" / "out"
    many = [
        subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in many:
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(process.stdout.readline() for process in many) == ["mine\n"] + ["refused\n"] * 3
    for process in many:
        process.communicate("\n")


def test_a_failed_job_leaves_no_lock(tiny, text, tmp_path):
    with pytest.raises(ValueError, match="below the table"):
        job.compress(tiny, tmp_path / "out", budget="0.01bpw", calibration=text)
    assert not (tmp_path / "out").exists() and not locks._held and paths.refuse_occupied(tmp_path / "out") is None
