"""What each matrix's error costs in KL at the model's output: six ways of asking, of one form, so that they can be compared.

Each takes errors ΔW = Ŵ − W, one a matrix, and gives nats of KL a token to each matrix. An option of squared relative error ε²
is then charged KL(matrix) · ε² / ε²(ΔW): small errors add up in KL, and grow as their squares (HIGGS, arXiv 2411.17525, theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import jax
import numpy as np

from qlr_jax.core.lazy import LazyMap
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference
from qlr_jax.models import Llama, is_linear
from qlr_jax.sensitivity.knockout import knockout
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
        errors: name -> ΔW (out, in).
        reference: the original's log-probabilities on calibration text.
        hessians: name -> H.
        outputs: name -> G; empty where there is none.
    """

    model: Llama
    errors: Mapping[str, np.ndarray]
    reference: Reference
    hessians: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Attribution:
    """What each matrix's error costs.

    Attributes:
        kl: nats a token for each matrix's error; for "error" the squared relative error itself.
    """

    kl: Mapping[str, float]


def attribute(method: str, case: Case, *, seed: int = 0, on_done: Callable[[str], None] | None = None) -> Attribution:
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

    Raises:
        QLRError: an unknown method; "kronecker" without output Hessians.
    """
    if method not in ATTRIBUTIONS:
        raise QLRError(f"attribution {method!r} is not known; give one of {', '.join(ATTRIBUTIONS)}")
    kl = _kl(method, case, seed, on_done)
    return Attribution(_at_least(kl, case, always=method == "path") if method in MEASURED else kl)


def _kl(method: str, case: Case, seed: int, on_done: Callable[[str], None] | None) -> Mapping[str, float]:
    model, errors = case.model, case.errors
    if method == "path":
        return path_shares(model, errors, case.reference)
    if method == "error":
        return {n: _share(model.matrices()[n].weight.get_value(), e, case.hessians[n]) for n, e in errors.items()}
    if vocabulary := [name for name in errors if not is_linear(name)]:
        alone = knockout(model, {name: errors[name] for name in vocabulary}, case.reference, on_done)
        linear = replace(case, errors=LazyMap([n for n in errors if is_linear(n)], errors.__getitem__))
        shares = {**_kl(method, linear, seed, on_done), **alone}
        return {name: shares[name] for name in errors}
    if method == "kronecker":
        if missing := [n for n in errors if n not in case.outputs]:
            raise QLRError(
                f"attribution 'kronecker' needs an output Hessian of {missing[0]}; give outputs: fisher, or another method"
            )
        return {n: _kronecker(n, e, case) for n, e in errors.items()}
    if method == "second-order":
        return second_order(model, errors, case.reference.windows, on_done=on_done)
    if method == "noise":
        draw = np.random.default_rng(seed)
        errors = {n: _noise_like(e, case.hessians[n], draw) for n, e in errors.items()}
    return knockout(model, errors, case.reference, on_done)


def _at_least(kl: Mapping[str, float], case: Case, always: bool) -> dict[str, float]:
    """What was measured; `LEAST` of the second order, in its units, where that is nothing or, `always`, where that is less."""
    found = dict(kl)
    for known in (True, False):  # where there is no G, the squared relative error has to do, which is no more than a stopgap
        names = [name for name in kl if (is_linear(name) and name in case.outputs) == known]
        own = {name: _kronecker(name, case.errors[name], case) if known else _plain_share(name, case) for name in names}
        ratios = [abs(kl[name]) / value for name, value in own.items() if value > 0]
        unit = LEAST * median(ratios) if ratios else 0.0
        found |= {name: max(kl[name], unit * value) for name, value in own.items() if (always and known) or kl[name] <= 0}
    return found


def _kronecker(name: str, error: np.ndarray, case: Case) -> float:
    return max(0.5 * _quadratic(error, case.hessians[name], case.outputs[name]), 0.0)


def _plain_share(name: str, case: Case) -> float:
    weight, error = np.asarray(case.model.matrices()[name].weight.get_value(), np.float32), case.errors[name]
    return float(np.vdot(error, error)) / whole if (whole := float(np.vdot(weight, weight))) > 0 else 0.0


def _quadratic(error: np.ndarray, hessian: np.ndarray, output: np.ndarray | None = None) -> float:
    return float(np.vdot(error if output is None else output @ error, error @ hessian))


def _share(weight: jax.Array, error: np.ndarray, hessian: np.ndarray) -> float:
    whole = _quadratic(np.asarray(weight, np.float32), hessian)
    return max(_quadratic(error, hessian), 0.0) / whole if whole > 0 else 0.0


def _noise_like(error: np.ndarray, hessian: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Gaussian noise of the same tr(E H Eᵀ)."""
    noise = draw.standard_normal(error.shape, np.float32)
    size, own = _quadratic(error, hessian), _quadratic(noise, hessian)
    return noise * np.float32(np.sqrt(max(size, 0.0) / own)) if own > 0 else 0 * noise
