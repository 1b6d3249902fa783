"""How far a compressed model's hidden states have drifted from the original's, after every block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlr_jax.engine import HERE, Engine
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.forward import Parts, entering, leaving
from qlr_jax.models.llama import Llama
from qlr_jax.progress import Stage

TITLE = "comparing hidden states"  # of its pieces


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
    *,
    engine: Engine = HERE,
) -> Drift:
    """Run both models side by side, block by block, each on its own hidden states.

        d_l = mean_t ‖x̂_l,t − x_l,t‖ / ‖x_l,t‖,   x_l,t the original's state of token t after block l, x̂ the compressed model's

    In memory are one block and the states of all windows: a block is read or decoded once, and one compilation serves all.

    Args:
        original, compressed: of as many layers and of one width.
        windows: tokens, (windows, length).
        batch: windows of one pass.
        progress: advanced block by block.
        engine: where the windows go through both.

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
    models, rows = [Parts.of(original), Parts.of(compressed)], list(batches(windows, batch))
    ropes = [parts.rope(windows.shape[1]) for parts in models]
    states = [[engine.submit(entering, parts.embedding(), tokens, title=TITLE) for parts in models] for tokens, _ in rows]

    def total() -> list[Any]:
        """Over all tokens of each batch."""
        return [engine.submit(_ratios, *pair, live, title=TITLE) for pair, (_, live) in zip(states, rows, strict=True)]

    sums = [total()]
    for i in range(shapes[0][0]):
        for k, parts in enumerate(models):
            block = parts.block(i)
            for pair in states:
                pair[k] = engine.submit(leaving, block, ropes[k], pair[k], title=TITLE)
        sums.append(total())
        if progress is not None:
            progress.advance()
    engine.forget()
    means = np.array([sum(engine.result(part) for part in parts) for parts in sums]) / windows.size
    return Drift(float(means[0]), tuple(map(float, means[1:])), int(windows.size))


def _ratios(x: np.ndarray, y: np.ndarray, live: int) -> float:
    return float(np.asarray(_ratio(x, y), np.float64)[:live].sum())


@jax.jit
def _ratio(x: Float[Array, "batch time n"], y: Float[Array, "batch time n"]) -> Float[Array, "batch time"]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size, error = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y - x, axis=-1)
    return jnp.where((size == 0) & (error == 0), 0.0, error / size)
