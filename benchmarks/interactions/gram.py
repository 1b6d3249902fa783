"""How the errors of all pairs of matrices interact in the KL, to second order; no job uses it."""

from collections.abc import Mapping

import numpy as np

from qlr_jax.models import Llama
from qlr_jax.sensitivity.second_order import logit_changes


def gram_matrix(model: Llama, errors: Mapping[str, np.ndarray], windows: np.ndarray) -> np.ndarray:
    """The Gram matrix of the errors in the Fisher metric of the output distribution, nats a token, (matrices, matrices).

        gram[i, j] = mean_t ½ v_i(t)ᵀ F_t v_j(t)      v_i = ∂ logits · ΔW_i,  F_t = diag(p_t) − p_t p_tᵀ

    KL(original ‖ all changed) ≈ Σ_ij gram[i, j] to second order; gram[i, i] is `second_order` of matrix i.

    Args:
        model: the original, all of it in memory and unpacked.
        errors: name -> ΔW (out, in).
        windows: token ids, (windows, time).
    """
    gram, vectors = np.zeros((len(errors), len(errors))), list[np.ndarray]()
    for _, vector in logit_changes(model, errors, windows):
        vectors.append(vector)
        if len(vectors) == len(errors):  # a batch of windows is done
            stacked = np.stack(vectors)
            gram += (stacked @ stacked.T).astype(np.float64)
            vectors.clear()
    return 0.5 * gram / windows.size
