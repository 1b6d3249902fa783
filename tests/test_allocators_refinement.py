"""Refinement by measuring, on losses that are not what the table predicts."""

import itertools
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from allocators import (
    Allocation,
    AllocationError,
    Option,
    OptionTable,
    Row,
    allocate,
    backbone,
    baselines,
    from_specs,
    rank0,
    refine,
    uniform,
)
from allocators.refinement.regression import damage_factors


def make_table(seed: int, layers: int = 4) -> OptionTable:
    draw, rows = np.random.default_rng(seed), []
    for layer, (kind, weights) in itertools.product(range(layers), dict(q=4096, k=2048, up=8192).items()):
        weight, options = draw.lognormal(), []
        for bits, rank in itertools.product(np.arange(4, 17) / 4, (0, 4, 8)):
            spec = f"trellis-{bits:g}" + (f"+r{rank}@trellis-4" if rank else "")
            options.append(Option(spec, int(weights * bits / 8) + 2 + 16 * rank, weight * 4.0**-bits * (1 + rank) ** -0.2))
        rows.append(Row(f"{layer}.{kind}", weights, tuple(options)))
    return OptionTable(tuple(rows))


def groups_of(table: OptionTable) -> dict[str, list[str]]:
    names = list(table.index)
    kinds = {kind: [n for n in names if n.endswith(f".{kind}")] for kind in ("q", "k", "up")}
    return kinds | {f"layer {k}": [n for n in names if n.startswith(f"{k}.")] for k in range(len(names) // 3)}


class Loss:
    """A true loss: kinds, layers and rows matter other than predicted, options are a little better or worse, rows interact."""

    def __init__(self, table: OptionTable, seed: int, error: float = 0.2, scatter: float = 0.02) -> None:
        draw = np.random.default_rng(seed)
        self.table, self.scatter, self.calls = table, scatter, []
        kinds, layers = {}, {}
        for name in table.index:
            layer, kind = name.split(".")
            kinds.setdefault(kind, draw.lognormal(0, error))
            layers.setdefault(layer, draw.lognormal(0, error))
        self.factor = {n: kinds[n.split(".")[1]] * layers[n.split(".")[0]] * draw.lognormal(0, error / 2) for n in table.index}
        vectors = draw.standard_normal((len(table.rows), 8))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.rho = 0.9 * np.eye(len(table.rows)) + 0.1 * vectors @ vectors.T

    def __call__(self, specs):
        self.calls.append(dict(specs))
        size = []
        for name in self.table.index:
            noise = np.random.default_rng(zlib.crc32(f"{name} {specs[name]}".encode())).standard_normal()
            size.append(self.table[name].option(specs[name]).damage * self.factor[name] * np.exp(self.scatter * noise))
        size = np.sqrt(size)
        return float(size @ self.rho @ size)


def setting(seed: int, tie: bool = False) -> tuple[OptionTable, int, Allocation, Loss]:
    table = make_table(seed)
    table = table.tie("*.q", "*.k") if tie else table
    limit = int(2.2 / 8 * table.weights())
    return table, limit, allocate(table, limit), Loss(table, seed)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_it_improves_within_limit_ties_and_evaluations(seed, tie):
    table, limit, start, loss = setting(seed, tie)
    others = [uniform(table, limit), rank0(table, limit)]
    told = []
    found = refine(
        table,
        start,
        limit,
        loss,
        groups=groups_of(table),
        evaluations=24,
        candidates=others,
        on_measured=lambda *what: told.append(what),
    )
    calls = list(loss.calls)
    assert found.measured < found.start and found.gained > 0 and found.accepted >= 1
    assert found.measured == min(trial.measured for trial in found.history) == loss(found.allocation.specs)
    assert found.candidates == {"uniform": loss(others[0].specs), "rank0": loss(others[1].specs)}
    assert found.measured <= min(found.candidates.values()) and found.start == loss(start.specs)
    assert found.allocation.bytes <= limit and found.allocation.method == "refined"
    assert from_specs(table, found.allocation.specs, limit).damage == found.allocation.damage >= start.damage * (1 - 1e-9)
    if tie:
        assert all(
            backbone(found.allocation.specs[f"{k}.q"]) == backbone(found.allocation.specs[f"{k}.k"]) for k in range(len(table.ties))
        )
    assert len(calls) == len(found.history) <= 24 and len({tuple(call.values()) for call in calls}) == len(
        calls
    )  # nothing is measured twice
    assert all(from_specs(table, call, limit).bytes <= limit for call in calls)
    assert told == [(trial.proposal, trial.measured, trial.accepted) for trial in found.history]
    assert found.tried == len(found.history) - 3 and found.explain.startswith("Measuring lowered the loss by")


def test_more_evaluations_are_never_worse_and_it_is_deterministic():
    table, limit, start, _ = setting(1)
    values = []
    for evaluations in (1, 6, 12, 40):
        found = refine(table, start, limit, Loss(table, 1), groups=groups_of(table), evaluations=evaluations)
        again = refine(table, start, limit, Loss(table, 1), groups=groups_of(table), evaluations=evaluations)
        assert found.history == again.history and found.allocation.specs == again.allocation.specs
        assert len(found.history) <= evaluations
        values.append(found.measured)
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_a_loss_that_is_as_predicted_is_left_alone():
    table, limit, start, _ = setting(2)
    found = refine(table, start, limit, lambda specs: from_specs(table, specs).damage, groups=groups_of(table), evaluations=15)
    assert found.allocation is start and found.gained == 0 and found.accepted == 0 and found.tried == 14
    assert found.explain == "Measuring found nothing better than the allocation predicted best, in 14 trials."


def test_a_better_candidate_is_taken_as_it_is():
    table, limit, start, _ = setting(0)
    wanted = baselines(table, limit)["uniform"]

    def loss(specs):
        return sum(specs[name] != spec for name, spec in wanted.specs.items())

    found = refine(table, start, limit, loss, candidates=[wanted, wanted], evaluations=5)
    assert found.allocation is wanted and found.measured == 0 and found.candidates == {"uniform": 0, "uniform 2": 0}
    assert found.gained == 1.0 and "The uniform allocation measures 100.00% better" in found.explain


def test_swaps_find_what_no_tilt_can():
    """The middle option is above the hull, so that no exact allocation takes it three times, however the damages are tilted."""
    options = tuple(Option(f"int-{bits}", 10 * bits, damage) for bits, damage in ((1, 6.0), (2, 5.5), (3, 2.0)))
    table = OptionTable((Row("a", 64, options), Row("b", 64, options), Row("c", 64, options)))
    start = allocate(table, 60)

    def loss(specs):
        return 10.0 - 5 * (set(specs.values()) == {"int-2"})

    found = refine(table, start, 60, loss, evaluations=30)
    assert found.measured == 5.0 and any("→" in trial.proposal and trial.accepted for trial in found.history)


def test_seconds_are_estimated_before_a_call():
    table, limit, start, loss = setting(3)
    now = [0.0]

    def dear(specs):
        now[0] += 10.0
        return loss(specs)

    for seconds, calls in ((1.0, 2), (29.0, 2), (30.0, 3), (65.0, 6), (70.0, 7)):
        now[0], loss.calls = 0.0, []
        found = refine(
            table,
            start,
            limit,
            dear,
            groups=groups_of(table),
            seconds=seconds,
            candidates=[uniform(table, limit)],
            clock=lambda: now[0],
        )
        assert len(loss.calls) == calls == len(found.history) and found.seconds == 10 * calls  # start and candidate always


def test_what_is_known_already_says_nothing_of_the_next_call():
    table, limit, start, loss = setting(3)
    now = [0.0]

    def dear(specs):
        now[0] += 10.0 * (len(loss.calls) >= 2)
        return loss(specs)

    found = refine(table, start, limit, dear, seconds=25.0, candidates=[uniform(table, limit)], clock=lambda: now[0])
    assert found.tried == 2 and found.seconds == 20


def test_a_loss_that_is_no_number_is_not_accepted():
    table, limit, start, _ = setting(4)
    first = dict(start.specs)
    found = refine(table, start, limit, lambda specs: 1.0 if specs == first else float("nan"), evaluations=8)
    assert found.allocation is start and found.accepted == 0
    with pytest.raises(AllocationError, match="the measured loss of the start is inf; pass a measure that gives a finite number"):
        refine(table, start, limit, lambda specs: float("nan"))


def test_groups_may_be_without_names_and_baselines_are_carried_along():
    table, limit, start, loss = setting(0)
    start = replace(start, baselines=baselines(table, limit))
    found = refine(table, start, limit, loss, groups=[{"0.q", "0.k"}, {"1.up"}], evaluations=12)
    assert found.allocation.baselines == start.baselines
    assert any(trial.proposal.startswith("0.k, 0.q × ") for trial in found.history)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(evaluations=0), "evaluations is 0; pass a whole number, at least 1"),
        (dict(evaluations=1.5), "evaluations is 1.5"),
        (dict(seconds=0), "seconds is 0; pass a positive time"),
        (dict(groups={"kind": "0.q"}), "group 'kind' is '0.q'; pass a set of row names"),
        (dict(groups={"kind": []}), "group 'kind' is []"),
        (dict(groups={"kind": ["9.q"]}), "the table has no row 9.q"),
        (dict(limit=100), "below the table's least"),
    ],
)
def test_errors_name_the_value(changes, words):
    table, limit, start, loss = setting(0)
    with pytest.raises(AllocationError, match=re.escape(words)):
        refine(table, start, **(dict(limit=limit, measure=loss) | changes))


def test_given_allocations_are_checked():
    table, limit, start, loss = setting(0)
    with pytest.raises(AllocationError, match="more than the limit of"):
        refine(table, allocate(table, 2 * limit), limit, loss)
    with pytest.raises(AllocationError, match="pass at least 2 for the start and its candidates"):
        refine(table, start, limit, loss, candidates=[start], evaluations=1)
    with pytest.raises(AllocationError, match="different backbones"):
        refine(table.tie("*.q", "*.up"), start, limit, loss)
    assert not loss.calls


@pytest.mark.parametrize("groups", [[], [[0, 1, 2, 3]]])
def test_fitted_factors_explain_the_losses(groups):
    draw = np.random.default_rng(0)
    damage, truth = draw.lognormal(0, 0.5, (20, 8)), np.array([1.4] * 4 + [0.9, 1.0, 0.8, 1.1])
    found = damage_factors(damage, damage @ truth, groups)
    assert np.abs(found - truth).max() < 0.02
    few = damage_factors(damage[:3], damage[:3] @ truth, [[0, 1, 2, 3]])
    assert np.abs(few - truth).mean() < np.abs(1 - truth).mean()
    assert damage_factors(damage[:1], damage[:1].sum(axis=1), groups) == pytest.approx(1.0)
