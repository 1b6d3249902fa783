"""Tokens that come one after another -> text that comes piece by piece, ended by stop strings."""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.generation import stream
from qlr_jax.evaluation.sampling import GenerationSettings, resolved
from qlr_jax.models.llama import Llama
from qlr_jax.models.vocabulary import check_tokens

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
TAIL = 8  # tokens of the prompt that new ones are decoded after: the first token of a text may lose its leading space
LONGEST_CHARACTER = 4  # tokens, where each is a byte of UTF-8


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a generation has added.

    Attributes:
        text: whole characters, certain to stay; may be empty.
        tokens: how many there are so far, the one that ended the text among them.
        finish: None while it goes on; "stop" at a stop string or an end-of-text token, "length" after as many tokens as were asked.
    """

    text: str
    tokens: int
    finish: str | None = None


def stream_text(
    model: Llama,
    tokenizer: Any,
    prompt: str,
    settings: GenerationSettings | None = None,
    *,
    stop: Sequence[str] = (),
    ends: Iterable[int] | None = None,
    **options: Any,
) -> Iterator[str]:
    """What follows the prompt, in pieces as they come; ends before the first stop string or at the end of the text.

    Args:
        model, settings, options: as for `generate`.
        tokenizer: of this model.
        prompt: tokenized as the tokenizer does by itself (with BOS, if that is its way); empty: BOS alone.
        stop: strings that end the text; they are not part of it.
        ends: token ids that end the text; the model's end-of-text tokens where not given.

    Returns:
        Pieces of text, whole characters each.

    Raises:
        QLRError: as `generate`, before the first piece; an empty prompt where the tokenizer has no BOS.
    """
    ids = encode_prompt(tokenizer, prompt)
    found = stream_pieces(model, tokenizer, ids, resolved(settings, options), stop=stop, ends=ends)
    return (piece.text for piece in found if piece.text)


def stream_pieces(
    model: Llama,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    stop: Sequence[str] = (),
    ends: Iterable[int] | None = None,
) -> Generator[Piece]:
    """As `stream_text`, for a prompt of token ids; with how many tokens have come, and in the last piece why it ended.

    Raises:
        QLRError: as `generate`; at once, not with the first piece.
    """
    ends = model.config.eos_ids if ends is None else tuple(ends)
    check_tokens(prompt, model.config.vocab_size, tokenizer)
    parts = stream(model, [prompt], settings, stop=ends)
    return pieces((part[0].tolist() for part in parts), tokenizer, prompt, stop, ends)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as the tokenizer makes them by itself; BOS where there would be none.

    Raises:
        QLRError: an empty prompt where the tokenizer has no BOS.
    """
    ids = list(tokenizer.encode(prompt)) if prompt else []
    if not ids and tokenizer.bos_token_id is None:
        raise QLRError("the prompt is empty, and the tokenizer has no BOS to start from; give some text")
    return ids or [tokenizer.bos_token_id]


def pieces(
    parts: Iterable[Sequence[int]], tokenizer: Any, prompt: Sequence[int], stop: Sequence[str], ends: Iterable[int] = ()
) -> Generator[Piece]:
    """Decode tokens as they come; what may be the start of a stop string, or half a character, waits for what follows.

    Args:
        parts: new token ids, a few at a time.
        tokenizer: decodes them.
        prompt: token ids before them.
        stop: strings that end the text; they are not part of it.
        ends: token ids that end it; their own text, if they have one, is not part of it.

    Returns:
        A piece for each part, the last one with its `finish`. Closing it lets go of what makes the parts.
    """
    decoder, stop, ends = Decoder(tokenizer, prompt), [word for word in stop if word], frozenset(ends)
    held, count, finish = "", 0, "length"
    for part in parts:
        for token in part:  # one by one, so that no token after a stop string is counted
            count += 1
            if token in ends:
                finish = "stop"
                break
            held += decoder.push(token)
            if (end := stop_position(held, stop)) < len(held):
                yield Piece(held[:end], count, "stop")
                return
        if finish == "stop":
            break
        safe = len(held) - undecided(held, stop)
        yield Piece(held[:safe], count)
        held = held[safe:]
    held += decoder.rest()
    end = stop_position(held, stop)
    yield Piece(held[:end], count, finish if end == len(held) else "stop")


class Decoder:
    """Tokens of one text, each decoded after those before it -> characters as soon as they are whole.

    Only the tokens that the last characters came from stay as what is before, so that a long text takes no longer a token.

    Args:
        tokenizer: decodes.
        prompt: token ids before the text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._tokenizer, self._ids, self._new = tokenizer, _tail(tokenizer, prompt), 0
        self._before = self._decoded().rstrip(UNFINISHED)  # a prompt may end in the middle of a character

    def push(self, token: int) -> str:
        """What one more token makes certain; nothing while a character is not whole."""
        self._ids.append(token)
        self._new += 1
        text = self._decoded()
        if text.endswith(UNFINISHED) or len(text) <= len(self._before):
            return ""
        found = text[len(self._before) :]
        self._ids, self._new = self._ids[-self._new :], 0
        self._before = self._decoded()
        return found

    def rest(self) -> str:
        """What is left at the end: of an unfinished character, what the tokenizer shows for it."""
        return self._decoded()[len(self._before) :] if self._new else ""

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


def decoded_after(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after a prompt, all at once.

    Args:
        tokenizer: decodes them.
        prompt, ids: token ids.
    """
    before = _tail(tokenizer, prompt)
    start = len(tokenizer.decode(before, skip_special_tokens=True))
    return tokenizer.decode([*before, *ids], skip_special_tokens=True)[start:]


def _tail(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from where a character begins: a tokenizer may show all bytes after half a one as unknown."""
    tails = [list(prompt[-size:]) for size in range(TAIL, TAIL + LONGEST_CHARACTER)]
    whole = (tail for tail in tails if not tokenizer.decode(tail, skip_special_tokens=True).startswith(UNFINISHED))
    return next(whole, tails[0])


def stop_position(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string begins, the length of the text where there is none.

    Example:
        >>> stop_position("a, b; c", ["; ", ", "]), stop_position("abc", ["x"])
        (1, 3)
    """
    return min([at for word in stop if (at := text.find(word)) >= 0], default=len(text))


def undecided(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the start of a stop string.

    Example:
        >>> undecided("one, tw", ["two"]), undecided("one", ["two"])
        (2, 0)
    """
    return max([size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])], default=0)
