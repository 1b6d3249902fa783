"""Uniform and rank 0 beside the allocation: solved alike, quickly for the report alone, or not at all; nothing is done twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from qlr_jax import evaluation, job
from qlr_jax.engine import HERE
from qlr_jax.errors import QLRError
from qlr_jax.models import LlamaConfig
from qlr_jax.pipelines.run import Candidate
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages import evaluate_on_calibration, refine, select, solve_plans
from qlr_jax.report.content.quality import controls_note, rank_paid
from qlr_jax.report.terminal.job import comparison, summary
from qlr_jax.run import workspace
from qlr_jax.settings import resolved
from qlr_jax.settings.recipe import Recipe

RECIPE = Recipe(
    budget="3.5bpw",  # 2-bit weights take 3 with their scales
    backbones=("int-2g16", "int-3g16"),
    factors=("int-4",),
    ranks=(0,),
    iterations=2,
    sequences=8,
    sequence_length=32,
    measure_tokens=256,
    evaluation_tokens=256,
    refine=0,
)
SMALL = LlamaConfig(512, 64, 96, 1, 2)
PLANS = {
    "allocated": {"q": "trellis-2", "k": "trellis-3", "v": "trellis-2"},
    "uniform": {"q": "trellis-2", "k": "trellis-2", "v": "trellis-2"},
    "rank0": {"q": "trellis-3", "k": "trellis-3", "v": "trellis-2"},
}


@pytest.fixture
def staged(monkeypatch):
    """run(mode, plans) -> solves as (kind, state bits, keys), and the candidates with a KL each, and how often it was measured."""

    def run(mode, plans=PLANS):
        recipe, asked, compared, said = Recipe(controls=mode), [], [], []

        def solver(kind):
            def solve(problems, *, seed, config, on_done):
                asked.append((kind, config.state_bits, list(problems)))
                return {key: SimpleNamespace(value=(key, config.state_bits)) for key in problems}

            return solve

        stage = SimpleNamespace(advance=lambda note: None)
        progress = SimpleNamespace(stage=lambda *given, **named: _context(stage), say=said.append)
        settings, statistics = resolved.Settings.of(recipe, SMALL), SimpleNamespace(problem=lambda *key: key)
        known = {"recipe": recipe, "settings": settings, "statistics": statistics, "progress": progress, "original": None}
        fake = SimpleNamespace(**known, solver=solver, note=lambda **facts: None, reference=None, engine=HERE)
        monkeypatch.setattr(Candidate, "parts", lambda candidate, original: dict(candidate.matrices))
        measured = lambda model, reference, engine: compared.append(model) or SimpleNamespace(kl=len(compared))  # noqa: E731
        monkeypatch.setattr(evaluation, "divergence", measured)
        candidates = solve_plans(fake, {name: SimpleNamespace(specs=specs) for name, specs in plans.items()})
        return asked, evaluate_on_calibration(fake, candidates), compared, fake

    return run


class _context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *error):
        pass


def test_full_solves_every_pair_once(staged):
    asked, _, compared, _ = staged("full")
    (kind, bits, keys), *more = asked
    assert (kind, bits, more) == ("final", 14, []) and len(keys) == len(set(keys)) == 5  # of nine
    assert {key for specs in PLANS.values() for key in specs.items()} == set(keys) and len(compared) == 3
    assert {bits for model in compared for _, bits in model.values()} == {14}


def test_quick_solves_controls_with_fewer_state_bits(staged):
    asked, candidates, compared, _ = staged("quick")
    assert [(kind, bits, len(keys)) for kind, bits, keys in asked] == [("final", 14, 3), ("control", 8, 5)]
    assert [{bits for _, bits in model.values()} for model in compared] == [{14}, {8}, {8}]
    assert all(dict(c.plan.specs) == {name: key[1] for name, (key, _) in model.items()}
               for c, model in zip(candidates.values(), compared, strict=True))  # fmt: skip


@pytest.mark.parametrize("mode", ["full", "quick"])
def test_plans_of_the_same_specs_are_one_model(staged, mode):
    """As without ranks, where the control is the allocation itself."""
    plans = PLANS | {"rank0": dict(PLANS["allocated"])}
    asked, candidates, compared, _ = staged(mode, plans)
    assert len(compared) == 2 and candidates["allocated"].kl == candidates["rank0"].kl != candidates["uniform"].kl
    assert sum(len(keys) for _, _, keys in asked) == (4 if mode == "full" else 3 + 3)


def test_quick_controls_neither_decide_nor_start_a_refinement(staged, monkeypatch):
    given, chosen, said = {}, {}, []
    for mode in ("full", "quick"):
        _, candidates, _, run = staged(mode)
        candidates = {
            name: candidate.replace(calibration=SimpleNamespace(kl=kl))
            for (name, candidate), kl in zip(candidates.items(), (3.0, 1.0, 2.0), strict=True)
        }

        def refined(table, start, limit, measure, *, candidates, evaluations, mode=mode, **more):
            given[mode] = [plan.specs for plan in (start, *candidates)], evaluations, measure(start.specs)
            return SimpleNamespace(allocation=start)

        monkeypatch.setattr("allocators.refine", refined)
        problem = SimpleNamespace(table=SimpleNamespace(index=()), limit=0)
        assert refine(run, problem, candidates)[0] == candidates
        run.progress.say = said.append
        chosen[mode] = select(run, candidates)
    assert given == {"full": (list(PLANS.values()), 12 + 3, 3.0), "quick": ([PLANS["allocated"]], 12 + 1, 3.0)}
    assert chosen == {"full": "uniform", "quick": "allocated"} and "--controls full would" in said[-1]


def test_reports_say_how_controls_were_solved():
    report = {
        "controls": {"mode": "quick", "state_bits": 8},
        "recipe": {"state_bits": 12},
        "kl": {"allocated": 0.03, "rank0": 0.05},
    }
    note = controls_note(report | {"calibration_kl": {"allocated": 0.03, "uniform": 0.04}})
    assert "solved quickly, at 8 state bits in place of 12" in note and "Even so" not in note
    assert "Even so uniform, quick measured" in controls_note(report | {"calibration_kl": {"allocated": 0.03, "uniform": 0.02}})
    assert not rank_paid(report) and "rank 0, quick" in comparison(report) and "solved quickly" in comparison(report)
    alike = report | {"controls": {"mode": "full", "state_bits": 12}}
    assert "rank paid" in rank_paid(alike) and not controls_note(alike) and "quick" not in comparison(alike)
    assert not controls_note({k: v for k, v in report.items() if k != "controls"})  # of an earlier version


def test_settings_of_controls():
    bits = lambda **settings: (c := resolved.Settings.of(Recipe(**settings), SMALL).controls) and c.state_bits  # noqa: E731
    assert (bits(), bits(controls="quick"), bits(controls="none"), bits(controls="quick", state_bits=6)) == (14, 8, None, 6)
    same = resolved.Settings.of(Recipe(target="gguf", budget="5bpw", controls="quick"), SMALL)
    assert same.controls == same.solver  # integers have no state bits
    with pytest.raises(QLRError, match="controls 'some' is not known; give one of full, quick, none"):
        Recipe(controls="some")


@pytest.fixture(scope="module")
def table(tiny):
    """Made up: what is allocated is not the question here."""
    source, notes, rows = open_source(tiny, RECIPE), {}, []
    for at, row in enumerate(source.prices.rows):
        options = (replace(o, damage=(1 + at) * 4.0 ** (-8 * o.bytes / row.weights)) for o in row.options)
        rows.append(replace(row, options=tuple(options)))
        notes[row.name] = {"coefficient": 1.0, "shape": list(source.weights[row.name].shape)}
    return replace(source.prices, rows=tuple(rows), notes={"matrices": notes})


@pytest.fixture
def compress(tiny, text, table, tmp_path, monkeypatch):
    """run(out, recipe) -> its report and the solves that were kept, (kind, key); quick controls take one iteration less."""
    kept, keep, controls = [], workspace.SolutionStore.__setitem__, resolved._controls

    def put(store, key, solution):
        kept.append((store._folder.name, key))
        keep(store, key, solution)

    monkeypatch.setattr(workspace.SolutionStore, "__setitem__", put)
    quicker = lambda recipe, *of: (found := controls(recipe, *of)) and replace(found, iterations=1 + (recipe.controls == "full"))  # noqa: E731
    monkeypatch.setattr(resolved, "_controls", quicker)

    def run(out, recipe, **options):
        kept.clear()
        return job.compress(tiny, tmp_path / out, None, text, recipe, table=table, **options).report, list(kept)

    return run


def test_none_solves_and_evaluates_the_allocation_alone(compress, tmp_path, text):
    report, kept = compress("out", RECIPE.updated(controls="none"), evaluate_on=text)
    assert len(kept) == len(set(kept)) >= 7 and {kind for kind, _ in kept} == {"final"}
    for figures in ("kl", "calibration_kl", "perplexity"):
        assert set(report[figures]) - {"original"} == {"allocated"}
    assert set(report["points"]) == {"allocated", "uniform", "rank0"} and report["uniform_spec"]  # what was predicted of them
    assert report["controls"] == {"mode": "none", "state_bits": None}
    for name in ("report.html", "report.md"):
        assert "were not solved (controls: none)" in (tmp_path / "out" / name).read_text()


def test_a_job_with_quick_controls_that_is_interrupted_goes_on(compress, tmp_path, monkeypatch):
    recipe = RECIPE.updated(controls="quick")
    report, kept = compress("whole", recipe)
    assert len(kept) == len(set(kept)) and {kind for kind, _ in kept} == {"final", "control"}
    assert set(report["calibration_kl"]) == {"allocated", "uniform", "rank0"} and report["delivered"] == "allocated"
    assert report["controls"]["mode"] == "quick" and "quick controls: they decided nothing" in summary(report)
    kl = report["calibration_kl"]
    assert kl["allocated"] == kl["rank0"] != kl["uniform"]  # without ranks the control is the allocation itself
    keep = workspace._save

    def stop(path, solution):
        if path.parent.name == "control":
            raise KeyboardInterrupt
        keep(path, solution)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workspace, "_save", stop)
        compress("part", recipe)
    _, again = compress("part", recipe, resume=True)
    assert {key for key in again} == set(kept[7:])  # all but the allocation's
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
