"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import allocators
import qlr_jax

NAMES = [m.name for p in (allocators, qlr_jax) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
# a library that was built in place is no module, and two modules are for vLLM, which is not here
LEFT_OUT = ("__main__", "._kernels", ".vllm_plugin.config", ".vllm_plugin.methods")
NAMES = ["allocators", "qlr_jax", *(name for name in NAMES if not name.endswith(LEFT_OUT))]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for n in NAMES for t in finder.find(importlib.import_module(n)) if t.examples]
    assert len(found) >= 20
