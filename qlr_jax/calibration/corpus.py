"""The texts of a job, mixed as asked: documents of several sources with weights, in a chat template where that is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.calibration.files import Messages, Part, read_part
from qlr_jax.calibration.tokens import encode
from qlr_jax.errors import QLRError

Files = Sequence[str | Path] | str | Path | None
"""What names texts (`read_part`): several, one, or none."""


@dataclass(frozen=True)
class Corpus:
    """Texts to calibrate, train or evaluate on.

    Attributes:
        parts: in the order in which they were given.
        chat: whether the tokenizer's chat template is applied. A plain text then is conversations whose paragraphs (lines, where
            none is blank) are by turns the user's and the assistant's, two of each.
    """

    parts: tuple[Part, ...]
    chat: bool = False
    _ids: dict[int, tuple[Any, list[np.ndarray]]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, files: Files, chat: bool = False) -> Corpus:
        """The texts of files.

        Raises:
            QLRError: none is given, or what `read_part` raises.
        """
        given = [files] if isinstance(files, str | Path) else list(files or ())
        if not given:
            raise QLRError("no text file is given; give at least one UTF-8 text file")
        return cls(tuple(read_part(file, chat) for file in given), chat)

    @classmethod
    def of(cls, text: str | Corpus) -> Corpus:
        """A text as a corpus; a corpus as it is.

        Example:
            >>> Corpus.of("a text").content
            'a text'
        """
        return text if isinstance(text, Corpus) else cls((Part("text", (text,)),))

    @property
    def weighted(self) -> bool:
        """Whether its parts are mixed by weights; without any they are one text."""
        return len(self.parts) > 1 and any(part.weight is not None for part in self.parts)

    @property
    def weights(self) -> list[float]:
        """Of the texts that `texts` returns; 1 where a part was given none."""
        return [part.weight or 1.0 for part in self.parts] if self.weighted else [1.0]

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in part.notes)

    @property
    def content(self) -> str:
        """All that tells it from another: the text itself, where it is plain and not weighted."""
        if not self.weighted and all(isinstance(document, str) for part in self.parts for document in part.documents):
            return ("chat:\n" if self.chat else "") + self._joined(self.parts, None)
        return json.dumps([self.chat, self.weights, [part.documents for part in self.parts]])

    def texts(self, tokenizer: Any) -> list[str]:
        """One text for every weight.

        Raises:
            QLRError: the tokenizer has no chat template, or it does not take a conversation.
        """
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise QLRError("the tokenizer has no chat template, which --chat applies; leave it out, or give an instruct model")
        return [self._joined(parts, tokenizer) for parts in ([[p] for p in self.parts] if self.weighted else [self.parts])]

    def text(self, tokenizer: Any) -> str:
        """All of it as one text.

        Raises:
            QLRError: as `texts`; weights, which are for calibration.
        """
        if self.weighted:
            raise QLRError("weights (FILE:2) mix texts to calibrate on; leave them out of the texts to adapt to or to evaluate on")
        return self.texts(tokenizer)[0]

    def ids(self, tokenizer: Any, vocabulary: int | None = None) -> list[np.ndarray]:
        """Token ids of `texts`, encoded once.

        Args:
            tokenizer: of the model.
            vocabulary: of the model, as for `encode`.
        """
        if id(tokenizer) not in self._ids:  # the tokenizer is kept, so that its id stays its own
            self._ids[id(tokenizer)] = tokenizer, [encode(text, tokenizer, vocabulary) for text in self.texts(tokenizer)]
        return self._ids[id(tokenizer)][1]

    def _joined(self, parts: Sequence[Part], tokenizer: Any) -> str:
        chat = self.chat and tokenizer is not None
        made = lambda d, name: _templated(d, tokenizer, name) if chat or not isinstance(d, str) else d  # noqa: E731
        return "\n".join(("" if chat else "\n\n").join(made(d, part.name) for d in part.documents) for part in parts)


def _templated(document: str | Messages, tokenizer: Any, name: str) -> str:
    talks = [document] if not isinstance(document, str) else _turns(document)
    try:
        return "".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks)
    except Exception as error:  # templates raise as they like
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QLRError(f"{name}: the chat template refuses a conversation ({why}); leave it out, or change its turns") from None


def _turns(text: str) -> list[Messages]:
    """A plain text as conversations: its paragraphs, or lines where none is blank, are by turns what user and assistant say."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text.strip())]
    if len(paragraphs) == 1:
        paragraphs = [line.strip() for line in text.split("\n") if line.strip()]
    roles = ("user", "assistant")
    said = [{"role": roles[at % 2], "content": paragraph} for at, paragraph in enumerate(paragraphs)]
    return [said[at : at + 4] for at in range(0, len(said), 4)]
