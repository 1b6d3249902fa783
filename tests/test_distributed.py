"""Several processes for one job: shares that add up, the bytes of one process, and a clear end where one is lost."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from qlr_jax import distributed
from qlr_jax.core.batch import batches
from qlr_jax.core.config import SolverConfig
from qlr_jax.distributed import Cluster, Together, cost, digest, gather, initialize, share
from qlr_jax.errors import QLRError
from qlr_jax.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
CONFIG = SolverConfig(state_bits=6, iterations=2)
PATIENCE = 300  # seconds for any one process

JOB = """
import json, os, signal, sys
from pathlib import Path
coordinator, processes, process, out, patience, dies = json.loads(sys.argv[1])
from qlr_jax.distributed import Together, initialize
cluster = initialize(coordinator, processes, process)
import numpy as np
from qlr_jax.core.config import SolverConfig
from qlr_jax.workspace import Workspace
draw = np.random.default_rng(0)
weights = {f"m{i}": draw.standard_normal((32 if i % 2 else 48, 48), np.float32) for i in range(6)}
x = draw.standard_normal((96, 48), np.float32)
metric = x.T @ x / 96
problem = lambda name, spec: (weights[name], metric, spec)
space = Workspace.open(Path(out), {"of": "a test"}, resume=True)
if dies:
    keep = space._write
    def last(path, write):
        keep(path, write)
        if path.suffix == ".safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
    space._write = last
config = SolverConfig(state_bits=6, iterations=2)
seen = []
with Together(cluster, space, patience=patience) as team:
    if cluster.process:
        team.serve(problem)
    else:
        for specs in (("int-3g16", "int-4g16"), ("int-3g16+r4@int-4",)):
            problems = {(name, spec): problem(name, spec) for spec in specs for name in weights}
            found = team.solve("final", problems, seed=0, config=config, on_done=lambda key, _: seen.append(key))
            assert list(found) == list(problems)
        assert len(seen) == len(set(seen)) == 18
"""


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def begin(out, processes, process, coordinator=None, patience=60, dies=False):
    quick = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OPENBLAS_NUM_THREADS": "1"}
    told = json.dumps([coordinator, processes, process, str(out), patience, dies])
    return subprocess.Popen([sys.executable, "-c", JOB, told], cwd=ROOT, env=os.environ | quick, stderr=subprocess.PIPE, text=True)


def run(out, processes, patience=60, dies=None):
    """Exit status and what each process said last."""
    coordinator = f"localhost:{port()}" if processes > 1 else None
    begun = [begin(out, processes, p, coordinator, patience, p == dies) for p in range(processes)]
    try:
        told = [process.communicate(timeout=PATIENCE)[1] for process in begun]
    finally:
        for process in begun:
            process.kill()
    return [(process.returncode, text.strip().splitlines()[-1:]) for process, text in zip(begun, told, strict=True)]


def kept(out):
    return {path.name: path.read_bytes() for path in (out / "job" / "final").glob("*.safetensors")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    ((status, said),) = run(out, 1)
    assert status == 0, said
    assert len(kept(out)) == 18
    return kept(out)


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_leave_the_bytes_of_one(alone, tmp_path, processes):
    for status, said in run(tmp_path, processes):
        assert status == 0, said
    assert kept(tmp_path) == alone


def test_a_lost_process_ends_the_job_and_one_alone_finishes_it(alone, tmp_path):
    (status, said), (lost, _) = run(tmp_path, 2, patience=5, dies=1)
    assert lost == -signal.SIGKILL and status == 1
    assert "process 1 of 2" in said[0] and "has not been heard of" in said[0] and "--resume" in said[0]
    half = kept(tmp_path)
    assert 0 < len(half) < 18 and half.items() <= alone.items()
    ((status, said),) = run(tmp_path, 1)
    assert status == 0, said
    assert kept(tmp_path) == alone


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
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(QLRError, match=words):
        initialize(*given)


def test_other_hessians_are_refused(problems, tmp_path):
    key = ("m0", "int-4g16")
    worker = Together(Cluster(1, 2, 7), Workspace.open(tmp_path, {}, resume=False))
    worker.folder.mkdir(parents=True)
    request = {"kind": "final", "seed": 0, "config": asdict(CONFIG), "keys": [key], "known_by": [digest(problems[key])]}
    (worker.folder / "request-0.json").write_text(json.dumps(request))
    weight, metric, *rest = problems[key]
    moved = metric.copy()
    moved[3, 4] = np.nextafter(moved[3, 4], np.float32(1))
    with pytest.raises(QLRError, match="m0 has another weight or Hessian in process 1"):
        worker.serve(lambda *_: (weight, moved, *rest))


def test_a_worker_ends_with_process_0(tmp_path):
    worker = Together(Cluster(1, 2, 7), Workspace.open(tmp_path, {}, resume=False))
    worker.folder.mkdir(parents=True)
    finished = worker.folder / "finished.json"
    finished.write_text(json.dumps({"error": "the disk is full"}))
    with pytest.raises(QLRError, match="process 0 has stopped: the disk is full"):
        worker.serve(lambda *_: ())
    finished.write_text(json.dumps({"error": None}))
    worker.serve(lambda *_: ())


def test_silence_is_told_from_slowness(tmp_path, monkeypatch):
    """By a count that stands still, whatever the clocks of other machines say; a first sign may take ten times as long."""
    team = Together(Cluster(0, 3, 7), Workspace.open(tmp_path, {}, resume=False), patience=10)
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
    space.solve("final", problems, seed=0, config=CONFIG)
    away = tmp_path / "away"
    path = space.root / "final" / "a.int-4g16.safetensors"
    shutil.move(path, away)
    looks = []

    def look():
        looks.append(len(looks))
        if len(looks) == 3:
            shutil.move(away, path)

    monkeypatch.setattr(distributed, "POLL", 0.0)
    found = gather(space, "final", problems, still_there=look)
    assert len(looks) == 3 and set(found) == set(problems)

    def lost():
        raise QLRError("process 1 is lost")

    with pytest.raises(QLRError, match="lost"):
        gather(space, "final", [("c", "int-4g16")], still_there=lost)


# Hessians --------------------------------------------------------------------------------------------------------------------

HESSIANS = """
import json
import jax, numpy as np
from qlr_jax.calibration import hessians
from qlr_jax.models import Llama, LlamaConfig
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
model, draw = Llama(config, jax.random.key(0)), np.random.default_rng(0)
tokens, weights = draw.integers(0, 64, (21, 128)).astype(np.int32), draw.random((21, 128)).astype(np.float32)
one = hessians(model, tokens, weights=weights, devices=1)
found = []
for given in ({}, {"devices": 3, "batch": 5}, {"batch": 32}):
    many = hessians(model, tokens, weights=weights, **given)
    for name, h in one.items():
        size = np.sqrt(np.outer(np.diag(h), np.diag(h)))
        assert np.array_equal(many[name], many[name].T)
        found.append(float(np.abs((many[name] - h) / size).max()))
print(json.dumps([len(one), max(found), jax.local_device_count()]))
"""


def test_hessians_on_eight_devices_are_those_of_one():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", HESSIANS], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    count, error, devices = json.loads(done.stdout.splitlines()[-1])
    assert count == 8 and devices == 8 and error < 2e-6  # of √(H_ii H_jj); 16 times the last bit of float32
