"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import allocators
import qlr_jax.adaptation
import qlr_jax.calibration
import qlr_jax.core
import qlr_jax.evaluation
import qlr_jax.models
import qlr_jax.report
import qlr_jax.sensitivity

PACKAGES = (
    qlr_jax.core,
    qlr_jax.calibration,
    qlr_jax.models,
    qlr_jax.evaluation,
    qlr_jax.sensitivity,
    qlr_jax.adaptation,
    qlr_jax.report,
    allocators,
)
NAMES = ["qlr_jax.errors", "qlr_jax.recipe", "qlr_jax.progress", "qlr_jax.planning", "qlr_jax.gate", "qlr_jax.delivered"]
NAMES += [f"qlr_jax.export.{name}" for name in ("files", "targets", "card", "gguf_blocks")] + [p.__name__ for p in PACKAGES]
NAMES += [m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for n in NAMES for t in finder.find(importlib.import_module(n)) if t.examples]
    assert len(found) >= 20
