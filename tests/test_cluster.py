"""Jobs on real schedulers and workers, as processes on loopback: the bytes of one process, whoever is lost on the way."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Process

from qlr_jax import job
from qlr_jax.engine import FAN_IN, HERE, Call, Here, TreeSum
from qlr_jax.errors import QLRError
from qlr_jax.settings.recipe import Recipe

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

from qlr_jax.cluster import connect, connected  # noqa: E402
from qlr_jax.cluster import engine as engine_room  # noqa: E402

RECIPE = Recipe(
    budget="2.75bpw",
    backbones=("trellis-2", "trellis-3"),
    ranks=(0, 4),
    factors=("trellis-2",),
    state_bits=6,
    search_state_bits=6,
    iterations=1,
    sequences=24,
    sequence_length=32,
    measure_tokens=256,
    evaluation_tokens=512,
    refine=1,
    include=("*self_attn*",),  # four matrices: enough for pieces of every kind
)


SCHEDULER = """
import asyncio, sys
from distributed import Scheduler

async def run():
    async with Scheduler(host="127.0.0.1", port=0, dashboard=False, scheduler_file=sys.argv[1]) as scheduler:
        await scheduler.finished()

asyncio.run(run())
"""
WORKER = """
import asyncio, sys
from distributed import Worker

async def run():
    async with Worker(scheduler_file=sys.argv[1], nthreads=1, host="127.0.0.1", dashboard=False) as worker:
        await worker.finished()

asyncio.run(run())
"""


class Machines:
    """A scheduler, and workers that can be killed: processes on loopback."""

    def __init__(self, folder):
        self.file, self.workers = folder / "scheduler.json", []
        self.scheduler = Process(SCHEDULER, self.file)
        until = time.monotonic() + 60
        while not self.file.is_file() and time.monotonic() < until:
            time.sleep(0.05)

    def add(self, count=1):
        self.workers += [Process(WORKER, self.file) for _ in range(count)]

    def kill_oldest(self):
        os.kill(self.workers.pop(0).pid, signal.SIGKILL)

    def end(self):
        for process in [*self.workers, self.scheduler]:
            process.kill()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    found = Machines(tmp_path_factory.mktemp("cluster"))
    found.add(2)
    yield found
    found.end()


@pytest.fixture(scope="module")
def alone(tiny, text, tmp_path_factory):
    """The folder that one process leaves."""
    return compressed(tiny, text, tmp_path_factory.mktemp("alone") / "out")


def compressed(model, text, out, **settings):
    return job.compress(model, out, calibration=[text], evaluate_on=[text], recipe=RECIPE, **settings).out


def assert_same(one, other):
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    for key in ("kl", "perplexity", "delivered", "matrices", "calibration_kl"):
        assert reports[0].get(key) == reports[1].get(key), key
    assert {**reports[0]["refined"], "seconds": 0} == {**reports[1]["refined"], "seconds": 0}


class Watched:
    """Progress that calls `then` with the title of every stage that begins, and keeps what is said."""

    def __init__(self, then=lambda title: None):
        self.then, self.said, self.notes = then, [], []

    def say(self, line):
        self.said.append(line)

    @contextlib.contextmanager
    def stage(self, title, total=None):
        self.then(title)
        yield self

    def advance(self, count=1, note=""):
        self.notes.append(note)


# ---------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("count", [0, 1, FAN_IN, FAN_IN + 1, 3 * FAN_IN**2 + 5])
def test_a_sum_is_that_of_its_tree(count):
    """Of floats, so that another order would be seen."""
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    total = TreeSum(HERE, lambda a, b: a + b)
    for value in values:
        total.add(value)

    def of(level):
        """Full groups of each level added up, and what is left of it below."""
        whole = len(level) // FAN_IN * FAN_IN
        above = [sum(level[k + 1 : k + FAN_IN], level[k]) for k in range(0, whole, FAN_IN)]
        left = sum(level[whole + 1 :], level[whole]) if len(level) > whole else None
        higher = of(above) if above else None
        return higher if left is None else left if higher is None else higher + left

    assert total.value == (of(list(values)) if count else None)


def test_what_is_kept_is_made_once_and_let_go_before_the_next():
    made, engine, held = [], Here(), {"big": object()}

    def make(i, given):
        made.append((i, given))
        return i

    def call(i):
        return Call(make, (i, held["big"]), kept=True)

    assert [engine.submit(lambda i: i, call(i)) for i in (1, 1, 2, 2, 1)] == [1, 1, 2, 2, 1]
    assert [i for i, _ in made] == [1, 2, 1]
    engine.forget()
    engine.submit(lambda i: i, call(1))
    assert len(made) == 4
    assert engine.submit(lambda pair: pair, [call(1), {"a": Call(len, ((1, 2),))}]) == [1, {"a": 2}]


# ------------------------------------------------------------------------------------------------------------ jobs


def test_a_job_leaves_the_bytes_of_one_process_whichever_worker_is_lost(alone, machines, tiny, text, tmp_path):
    """One is killed in three stages of different kinds (sums that stay there, solves, passes), and another comes late each time."""
    killed = []

    def lose_one(title):
        if title in ("calibrating: outputs", "compressing", "evaluating on held-out text"):
            machines.kill_oldest()
            machines.add()
            killed.append(title)

    watched = Watched(lose_one)
    out = compressed(tiny, text, tmp_path / "out", cluster=str(machines.file), progress=watched)
    assert len(killed) == 3
    assert_same(alone, out)
    assert any("is lost; its pieces run again" in line for line in watched.said)
    assert any("pieces done" in note for note in watched.notes)


def test_a_scheduler_that_is_lost_ends_the_job_and_any_number_of_workers_goes_on(alone, tiny, text, tmp_path):
    (tmp_path / "machines").mkdir()
    lost, out = Machines(tmp_path / "machines"), tmp_path / "out"
    try:
        lost.add()

        def lose(title):
            if title == "evaluating on calibration text":
                lost.scheduler.kill()

        patience = dask.config.set({"distributed.comm.timeouts.connect": "2s"})  # for it to come back
        with patience, pytest.raises(QLRError, match=r"scheduler is lost .*what is solved is kept, so go on with --resume"):
            compressed(tiny, text, out, cluster=str(lost.file), progress=Watched(lose))
    finally:
        lost.end()
    kept = sorted(path.name for path in (out / "job" / "final").glob("*"))
    assert kept and (out / "job" / "table.json").is_file()
    assert_same(alone, compressed(tiny, text, out, resume=True))


def test_a_table_and_an_evaluation_are_those_of_one_process(alone, machines, tiny, text, tmp_path):
    tables = [
        job.sensitivity(tiny, tmp_path / name, calibration=[text], recipe=RECIPE, cluster=cluster)
        for name, cluster in (("one", None), ("many", str(machines.file)))
    ]
    rows = [json.loads((tmp_path / name / "table.json").read_text())["rows"] for name in ("one", "many")]
    assert rows[0] == rows[1] and tables[0]["options"] == tables[1]["options"]
    with distributed.Client(scheduler_file=str(machines.file)) as client:
        found = [job.evaluate(alone, text=[text], original=tiny, cluster=cluster) for cluster in (None, client)]
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_worker_of_other_versions_is_refused(machines, monkeypatch):
    real = engine_room.facts
    monkeypatch.setattr(engine_room, "facts", lambda: real() | {"jax": "0.0.1", "devices": "8 of kind cpu"})
    with (
        pytest.raises(QLRError, match=r"a worker on .* has jax \S+ where the job has 0\.0\.1; has devices 1 of kind \S+ where the"),
        connected(str(machines.file)),
    ):
        pass


def test_what_fails_in_a_piece_is_not_taken_for_a_lost_scheduler(machines):
    with connected(str(machines.file)) as engine:
        failed = engine.submit(open, "/nowhere", title="reading")
        with pytest.raises(QLRError, match=r"a piece of work \(reading\) failed on a worker: FileNotFoundError: .*/nowhere"):
            engine.result(failed)
        first, _ = engine.split(failed, 2)
        with pytest.raises(QLRError, match="FileNotFoundError"):
            engine.result(first)
        assert engine.result(engine.submit(len, [1, 2])) == 2


def test_what_no_cluster_is_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(connect, "ANSWER", 0.5)
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_text("[]")
    cases = {
        str(tmp_path / "empty"): "is no scheduler's file: it names no address; give the one that dask scheduler",
        str(tmp_path / "other"): "is no scheduler's file",
        "local:none": "has no number of processes; give e.g. local:4",
        "somewhere": "is neither an address",
        "tcp://127.0.0.1:1": "no scheduler answers at tcp://127.0.0.1:1 .*start one there with: dask scheduler",
    }
    for given, says in cases.items():
        with pytest.raises(QLRError, match=says), connected(given):
            pass
    monkeypatch.setattr(connect.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QLRError, match=r"pip install 'qlr-jax\[cluster\]'"), connected("local:1"):
        pass


def test_a_scheduler_file_that_is_not_written_yet_is_waited_for(machines, tmp_path):
    """The scheduler makes it, and writes it then: whoever reads it between the two finds nothing."""
    file = tmp_path / "scheduler.json"
    file.touch()
    threading.Timer(0.3, lambda: file.write_text(machines.file.read_text())).start()
    with connected(str(file)) as engine:
        assert engine.result(engine.submit(len, [1, 2])) == 2


def test_workers_that_do_not_see_the_model_copy_its_files(alone, machines, tiny, text, tmp_path, monkeypatch):
    from qlr_jax.pipelines import source

    real = source.identity
    monkeypatch.setattr(source, "identity", lambda folder, name: real(folder, name) | {"path": "/nowhere"})
    assert_same(alone, compressed(tiny, text, tmp_path / "out", cluster=str(machines.file)))
    with distributed.Client(scheduler_file=str(machines.file)) as client:
        copies = client.run(lambda dask_worker: len(list(Path(dask_worker.local_directory).glob("model-*/model.safetensors"))))
    assert 1 in copies.values()


def test_another_model_on_a_worker_is_refused(machines, tiny, text, tmp_path, monkeypatch):
    from qlr_jax.pipelines import source

    monkeypatch.setattr(
        source, "identity", lambda folder, name: {"path": str(folder), "hub": None, "digest": "sha256:0", "name": name}
    )
    with pytest.raises(QLRError, match=r"has another model at .* \(sha256:\w+ where the job has sha256:0\)"):
        compressed(tiny, text, tmp_path / "out", cluster=str(machines.file))


def test_workers_with_too_little_memory_are_refused(machines, tiny, text, tmp_path, monkeypatch):
    from qlr_jax import cost

    assert cost.of_a_worker(cost.Counted(tiny_config(tiny), RECIPE, cost.Machine.parse())) > 500_000_000  # Python and JAX alone
    monkeypatch.setattr(cost, "of_a_worker", lambda counted: 10**15)
    with pytest.raises(QLRError, match=r"may use \d+\.\d\d GB, and the largest piece of this job takes about 1000000\.00 GB"):
        compressed(tiny, text, tmp_path / "out", cluster=str(machines.file))


def tiny_config(folder):
    from qlr_jax.models import LlamaConfig

    return LlamaConfig.from_hf(folder)
