"""The commands: what they call, what they print, and one sentence with a status for every mistake."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from processes import Process
from typer.testing import CliRunner

import qlr_jax
from allocators.errors import AllocationError
from qlr_jax import cli
from qlr_jax.errors import QLRError
from qlr_jax.settings.recipe import DEMO, Recipe

REPORT = {
    "bits_per_weight": 2.2431,
    "bytes": {"before": 10_500_000, "after": 2_370_000},
    "perplexity": {"original": 4.812, "allocated": 5.633, "uniform": 5.921, "rank0": 5.702},
    "kl": {"allocated": 0.1523, "uniform": float("nan"), "rank0": 0.1688},
    "delivered": "allocated",
    "matrices": [
        {"name": "a.q_proj", "kind": "q", "spec": "trellis-2+r8@trellis-4"},
        {"name": "a.v_proj", "kind": "v", "spec": "trellis-3"},
    ],
}
COMMANDS = ("demo", "compress", "evaluate", "inspect", "export", "sensitivity", "verify", "generate", "adapt", "plan", "serve")
PLANNERS = ("allocate", "frontier")  # tests/test_pipelines_allocate.py says more of them
FOUND = {
    "out": Path("measured"),
    "table": Path("measured/table.json"),
    "matrices": 1,
    "options": 12,
    "seconds": 61.0,
    "notes": {
        "model": "bundled",
        "attribution": "knockout",
        "matrices": {"a.q_proj": {"kind": "q", "layer": 0, "coefficient": float("inf"), "probe": {"error": 0.25, "kl": 0.0125}}},
    },
}

EVALUATED = {
    "perplexity_original": 5.5, "perplexity": 5.633, "perplexity_ratio": 1.02, "kl": 0.15, "kl_p99": 1.5, "agreement": 0.86,
    "tokens": 512, "protocol": "one BOS", "intervals": {"kl": [0.14, 0.16]},
    "worst": {"kl": 3.0, "position": 1, "window": 2, "before": "a", "next": "b", "original": "c", "compressed": "d"},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """A job and an exporter that only note how they are called; `calls.fails` is what they raise."""
    seen = types.SimpleNamespace(fails=None, args=None, kwargs=None)

    def noted(result):
        def call(*args, **kwargs):
            seen.args, seen.kwargs = args, kwargs
            if seen.fails:
                raise seen.fails
            return result

        return call

    done = types.SimpleNamespace(out=Path("small"), report=REPORT)
    job = types.ModuleType("qlr_jax.job")
    job.demo = job.compress = noted(done)
    job.evaluate = noted(EVALUATED)
    job.sensitivity = noted(FOUND)
    job.inspect = noted({"matrices": [{"name": "a.q_proj", "spec": "trellis-2", "shape": [4, 4], "bytes": 8, "bits": 4.0}]})
    for target in ("dense", "peft", "compressed_tensors", "gguf"):
        home = "qlr_jax.formats." + {"gguf": "gguf.export"}.get(target, target.replace("-", "_"))
        exporter = types.ModuleType(home)
        setattr(exporter, f"export_{target}", noted(Path(target)))
        monkeypatch.setitem(sys.modules, home, exporter)
    monkeypatch.setitem(sys.modules, "qlr_jax.job", job)
    monkeypatch.setattr(qlr_jax, "job", job, raising=False)
    return seen


def qlr(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_demo(calls):
    result = qlr("demo", "--resume")
    assert result.exit_code == 0 and calls.args == (Path("qlr-demo"),) and calls.kwargs["budget"] == "2.25bpw"
    assert calls.kwargs["resume"] is True
    for wanted in (
        "2.2431 bits per weight",
        "10.5 MB before, 2.37 MB after",
        "×1.17",
        "ranks: 1 of 2",
        "small/report.html",
        "qlr.load",
    ):
        assert wanted in result.stdout
    assert "from_pretrained('small', trust_remote_code=True)" in result.stdout


def test_compress_passes_everything_on(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/qlr", "compress", "my model", "out"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\nranks: [0, 16]\ninclude: ['*.mlp.*']\n")
    options = ["--budget", "3bpw", "--calibration", "a.txt", "--calibration", "b.txt", "--recipe", recipe, "--exclude", "*.0.*"]
    options += ["--include", "*.q_proj", "--evaluate-on", "c.txt", "--state-bits", "10", "--force", "--strategy", "greedy"]
    options += ["--controls", "quick"]
    result = qlr("compress", "model", "out", *options)
    assert result.exit_code == 0, result.output
    assert calls.args == ("model", Path("out"))
    got = calls.kwargs
    assert got["calibration"] == [Path("a.txt"), Path("b.txt")] and got["evaluate_on"] == [Path("c.txt")]
    patterns = {"include": ("*.q_proj",), "exclude": ("*.0.*",), "controls": "quick"}
    wanted = Recipe(budget="3bpw", seed=3, ranks=(0, 16), state_bits=10, force=True, strategy="greedy", **patterns)
    assert got["recipe"] == wanted
    assert got["budget"] == "3bpw" and got["command"] == "qlr compress 'my model' out"


def test_budget_from_the_recipe_or_refused(calls, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("budget: 2.5bpw\n")
    assert qlr("compress", "model", "out", "--recipe", recipe).exit_code == 0
    assert calls.kwargs["recipe"].budget == calls.kwargs["budget"] == "2.5bpw"
    assert calls.kwargs["calibration"] is None
    recipe.write_text("seed: 1\n")
    result = qlr("compress", "model", "out", "--recipe", recipe)
    assert result.exit_code == 1 and "no budget is given; pass --budget" in result.stderr
    result = qlr("compress", "model", "out", "--budget", "2bpw", "--strategy", "best")
    assert result.exit_code == 1 and "strategy 'best' is not known; give one of allocated, uniform, " in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("demo",),
        ("compress", "m", "o", "--budget", "2bpw"),
        ("evaluate", "o"),
        ("inspect", "o"),
        ("export", "o", "d", "--to", "dense"),
        ("sensitivity", "m", "o"),
    ],
    ids=COMMANDS[:6],
)
@pytest.mark.parametrize(
    "fails", [None, QLRError("the folder is not there; give one"), AllocationError("budget 9bpw is above 4bpw")]
)
def test_json_is_one_object(calls, args, fails):
    calls.fails = fails
    result = qlr(*args, "--json")
    told = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(told, dict)
    if fails:
        assert result.exit_code == 1 and told == {"error": str(fails)}
        assert result.stderr.splitlines() == [f"qlr: {fails}"]
    else:
        assert result.exit_code == 0 and "error" not in told
        if args[0] == "sensitivity":
            assert told["table"] == "measured/table.json" and told["notes"]["matrices"]["a.q_proj"]["coefficient"] is None
        if args[0] in ("demo", "compress"):
            assert told["out"] == "small" and told["bits_per_weight"] == 2.2431 and told["kl"]["uniform"] is None


def test_evaluate_and_inspect(calls):
    result = qlr("evaluate", "o", "--text", "t.txt", "--original", "m", "--windows", "4")
    assert calls.args == (Path("o"),) and calls.kwargs["text"] == [Path("t.txt")]
    assert calls.kwargs["original"] == Path("m") and calls.kwargs["windows"] == 4 and calls.kwargs["drift"]
    assert qlr("evaluate", "o", "--tasks", "paper", "--tasks", "t.yaml", "--no-drift", "--limit", "5").exit_code == 0
    assert calls.kwargs["tasks"] == ["paper", "t.yaml"] and not calls.kwargs["drift"] and calls.kwargs["limit"] == 5
    assert "5.633" in result.stdout and "86.0 %" in result.stdout
    assert "trellis-2" in qlr("inspect", "o").stdout


def test_verify_and_generate(monkeypatch):
    from qlr_jax.pipelines import generate as generating
    from qlr_jax.pipelines import verify as gate

    seen = {}
    check = {"name": "kl", "value": 0.2, "threshold": 0.1, "passed": False, "margin": -0.1, "says": "too far"}
    verdict = {"passed": False, "checks": [check]}
    monkeypatch.setattr(gate, "verify", lambda *args, **kwargs: seen.update(args=args, **kwargs) or verdict)
    result = qlr("verify", "o", "--text", "t", "--thresholds", "f.yaml", "--windows", "3")
    assert result.exit_code == 1 and "NO" in result.stdout
    assert seen["args"] == (Path("o"),) and seen["thresholds"] == Path("f.yaml") and seen["windows"] == 3
    verdict = {"passed": True, "checks": [check | {"passed": True, "value": 0.05, "margin": 0.05}]}
    result = qlr("verify", "o", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["passed"]
    monkeypatch.setattr(generating, "generate", lambda *args, **kwargs: seen.update(args=args, **kwargs) or iter(["b", "c"]))
    result = qlr("generate", "o", "--prompt", "a", "--temperature", "0.5", "--stop", "x", "--stop", "y")
    assert result.exit_code == 0 and result.stdout == "abc\n"
    assert seen["args"] == ("o", "a") and seen["temperature"] == 0.5 and seen["stop"] == ["x", "y"]
    assert json.loads(qlr("generate", "o", "--prompt", "a", "--json").stdout) == {"prompt": "a", "text": "bc"}


def test_formats(calls):
    assert qlr("export", "o", "d", "--to", "dense", "--dtype", "float32").exit_code == 0
    assert calls.args == (Path("o"), Path("d")) and calls.kwargs == {"dtype": "float32"}
    for options, settings in (
        (["gguf"], {"dtype": "bfloat16"}),
        (["compressed-tensors", "--uniform-rank"], {"dtype": "bfloat16", "uniform_rank": True}),
        (["peft", "--base", "compressed-tensors"], {"dtype": "bfloat16", "uniform_rank": False, "base": "compressed-tensors"}),
    ):
        result = qlr("export", "o", "d", "--to", *options)
        assert (
            result.exit_code == 0
            and calls.kwargs == settings
            and "README.md says how to load it" in result.stdout.replace("\n", " ")
        )
    for options, says in (
        (["onnx"], "--to takes dense, peft, compressed-tensors, gguf"),
        (["gguf", "--base", "compressed-tensors"], "--base compressed-tensors is for --to peft"),
        (["dense", "--uniform-rank"], "--uniform-rank is for"),
    ):
        result = qlr("export", "o", "d", "--to", *options)
        assert result.exit_code == 1 and result.stdout == "" and says in result.stderr and len(result.stderr.splitlines()) == 1
    assert "--dtype takes" in qlr("export", "o", "d", "--to", "dense", "--dtype", "int3").stderr


def test_errors_bugs_and_interruptions(calls):
    calls.fails = QLRError("the folder is not there; give one")
    result = qlr("inspect", "o")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "qlr: the folder is not there; give one\n")
    calls.fails = ValueError("a bug")
    result = qlr("inspect", "o")
    assert result.exception is calls.fails
    calls.fails = KeyboardInterrupt()
    result = qlr("inspect", "o")
    assert result.exit_code == 130 and len(result.stderr.splitlines()) == 1


def test_sensitivity_passes_everything_on(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/qlr", "sensitivity", "bundled", "out"])
    result = qlr("sensitivity", "bundled", "out")
    assert result.exit_code == 0, result.output
    assert calls.args == ("bundled", Path("out")) and calls.kwargs["recipe"] == DEMO
    assert calls.kwargs["calibration"] is None and calls.kwargs["matrix"] is None
    assert calls.kwargs["command"] == "qlr sensitivity bundled out"
    for wanted in (
        "bundled: 1 matrices, 12 options",
        "a.q_proj",
        "0.0125",
        "attribution: knockout",
        "1 min 01 s",
        "measured/table.json",
    ):
        assert wanted in result.stdout
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ranks: [0, 16]\nseed: 3\n")
    options = ["--calibration", "a.txt", "--calibration", "b.txt", "--recipe", recipe, "--include", "*.mlp.*", "--exclude", "*.0.*"]
    assert qlr("sensitivity", "model", "out", *options, "--matrix", "a.q_proj", "--seed", "5", "--force").exit_code == 0
    assert calls.kwargs["calibration"] == [Path("a.txt"), Path("b.txt")] and calls.kwargs["matrix"] == "a.q_proj"
    assert calls.kwargs["recipe"] == Recipe(ranks=(0, 16), seed=5, include=("*.mlp.*",), exclude=("*.0.*",), force=True)


@pytest.mark.parametrize("command", COMMANDS + PLANNERS)
def test_help_teaches(command):
    result = qlr(command, "--help")
    assert (
        result.exit_code == 0 and "Example:" in result.stdout and f"qlr {command} " in result.stdout and "--json" in result.stdout
    )


def run(*args, code="from qlr_jax import cli; cli.main()"):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


def test_console_script():
    code = "import sys; from qlr_jax import cli\ntry: cli.main()\n"
    code += "finally: print([m for m in ('jax', 'numpy') if m in sys.modules], file=sys.stderr)"
    done = run("--help", code=code)
    assert done.returncode == 0 and all(command in done.stdout for command in COMMANDS + PLANNERS)
    assert done.stderr.strip() == "[]"  # help is instant
    typed = ("inspect", "--jsn", "--json"), ("compress", "m", "o")
    unknown, missing = (Process("from qlr_jax import cli\ncli.main()", *words) for words in typed)
    assert "--jsn" in json.loads(unknown.communicate(60)[0])["error"] and unknown.returncode == 2
    out, err = missing.communicate(60)
    assert missing.returncode == 1 and len(err.splitlines()) == 1 and out == ""


def test_compress_for_other_formats(calls):
    assert qlr("compress", "m", "o", "--budget", "4bpw", "--calibration", "t", "--target", "gguf", "--resume").exit_code == 0
    recipe = calls.kwargs["recipe"]
    assert (
        recipe.target == "gguf"
        and recipe.backbones == ("int-8g32", "int-4g32", "int-3g256", "int-2g256", "bf16")
        and calls.kwargs["resume"]
    )
    given = ["--backbone-from", "dense", "--hessians", "h"]
    assert qlr("compress", "m", "o", "--budget", "0.3bpw", "--calibration", "t", *given).exit_code == 0
    recipe = calls.kwargs["recipe"]
    assert (recipe.target, recipe.backbone_from, recipe.hessians_from) == ("adapter", "dense", "h") and not calls.kwargs["resume"]
    assert "pass one of qlr" in qlr("compress", "m", "o", "--budget", "4bpw", "--target", "onnx").stderr


def test_plan_and_dry_run(calls, monkeypatch):
    monkeypatch.setattr("qlr_jax.cost.measured_rates", lambda *given: None)  # measuring is tests/test_cost_measured.py's
    told = json.loads(qlr("plan", "Llama-2-7B", "--budget", "2.25bpw", "--device", "cpu:64GiB,cores=8", "--json").stdout)
    dry = json.loads(qlr("compress", "Llama-2-7B", "o", "--budget", "2.25bpw", "--dry-run", "--json").stdout)
    assert set(told) == set(dry) and calls.args is None  # nothing was run
    assert "Llama-2-7B" in qlr("plan", "Llama-2-7B", "--budget", "2.25bpw").stdout
    assert "is below the table's range" in qlr("plan", "Llama-2-7B", "--budget", "0.01bpw").stdout.replace("\n", " ")


def test_commands_that_compute_prepare_jax_for_it(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("qlr_jax.settings.host.prepare", lambda place=None: seen.append(place) or "not kept there")
    computing = (
        ["demo", "--out", str(tmp_path), "--budget", "nonsense"],
        ["compress", "nowhere", str(tmp_path / "o"), "--budget", "2bpw"],
        ["sensitivity", "nowhere", str(tmp_path / "o")],
        ["evaluate", "nowhere"],
        ["verify", "nowhere"],
        ["generate", "nowhere", "--prompt", "a"],
        ["serve", "nowhere", "--port", "0"],
        ["adapt", "o", "d", "--loss", "mse"],
        ["export", "o", "d", "--to", "no"],
    )
    for typed in computing:
        found = CliRunner().invoke(cli.app, [*typed, "--compile-cache", "there"])
        assert found.exit_code == 1 and seen[0] == "there" and "qlr: not kept there" in found.stderr
        seen.clear()
    assert CliRunner().invoke(cli.app, ["allocate", "nowhere", "--budget", "2bpw"]).exit_code == 1 and not seen
