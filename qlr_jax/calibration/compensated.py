"""Moments of a block's inputs when the blocks before it are compressed already, beside those of the original."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlr_jax.calibration.finite import SHARE, finite_rows
from qlr_jax.errors import QLRError
from qlr_jax.models.attention import HIGHEST
from qlr_jax.models.llama import Block, Rope

Moments = dict[str, tuple[np.ndarray, np.ndarray]]
"""Input's local name -> (E[x̂ x̂ᵀ], E[x x̂ᵀ])."""


def moments(
    block: Block, originals: Sequence[np.ndarray], compressed: Sequence[np.ndarray], rope: Rope
) -> tuple[list[np.ndarray], Moments]:
    """Moments of what enters the linear layers of a block: in the original model, x, and behind compressed blocks, x̂.

    Sequences in which an activation of either side is not finite are left out.

    Args:
        block: of the original model.
        originals, compressed: by batch, the hidden states (batch, time, n) that enter the block in the original model and behind
            the compressed blocks before it.
        rope: (cos, sin) of the positions.

    Returns:
        The hidden states that leave the block in the original model; E[x̂ x̂ᵀ] and E[x x̂ᵀ] by input, x̂ behind compressed blocks.

    Raises:
        QLRError: where more than 1 % of the sequences would be left out.
    """
    sums: dict[str, tuple[Array, Array]] = {}
    leaving, count, bad, sequences = [], 0, 0, sum(map(len, originals))
    for x, y in zip(originals, compressed, strict=True):
        out, sides, finite = _pass(block, jnp.asarray(x), jnp.asarray(y), rope)
        leaving.append(np.asarray(out))
        sums = {
            name: (sums[name][0] + own, sums[name][1] + cross) if sums else (own, cross) for name, (own, cross) in sides.items()
        }
        bad += len(x) - int(np.sum(finite))
        count += int(np.sum(finite)) * x.shape[1]
    if bad > SHARE * sequences:
        raise QLRError(
            f"behind the compressed blocks activations are not finite in {bad} of {sequences} sequences, and at most "
            f"{100 * SHARE:g} % can be left out; give other calibration text, or sequential: false"
        )
    return leaving, {name: (np.asarray(own) / count, np.asarray(cross) / count) for name, (own, cross) in sums.items()}


@jax.jit
def _pass(block: Block, x: Array, y: Array, rope: Rope) -> tuple[Array, dict[str, tuple[Array, Array]], Array]:
    taps: list[dict[str, Array]] = [{}, {}]
    out = block(x, rope, tap=taps[0].__setitem__)
    block(y, rope, tap=taps[1].__setitem__)
    finite = jnp.stack([finite_rows(value) for tap in taps for value in tap.values()]).all(axis=0)

    def tokens(value: Array) -> Array:
        return jnp.where(finite[:, None, None], value.astype(jnp.float32), 0).reshape(-1, value.shape[-1])

    rows = [{name: tokens(value) for name, value in tap.items()} for tap in taps]
    return out, {name: (_outer(b, b), _outer(rows[0][name], b)) for name, b in rows[1].items()}, finite


def _outer(a: Float[Array, "t m"], b: Float[Array, "t n"]) -> Float[Array, "m n"]:
    return jnp.einsum("ti,tj->ij", a, b, precision=HIGHEST, preferred_element_type=jnp.float32)


def compensated_target(
    weight: Float[np.ndarray, "m n"], own: Float[np.ndarray, "n n"], cross: Float[np.ndarray, "n n"], damping: float
) -> Float[np.ndarray, "m n"]:
    """The weight whose outputs on x̂ are nearest to the original's on x:

        W* = argmin_V E‖W x − V x̂‖² = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹,   drawn towards W as far as E[x̂ x̂ᵀ] is damped.

    Then tr((W* − Ŵ) Ĥ (W* − Ŵ)ᵀ), Ĥ = E[x̂ x̂ᵀ], is what Ŵ loses beyond the best that is possible.

    Args:
        weight: W (m, n).
        own, cross: E[x̂ x̂ᵀ] and E[x x̂ᵀ] (n, n), from `moments`.
        damping: what is added to the diagonal of both, as a share of the mean diagonal of E[x̂ x̂ᵀ].

    Returns:
        W* (m, n), float32.

    Source: GPTAQ, arXiv 2504.02692.

    Example:
        >>> w, h = np.eye(2, dtype=np.float32), np.diag([2.0, 1.0])
        >>> bool(np.allclose(compensated_target(w, h, h, 0.01), w))
        True
        >>> bool(np.allclose(compensated_target(w, h, 0.5 * h, 1e-6), 0.5 * w, atol=1e-3))
        True
    """
    shift = damping * float(np.trace(own)) / len(own) * np.eye(len(own))
    regular = own.astype(np.float64) + shift
    return (weight @ np.linalg.solve(regular, (cross.astype(np.float64) + shift).T).T).astype(np.float32)
