"""The scripts in examples/ run, each once; benchmarks can be imported."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from processes import run

from qlr_jax import calibration
from qlr_jax.core.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script, monkeypatch, capsys):
    """As a program, whatever it adds to the library is taken away again."""
    monkeypatch.setattr(sys, "argv", [str(script), *(["--quick"] if "--quick" in script.read_text() else [])])
    whole, before = calibration.standard_library, dict(QUANTIZERS)
    monkeypatch.setattr(calibration, "standard_library", lambda split: whole(split)[:50_000])  # tokenizing it all takes seconds
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        QUANTIZERS.clear()
        QUANTIZERS.update(before)
    assert capsys.readouterr().out.strip()


def test_benchmarks_can_be_imported():
    """None is run; each one's names are still those of the library."""
    without = {"torch_runtime", "triton_kernels"} | ({"picture"} if importlib.util.find_spec("matplotlib") is None else set())
    names = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - without)
    code = f"import importlib, sys\nsys.path.insert(0, 'benchmarks')\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    run(code)
