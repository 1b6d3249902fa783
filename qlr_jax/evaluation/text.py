"""Tokens that come one after another -> text that comes piece by piece, ended by stop strings."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.generation import stream
from qlr_jax.models.llama import Llama

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
TAIL = 8  # tokens of the prompt that new ones are decoded after: the first token of a text may lose its leading space


def stream_text(
    model: Llama,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """What follows the prompt, in pieces as they come; ends before the first stop string or at the end of the text.

    Args:
        prompt: tokenized as the tokenizer does by itself (with BOS, if that is its way); empty: BOS alone.
        stop: strings that end the text; they are not part of it.
        max_new_tokens, temperature, top_k, top_p, seed: as for `generate`.

    Raises:
        QLRError: as `generate`; an empty prompt where the tokenizer has no BOS.
    """
    ids = encode_prompt(tokenizer, prompt)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    parts = stream(model, [ids], max_new_tokens=max_new_tokens, **settings)
    return pieces((part[0].tolist() for part in parts), tokenizer, ids, stop)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as the tokenizer makes them by itself; BOS where there would be none."""
    ids = list(tokenizer.encode(prompt)) if prompt else []
    if not ids and tokenizer.bos_token_id is None:
        raise QLRError("the prompt is empty, and the tokenizer has no BOS to start from; give some text")
    return ids or [tokenizer.bos_token_id]


def pieces(parts: Iterable[Sequence[int]], tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> Iterator[str]:
    """Decode tokens as they come; what may be the start of a stop string, or half a character, is held back."""
    stop = [word for word in stop if word]
    before = list(prompt[-TAIL:])
    start = len(tokenizer.decode(before, skip_special_tokens=True))
    ids: list[int] = []
    text, told = "", 0
    for part in parts:
        ids.extend(part)
        text = tokenizer.decode(before + ids, skip_special_tokens=True)[start:]
        if (end := cut_at(text, stop)) < len(text):
            text = text[:end]
            break
        safe = len(text) - held(text, stop)
        if safe > told:
            yield text[told:safe]
            told = safe
    if len(text) > told:
        yield text[told:]


def cut_at(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string begins, the length of the text where there is none.

    >>> cut_at("a, b; c", ["; ", ", "]), cut_at("abc", ["x"])
    (1, 3)
    """
    return min([at for word in stop if (at := text.find(word)) >= 0], default=len(text))


def held(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may still turn out otherwise.

    >>> held("one, tw", ["two"]), held("one", ["two"]), held("caf\\ufffd", [])
    (2, 0, 1)
    """
    half = len(text) - len(text.rstrip(UNFINISHED))
    starts = [size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])]
    return max([half, *starts])
