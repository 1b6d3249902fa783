"""Several processes for one job: shares that add up, the bytes of one process, and a clear end where one is lost."""

import itertools
import json
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from processes import Process

from qlr_jax.core.batch import batches, solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.errors import QLRError
from qlr_jax.run import processes as distributed
from qlr_jax.run.processes import Cluster, WorkerGroup, cost, gather, join, share
from qlr_jax.run.workspace import Workspace
from qlr_jax.settings.recipe import Recipe

CONFIG = SolverConfig(state_bits=6, iterations=2)
PATIENCE = 300  # seconds for any one process

RECIPE = Recipe(
    budget="3.5bpw",
    backbones=("int-2g16", "int-3g16"),
    factors=("int-4",),
    ranks=(0, 4),
    include=("*.self_attn.*",),
    iterations=2,
    sequences=8,
    sequence_length=32,
    measure_tokens=256,
    refine=1,
    refine_seconds=1000,
)

# `qlr`, but process 0 or 1 may die once it has solved so many matrices, and losses are noticed sooner
COMMAND = """
import os, signal, sys
dies, patience, *arguments = sys.argv[1:]
from qlr_jax import cli
from qlr_jax.run import processes as distributed
from qlr_jax.run import workspace
distributed.WorkerGroup.__init__.__defaults__ = (float(patience), *distributed.WorkerGroup.__init__.__defaults__[1:])
if int(dies):
    left, keep = [int(dies)], workspace._save
    def last(path, solution):
        keep(path, solution)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    workspace._save = last
sys.argv = ["qlr", *arguments]
cli.main()
"""


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def inputs(tiny, text, tmp_path_factory):
    """A model, a recipe and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tiny").symlink_to(tiny)
    (folder / "recipe.yaml").write_text(RECIPE.to_yaml())
    (folder / "text.txt").symlink_to(text)
    return folder


def run(inputs, out, processes, *options, patience=60, dies=None):
    """Exit status and the last line of what each process said; dies = (process, after how many matrices)."""
    words = ["compress", inputs / "tiny", out, "--recipe", inputs / "recipe.yaml", "--calibration", inputs / "text.txt", *options]
    at, begun = ["--coordinator", f"localhost:{port()}", "--processes", processes], []
    for p in range(processes):
        own = [dies[1] if dies and dies[0] == p else 0, patience, *words, *([*at, "--process", p] if processes > 1 else [])]
        begun.append(Process(COMMAND, *own))
    try:
        told = [process.communicate(timeout=PATIENCE) for process in begun]
    finally:
        for process in begun:
            process.kill()
    return [(process.returncode, out.strip(), err.strip()) for process, (out, err) in zip(begun, told, strict=True)]


def ended(out):
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "config.json")}


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    ((status, _, said),) = run(inputs, out, 1)
    assert status == 0, said
    return ended(out)


def test_many_processes_leave_the_bytes_of_one(inputs, alone, tmp_path):
    (status, _, said), *others = run(inputs, tmp_path / "out", 3)
    assert status == 0, said
    for status, told, said in others:
        assert status == 0, said
        assert re.search(r"solved [1-9]\d* matrices for process 0", told)
    assert ended(tmp_path / "out") == alone
    assert [path.name for path in (tmp_path / "out" / "job").iterdir()] == ["log.txt"]


def test_a_lost_process_ends_the_job_and_fewer_finish_it(inputs, alone, tmp_path):
    (status, _, said), (lost, _, _) = run(inputs, tmp_path / "out", 2, patience=5, dies=(1, 3))
    assert lost == -signal.SIGKILL and status == 1
    assert "process 1 of 2" in said and "has not been heard of" in said and "--resume" in said
    assert not (tmp_path / "out" / "config.json").exists()
    ((status, _, said),) = run(inputs, tmp_path / "out", 1, "--resume")
    assert status == 0, said
    assert ended(tmp_path / "out") == alone


def test_where_process_0_is_lost_the_others_end(inputs, tmp_path):
    (lost, _, _), (status, _, said) = run(inputs, tmp_path / "out", 2, patience=5, dies=(0, 3))
    assert lost == -signal.SIGKILL and status == 1
    assert "process 0 of 2" in said and "has not been heard of" in said


# Shares ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def problems():
    draw, found = np.random.default_rng(0), {}
    metric = np.eye(32, dtype=np.float32)
    for i, rows in enumerate((32, 512, 512, 512, 512, 512, 1024, 1024, 2048)):
        for spec in ("int-4g16", "trellis-2", "trellis-2+r8@int-4", "bf16"):
            backbone = draw.standard_normal((rows, 32), np.float32) if spec == "bf16" else None
            found[f"m{i}", spec] = (draw.standard_normal((rows, 32), np.float32), metric, spec, None, backbone)
    return found


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 50])
def test_shares_are_whole_batches_and_add_up(problems, processes):
    shares = [share(problems, p, processes, CONFIG) for p in range(processes)]
    assert sum(map(len, shares)) == len(problems) and set().union(*shares) == set(problems)
    for mine in shares:
        assert list(mine) == [key for key in problems if key in mine]
        assert sorted(batches(mine)) == sorted(keys for keys in batches(problems) if keys[0] in mine)


def test_shares_are_even(problems):
    costs = [sum(cost(p, CONFIG) for p in share(problems, i, 3, CONFIG).values()) for i in range(3)]
    dearest = max(sum(cost(problems[key], CONFIG) for key in keys) for keys in batches(problems))
    assert max(costs) - min(costs) <= dearest


def test_more_state_bits_cost_more(problems):
    one, other = problems["m1", "trellis-2"], problems["m1", "int-4g16"]
    dear = SolverConfig(state_bits=12)
    assert cost(one, dear) > 10 * cost(one, CONFIG) and cost(other, dear) == cost(other, CONFIG) < cost(one, CONFIG)


# What may go wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    (("localhost:1", 2, None), "pass all three"),
    (("localhost:1", 2, 2), "process 2 of 2"),
    (("localhost", 2, 0), "host:port"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, given, words):
    with pytest.raises(QLRError, match=words):
        join(tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(QLRError, match=r"notes\.txt"):
        join(tmp_path, "localhost:1", 2, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def worker(root, patience=60.0):
    team = WorkerGroup(Cluster(1, 2), root, patience)
    team.folder.mkdir(parents=True)
    return team


def test_a_worker_ends_with_process_0(tmp_path):
    team, space = worker(tmp_path), Workspace.open(tmp_path, {}, resume=False)
    finished = team.folder / "finished.json"
    finished.write_text(json.dumps({"error": "the disk is full"}))
    for waits in (team.statistics, lambda: team.serve(space, lambda *_: (), lambda *_: None)):
        with pytest.raises(QLRError, match="process 0 has stopped: the disk is full"):
            waits()
    finished.write_text(json.dumps({"error": None}))
    assert team.serve(space, lambda *_: (), lambda *_: None) == 0


def test_statistics_are_those_of_process_0_and_shared_arrays_stay_shared(tmp_path, monkeypatch):
    draw, space = np.random.default_rng(0), Workspace.open(tmp_path, {}, resume=False)
    shared, own, kept = draw.standard_normal((3, 4, 4), np.float32)
    first = WorkerGroup(Cluster(0, 2), space.root)
    first.folder.mkdir(parents=True)
    kept = space.spill("outputs")("k", kept)
    first.publish(space, {"q": shared, "k": shared, "o": own}, {"k": kept})
    hessians, outputs = WorkerGroup(Cluster(1, 2), space.root).statistics()
    assert hessians["q"] is hessians["k"] and np.array_equal(hessians["q"], shared) and np.array_equal(hessians["o"], own)
    assert list(outputs) == ["k"] and np.array_equal(outputs["k"], kept)
    monkeypatch.setattr(distributed, "_devices", lambda: 8)
    with pytest.raises(QLRError, match="process 1 has 8 devices and process 0 has 1"):
        WorkerGroup(Cluster(1, 2), space.root).statistics()


def test_silence_is_told_from_slowness(tmp_path, monkeypatch):
    """By a count that stands still, whatever the clocks of other machines say; a first sign may take ten times as long."""
    team = WorkerGroup(Cluster(0, 3), tmp_path, patience=10)
    team.folder.mkdir(parents=True)
    now = itertools.count(0, 4)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    beats = itertools.count(1)
    for _ in range(5):
        (team.folder / "process-1.json").write_text(json.dumps(team._card(next(beats))))
        team._check()
    with pytest.raises(QLRError, match=r"process 1 of 3 .* not been heard of"):
        for _ in range(5):
            team._check()
    (team.folder / "process-1.json").write_text(json.dumps(team._card() | {"left": "out of memory"}))
    with pytest.raises(QLRError, match="process 1 has stopped: out of memory"):
        team._check()


def test_gather_waits_for_what_is_missing(tmp_path, monkeypatch):
    """Files may come in any order; what will never come is not waited for."""
    space = Workspace.open(tmp_path, {}, resume=False)
    metric = np.eye(32, dtype=np.float32)
    problems = {(name, "int-4g16"): (np.full((32, 32), i + 1, np.float32), metric, "int-4g16") for i, name in enumerate("ab")}
    store = space.store("final")
    solve_many(problems, seed=0, config=CONFIG, into=store)
    away = tmp_path / "away"
    path = space.root / "final" / "a.int-4g16.safetensors"
    shutil.move(path, away)
    looks, done = [], []

    def look():
        looks.append(len(looks))
        if len(looks) == 3:
            shutil.move(away, path)

    monkeypatch.setattr(distributed, "POLL", 0.0)
    gather(store, problems, lambda key, _: done.append(key), look)
    assert len(looks) == 3 and done == [("b", "int-4g16"), ("a", "int-4g16")]

    def lost():
        raise QLRError("process 1 is lost")

    with pytest.raises(QLRError, match="lost"):
        gather(store, [("c", "int-4g16")], None, lost)
