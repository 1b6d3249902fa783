"""How sensitive the end loss is to each linear layer's output: squared gradients by token, and G = E[g gᵀ] by output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from qlr_jax.calibration.backward import States
from qlr_jax.calibration.descent import TITLE, Descent, DescentRun, EndSums
from qlr_jax.calibration.finite import CalibrationResult
from qlr_jax.calibration.second_moment import added
from qlr_jax.engine import HERE, Engine, TreeSum
from qlr_jax.errors import QLRError
from qlr_jax.models.forward import TOGETHER
from qlr_jax.models.llama import Llama
from qlr_jax.models.names import layer_of, linear_names, shape_of
from qlr_jax.models.sites import BY_PATH


# most of the lines say what it is
def squared_gradients(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = TOGETHER,
    progress: Callable[[int], None] | None = None,
    devices: int | None = None,
    engine: Engine = HERE,
) -> CalibrationResult:
    """For every linear layer y = W x the squared gradient of the next-token loss at y, (sequences, time), token by token.

        s(layer)[q, t] = Σ_i ( ∂ nll_q / ∂ y[q, t, i] )²      nll_q summed over the tokens of sequence q

    A token counts through all predictions after it; the last of a sequence predicts nothing and has s = 0. One backward pass,
    block by block: a block's forward pass is computed again where it is pulled back, so that memory is the hidden states at all
    block boundaries and what one block and the head keep for `batch` sequences, and one compiled function serves all blocks.

    A sequence in which a hidden state or a gradient is not finite has s = 0 everywhere, and is named in what is returned
    (`CalibrationResult.left_out`).

    Args:
        model: the original.
        tokens: token ids; at least one sequence of two.
        batch: sequences at a time, filled up to a multiple of the devices, which they are shared out over.
        progress: called with the number of blocks that are newly done.
        devices: how many of this process's devices to use at most; None: all.
        engine: where batches go through blocks.

    Raises:
        QLRError: for tokens of another shape; where more than 1 % of the sequences would be left out, naming their block or layer.

    Source: GuidedQuant, arXiv 2505.07004, section 3.

    Example:
        >>> import jax
        >>> from qlr_jax.models import Llama, LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> squares = squared_gradients(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))
        >>> squares["model.layers.0.mlp.down_proj"].shape, squares["model.layers.0.mlp.down_proj"][0, -1].item()
        ((1, 3), 0.0)
    """
    tokens = _checked(tokens)
    out = {name: np.empty(tokens.shape, np.float32) for name in linear_names(model.config)}
    layers = range(model.config.num_hidden_layers)
    work = Descent({i: dict.fromkeys(BY_PATH, 0) for i in layers}, "squares", None)
    run = DescentRun(model, tokens, work, batch, devices, engine, "calibrating: gradients")
    waiting: list[tuple[int, int, Any]] = []

    def settle() -> None:
        for i, j, value in waiting:
            rows = run.batches[j]
            for name, own in engine.result(value).items():
                out[f"model.layers.{i}.{name}"][rows.start : rows.start + rows.live] = np.asarray(own)[: rows.live]
        waiting.clear()

    for step in run.steps(progress):
        waiting.append(step)
        if not engine.ahead:
            settle()
    settle()
    for name, value in out.items():
        _finite(name, value)[list(run.left_out)] = 0
    return CalibrationResult(out, len(tokens), run.left_out)


# most of the lines say what it is
def output_hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    batch: int = TOGETHER,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
    devices: int | None = None,
    ends: "EndSums | None" = None,
    states: States | None = None,
    engine: Engine = HERE,
) -> CalibrationResult:
    """For every linear layer y = W x what an error in y does to the model's output distribution, (m, m), on the mean over tokens.

        G(layer) = mean_{q,t} g gᵀ      g = ∂ Σ_t' log p(z_t') / ∂ y[q, t],  labels z_t' drawn from the model's own p

    Then an error E in W alone costs KL(original ‖ changed) ≈ ½ tr(G E H Eᵀ) nats a token, H = E[x xᵀ]: the second-order expansion
    of the KL with its Fisher matrix, errors of different tokens taken to be independent and x of g (a Kronecker factorisation).
    One backward pass as in `squared_gradients`, of an (m, m) a layer of `names` (all where None). Labels are drawn sequence by
    sequence: neither the batch nor the number of devices changes them, and on several devices G is that of one up to the order
    in which sums are taken, by less than 2e-6 √(G_ii G_jj) for some thousand tokens (measured).

    A sequence in which a hidden state or a gradient is not finite is left out of G from that block of the backward pass on (of all,
    where it happens in the forward pass), and is named in what is returned (`CalibrationResult.left_out`).

    Args:
        model, tokens, batch, progress, devices, engine: as of `squared_gradients`.
        names: linear layers; None: all.
        seed: of the labels.
        keep: (name, G) -> what is returned in its place, e.g. the same on disk, called as soon as G is done.
        ends: gathers what the same pass has at its two ends, for the metrics of embedding and head.
        states: what `hessians` has left of the same sequences, none of them left out: half of the way is made then.

    Raises:
        QLRError: as `squared_gradients`.

    Source: Martens and Grosse, arXiv 1503.05671, section 3; for rounding: YAQA, arXiv 2505.22988, section 3 (sketch A).

    Example:
        >>> import jax
        >>> from qlr_jax.models import Llama, LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> output_hessians(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))["model.layers.0.mlp.up_proj"].shape
        (8, 8)
    """
    tokens, wanted = _checked(tokens), list(names if names is not None else linear_names(model.config))
    watched: dict[int, dict[str, int]] = {0: {}} if ends is not None else {}  # what enters the first block is asked for in any case
    for name in wanted:
        i = layer_of(name)
        watched.setdefault(i, {})[name.removeprefix(f"model.layers.{i}.")] = shape_of(model.config, name)[0]
    run = DescentRun(model, tokens, Descent(watched, "products", seed, ends is not None), batch, devices, engine, TITLE, states)
    out: dict[str, Any] = {}
    sums = TreeSum(engine, added, TITLE)
    for i, j, received in run.steps(progress, ends):
        sums.add(received)
        if not run.is_last(j):
            continue
        total, sums = sums.value, TreeSum(engine, added, TITLE)
        for local in watched.get(i, {}):
            name = f"model.layers.{i}.{local}"
            out[name] = keep(name, engine.submit(_mean, total, run.checked[-1], local, tokens.shape[1], name, title=TITLE))
    return CalibrationResult({name: out[name] for name in wanted}, len(tokens), run.left_out)


def _checked(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise QLRError(f"tokens have shape {tokens.shape}; at least one sequence of two tokens is needed")
    return tokens


def _finite(name: str, value: np.ndarray) -> np.ndarray:
    if not np.isfinite(value).all():
        raise QLRError(
            f"the sum over gradients at the output of {name} is not finite; load the model in float32 and check its weights"
        )
    return value


def _mean(sums: Mapping[str, Array], known: tuple[Any, list[float]], local: str, time: int, name: str) -> np.ndarray:
    """G from the sum over the sequences that are left."""
    return _finite(name, np.asarray(sums[local], np.float32) / np.float32(known[1][0] * time))
