"""How much the end loss feels an error in each linear layer's output: squared gradients, token by token and on the mean."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Block, Llama
from qlr_jax.models.names import layer_of, linear_names, shape_of


@jax.custom_vjp
def _watch(y: Array, probe: Array) -> Array:
    """y itself; the gradient that arrives for `probe` is Σ_i (∂loss/∂y_i)² of every token, so that no gradient need be kept."""
    return y


def _watch_forward(y: Array, probe: Array) -> tuple[Array, None]:
    return y, None


def _watch_backward(_: None, g: Array) -> tuple[Array, Array]:
    return g, jnp.sum(jnp.square(g.astype(jnp.float32)), axis=-1)


_watch.defvjp(_watch_forward, _watch_backward)


def squared_gradients(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = 4,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Float[np.ndarray, "sequences time"]]:
    """For every linear layer y = W x the squared gradient of the next-token loss at y, token by token.

        s(layer)[q, t] = Σ_i ( ∂ nll_q / ∂ y[q, t, i] )²      nll_q summed over the tokens of sequence q

    A token is felt through all predictions after it; the last of a sequence predicts nothing and has s = 0. One backward pass,
    block by block: a block's forward pass is computed again where it is pulled back, so that memory is the hidden states at all
    block boundaries and what one block and the head keep for `batch` sequences, and one compiled function serves all blocks.

    Args:
        tokens: token ids; at least one sequence of two.
        progress: called with the number of sequences that are newly done.

    Raises:
        QLRError: for tokens of another shape; for a gradient that is not finite, naming its layer.

    Source: GuidedQuant, arXiv 2505.07004, section 3.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> found = squared_gradients(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))
        >>> found["model.layers.0.mlp.down_proj"].shape, found["model.layers.0.mlp.down_proj"][0, -1].item()
        ((1, 3), 0.0)
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise QLRError(f"tokens have shape {tokens.shape}; at least one sequence of two tokens is needed")
    out = {name: np.empty(tokens.shape, np.float32) for name in linear_names(model.config)}
    rope, batch = model.rope(tokens.shape[1]), min(batch, len(tokens))
    first = [name.removeprefix("model.layers.0.") for name in linear_names(model.config) if layer_of(name) == 0]
    probes = dict.fromkeys(first, jnp.zeros((batch, tokens.shape[1])))
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        live = len(rows)
        rows = jnp.asarray(np.concatenate([rows, np.repeat(rows[-1:], batch - live, axis=0)]))  # every batch has one shape
        states = [model.embed(rows)]
        for block in model.model.layers:
            states.append(_forward(block, states[-1], rope))
        g = _head_gradient(model, states.pop(), rows)
        for i, block in reversed(list(enumerate(model.model.layers))):
            g, found = _pull_back(block, states.pop(), rope, probes, g)
            for name, value in found.items():
                out[f"model.layers.{i}.{name}"][start : start + live] = np.asarray(value)[:live]
        if progress is not None:
            progress(live)
    for name, value in out.items():
        if not np.isfinite(value).all():
            raise QLRError(f"the gradient at the output of {name} is not finite; load the model in float32 and check its weights")
    return out


def output_gradients(model: Llama, tokens: Int[np.ndarray, "sequences time"], *, batch: int = 4) -> dict[str, float]:
    """For every linear layer y = W x the mean squared gradient of the next-token loss at y, over tokens and outputs.

        g(layer) = mean_{q,t,i} ( ∂ nll_q / ∂ y[q, t, i] )²      nll_q summed over the tokens of sequence q

    Then the loss rises to first order of the Fisher approximation by ½ Σ_t g ‖E x_t‖² for an error E in W: the end-loss
    coefficient of a layer (GuidedQuant, arXiv 2505.07004, section 3, with one group). Raises what `squared_gradients` raises.
    """
    found = squared_gradients(model, tokens, batch=batch)
    return {name: float(s.mean(dtype=np.float64)) / shape_of(model.config, name)[0] for name, s in found.items()}


@jax.jit
def _forward(block: Block, x: Array, rope: tuple[Array, Array]) -> Array:
    return block(x, rope)


@jax.jit
def _head_gradient(model: Llama, x: Float[Array, "batch time n"], tokens: Int[Array, "batch time"]) -> Array:
    """∂ Σ nll / ∂x of the hidden state that leaves the last block."""

    def loss(x: Array) -> Array:
        logp = jax.nn.log_softmax(model.head(x)[:, :-1], axis=-1)
        return -jnp.sum(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

    return jax.grad(loss)(x)


@jax.jit
def _pull_back(
    block: Block, x: Array, rope: tuple[Array, Array], probes: dict[str, Array], g: Array
) -> tuple[Array, dict[str, Float[Array, "batch time"]]]:
    """From ∂loss/∂(the block's output): ∂loss/∂x, and s of each of its linear layers; `probes` has a zero for each token."""

    def watched(x: Array, probes: dict[str, Array]) -> Array:
        return block(x, rope, adjust=lambda name, y: _watch(y, probes[name]))

    return jax.vjp(watched, x, probes)[1](g)
