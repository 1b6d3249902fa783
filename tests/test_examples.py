"""The scripts in examples/ run, each once; benchmarks can be imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script):
    quick = ["--quick"] if "--quick" in script.read_text() else []
    assert run(script, *quick).strip()


def test_benchmarks_can_be_imported():
    """None is run; each one's names are still those of the library."""
    without = {"torch_runtime", "triton_kernels"} | ({"picture"} if importlib.util.find_spec("matplotlib") is None else set())
    names = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - without)
    code = f"import importlib, sys\nsys.path.insert(0, 'benchmarks')\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    run("-c", code)
