"""How much the end loss feels an error in each linear layer's output: mean squared gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama
from qlr_jax.models.names import linear_names, shape_of


@jax.custom_vjp
def _watch(y: Array, probe: Array) -> Array:
    """y itself; the gradient that arrives for `probe` is Σ (∂loss/∂y)², so that no gradient need be kept."""
    return y


def _watch_forward(y: Array, probe: Array) -> tuple[Array, None]:
    return y, None


def _watch_backward(_: None, g: Array) -> tuple[Array, Array]:
    return g, jnp.sum(jnp.square(g.astype(jnp.float32)))


_watch.defvjp(_watch_forward, _watch_backward)


def output_gradients(model: Llama, tokens: Int[np.ndarray, "sequences time"], *, batch: int = 4) -> dict[str, float]:
    """For every linear layer y = W x the mean squared gradient of the next-token loss at y, over tokens and outputs.

        g(layer) = mean_{t,i} ( ∂ Σ_s nll_s / ∂ y[t, i] )²      nll summed over the tokens of a sequence

    Then the loss rises to first order of the Fisher approximation by ½ Σ_t g ‖E x_t‖² for an error E in W: the end-loss
    coefficient of a layer (GuidedQuant, arXiv 2505.07004, section 3, with one group). Raises QLRError naming a layer whose
    gradient is not finite. Memory is that of one backward pass over `batch` sequences.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise QLRError(f"tokens have shape {tokens.shape}; at least one sequence of two tokens is needed")
    names = linear_names(model.config)
    zeros = dict.fromkeys(names, jnp.zeros(()))
    total = dict.fromkeys(names, 0.0)
    batch = min(batch, len(tokens))
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        # Rows that fill up the last batch have weight zero: their loss, hence their gradient, is zero.
        live = np.arange(batch) < len(rows)
        rows = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
        for name, value in _squares(model, zeros, jnp.asarray(rows), jnp.asarray(live, jnp.float32)).items():
            total[name] += float(value)
    out = {name: total[name] / (tokens.size * shape_of(model.config, name)[0]) for name in names}
    for name, value in out.items():
        if not np.isfinite(value):
            raise QLRError(f"the gradient at the output of {name} is not finite; load the model in float32 and check its weights")
    return out


@jax.jit
def _squares(
    model: Llama, zeros: dict[str, Array], tokens: Int[Array, "batch time"], live: Float[Array, "batch"]
) -> dict[str, Array]:
    def loss(probes: dict[str, Array]) -> Array:
        logits = model(tokens, adjust=lambda name, y: _watch(y, probes[name]))
        logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * live[:, None])

    return jax.grad(loss)(zeros)
