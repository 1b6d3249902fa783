"""The text of an adaptation: sequences of tokens with what the teacher says about them, and the order in which they are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qlr_jax.adaptation.config import AdaptConfig
from qlr_jax.adaptation.teacher import TeacherLogits, teacher_logits
from qlr_jax.calibration import evenly_spaced
from qlr_jax.core.typing import Bool
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama
from qlr_jax.progress import Progress


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length and what the teacher says about them.

    Attributes:
        tokens: (rows, length).
        teacher: its kept logits over `tokens`, the teacher itself, or None.
    """

    tokens: np.ndarray
    teacher: Llama | TeacherLogits | None

    @property
    def resident_teacher(self) -> Llama | None:
        """The teacher that runs beside the student, where there is one."""
        return self.teacher if isinstance(self.teacher, Llama) else None

    def batch(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens and, where they are kept, ids and log-probabilities of the teacher, of these rows."""
        kept = (self.teacher.ids, self.teacher.logp) if isinstance(self.teacher, TeacherLogits) else ()
        return tuple(a[index] for a in (self.tokens, *kept))

    def part(self, count: int) -> Sequences:
        """`count` evenly spaced sequences, at least one."""
        index = evenly_spaced(len(self.tokens), count)
        teacher = self.teacher
        if isinstance(teacher, TeacherLogits):
            teacher = TeacherLogits(teacher.tokens[index], teacher.ids[index], teacher.logp[index])
        return Sequences(self.tokens[index], teacher)

    def seen_tokens(self, vocabulary: int) -> Bool[np.ndarray, "vocab"]:
        """Which tokens the text or its teacher's kept logits have: the embeddings of all others stay, as nothing is known of them.

        Example:
            >>> Sequences(np.array([[1, 3]]), None).seen_tokens(5).tolist()
            [False, True, False, True, False]
        """
        seen = np.zeros(vocabulary, bool)
        seen[self.tokens] = True
        if isinstance(self.teacher, TeacherLogits):
            for ids in self.teacher.ids:  # all at once would be copied to indices of 8 bytes
                seen[ids] = True
        return seen


def epoch_order(seed: int, step: int, count: int, rows: int) -> np.ndarray:
    """Which of `rows` sequences step `step` takes: every epoch all of them in a new order; a function of its arguments alone.

    Args:
        seed: of the permutations.
        step: counted from 0.
        count: sequences of a step.
        rows: of the text.

    Example:
        >>> sorted(np.concatenate([epoch_order(0, s, 2, 6) for s in range(3)]).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(step * count, (step + 1) * count)
    epochs = {e: np.random.default_rng([seed, e]).permutation(rows) for e in set((places // rows).tolist())}
    return np.array([epochs[p // rows][p % rows] for p in places.tolist()])


def prepare_sequences(
    model: Llama,
    tokens: Any,
    held_out: Any,
    teacher: Llama | TeacherLogits | None,
    held_out_teacher: TeacherLogits | None,
    config: AdaptConfig,
    progress: Progress,
) -> tuple[Sequences, Sequences | None]:
    """The text to train on and the one to validate on, with what the teacher says about them where the loss asks for it.

    Args:
        model: the compressed model.
        tokens, held_out: (rows, length); held_out may be None.
        teacher, held_out_teacher: as `fine_tune` takes them.
        config: the loss, and how many of the teacher's logits are kept.
        progress: where the teacher's pass is shown.

    Raises:
        QLRError: tokens that do not fit the model, a loss without its teacher, or a teacher that does not fit.
    """
    rows = _checked(model, tokens, "tokens")
    others = None if held_out is None else _checked(model, held_out, "held_out")
    if config.loss == "text":
        return Sequences(rows, None), None if others is None else Sequences(others, None)
    if teacher is None:
        raise QLRError(f"loss {config.loss!r} compares with the original model; pass it as teacher, or choose loss 'text'")
    if isinstance(teacher, TeacherLogits):
        if config.states:
            raise QLRError(
                f"states {config.states:g} needs the original's hidden states; pass the model itself as teacher, or states=0"
            )
        for given, kept, name in ((rows, teacher, "tokens"), (others, held_out_teacher, "held_out")):
            if given is not None and (kept is None or not np.array_equal(kept.tokens, given)):
                raise QLRError(f"the teacher's kept logits are not those of {name}; pass teacher_logits(original, {name}, top)")
        return Sequences(rows, teacher), None if others is None else Sequences(others, held_out_teacher)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise QLRError(
            f"the teacher has {teacher.config.vocab_size} tokens in its vocabulary, the model {model.config.vocab_size}; "
            "pass the original of this model"
        )
    if config.top is None or config.states:
        return Sequences(rows, teacher), None if others is None else Sequences(others, teacher)
    kept = [None if t is None else teacher_logits(teacher, t, config.top, progress=progress) for t in (rows, others)]
    return Sequences(rows, kept[0]), None if others is None else Sequences(others, kept[1])


def _checked(model: Llama, tokens: Any, name: str) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise QLRError(f"{name} has shape {tokens.shape}; pass (rows, length) with at least one row of two tokens")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise QLRError(f"{name} holds ids outside the vocabulary of {model.config.vocab_size}; use the model's own tokenizer")
    return tokens.astype(np.int32)
