"""The exact allocation against brute force, its neighbours, and the properties that every allocation has."""

import doctest
import importlib
import itertools
import pkgutil
import random as stdlib_random
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

import allocators
from allocators import (
    STRATEGIES,
    AllocationError,
    Infeasible,
    Option,
    OptionTable,
    Role,
    Row,
    Status,
    Tie,
    allocate,
    baselines,
    compared,
    delivered,
    find_strategy,
    from_specs,
    frontier,
    job_plans,
    prune,
    random,
    rank0,
    solved_strategies,
)
from allocators.exact import knapsack
from allocators.exact.reduction import trim
from allocators.strategies import BASELINE, CONTROL, DEFAULT

SPECS = [f"int-{bits}" + (f"+r{rank}@bf16" if rank else "") for bits in (2, 3, 4, 5) for rank in (0, 4, 8)]
TIES = {
    "free": (),
    "backbone": (Tie(("r0", "r1")), Tie(("r2", "r4"))),
    "three": (Tie(("r3", "r0", "r2")),),
    "spec": (Tie(("r0", "r2", "r3"), "spec"),),
    "both": (Tie(("r0", "r4"), "spec"), Tie(("r1", "r3"))),
}


def draw_table(seed: int, ties: str, rows: int = 5, options: int = 7) -> OptionTable:
    """A small table: sizes coarse or up to 10⁹, damages coarse (with equals), negative at times, or fine."""
    draw = np.random.default_rng(seed)
    top, coarse, alike = 10 ** int(draw.integers(1, 10)), draw.random() < 0.5, draw.random() < 0.2
    made: list[Row] = []
    for i in range(rows):
        specs = [SPECS[k] for k in sorted(draw.permutation(len(SPECS))[: draw.integers(1, options + 1)])]
        specs = list(dict.fromkeys([*specs, "int-2", "int-4+r4@bf16"]))
        damage = draw.integers(-3, 20, len(specs)) / 4 if coarse else draw.lognormal(-5, 3, len(specs))
        size = draw.integers(0, top + 1, len(specs))
        options_of = tuple(Option(s, int(b), float(d)) for s, b, d in zip(specs, size, damage, strict=True))
        made.append(Row(f"r{i}", 64, made[0].options if alike and made else options_of))
    return OptionTable(tuple(made), TIES[ties])


def brute_force(table: OptionTable) -> list[tuple[int, float]]:
    """Bytes and damage of every allocation that the ties allow."""
    choices = np.indices([len(row.options) for row in table.rows]).reshape(len(table.rows), -1)
    allowed = np.ones(choices.shape[1], bool)
    for tie in table.ties:
        number: dict = {}
        keys = [[number.setdefault(tie.key(option), len(number)) for option in table[name].options] for name in tie.rows]
        chosen = [np.array(of)[choices[table.index[name]]] for of, name in zip(keys, tie.rows, strict=True)]
        allowed &= np.all(np.equal(chosen, chosen[0]), axis=0)
    options = [[(o.bytes, o.damage) for o in row.options] for row in table.rows]
    size = sum(np.array([b for b, _ in of])[chosen] for of, chosen in zip(options, choices, strict=True))
    damage = sum(np.array([d for _, d in of])[chosen] for of, chosen in zip(options, choices, strict=True))
    return list(zip(size[allowed].tolist(), damage[allowed].tolist(), strict=True))


def limits(table: OptionTable, every: list[tuple[int, float]], seed: int) -> list[int]:
    """The ends, one in between, and the exact bytes of two allocations and a byte less than one (where tolerances would show)."""
    draw = stdlib_random.Random(seed)
    tight = draw.choice(every)[0]
    return [table.least_bytes, draw.randint(table.least_bytes, table.most_bytes), tight, max(tight - 1, table.least_bytes)]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("seed", range(15))
def test_exact_equals_brute_force(ties, seed):
    table = draw_table(seed, ties, options=5)
    every = brute_force(table)
    assert table.least_bytes == min(size for size, _ in every) and table.most_bytes == max(size for size, _ in every)
    curve, pruned = frontier(table), prune(table).table
    for limit in limits(table, every, seed):
        best = min(damage for size, damage in every if size <= limit)
        found = allocate(table, limit)
        slack = 1e-9 * (1 + abs(best))
        assert found.bytes <= limit and abs(found.damage - best) <= slack
        assert found.status is Status.OPTIMAL and found.bound <= best + slack and found.gap <= 1e-6
        assert from_specs(table, found.specs, limit).damage == found.damage
        assert abs(allocate(pruned, limit).damage - best) <= slack
        below, above = curve.bracket(limit)
        assert curve.bytes[below] <= limit and (curve.bytes[above] > limit or below == above == len(curve) - 1)
        assert curve.bound(limit) - slack <= best <= curve.damage[below] + slack
        for name, other in baselines(table, limit).items():
            assert other.bytes <= limit and other.damage >= best - slack, name


@pytest.mark.parametrize("seed", range(30))
def test_locks_against_brute_force(seed):
    table = draw_table(seed, "backbone" if seed % 2 else "free", options=4)
    for row in table.rows[:3]:
        shared = [option for option in row.options if option.spec in ("int-2", "int-4+r4@bf16")]
        most = max(map(row.bits, shared))
        locked = table.lock(row.name, shared[seed % 2].spec) if seed % 3 or not most else table.at_least(row.name, most)
        every = brute_force(locked)
        limit = stdlib_random.Random(seed).randint(locked.least_bytes, locked.most_bytes)
        found = allocate(locked, limit)
        assert abs(found.damage - min(d for size, d in every if size <= limit)) <= 1e-9 * (1 + abs(found.damage))
        assert found.specs[row.name] in {option.spec for option in locked[row.name].options}


def curve_table(layers: int, seed: int = 0, alike: bool = False, tie: bool = False) -> OptionTable:
    """A table with rate-distortion curves, as a model would give: every rank and rate, sizes of two shapes."""
    draw = np.random.default_rng(seed)
    rows = []
    for layer, kind in itertools.product(range(layers), "qkv"):
        weights = 64 * (256 if kind == "q" else 128)
        weight, steep = (1.0, 0.3) if alike else (draw.lognormal(), draw.uniform(0, 1))
        options = []
        for bits, rank in itertools.product(np.arange(6, 18) / 4, (0, 4, 8, 16)):
            noise = 1.0 if alike else draw.lognormal(0, 0.05)
            size = int(weights * bits / 8) + 2 * 64 + rank * (64 + weights // 64) // 2
            text = f"trellis-{bits:g}" + (f"+r{rank}@trellis-4" if rank else "")
            options.append(Option(text, size, weight * 4.0**-bits * (1 + rank) ** -steep * noise))
        rows.append(Row(f"{layer}.{kind}", weights, tuple(options)))
    table = OptionTable(tuple(rows))
    return table.tie("*.q", "*.k", "*.v") if tie else table


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_larger_tables_are_proved_and_monotone(tie, alike, capfd):
    table = curve_table(12, alike=alike, tie=tie)
    curve, last = frontier(table), np.inf
    for share in np.linspace(0, 1, 5):
        limit = int(table.least_bytes + share * (table.most_bytes - table.least_bytes))
        found = allocate(table, limit)
        assert found.bytes <= limit and found.gap <= 1e-6 and found.status is Status.OPTIMAL
        assert found.damage <= last * (1 + 1e-9)
        assert curve.bound(limit) <= found.damage * (1 + 1e-9) <= curve.damage[curve.bracket(limit)[0]] * (1 + 2e-9)
        last = found.damage
        others = baselines(table, limit)
        assert all(other.bytes <= limit and other.damage >= found.damage * (1 - 1e-9) for other in others.values())
        assert all(
            option.rank == 0 for row in table.rows for option in row.options if option.spec == others["rank0"].specs[row.name]
        )
        if "uniform" in others:
            assert len(set(others["uniform"].specs.values())) == 1
            assert others["filled_uniform"].damage <= others["uniform"].damage
    assert capfd.readouterr().out == ""  # so that --json stays clean


def test_frontier_corners_are_optimal_allocations():
    table = curve_table(4, tie=True)
    curve = frontier(table)
    assert np.all(np.diff(curve.bytes) > 0) and np.all(np.diff(curve.damage) < 0) and np.all(np.diff(curve.price) <= 0)
    assert curve.bytes[0] == table.least_bytes
    for corner in curve.subsample(7):
        point = curve.allocation(corner)
        assert point.bytes == curve.bytes[corner] and point.damage == pytest.approx(curve.damage[corner])
        assert allocate(table, point.bytes).damage == pytest.approx(point.damage)
    assert curve.allocation(-1).damage == pytest.approx(allocate(table, table.most_bytes).damage)


def test_a_gap_stops_early_and_is_kept():
    table = curve_table(30)
    limit = (table.least_bytes + table.most_bytes) // 3
    exact, loose = allocate(table, limit), allocate(table, limit, gap=1e-2)
    assert loose.status in (Status.WITHIN_GAP, Status.OPTIMAL) and loose.gap <= 1e-2
    assert loose.bound <= exact.damage <= loose.damage <= exact.damage * 1.01


def test_a_table_of_the_size_of_a_70b_model():
    draw = np.random.default_rng(0)
    rows = []
    for i in range(560):
        weights, scale = 8192 * (1024 if i % 7 in (1, 2) else 8192), draw.lognormal()
        grid = [(bits, rank) for rank in (0, 8, 16, 32, 64) for bits in np.arange(6, 18) / 4]
        options = (
            Option(f"trellis-{b:g}+r{r}", int(weights * b / 8) + r * 10000, scale * 4.0**-b * (1 + r) ** -draw.uniform(0, 0.6))
            for b, r in grid
        )
        rows.append(Row(f"m{i}", weights, tuple(options)))
    table = OptionTable(tuple(rows))
    found = allocate(table, int(2.25 / 8 * table.weights()), gap=1e-4)
    assert found.gap <= 1e-4 and found.seconds < 10 and 2.24 < found.bits_per_weight <= 2.25


def test_random_allocations_fill_the_limit_and_differ():
    table = curve_table(20)
    limit = int(2.5 / 8 * table.weights())
    found = [random(table, limit, seed) for seed in range(5)]
    assert all(0.995 * limit <= allocation.bytes <= limit for allocation in found)
    assert len({tuple(allocation.specs.values()) for allocation in found}) == 5
    assert random(table, limit, 3).specs == found[3].specs
    tied = random(curve_table(6, tie=True), int(2.5 / 8 * curve_table(6).weights()), 1)
    backbones = [allocators.backbone(spec) for spec in tied.specs.values()]
    assert all(len(set(backbones[k : k + 3])) == 1 for k in range(0, 18, 3))


def test_no_room_and_all_the_room():
    table = curve_table(3)
    smallest, largest = allocate(table, table.least_bytes), allocate(table, table.most_bytes + 10**9)
    assert smallest.bytes == table.least_bytes and smallest.gap == 0
    assert largest.damage == pytest.approx(sum(min(o.damage for o in row.options) for row in table.rows)) and largest.gap <= 1e-12
    with pytest.raises(Infeasible):
        allocate(table, table.least_bytes - 1)


def test_an_allocation_explains_itself():
    found = allocate(curve_table(2), curve_table(2).most_bytes)
    plain = found.to_dict()
    assert plain["status"] == "optimal" and plain["gap"] == found.gap and len(plain["specs"]) == 6
    assert all(status.explain.endswith(".") for status in Status)
    assert baselines(curve_table(2), found.limit)["greedy"].gap is None


def smooth_table(seed: int, factors: int = 1, layers: int = 6, tie: bool = False) -> OptionTable:
    """A table as small models give it: rates in sixteenths of a bit, ranks and factor grids, smooth damages, bytes in steps of 4.

    HiGHS on the core of such tables runs for minutes: its bounds hardly move, because any two rows can trade bytes.
    """
    draw, quarters = np.random.default_rng(seed), np.arange(4, 17) / 4
    curve = -2 * quarters * 0.95 * np.log(2) + 0.15 + 0.03 * np.sin(7 * quarters)
    grids, lost = [(4, 4), (4, 2), (2, 4)][:factors], {2: 0.08, 4: 0.005}
    rates = [(rate, float(np.exp(np.interp(rate, quarters, curve)))) for rate in np.arange(16, 65) / 16]
    sides = [(0, 4, 4), *((rank, left, right) for rank in (4, 8, 16, 32) for left, right in grids)]
    shapes = dict(q=(256, 256), k=(128, 256), v=(128, 256), o=(256, 256), gate=(768, 256), up=(768, 256), down=(256, 768))
    rows = []
    for layer, (kind, (m, n)) in itertools.product(range(layers), shapes.items()):
        weight, steep = draw.lognormal() * 1e-3, draw.uniform(0.02, 1.2)
        spectrum = np.arange(1, 257.0) ** -steep
        captured = np.concatenate(([0.0], np.cumsum(spectrum / spectrum.sum()))) * draw.uniform(0.2, 0.8)
        options = []
        for rank, left, right in sides:
            noise = draw.lognormal(0, 0.01)
            for rate, lost_at_rate in rates:
                kept = 1 - captured[rank] * (1 - lost[left] - lost[right])
                size = int(m * n * rate / 8) + 4 + (8 + (m * left + n * right) * rank // 8 if rank else 0)
                spec = f"trellis-{rate:g}" + (f"+r{rank}@trellis-{left},trellis-{right}" if rank else "")
                if size < 2 * m * n:
                    options.append(Option(spec, size, float(weight * lost_at_rate * kept * noise)))
        rows.append(Row(f"{layer}.{kind}", m * n, tuple(options)))
    table = OptionTable(tuple(rows))
    return table.tie("*.q", "*.k", "*.v").tie("*.gate", "*.up") if tie else table


# three of those without ties stopped HiGHS at 4e-4
@pytest.mark.parametrize(
    ("seed", "factors", "tie"), [(13, 1, False), (1, 3, False), (4, 3, False), (15, 3, False), (13, 1, True), (4, 3, True)]
)
def test_smooth_tables_are_solved_to_the_end(seed, factors, tie):
    table = smooth_table(seed, factors, tie=tie)
    limit = int(2.25 / 8 * table.weights())
    exact, loose = allocate(table, limit), allocate(table, limit, gap=1e-4)
    assert exact.status is Status.OPTIMAL and exact.gap <= 1e-9 and exact.seconds < 5
    assert loose.status in (Status.WITHIN_GAP, Status.OPTIMAL) and loose.gap <= 1e-4
    assert loose.bound <= exact.damage <= loose.damage <= exact.damage * (1 + 1e-4)
    others = baselines(table, limit)
    assert set(others) == {"uniform", "filled_uniform", "rank0", "greedy", "random"}
    assert all(other.damage >= exact.damage for other in others.values())


@pytest.mark.parametrize("seed", range(8))
def test_exact_equals_highs(seed):
    """An independent solver on the textbook model, one 0-1 variable an option."""
    table = curve_table(5, seed, alike=seed == 7)
    limit = int((1.7 + 0.2 * seed) / 8 * table.weights())
    size = np.array([o.bytes for row in table.rows for o in row.options], dtype=float)
    damage = np.array([o.damage for row in table.rows for o in row.options])
    owner = np.repeat(np.arange(len(table.rows)), [len(row.options) for row in table.rows])
    result = milp(
        damage / damage.max(),
        integrality=np.ones(len(owner)),
        bounds=(0, 1),
        constraints=[LinearConstraint(owner == np.arange(len(table.rows))[:, None], 1, 1), LinearConstraint(size, 0, limit)],
        options=dict(mip_rel_gap=1e-9),
    )
    assert allocate(table, limit).damage == pytest.approx(result.fun * damage.max(), rel=1e-6)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("seed", range(10))
def test_bounds_hold_where_states_are_trimmed_or_time_runs_out(ties, seed, monkeypatch):
    table = draw_table(seed, ties, options=5)
    every = brute_force(table)
    for limit in limits(table, every, seed)[1:]:
        best = min(damage for size, damage in every if size <= limit)
        slack = 1e-9 * (1 + abs(best))
        found = [allocate(table, limit, gap=gap, seconds=1e-9) for gap in (0.0, 0.05)]
        for cells in ((6,), (6, 20), (40,)):
            monkeypatch.setattr(knapsack, "CELLS", cells)
            found += [allocate(table, limit, gap=gap) for gap in (0.0, 0.05)]
        for one in found:
            assert one.bytes <= limit and one.bound <= best + slack and best - slack <= one.damage
            assert one.status is not Status.OPTIMAL or abs(one.damage - best) <= slack
            assert one.status is not Status.WITHIN_GAP or one.damage - best <= 0.05 * abs(one.damage) + slack


def test_trimmed_searches_say_so(monkeypatch):
    table = smooth_table(18, 3)
    limit = int(2.25 / 8 * table.weights())
    exact = allocate(table, limit)
    monkeypatch.setattr(knapsack, "CELLS", (200,))
    trimmed = allocate(table, limit)
    assert trimmed.status is Status.STOPPED and 0 < trimmed.gap < 0.01
    assert trimmed.bound <= exact.damage <= trimmed.damage


def test_trimming_loses_no_more_than_it_says():
    draw = np.random.default_rng(0)
    for most in (2, 3, 10, 60, 200):
        damage = np.unique(draw.lognormal(0, 2, 100))[::-1]
        kept, loss = trim(damage, most)
        assert len(kept) <= most and kept[0] == 0
        before = kept[np.searchsorted(kept, np.arange(100), side="right") - 1]  # what stands in for each: fewer bytes
        assert (damage[before] - damage).max() == pytest.approx(loss)


def test_hard_tables_end_with_an_honest_gap():
    """Damage that falls with bytes by the same law everywhere: no bound tells the allocations apart, and time must not run away."""
    draw, rows = np.random.default_rng(0), []
    for i in range(30):
        size = np.sort(draw.integers(1, 10**9, 12))
        rows.append(Row(f"r{i}", 64, tuple(Option(f"s{j}", int(b), 2 - b / 1e9) for j, b in enumerate(size))))
    table = OptionTable(tuple(rows))
    found = allocate(table, (table.least_bytes + table.most_bytes) // 2, seconds=1.0)
    assert found.gap < 1e-6 and found.seconds < 5
    assert found.status is (Status.OPTIMAL if found.gap <= 1e-12 else Status.STOPPED)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_to_limit_ties_and_totals(name, ties):
    strategy, tried = STRATEGIES[name], 0
    for seed in range(12):
        table = draw_table(seed, ties)
        limit = int((table.least_bytes + table.most_bytes) / 2)
        try:
            found = strategy.allocate(table, limit, gap=0.0, seconds=10.0, seed=seed)
        except Infeasible:
            continue
        tried += 1
        again = from_specs(table, found.specs, limit)  # refuses a broken tie, and too many bytes
        assert (found.bytes, found.damage, found.bits_per_weight) == (again.bytes, again.damage, again.bits_per_weight)
        assert found.bytes <= found.limit == limit and found.method and found.baselines == {}
        assert found.damage >= allocate(table, limit).bound - 1e-9 * abs(found.damage)
        assert strategy.ranks or all("+" not in spec for spec in found.specs.values())
        assert found.specs == strategy.allocate(table, limit, gap=0.0, seconds=10.0, seed=seed).specs
    assert tried


def test_the_table_of_strategies_is_whole():
    assert all(name == strategy.name and strategy.label and strategy.text for name, strategy in STRATEGIES.items())
    roles = [strategy.role for strategy in STRATEGIES.values()]
    assert [roles.count(role) for role in (Role.DELIVERED, Role.BASELINE, Role.CONTROL)] == [1, 1, 1]
    assert solved_strategies()[0] == DEFAULT and STRATEGIES[DEFAULT].role is Role.DELIVERED
    with pytest.raises(AllocationError, match="strategy 'best' is not known; there are allocated, uniform, "):
        find_strategy("best")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_job_builds_what_was_asked_for_beside_baseline_and_control(name):
    table = smooth_table(3, layers=2)
    limit = int(2.25 / 8 * table.weights())
    plans = job_plans(compared(table, limit, seed=5, strategy=name), name)
    assert tuple(plans) == solved_strategies()
    assert plans[DEFAULT].specs == STRATEGIES[name].allocate(table, limit, seed=5).specs
    assert all(plans[other].specs == STRATEGIES[other].allocate(table, limit).specs for other in (BASELINE, CONTROL))
    assert [name, *plans[DEFAULT].baselines] == sorted(STRATEGIES, key=lambda other: (other != name, list(STRATEGIES).index(other)))


def test_least_kl_is_delivered_unless_a_strategy_was_asked_for():
    worse = {DEFAULT: 0.3, BASELINE: 0.2, CONTROL: 0.25}
    assert delivered(worse) == BASELINE and delivered(dict.fromkeys(worse, 0.2)) == DEFAULT
    assert delivered(worse, DEFAULT) == BASELINE and delivered(worse, "greedy") == DEFAULT


def test_an_allocation_carries_its_baselines():
    table = smooth_table(3, layers=2)
    limit = int(2.25 / 8 * table.weights())
    found = compared(table, limit, gap=1e-2, seed=5)
    assert [DEFAULT, *found.baselines] == list(STRATEGIES)
    assert found.baselines["random"].specs == random(table, limit, 5).specs
    assert found.bound <= found.damage <= min(other.damage for other in found.baselines.values())
    plain = found.to_dict()
    assert plain["baselines"]["uniform"]["spec"] == found.baselines["uniform"].spec == found.baselines["filled_uniform"].spec
    assert set(found.baselines["uniform"].specs.values()) == {found.baselines["uniform"].spec}
    for name, other in plain["baselines"].items():
        assert (other["damage"], other["bytes"]) == (found.baselines[name].damage, found.baselines[name].bytes)
    assert "baselines" not in allocate(table, limit).to_dict() and "spec" not in plain["baselines"]["greedy"]
    assert from_specs(table, found.specs, limit).damage == found.damage


def test_baselines_that_do_not_exist_are_not_compared():
    ranked = Option("int-2+r4@bf16", 10, 1.0)
    table = OptionTable((Row("a", 64, (ranked,)), Row("b", 64, (Option("int-4", 30, 0.5), Option("int-3", 20, 2.0)))))
    assert "rank0" not in compared(table, 40).baselines and "uniform" in compared(table, 40).baselines
    apart = OptionTable((Row("a", 64, (ranked, Option("nf-2", 11, 2.0))), table.rows[1]))
    assert "rank0" in compared(apart, 41).baselines and "uniform" not in compared(apart, 41).baselines
    with pytest.raises(Infeasible, match="leaving out every rank leaves row a no option"):
        rank0(table, 40)


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(allocators.__path__)])
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(f"allocators.{module}"), optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed == 0


def test_only_numpy_and_scipy_are_imported():
    others = {"jax", "flax", "torch", "qlr_jax", "transformers", "matplotlib"}
    probe = f"import sys, allocators; print(sorted({others} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert set(allocators.__all__) <= set(vars(allocators))
