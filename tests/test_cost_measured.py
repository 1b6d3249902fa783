"""Rates of this machine: measured once a day, everything that is foretold scales with them, and another machine keeps its own."""

import dataclasses
import json
import time

import pytest
from typer.testing import CliRunner

from qlr_jax import cost
from qlr_jax.cli import app
from qlr_jax.cost import Machine, measured, measured_rates, plan_job
from qlr_jax.models import LlamaConfig
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.progress import silent
from qlr_jax.settings.recipe import Recipe

HERE = Machine("cpu", 10**12, 10**12, 2)
SMALL = LlamaConfig(2048, 64, 96, 2, 4, 2, max_position_embeddings=256)
LIGHT = Recipe(sequences=8, measure_tokens=512, ranks=(0, 8), factors=("trellis-2",), state_bits=8, search_state_bits=6)
POINTS = {"4": [2e-6, 2e-6], "32": [1e-6, 0.6e-6]}


def found(times=1.0, **others):
    """What a measurement gives, of a machine so many times slower."""
    each = {"passed": 1e-9, "products": 2e-11, "factored": 1e-10, "checked": 1e-10, "compiled": 0.3, "decoded": 1e-8} | others
    searches = {bits: {count: [times * value for value in took] for count, took in POINTS.items()} for bits in ("6", "8")}
    return {"when": time.time(), **{name: [times * v, 0.6 * times * v] for name, v in each.items()}, "searches": searches}


@pytest.fixture(autouse=True)
def calls(monkeypatch, tmp_path):
    """The jobs that were measured; nothing is, really."""
    jobs = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "_measure", lambda job: jobs.append(job) or found())
    return jobs


def test_what_is_measured_is_kept_for_a_day_for_its_shapes(calls, monkeypatch, tmp_path):
    rates = measured_rates(SMALL, LIGHT, HERE)
    assert measured_rates(SMALL, LIGHT, HERE) == rates and len(calls) == 1
    measured_rates(SMALL, LIGHT.updated(sequences=16, budget="3bpw"), HERE)  # the same shapes and state bits
    assert len(calls) == 1
    measured_rates(dataclasses.replace(SMALL, hidden_size=128), LIGHT, HERE)
    measured_rates(SMALL, LIGHT.updated(state_bits=10), HERE)
    assert len(calls) == 3
    monkeypatch.setattr(measured, "kind", lambda: "another processor")
    measured_rates(SMALL, LIGHT, HERE)
    assert len(calls) == 4
    now = time.time()
    monkeypatch.setattr(measured.time, "time", lambda: now + 1.1 * measured.KEPT)
    measured_rates(SMALL, LIGHT, HERE)
    assert len(calls) == 5
    file = tmp_path / "cache" / "qlr-jax" / "rates.json"
    assert len(json.loads(file.read_text())) == 1  # what is too old is forgotten
    for content in ("no json", "[]", '{"a": 1}'):
        file.write_text(content)
        assert measured_rates(SMALL, LIGHT, HERE).measured
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be kept there
    assert measured_rates(SMALL, LIGHT, HERE).measured


@pytest.mark.parametrize("recipe", [LIGHT, LIGHT.updated(backbones=("int-3g16",), factors=("int-4",), budget="4.5bpw")])
def test_all_that_is_foretold_comes_from_what_was_measured(recipe, monkeypatch):
    """A machine that is twice as slow at everything takes twice as long at every stage."""
    plans = []
    for times in (1.0, 2.0):
        monkeypatch.setattr(measured, "_kept", lambda key, times=times: found(times))
        plans.append(plan_job(SMALL, recipe, HERE, rates=measured_rates(SMALL, recipe, HERE)))
    for one, two in zip(plans[0].stages, plans[1].stages, strict=True):
        assert two.cpu_seconds == pytest.approx(2 * one.cpu_seconds) and two.seconds == pytest.approx(2 * one.seconds), one.name
    assert plans[0].host == plans[1].host


def test_slower_searches_make_solves_slower_and_nothing_else(monkeypatch):
    known, slower = found(), found()
    slower["searches"] = {"6": POINTS, "8": {count: [10 * v for v in took] for count, took in POINTS.items()}}
    plans = []
    for values in (known, slower):
        monkeypatch.setattr(measured, "_kept", lambda key, values=values: values)
        plans.append(plan_job(SMALL, LIGHT, HERE, rates=measured_rates(SMALL, LIGHT, HERE)))
    changed = {a.name for a, b in zip(plans[0].stages, plans[1].stages, strict=True) if a.cpu_seconds != b.cpu_seconds}
    assert changed == {"solve"}  # probes have 6 state bits
    quick = {values: LIGHT.updated(controls=values) for values in ("full", "none")}
    seconds = [sum(s.cpu_seconds for s in plan_job(SMALL, r, HERE, rates=plans[0].rates).stages) for r in quick.values()]
    assert seconds[1] < seconds[0]


def test_only_a_job_that_runs_here_is_measured(calls):
    def planned(*options):
        result = CliRunner().invoke(app, ["plan", str(BUNDLED), "--json", *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["rates"]

    assert planned("--device", "cpu:24GiB,cores=2")["per"] == dict(cost.RATES["cpu"].per) and not calls
    assert not planned("--device", "gpu:80GB,host=512GB")["measured"] and not calls
    rates = planned("--state-bits", "8")
    assert len(calls) == 1 and rates["says"].startswith("measured on this machine on 2") and rates["per"]["products"] == 2e-11
    assert rates["searches"]["256"]["points"] == [[4, 2e-6], [32, 1e-6]]


def test_a_machine_is_measured(monkeypatch):
    """Each really, on shapes that compile quickly."""
    monkeypatch.undo()
    monkeypatch.setattr(measured, "_kept", lambda key: None)
    monkeypatch.setattr(measured, "_keep", lambda key, found: None)
    for name, value in {"LEAST": 0.0, "OPERATIONS": 1e6, "ELEMENTS": 2**16}.items():
        monkeypatch.setattr(measured, name, value)
    rates = measured_rates(SMALL, LIGHT.updated(state_bits=6), HERE, silent())
    assert set(rates.searches) == {64} and all(0 < seconds < 1e-3 for _, seconds in rates.searches[64].points)
    assert all(0 < rates.per[name] < 1e-4 for name in ("products", "passed", "factored", "checked", "placed"))
    assert 1e-3 < rates.per["compiled"] < 60 and all(0 <= part <= 1 for part in rates.shared.values())
    plain = measured_rates(SMALL, LIGHT.updated(backbones=("int-3g16",), factors=("int-4",), budget="4.5bpw"), HERE)
    assert not plain.searches
