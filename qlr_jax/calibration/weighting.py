"""How much each token counts in a matrix's Hessian: all alike, or by how sensitive the end loss is to an error there."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from qlr_jax.calibration.backward import States
from qlr_jax.calibration.finite import CalibrationResult
from qlr_jax.calibration.gradients import squared_gradients
from qlr_jax.calibration.hessians import TITLE, TokenWeights, hessians
from qlr_jax.core.objective import checked_hessian
from qlr_jax.engine import HERE, Engine
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama
from qlr_jax.models.names import input_of
from qlr_jax.progress import Progress, silent

WEIGHTINGS = ("plain", "loss", "loss-by-matrix")


def matrix_hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    names: Sequence[str],
    weighting: str = "plain",
    progress: Progress | None = None,
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
    entering: States | None = None,
    engine: Engine = HERE,
) -> CalibrationResult:
    """The Hessian (n, n) in which each linear layer of `names` is compressed, checked; layers that share one share the array.

    Sequences in which an activation or a gradient is not finite are left out, reported as progress, and named in what is returned.

    Args:
        model: the original.
        tokens: of calibration text, (sequences, time).
        names: of the linear layers to compress.
        weighting: "plain": all tokens alike; "loss": tokens weighted by the end loss's squared gradients, the matrices of one
            input together; "loss-by-matrix": the same, each matrix for itself. Both take one backward pass first; whether they
            pay on a model is for its KL to say (`benchmarks/hessians.py` compares the three).
        progress: where stages and messages go.
        keep: (name, H) -> what is returned in its place, e.g. the same on disk, called as soon as H is done.
        entering: where what enters every block is left, for `output_hessians` of the same tokens; of no use where the result names
            sequences that are left out.
        engine: where batches go through blocks.

    Raises:
        QLRError: for an unknown weighting, and what `hessians` and `squared_gradients` raise.

    Source: GuidedQuant, arXiv 2505.07004, section 3, with one group of outputs a matrix.
    """
    if weighting not in WEIGHTINGS:
        raise QLRError(f"weighting {weighting!r} of Hessians is not known; give one of {', '.join(WEIGHTINGS)}")
    progress, weights, tokens = progress or silent(), None, np.asarray(tokens)
    count, rows, left_out = len(tokens), np.arange(len(tokens)), dict[int, str]()
    if weighting != "plain":
        with progress.stage("calibrating: backward pass", total=model.config.num_hidden_layers) as stage:
            squares = squared_gradients(model, tokens, progress=stage.advance, engine=engine)
        left_out |= squares.left_out
        rows = np.delete(rows, list(left_out))
        used = {name: squares[name][rows] if left_out else squares[name] for name in names}
        weights = token_weights(used, by_matrix=weighting == "loss-by-matrix")
    with progress.stage("calibrating", total=model.config.num_hidden_layers) as stage:
        moments = hessians(
            model,
            tokens[rows],
            weights=weights,
            progress=lambda done, _: stage.advance(note=f"layer {done - 1}"),
            keep=lambda name, h: keep(name, engine.submit(_checked, h, title=TITLE)),
            entering=None if left_out else entering,
            engine=engine,
        )
    left_out |= {int(rows[row]): place for row, place in moments.left_out.items()}
    by_name = {name: moments[name if weighting == "loss-by-matrix" else input_of(name)] for name in names}
    out = CalibrationResult(by_name, count, left_out)
    if out.left_out:
        progress.say(f"calibrating: {out.summary()}")
    return out


def _checked(h: np.ndarray) -> np.ndarray:
    return checked_hessian(h, len(h))


def token_weights(squares: Mapping[str, TokenWeights], *, by_matrix: bool = False) -> dict[str, TokenWeights]:
    """Weights of tokens from the squared gradients of linear layers.

        w_t(layer) = s_t / mean_t s      w_t(input) = Σ w_t(layer) over the layers of that input

    Where s is zero throughout, all tokens of the layer weigh alike. Normalised, because the scales of q, k and v differ, and the
    largest would speak for all.

    Args:
        squares: linear layer -> s, (sequences, time).
        by_matrix: keep each layer's weights apart.

    Returns:
        w, (sequences, time), by layer where `by_matrix`, by input otherwise.

    Example:
        >>> q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
        >>> token_weights({q: np.array([[1.0, 3.0]]), k: np.array([[4.0, 0.0]])})
        {'model.layers.0.self_attn.qkv': array([[2.5, 1.5]])}
    """
    out: dict[str, TokenWeights] = {}
    for name, s in squares.items():
        mean = float(s.mean(dtype=np.float64))
        w = s / mean if mean > 0 else np.ones_like(s)
        key = name if by_matrix else input_of(name)
        out[key] = out[key] + w if key in out else w
    return out
