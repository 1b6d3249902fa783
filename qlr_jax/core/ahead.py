"""The solver's two large programs, compiled before the matrices are there: `solve_many` then finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qlr_jax.core.alternation import ONE_PROGRAM
from qlr_jax.core.backbone import downdate_strength, round_backbone
from qlr_jax.core.batch import Key, Problems, sizes
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.factors import fit_factors
from qlr_jax.core.ldlq import column_block, row_group
from qlr_jax.core.problem import component_mask
from qlr_jax.core.spec import Spec

Compile = Callable[[], Any]


def programs(problems: Problems[Key], config: SolverConfig | None = None) -> Iterator[Compile]:
    """What compiles each program of `round_backbone` and `fit_factors` that a `solve_many` of these problems calls on one device.

    Only shapes are looked at: arrays may be `jax.ShapeDtypeStruct`s, those of one Hessian the same object. The programs are kept by
    JAX, so that the calls themselves compile neither.

    Args:
        problems: as for `solve_many`.
        config: settings of the solver; None: the defaults.

    Example:
        >>> w, h = jax.ShapeDtypeStruct((64, 32), np.float32), jax.ShapeDtypeStruct((32, 32), np.float32)
        >>> specs = "trellis-2", "trellis-3", "trellis-2.5+r4@trellis-4"
        >>> len(list(programs({spec: (w, h, spec) for spec in specs})))  # rates and ranks are data; 8 state bits, then all of them
        3
    """
    config, seen = config or SolverConfig(), set()
    for problem, count, shared in sizes(problems):
        shape, spec, outputs = problem[0].shape, Spec.parse(problem[2]), len(problem) > 3 and problem[3] is not None
        for function, arguments, static in _calls(shape, spec, config, count, shared, outputs):
            key = function, str(jax.tree.map(lambda a: (np.shape(a), getattr(a, "dtype", type(a))), arguments)), str(static)
            if key not in seen:
                seen.add(key)
                yield lambda f=function, a=arguments, s=static: f.__wrapped__.lower(*a, **s).compile()


def _calls(
    shape: tuple[int, int], spec: Spec, config: SolverConfig, count: int, shared: bool, outputs: bool
) -> Iterator[tuple[Any, tuple, dict[str, Any]]]:
    """(function, arguments, static arguments) as `alternation` calls them."""
    (m, n), own = shape, 1 if shared else count
    stages = dict.fromkeys(([config.first_bits] if spec.rank else []) + [config.state_bits])
    quantizers = {quantizer.static(): quantizer for quantizer in (spec.quantizer(bits, shape) for bits in stages)}
    weight, hessian, energy = _array(count, m, n), _array(own, n, n), _array(count)
    metric, root = (_array(count, m, m), _array(count, m, m)) if outputs else (None, None)
    for quantizer in quantizers.values():
        if quantizer.empty:
            continue
        height, width = quantizer.tile[0], column_block(quantizer)
        columns, rows = n + -n % width, m + -m % height
        metrics = count if downdate_strength(spec, config) else own
        feedback = _array(metrics, columns, columns)
        group = row_group(rows, height)
        padded = m + -m % group
        correction = _array(count)
        row_feedback = _array(count, padded, padded) if outputs else None
        decided = quantizer.metric_qparams(np.ones((count, columns // width)))
        given = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in decided)
        arguments = (weight, hessian, energy, feedback, correction, quantizer.traced(), metric, row_feedback, given)
        yield round_backbone, arguments, {"static": quantizer.static(), "refit": config.backbone_scale == "fitted"}
    if spec.rank:
        mask, (left, right) = _array(count, len(component_mask(spec.rank, shape))), spec.factor_quantizers(config.state_bits)
        width = column_block(right)
        basis, feedback = _array(count, m, min(mask.shape[-1], m, n)), _array(own, n + -n % width, n + -n % width)
        static = {"statics": (left.static(), right.static()), "inner": config.inner, "one_scale": config.factor_scales == "matrix"}
        traced = left.traced(), right.traced()
        for given in dict.fromkeys((outputs, outputs and max(shape) <= ONE_PROGRAM)):  # a large start is fitted without G
            output = (metric, root) if given else None
            evaluated_in = hessian, energy, metric
            yield fit_factors, (weight, weight, hessian, feedback, basis, mask, traced, 2, evaluated_in, output, False), static


def _array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.float32)


__all__ = ["programs"]
