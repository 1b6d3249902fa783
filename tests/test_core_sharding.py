"""A batch on eight simulated devices: the results of one device, an eighth of the work, and no waiting for ever.

A matrix that is alone on its devices comes out to the last bit as on one device. A batch does not quite: XLA sums over a matrix in
another order where its program has fewer of them, so scales and damping may differ in their last bit, and a near tie among codes
then falls the other way. Without factors hardly a code changes; alternations with factors carry it on, and only the error stays.
"""

import json

import pytest
from processes import run

from qlr_jax.core import sharding as devices
from qlr_jax.errors import QLRError

PATIENCE = 400  # seconds; a wait for ever must end as a failure

HEAD = """
import json, sys
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
import numpy as np
from qlr_jax.core import alternation, batch, solver
from qlr_jax.core import sharding as devices
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.solver import solve_batch

def hessian(n, seed):
    x = np.random.default_rng(seed).standard_normal((2 * n, n)) * np.geomspace(3, 0.1, n)
    return (x.T @ x / len(x)).astype(np.float32)

def stored(solution):
    return {name: np.asarray(array) for name, array in solution.value.arrays.items()}

def compared(one, many):
    assert len(one) == len(many)
    pairs = [(stored(a), stored(b)) for a, b in zip(one, many)]
    same = [np.mean(a[k] == b[k]) for a, b in pairs for k in a if k.endswith("codes")]
    ratios = [b.stats["relative_error"] / a.stats["relative_error"] for a, b in zip(one, many)]
    identical = all(a[k].tobytes() == b[k].tobytes() for a, b in pairs for k in a)
    identical = identical and all(a.stats == b.stats and a.verdict == b.verdict for a, b in zip(one, many))
    worst, mean = max(abs(r - 1) for r in ratios), float(np.mean(ratios))
    return {"same": float(np.mean(same)), "error": worst, "mean": mean, "identical": identical}

config = SolverConfig(state_bits=6, iterations=2)
"""

EQUAL = """
found = {}
for name, (b, m, n), spec, each, outputs in [
    ("matrices G", (10, 64, 64), "trellis-2", False, True),
    ("matrices factors", (3, 64, 64), "int-2g16+r8@int-4", True, False),  # each device compiles the factors for itself
    ("rows G", (1, 512, 64), "trellis-2.25w", False, True),
    ("rows G factors", (1, 500, 48), "int-3/rot+r8@int-8", False, True),
    ("both", (2, 256, 64), "trellis-2", True, False),
]:
    devices.LEAST_ROWS = 64 if m > 64 else 512
    weights = np.random.default_rng(1).standard_normal((b, m, n), np.float32)
    metric = np.stack([hessian(n, i) for i in range(b if each else 1)])
    given = {"outputs": np.stack([hessian(m, 99 + i) for i in range(b)]) if outputs else None, "config": config}
    one = solve_batch(weights, metric, spec, devices=1, **given)
    found[name] = compared(one, solve_batch(weights, metric, spec, **given)) | {"mesh": devices.shares(b, m, 8)}

devices.LEAST_ROWS = 512
shared = hessian(32, 0)
problems = {(i, spec): (np.random.default_rng(i).standard_normal((48, 32)).astype(np.float32), shared, spec)
            for i in range(5) for spec in ("int-4g16", "bf16")}
seen = []
many = solve_many(problems, config=config, on_done=lambda key, _: seen.append(key))
one = solve_many(problems, config=config, devices=1)
assert list(one) == list(many) == seen and set(one) == set(problems)
found["many"] = compared(list(one.values()), list(many.values()))

# four large matrices of two Hessians, and four small ones that are two batches; the large with factors: each pair stops by itself
batch.ROWS_TOGETHER, metrics = 128, [hessian(32, i) for i in range(2)]
problems = {(i, rows): (np.random.default_rng(i).standard_normal((rows, 32)).astype(np.float32), metrics[i // 2], spec)
            for rows, spec in ((64, "int-3g16"), (1024, "int-3g16+r4@int-4")) for i in range(4)}
calls = []
def counted(weights, *rest, groups, **given):
    calls.append([len(weights), *groups])
    return solve_batch(weights, *rest, groups=groups, **given)
batch.solve_batch = counted
several = SolverConfig(iterations=3)
many = solve_many(problems, config=several)
found["calls"], calls = calls, []
one = solve_many(problems, config=several, devices=1)
found["calls of one"] = calls
found["side by side"] = compared([one[k] for k in problems], [many[k] for k in problems])
found["side by side"]["iterations"] = [[s[k].stats["iterations"] for k in problems] for s in (one, many)]
print(json.dumps(found))
"""

WORK = """
import dataclasses
sys.path.insert(0, "benchmarks")
from scaling import operations
real = devices._sharded

def work(shape, spec, count, bits):
    total = []
    def watched(*key):
        made = real(*key)
        def call(*leaves):
            total.append(operations(jax.make_jaxpr(made)(*leaves).jaxpr))
            return made(*leaves)
        return call
    devices._sharded = watched
    solver.matrix_placement = lambda *_: devices.Placement(devices._mesh(*devices.shares(shape[0], shape[1], count)))
    weights = np.random.default_rng(1).standard_normal(shape, np.float32)
    solve_batch(weights, hessian(shape[2], 0)[None], spec, config=dataclasses.replace(config, state_bits=bits))
    return sum(total)

# every device rotates a matrix whose rows are shared out, which is little beside a search of as many states as usual
print(json.dumps({name: [work(shape, spec, count, bits) for count in (1, 2, 8)] for name, shape, spec, bits in
    [("matrices", (64, 64, 32), "int-4g16", 6), ("rows", (1, 4096, 64), "int-4", 6), ("walks", (1, 4096, 16), "trellis-2", 10)]}))
"""

# eight devices at once, with two matrices of 64 components each, hung in batched factorizations, of the components and of Hessians;
# so did, now and then, two with 16 Hessians each (jaxlib 0.10.2)
LOOPS = """
weights = np.random.default_rng(1).standard_normal((16, 64, 64), np.float32)
found = solve_batch(weights, np.stack([hessian(64, i) for i in range(16)]), "int-4/rot+r64@int-4", config=config)
weights = np.random.default_rng(1).standard_normal((32, 128, 128), np.float32)
for _ in range(5):
    found += solve_batch(weights, np.stack([hessian(128, 0)] * 32), "int-4/rot", config=config, devices=2)
print(json.dumps([s.stats["relative_error"] for s in found]))
"""

# as accelerators do it, all devices at once: with threads enough nobody waits
AT_ONCE = """
weights = np.random.default_rng(1).standard_normal((3, 64, 64), np.float32)  # "matrices factors" of above: compiled already
metric = np.stack([hessian(64, i) for i in range(3)])
found = []
for platforms in (("cpu",), ()):
    devices.ONE_AFTER_ANOTHER = platforms
    found.append(solve_batch(weights, metric, "int-2g16+r8@int-4", config=config))
print(json.dumps(compared(*found)["identical"]))
"""


def on_eight(script, patience=PATIENCE, **environment):
    """What a script prints in a process with eight devices."""
    return json.loads(run(HEAD + script, devices=8, environment=environment, timeout=patience).splitlines()[-1])


@pytest.fixture(scope="module")
def equal():
    return on_eight(EQUAL)


@pytest.mark.parametrize("name", ["rows G", "rows G factors"])
def test_a_matrix_on_many_devices_is_that_of_one_to_the_last_bit(equal, name):
    assert equal[name]["mesh"][0] == 1 and equal[name]["mesh"][1] > 4
    assert equal[name]["identical"], equal[name]


@pytest.mark.parametrize("name", ["matrices G", "both", "many"])
def test_a_batch_on_many_devices_is_that_of_one_up_to_near_ties(equal, name):
    assert equal[name]["same"] > 0.99 and equal[name]["error"] < 1e-3, equal[name]


def test_with_factors_a_batch_on_many_devices_has_the_error_of_one(equal):
    """Of matrices so small that one tie is felt; the mean shows that neither is better."""
    assert equal["matrices factors"]["error"] < 0.1 and abs(equal["matrices factors"]["mean"] - 1) < 0.03, equal["matrices factors"]


def test_batches_of_one_kind_are_solved_side_by_side(equal):
    """On one device one after another; on eight at once, each stopping by itself, in which they are those of one device."""
    assert equal["calls of one"] == [[2, 2]] * 4 and equal["calls"] == [[4, 2, 2]] * 2
    found = equal["side by side"]
    assert found["error"] < 0.03 and abs(found["mean"] - 1) < 0.01, found
    assert found["iterations"][0] == found["iterations"][1], found


def test_meshes(equal):
    """Filled up to whole devices; matrices and rows at once."""
    assert equal["matrices G"]["mesh"] == [8, 1] and equal["both"]["mesh"] == [2, 4]


def test_work_falls_with_the_devices():
    for name, (one, two, eight) in on_eight(WORK).items():
        assert one / two > 1.9 and one / eight > (7.9 if name == "matrices" else 6), (name, one, two, eight)


def test_factorizations_do_not_wait_for_each_other():
    errors = on_eight(LOOPS)
    assert len(errors) == 176 and all(0 < error < 0.2 for error in errors)


def test_all_devices_at_once_find_what_one_after_another_does():
    assert on_eight(AT_ONCE, NPROC="64") is True


def test_shares():
    for matrices, rows, count in [(1, 64, 8), (1, 8192, 8), (7, 512, 8), (64, 128, 6), (3, 4096, 8), (5, 11008, 3)]:
        along, each = devices.shares(matrices, rows, count)
        assert 1 <= along * each <= count and along <= matrices and each <= max(1, rows // devices.LEAST_ROWS)
    assert devices.shares(8, 4096, 8) == (8, 1)  # no word between devices where it can be helped


def test_one_device_has_no_mesh():
    assert devices.matrix_placement(8, 4096, 1) is devices.HERE
    with pytest.raises(QLRError, match="devices=0"):
        devices.matrix_placement(8, 4096, 0)
