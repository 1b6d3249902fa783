"""Tokens that come one after another -> text that comes piece by piece, ended by stop strings."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.generation import stream
from qlr_jax.evaluation.sampling import GenerationSettings
from qlr_jax.models.llama import Llama
from qlr_jax.models.vocabulary import check_tokens

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
TAIL = 8  # tokens of the prompt that new ones are decoded after: the first token of a text may lose its leading space


def stream_text(
    model: Llama,
    tokenizer: Any,
    prompt: str,
    settings: GenerationSettings | None = None,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """What follows the prompt, in pieces as they come; ends before the first stop string or at the end of the text.

    Args:
        model, settings, options: as for `generate`.
        tokenizer: of this model.
        prompt: tokenized as the tokenizer does by itself (with BOS, if that is its way); empty: BOS alone.
        stop: strings that end the text; they are not part of it.

    Returns:
        Pieces of text, whole characters each.

    Raises:
        QLRError: as `generate`, before the first piece; an empty prompt where the tokenizer has no BOS.
    """
    ids = encode_prompt(tokenizer, prompt)
    check_tokens(ids, model.config.vocab_size, tokenizer)
    parts = stream(model, [ids], settings, **options)
    return pieces((part[0].tolist() for part in parts), tokenizer, ids, stop)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as the tokenizer makes them by itself; BOS where there would be none.

    Raises:
        QLRError: an empty prompt where the tokenizer has no BOS.
    """
    ids = list(tokenizer.encode(prompt)) if prompt else []
    if not ids and tokenizer.bos_token_id is None:
        raise QLRError("the prompt is empty, and the tokenizer has no BOS to start from; give some text")
    return ids or [tokenizer.bos_token_id]


def pieces(parts: Iterable[Sequence[int]], tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> Iterator[str]:
    """Decode tokens as they come; what may be the start of a stop string, or half a character, waits for what follows.

    Args:
        parts: new token ids, a few at a time.
        tokenizer: decodes them.
        prompt: token ids before them.
        stop: strings that end the text; they are not part of it.

    Returns:
        Pieces of text.
    """
    stop = [word for word in stop if word]
    before = list(prompt[-TAIL:])
    start = len(tokenizer.decode(before, skip_special_tokens=True))
    ids: list[int] = []
    text, shown = "", 0
    for part in parts:
        ids.extend(part)
        text = tokenizer.decode(before + ids, skip_special_tokens=True)[start:]
        if (end := stop_position(text, stop)) < len(text):
            text = text[:end]
            break
        safe = len(text) - undecided(text, stop)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    if len(text) > shown:
        yield text[shown:]


def stop_position(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string begins, the length of the text where there is none.

    Example:
        >>> stop_position("a, b; c", ["; ", ", "]), stop_position("abc", ["x"])
        (1, 3)
    """
    return min([at for word in stop if (at := text.find(word)) >= 0], default=len(text))


def undecided(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may still change: half a character, or the start of a stop string.

    Example:
        >>> undecided("one, tw", ["two"]), undecided("one", ["two"]), undecided("caf\\ufffd", [])
        (2, 0, 1)
    """
    half = len(text) - len(text.rstrip(UNFINISHED))
    starts = [size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])]
    return max([half, *starts])
