"""What an adaptation hands back, and how it ended."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from qlr_jax.adaptation.student import EMBEDDINGS
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.models.llama import Llama


class AdaptationVerdict(enum.Enum):
    """How an adaptation ended; `str(verdict)` says what that means and what to do about it."""

    IMPROVED = "the loss fell and was still falling or level at the end; more steps may gain a little more"
    STOPPED_EARLY = "the loss on held-out text stopped falling, so training ended and the best was kept; more text would help"
    NOT_IMPROVED = (
        "the stored model is no better than before, so it is handed back unchanged; "
        "pass a lower learning rate, more steps, more text, or factors of more bits"
    )

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Adapted:
    """What `fine_tune` returns.

    Attributes:
        value: the adapted model, packed: QLRMatrix values of the new specs inside, new norms and embeddings (as bf16 holds them).
        verdict: how it ended.
        stats: `before`, `after`: the loss, nats a token, of the model as it was and is stored, on held-out text (on some training
            sequences where none was given); `bits_per_weight_before`, `bits_per_weight`; `bytes_before`, `bytes`; `trained`, how
            many numbers; `steps`; `seconds`; `history`: phase, step, loss and, after a validation step, held_out.
    """

    value: Llama
    verdict: AdaptationVerdict
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, QLRMatrix]:
        """Every packed matrix by its name, an embedding and a head among them, as `save_packed` takes them."""
        weights = {name: matrix.weight.get_value() for name, matrix in self.value.matrices().items()}
        return {name: value for name, value in weights.items() if isinstance(value, QLRMatrix)}

    @property
    def norms(self) -> dict[str, jax.Array]:
        """The weights of all norms by tensor name."""
        return {n: p.get_value() for n, p in self.value.tensors().items() if n.endswith("norm.weight")}

    @property
    def embeddings(self) -> dict[str, jax.Array]:
        """The embedding and, where it is not tied, lm_head by tensor name, (vocab, hidden)."""
        return {n: p.get_value() for n, p in self.value.tensors().items() if n in EMBEDDINGS}
