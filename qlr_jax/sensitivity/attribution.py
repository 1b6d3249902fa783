"""What each matrix's error costs in KL at the model's output: six ways of asking, of one form, so that they can be compared.

Each takes errors ΔW = Ŵ − W, one a matrix, and gives nats of KL a token to each matrix. An option of squared relative error ε²
is then charged KL(matrix) · ε² / ε²(ΔW): small errors add up in KL, and grow as their squares (HIGGS, arXiv 2411.17525, theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from qlr_jax.core.lazy import handle
from qlr_jax.engine import HERE, Call, Engine
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama, is_linear
from qlr_jax.sensitivity.knockout import TITLE, knockout
from qlr_jax.sensitivity.path import path_shares
from qlr_jax.sensitivity.second_order import second_order

ATTRIBUTIONS = {
    "error": "the squared relative error itself, the same for every matrix: no model is asked (not in nats)",
    "kronecker": "half of tr(G E H Eᵀ): the second order of the KL, Kronecker-factored; no further pass",
    "alone": "the KL of the model with this matrix alone changed: a forward pass a matrix",
    "noise": "the same with Gaussian noise of the error's size in place of the error (HIGGS)",
    "second-order": "half of vᵀFv, v the change of the logits to first order, F their Fisher matrix: two forward passes a matrix",
    "path": "shares of the joint KL along the path on which all matrices change together (Aumann-Shapley): two backward passes",
}
MEASURED = ("path", "alone", "noise")  # as differences of log-probabilities: some come out as nothing or less
LEAST = 0.5  # of what the second order says; from 0.5 to 1 allocations are as good, below worse (benchmarks/RESULTS.md)


@dataclass(frozen=True)
class Case:
    """What an attribution may ask about.

    Attributes:
        model: the original.
        errors: name -> ΔW (out, in), or what stands for it in a piece.
        reference: the original's log-probabilities on calibration text.
        hessians: name -> H, or what stands for it.
        outputs: name -> G; empty where there is none.
    """

    model: Llama
    errors: Mapping[str, Any]
    reference: Reference
    hessians: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Attribution:
    """What each matrix's error costs.

    Attributes:
        kl: nats a token for each matrix's error; for "error" the squared relative error itself.
    """

    kl: Mapping[str, float]


def attribute(
    method: str, case: Case, *, seed: int = 0, on_done: Callable[[str], None] | None = None, engine: Engine = HERE
) -> Attribution:
    """The cost of each matrix's error by one of `ATTRIBUTIONS`; embedding and head by "alone" but for "path" and "error".

    No error costs nothing, or an allocation would give its matrix the fewest bits there are. A share of the path is of few tokens,
    and comes out below 0 where an error happens to undo a part of the others': it is charged no less than `LEAST` of what the
    second order says, ½ tr(G E H Eᵀ), of all the tokens of the Hessians, in units of the median over matrices of what was measured
    over it. The same stands in for a KL by itself that is less than float32 resolves.

    Args:
        method: its name.
        case: the model, the errors, and what the method may need beside them.
        seed: of the noise.
        on_done: called with each matrix's name where a method goes matrix by matrix.
        engine: where its pieces run.

    Raises:
        QLRError: an unknown method; "kronecker" without output Hessians.
    """
    if method not in ATTRIBUTIONS:
        raise QLRError(f"attribution {method!r} is not known; give one of {', '.join(ATTRIBUTIONS)}")
    kl = _kl(method, case, seed, on_done, engine)
    return Attribution(_at_least(kl, case, engine, always=method == "path") if method in MEASURED else kl)


def _kl(method: str, case: Case, seed: int, on_done: Callable[[str], None] | None, engine: Engine) -> Mapping[str, float]:
    model, errors = case.model, case.errors
    if method == "path":
        return path_shares(model, errors, case.reference, engine=engine)
    if method == "error":
        return _each(engine, _share, {n: (_weight(model, n), handle(errors, n), case.hessians[n]) for n in errors})
    if vocabulary := [name for name in errors if not is_linear(name)]:
        alone = knockout(model, _selected(errors, vocabulary), case.reference, on_done, engine=engine)
        linear = replace(case, errors=_selected(errors, [n for n in errors if is_linear(n)]))
        shares = {**_kl(method, linear, seed, on_done, engine), **alone}
        return {name: shares[name] for name in errors}
    if method == "kronecker":
        if missing := [n for n in errors if n not in case.outputs]:
            raise QLRError(
                f"attribution 'kronecker' needs an output Hessian of {missing[0]}; give outputs: fisher, or another method"
            )
        return _each(engine, _kronecker, {n: _metrics(n, case) for n in errors})
    if method == "second-order":
        return second_order(model, errors, case.reference.windows, on_done=on_done, engine=engine)
    if method == "noise":
        errors = {n: Call(_noise_like, (handle(errors, n), case.hessians[n], [seed, i])) for i, n in enumerate(errors)}
    return knockout(model, errors, case.reference, on_done, engine=engine)


def _at_least(kl: Mapping[str, float], case: Case, engine: Engine, always: bool) -> dict[str, float]:
    """What was measured; `LEAST` of the second order, in its units, where that is nothing or, `always`, where that is less."""
    found = dict(kl)
    for known in (True, False):  # where there is no G, the squared relative error has to do, which is no more than a stopgap
        names = [name for name in kl if (is_linear(name) and name in case.outputs) == known]
        if known:
            own = _each(engine, _kronecker, {name: _metrics(name, case) for name in names})
        else:
            own = _each(engine, _plain_share, {name: (_weight(case.model, name), handle(case.errors, name)) for name in names})
        ratios = [abs(kl[name]) / value for name, value in own.items() if value > 0]
        unit = LEAST * median(ratios) if ratios else 0.0
        found |= {name: max(kl[name], unit * value) for name, value in own.items() if (always and known) or kl[name] <= 0}
    return found


def _each(engine: Engine, function: Callable[..., float], arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, float]:
    asked = {name: engine.submit(function, *given, title=TITLE) for name, given in arguments.items()}
    found = dict(engine.results(asked))
    return {name: found[name] for name in arguments}


def _selected(errors: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: handle(errors, name) for name in names}


def _weight(model: Llama, name: str) -> Call:
    return Call(_weight_of, (model, name))


def _weight_of(model: Llama, name: str) -> np.ndarray:
    return np.asarray(model.matrices()[name].weight.get_value(), np.float32)


def _metrics(name: str, case: Case) -> tuple[Any, Any, Any]:
    return handle(case.errors, name), case.hessians[name], case.outputs[name]


def _kronecker(error: np.ndarray, hessian: np.ndarray, output: np.ndarray) -> float:
    return max(0.5 * _quadratic(error, hessian, output), 0.0)


def _plain_share(weight: np.ndarray, error: np.ndarray) -> float:
    return float(np.vdot(error, error)) / whole if (whole := float(np.vdot(weight, weight))) > 0 else 0.0


def _quadratic(error: np.ndarray, hessian: np.ndarray, output: np.ndarray | None = None) -> float:
    return float(np.vdot(error if output is None else output @ error, error @ hessian))


def _share(weight: np.ndarray, error: np.ndarray, hessian: np.ndarray) -> float:
    whole = _quadratic(weight, hessian)
    return max(_quadratic(error, hessian), 0.0) / whole if whole > 0 else 0.0


def _noise_like(error: np.ndarray, hessian: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Gaussian noise of the same tr(E H Eᵀ)."""
    noise = np.random.default_rng(seed).standard_normal(error.shape, np.float32)
    size, own = _quadratic(error, hessian), _quadratic(noise, hessian)
    return noise * np.float32(np.sqrt(max(size, 0.0) / own)) if own > 0 else 0 * noise
