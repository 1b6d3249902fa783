"""Compile ahead: what the solver needs first is compiled while calibration, which knows nothing of it yet, has the other core."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np

from qlr_jax import sensitivity
from qlr_jax.core.ahead import programs
from qlr_jax.core.sharding import available
from qlr_jax.models import kind_of, layer_of
from qlr_jax.models.sites import BY_KIND
from qlr_jax.pipelines.source import Source


@contextmanager
def compiling_ahead(source: Source, wanted: bool = True) -> Iterator[None]:
    """While what is inside runs, a thread compiles the large programs of the solves that `measure` begins with.

    It ends with what is inside, one program later at most. Nothing is compiled ahead where backbones are given, on several devices,
    or where the weights take so much of the memory that they stay on disk.

    Args:
        source: of the job.
        wanted: whether there will be such solves.
    """
    if not wanted or source.backbones or source.settings.streaming or available() > 1:
        yield
        return
    ended = threading.Event()

    def compile_all() -> None:
        with suppress(Exception):  # what cannot be compiled is told of where it is called
            for compile_one in programs(_problems(source), source.settings.search):
                if ended.is_set():
                    return
                compile_one()

    thread = threading.Thread(target=compile_all, name="compile-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _problems(source: Source) -> dict[tuple[str, str], tuple]:
    """The shapes of what `measure` will solve."""
    settings, recipe = source.settings, source.recipe
    inputs: dict[Any, Any] = {}
    outputs = recipe.outputs == "fisher" and settings.outputs_fit

    def problem(name: str, spec: str) -> tuple:
        m, n = settings.matrices[name]
        own = name if recipe.hessians == "loss-by-matrix" else (layer_of(name), BY_KIND[kind_of(name)].input)
        return _array(m, n), inputs.setdefault(own, _array(n, n)), spec, _array(m, m) if outputs else None

    return {key: problem(*key) for key in sensitivity.solved_first(source.prices)}


def _array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.float32)
