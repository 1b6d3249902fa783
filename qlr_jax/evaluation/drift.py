"""How far a compressed model's hidden states have drifted from the original's, after every block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.forward import through
from qlr_jax.models.llama import Llama
from qlr_jax.progress import Stage


@dataclasses.dataclass(frozen=True)
class Drift:
    """Mean over tokens of ‖x̂ − x‖ / ‖x‖.

    Attributes:
        embedding: of the state that enters the first block.
        layers: of the state that each block leaves.
        tokens: how many tokens the means are over.
    """

    embedding: float
    layers: tuple[float, ...]
    tokens: int

    @property
    def worst(self) -> int:
        """The layer with the largest drift; the first that is not a number, where one is not."""
        return int(np.argmax(self.layers))


def drift(
    original: Llama,
    compressed: Llama,
    windows: Int[np.ndarray, "windows length"],
    batch: int = 1,
    progress: Stage | None = None,
) -> Drift:
    """Run both models side by side, block by block, each on its own hidden states.

        d_l = mean_t ‖x̂_l,t − x_l,t‖ / ‖x_l,t‖,   x_l,t the original's state of token t after block l, x̂ the compressed model's

    In memory are one block and the states of all windows: a block is read or decoded once, and one compilation serves all.

    Args:
        original, compressed: of as many layers and of one width.
        windows: tokens, (windows, length).
        batch: windows of one pass.
        progress: advanced block by block.

    Raises:
        QLRError: the two models differ in their layers or in their width.

    Example:
        >>> from qlr_jax.models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
        >>> model = Llama(config, jax.random.key(0))
        >>> drift(model, model, np.zeros((1, 5), np.int32))
        Drift(embedding=0.0, layers=(0.0, 0.0), tokens=5)
    """
    shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (original, compressed)]
    if shapes[0] != shapes[1]:
        raise QLRError(
            f"the models differ: {shapes[0][0]} layers of width {shapes[0][1]} and {shapes[1][0]} of {shapes[1][1]}; "
            "give a compressed model of this original"
        )
    models, rows = (original, compressed), list(batches(windows, batch))
    ropes = [model.rope(windows.shape[1]) for model in models]
    states = [[np.asarray(model.embed(jnp.asarray(tokens))) for model in models] for tokens, _ in rows]

    def total() -> float:
        """Over all tokens."""
        return sum(float(np.asarray(_ratio(x, y), np.float64)[:live].sum()) for (x, y), (_, live) in zip(states, rows, strict=True))

    sums = [total()]
    for i in range(shapes[0][0]):
        for k, model in enumerate(models):
            block = model.block(i)
            for pair in states:
                pair[k] = np.asarray(through(block, jnp.asarray(pair[k]), ropes[k]))
        sums.append(total())
        if progress is not None:
            progress.advance()
    means = np.array(sums) / windows.size
    return Drift(float(means[0]), tuple(map(float, means[1:])), int(windows.size))


@jax.jit
def _ratio(x: Float[Array, "batch time n"], y: Float[Array, "batch time n"]) -> Float[Array, "batch time"]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size, error = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y - x, axis=-1)
    return jnp.where((size == 0) & (error == 0), 0.0, error / size)
