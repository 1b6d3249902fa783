"""Programs that are compiled before there are matrices are those that the solver calls."""

import logging

import jax
import numpy as np
import pytest

from qlr_jax.core import ahead, alternation, batch
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.spec import Spec

CONFIG = SolverConfig.make({"state_bits": 6, "iterations": 2}, None)
MORE_BITS = SolverConfig.make({"state_bits": 10, "alternation_bits": 6, "iterations": 2}, None)
SHAPES = {"a": (40, 48), "b": (40, 48), "c": (64, 40)}
SPECS = ("trellis-2", "trellis-3+r4@trellis-4", "trellis-2w", "int-4g16+r4@int-8", "none+r4@int-8")


def compiled(caplog, function):
    """Names of what is compiled while `function` runs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function()
    marks = (record.getMessage() for record in caplog.records)
    return [text.split("(")[1].split(")")[0] for text in marks if text.startswith("Finished XLA compilation of jit(")]


@pytest.mark.parametrize("small, outputs", [(True, True), (False, True), (False, False)])
def test_the_solver_finds_what_was_compiled(small, outputs, monkeypatch, caplog):
    """Of small matrices in batches and of large ones that share their Hessian, with and without G, above ONE_PROGRAM too."""
    monkeypatch.setattr(batch, "SMALL", 1024 if small else 1)
    monkeypatch.setattr(alternation, "ONE_PROGRAM", 1024 if small else 48)
    monkeypatch.setattr(ahead, "ONE_PROGRAM", 1024 if small else 48)
    monkeypatch.setattr(batch, "ROWS_TOGETHER", 96)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    hessians = {n: np.cov(rng.standard_normal((n, 4 * n))).astype(np.float32) for n in (40, 48, 64)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    # the first case has all grids, where there is something to pad in both shapes; how matrices are batched is the same for each
    specs = SPECS if small else SPECS[1:3] if outputs else SPECS[1:2]
    problems = {
        (name, spec): (w, hessians[w.shape[1]], spec, hessians[w.shape[0]] if outputs else None)
        for name, w in weights.items()
        for spec in specs
        if name != "c" or spec.startswith("trellis")
    }
    shared = {n: jax.ShapeDtypeStruct(h.shape, h.dtype) for n, h in hessians.items()}
    shapes = {
        key: (jax.ShapeDtypeStruct(w.shape, w.dtype), shared[h.shape[0]], spec, None if g is None else shared[g.shape[0]])
        for key, (w, h, spec, g) in problems.items()
    }
    Spec.parse("trellis-2w").quantizer(CONFIG.state_bits, (64, 64)).relative_gain(np.ones(16))  # measures its code once
    config = CONFIG if outputs else MORE_BITS
    made = compiled(caplog, lambda: [compile_one() for compile_one in ahead.programs(shapes, config)])
    assert set(made) == {"fit_factors", "round_backbone"} and len(made) == len(list(ahead.programs(shapes, config)))
    found = compiled(caplog, lambda: solve_many(problems, config=config))
    assert "relative_errors" in found and not set(made) & set(found)
