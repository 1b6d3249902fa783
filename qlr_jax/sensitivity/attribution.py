"""What each matrix's error costs in KL at the model's output: six ways of asking, of one form, so that they can be compared.

Each takes errors ΔW = Ŵ − W, one a matrix, and gives nats of KL a token to each matrix. An option of squared relative error ε²
is then charged KL(matrix) · ε² / ε²(ΔW): small errors add up in KL, and grow as their squares (HIGGS, arXiv 2411.17525, theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
    model, errors = case.model, case.errors
    if method == "path":
        return Attribution(path_shares(model, errors, case.reference))
    if method == "error":
        return Attribution({n: _share(model.matrices()[n].weight.get_value(), e, case.hessians[n]) for n, e in errors.items()})
    if vocabulary := [name for name in errors if not is_linear(name)]:
        alone = knockout(model, {name: errors[name] for name in vocabulary}, case.reference, on_done)
        linear = replace(case, errors=LazyMap([n for n in errors if is_linear(n)], errors.__getitem__))
        shares = {**attribute(method, linear, seed=seed, on_done=on_done).kl, **alone}
        return Attribution({name: shares[name] for name in errors})
    if method == "kronecker":
        if missing := [n for n in errors if n not in case.outputs]:
            raise QLRError(
                f"attribution 'kronecker' needs an output Hessian of {missing[0]}; give outputs: fisher, or another method"
            )
        return Attribution({n: max(0.5 * _quadratic(e, case.hessians[n], case.outputs[n]), 0.0) for n, e in errors.items()})
    if method == "second-order":
        return Attribution(second_order(model, errors, case.reference.windows, on_done=on_done))
    if method == "noise":
        draw = np.random.default_rng(seed)
        errors = {n: _noise_like(e, case.hessians[n], draw) for n, e in errors.items()}
    return Attribution(knockout(model, errors, case.reference, on_done))


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
