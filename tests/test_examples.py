"""The scripts in examples/ run, each once; benchmarks can be imported."""

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
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("torch_runtime", "triton_kernels"))
    code = f"import importlib, sys\nsys.path.insert(0, 'benchmarks')\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    run("-c", code)
