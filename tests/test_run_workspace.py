"""A job that is interrupted anywhere goes on, and ends with the same bytes; what was begun otherwise is refused."""

import dataclasses
import errno
import json
import signal
import time

import pytest
from processes import Process

from qlr_jax import job
from qlr_jax.errors import QLRError
from qlr_jax.run import workspace
from qlr_jax.settings.recipe import Recipe

RECIPE = Recipe(
    budget="3.5bpw",
    backbones=("int-2g16", "int-3g16"),
    factors=("int-4",),
    ranks=(0, 4),
    iterations=2,
    sequences=8,
    sequence_length=32,
    measure_tokens=256,
    refine=2,
    refine_seconds=1000,
    include=("*self_attn*",),  # four matrices: of every kind of file a few
)
SAME = ("model.safetensors", "config.json", "recipe.yaml")


def ended(out):
    """What a job left, without its times."""
    plans = json.loads((out / "allocation.json").read_text())
    for plan in plans.values():
        if isinstance(plan, dict):
            plan.pop("seconds", None)
    return {name: (out / name).read_bytes() for name in SAME} | {"plans": plans}


def run(tiny, text, out, **options):
    return job.compress(tiny, out, calibration=text, recipe=RECIPE, **options)


@pytest.fixture(scope="module")
def undisturbed(tiny, text, tmp_path_factory):
    """The bytes of a job that nothing interrupts, and how many files its workspace wrote."""
    out, writes = tmp_path_factory.mktemp("undisturbed") / "out", []
    keep = workspace._renamed

    def counted(path, write):
        if path.name != workspace.REPORT:  # written as time goes by
            writes.append(path)
        keep(path, write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "_renamed", counted)
        run(tiny, text, out)
    assert [p.name for p in (out / "job").iterdir()] == ["log.txt"]
    return ended(out), len(writes)


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.4, 0.7, 0.99])
def test_interrupted_at_any_moment_it_ends_the_same(tiny, text, tmp_path, undisturbed, moment):
    wanted, writes = undisturbed
    left, keep = [int(moment * writes)], workspace._renamed

    def failing(path, write):
        if path.name == workspace.REPORT:
            return keep(path, write)
        if not left[0]:  # half of a file is written, and the process is gone
            path.with_name(f".{path.name}.1").write_bytes(b"half")
            raise KeyboardInterrupt
        left[0] -= 1
        keep(path, write)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workspace, "_renamed", failing)
        run(tiny, text, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    run(tiny, text, tmp_path / "out", resume=True)
    assert ended(tmp_path / "out") == wanted


def test_killed_it_goes_on(tiny, text, tmp_path, undisturbed):
    """kill -9, in a process of its own."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    command = ["compress", tiny, tmp_path / "out", "--calibration", text]
    process = Process("from qlr_jax import cli\ncli.main()", *command, "--recipe", tmp_path / "recipe.yaml")
    final = tmp_path / "out" / "job" / "final"
    while process.poll() is None and not (final.is_dir() and len(list(final.iterdir())) > 1):
        time.sleep(0.02)
    process.kill()
    assert process.returncode in (-signal.SIGKILL, 0)
    if process.returncode:
        run(tiny, text, tmp_path / "out", resume=True)
    assert ended(tmp_path / "out") == undisturbed[0]


@pytest.fixture
def begun(tiny, text, tmp_path, monkeypatch):
    """A job that stopped after its first file."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workspace, "_save", stop)
        run(tiny, text, tmp_path / "out")
    return tmp_path / "out"


def test_what_was_begun_otherwise_is_refused(tiny, text, begun, tmp_path):
    with pytest.raises(QLRError, match="--resume"):
        run(tiny, text, begun)
    with pytest.raises(QLRError, match=r'recipe budget was "3.5bpw" and is "4bpw"'):
        job.compress(tiny, begun, "4bpw", text, RECIPE, resume=True)
    (tmp_path / "other.txt").write_text(text.read_text() + "more of it " * 50)
    with pytest.raises(QLRError, match="calibration text was"):
        run(tiny, tmp_path / "other.txt", begun, resume=True)
    other = tmp_path / "model"
    other.mkdir()
    for path in tiny.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(QLRError, match="model was"):
        run(other, text, begun, resume=True)
    (begun / "job" / "begun.json").write_text("{")
    with pytest.raises(QLRError, match="start again"):
        run(tiny, text, begun, resume=True)


def test_a_full_disk_is_one_clear_sentence(tiny, text, tmp_path, monkeypatch):
    def full(path, solution):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(QLRError, match=r"is full .* --resume"):
        patch.setattr(workspace, "_save", full)
        run(tiny, text, tmp_path / "out")
    assert not list((tmp_path / "out" / "job" / "probe").iterdir())  # nothing half written


def test_resume_without_a_job_begins_one(tiny, text, tmp_path):
    result = job.compress(tiny, tmp_path / "out", "3.5bpw", text, RECIPE.updated(ranks=(0,)), resume=True)
    assert (result.out / "config.json").is_file()
    log = (result.out / "job" / "log.txt").read_text()
    assert "compressing: model.layers.0.self_attn.q_proj int-" in log and "saving: done" in log
    assert json.loads((result.out / "report.json").read_text())["bits_per_weight"] <= 3.5


def test_a_job_begun_before_a_setting_existed_goes_on(tmp_path):
    facts = {"recipe": {item.name: item.default for item in dataclasses.fields(Recipe)}, "model": "m"}
    facts = json.loads(json.dumps(facts))
    old = {"recipe": {name: value for name, value in facts["recipe"].items() if name != "strategy"}, "model": "m"}
    space = workspace.Workspace(tmp_path / "job", old)
    space.write(space.root / "table.json", lambda path: path.write_text("{}"))
    assert workspace.Workspace.open(tmp_path, facts, resume=True).begun
    other = {**facts, "recipe": {**facts["recipe"], "strategy": "greedy"}}
    with pytest.raises(QLRError, match=r'recipe strategy was "allocated" and is "greedy"'):
        workspace.Workspace.open(tmp_path, other, resume=True)
