"""How much the end loss feels an error in each linear layer's output: squared gradients by token, and G = E[g gᵀ] by output."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.calibration.backward import backward
from qlr_jax.errors import QLRError
from qlr_jax.models.forward import logits as logits_of
from qlr_jax.models.forward import through
from qlr_jax.models.llama import HIGHEST, Block, Llama, Top
from qlr_jax.models.names import layer_of, linear_names, shape_of

# ---- watchers: y itself, and what the probe's "gradient" becomes, so that no gradient of a token need be kept


@jax.custom_vjp
def _squares(y: Array, probe: Array) -> Array:
    """y itself; the gradient that arrives for `probe` (batch, time) is Σ_i (∂loss/∂y_i)² of every token."""
    return y


@jax.custom_vjp
def _products(y: Array, probe: Array) -> Array:
    """y itself; the gradient that arrives for `probe` (m, m) is Σ g gᵀ over all tokens, g = ∂loss/∂y."""
    return y


def _untouched(y: Array, probe: Array) -> tuple[Array, None]:
    return y, None


def _squared(_: None, g: Array) -> tuple[Array, Array]:
    return g, jnp.sum(jnp.square(g.astype(jnp.float32)), axis=-1)


def _multiplied(_: None, g: Array) -> tuple[Array, Array]:
    rows = g.astype(jnp.float32).reshape(-1, g.shape[-1])
    return g, jnp.einsum("ti,tj->ij", rows, rows, precision=HIGHEST, preferred_element_type=jnp.float32)


_squares.defvjp(_untouched, _squared)
_products.defvjp(_untouched, _multiplied)


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
        progress: called with the number of blocks that are newly done.

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
    tokens = _checked(tokens)
    out = {name: np.empty(tokens.shape, np.float32) for name in linear_names(model.config)}
    names, batch = _local_names(model), min(batch, len(tokens))
    probes = dict.fromkeys(names, jnp.zeros((batch, tokens.shape[1])))
    batches = list(_batches(tokens, batch))
    labels = []
    for rows, _, _ in batches:
        labels.append(np.full(rows.shape, NOTHING, np.int32))
        labels[-1][:, :-1] = rows[:, 1:]
    layers = dict.fromkeys(range(model.config.num_hidden_layers), probes)
    for i, j, found in _watched(model, [rows for rows, _, _ in batches], labels, layers, "squares"):
        _, start, live = batches[j]
        for name, value in found.items():
            out[f"model.layers.{i}.{name}"][start : start + live] = np.asarray(value)[:live]
        if progress is not None and j == len(batches) - 1:
            progress(1)
    return _finite(out)


def output_hessians(
    model: Llama,
    tokens: Int[np.ndarray, "sequences time"],
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    batch: int = 4,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
) -> dict[str, Float[np.ndarray, "m m"]]:
    """For every linear layer y = W x what an error in y does to the model's output distribution, token by token on the mean.

        G(layer) = mean_{q,t} g gᵀ      g = ∂ Σ_t' log p(z_t') / ∂ y[q, t],  labels z_t' drawn from the model's own p

    Then an error E in W alone costs KL(original ‖ changed) ≈ ½ tr(G E H Eᵀ) nats a token, H = E[x xᵀ]: the second-order expansion
    of the KL with its Fisher matrix, errors of different tokens taken to be independent and x of g (a Kronecker factorisation).
    One backward pass as in `squared_gradients`, of an (m, m) a layer of `names` (all where None).

    Args:
        seed: of the labels.
        progress: called with the number of blocks that are newly done.
        keep: (name, G) -> what is returned in its place, e.g. the same on disk, called as soon as G is done.

    Raises:
        QLRError: as `squared_gradients`.

    Source: Martens and Grosse, arXiv 1503.05671, section 3; for rounding: YAQA, arXiv 2505.22988, section 3 (sketch A).

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> output_hessians(Llama(config, jax.random.key(0)), np.array([[1, 5, 3]]))["model.layers.0.mlp.up_proj"].shape
        (8, 8)
    """
    tokens, wanted = _checked(tokens), list(names if names is not None else linear_names(model.config))
    sizes = {shape_of(model.config, name)[0] for name in wanted}
    zeros = {m: jnp.zeros((m, m)) for m in sizes}  # one of each size serves all blocks
    layers: dict[int, dict[str, Array]] = {}
    for name in wanted:
        i = layer_of(name)
        layers.setdefault(i, {})[name.removeprefix(f"model.layers.{i}.")] = zeros[shape_of(model.config, name)[0]]
    batches = list(_batches(tokens, min(batch, len(tokens))))
    key = jax.random.key(seed)
    labels = []
    for (_, start, live), logits in zip(batches, logits_of(model, [rows for rows, _, _ in batches]), strict=True):
        labels.append(np.array(_drawn(logits, jax.random.fold_in(key, start))))
        labels[-1][live:] = NOTHING  # repeats that fill the last batch
    out: dict[str, np.ndarray] = {}
    sums: dict[str, Array] = {}
    for i, j, found in _watched(model, [rows for rows, _, _ in batches], labels, layers, "products"):
        sums = {name: sums[name] + value if j else value for name, value in found.items()}
        if j == len(batches) - 1:  # the block is done
            mean = {
                f"model.layers.{i}.{name}": np.asarray(total, np.float32) / np.float32(tokens.size) for name, total in sums.items()
            }
            out |= {name: keep(name, value) for name, value in _finite(mean).items()}
            if progress is not None:
                progress(1)
    return {name: out[name] for name in wanted}


NOTHING = -1  # the label of a position whose prediction does not count


def _checked(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise QLRError(f"tokens have shape {tokens.shape}; at least one sequence of two tokens is needed")
    return tokens


def _finite(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise QLRError(f"the gradient at the output of {name} is not finite; load the model in float32 and check its weights")
    return found


def _local_names(model: Llama) -> list[str]:
    return [name.removeprefix("model.layers.0.") for name in linear_names(model.config) if layer_of(name) == 0]


def _batches(tokens: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(rows, first, how many are not repeats); every batch has one shape."""
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        yield np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)]), start, len(rows)


def _watched(
    model: Llama, batches: Sequence[np.ndarray], labels: Sequence[np.ndarray], probes: dict[int, dict[str, Array]], watch: str
) -> Iterator[tuple[int, int, dict[str, Array]]]:
    """From the last block to the first of those in `probes`: (layer, batch, what its probes received), of −Σ log p(labels)."""
    top = model.top()
    return backward(
        model,
        batches,
        lambda i, block, x, rope: through(block, x, rope),
        lambda j, x: _head_gradient(top, x, jnp.asarray(labels[j])),
        lambda i, j, block, x, rope, g: _pull_back(block, x, rope, probes.get(i, {}), g, watch=watch),
        first=min(probes),
    )


@jax.jit
def _drawn(logits: Float[Array, "batch time vocab"], key: Array) -> Int[Array, "batch time"]:
    """A label for every position, from the model's own distribution."""
    return jax.random.categorical(key, logits).astype(jnp.int32)


@jax.jit
def _head_gradient(top: Top, x: Float[Array, "batch time n"], labels: Int[Array, "batch time"]) -> Array:
    """∂ −Σ log p(label) / ∂x of the hidden state that leaves the last block."""

    def loss(x: Array) -> Array:
        logp = jax.nn.log_softmax(top(x), axis=-1)
        of = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, of, 0.0))

    return jax.grad(loss)(x)


@partial(jax.jit, static_argnames=("watch",))
def _pull_back(
    block: Block, x: Array, rope: tuple[Array, Array], probes: dict[str, Array], g: Array, *, watch: str
) -> tuple[Array, dict[str, Array]]:
    """From ∂loss/∂(the block's output): ∂loss/∂x, and what each probe of its linear layers receives."""
    see = {"squares": _squares, "products": _products}[watch]

    def watched(x: Array, probes: dict[str, Array]) -> Array:
        return block(x, rope, adjust=lambda name, y: see(y, probes[name]) if name in probes else y)

    return jax.vjp(watched, x, probes)[1](g)
