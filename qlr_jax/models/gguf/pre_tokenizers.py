"""How a byte-level tokenizer cuts text before it merges pairs, by llama.cpp's names: a GGUF file keeps the name alone.

Names: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp; regular expressions: tokenizer.json of the models that they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's types of tokens
SPACE = "▁"  # SentencePiece's own space

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = f"{_ENDINGS}{_LETTERS}{{1,3}}{_REST}"
QWEN2 = f"{_ENDINGS}{_LETTERS}{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text.

    Attributes:
        steps: one after another: "gpt2" (GPT-2's rule, and bytes), "bytes" (bytes alone), "digit" (every digit apart), or a regular
            expression whose matches are pieces.
        whole_words: a piece that is a token stays whole, whatever its merges.
        bos: a text begins with the token of that name where the file does not say.
        composed: text is brought into Unicode's form NFC first.
    """

    steps: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    composed: bool = False


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(("gpt2",)),
    "smollm": PreTokenizer(("digit", "gpt2")),
    "llama-bpe": PreTokenizer((LLAMA3, "bytes"), whole_words=True, bos=True),
    "dbrx": PreTokenizer((LLAMA3, "bytes")),
    "qwen2": PreTokenizer((QWEN2, "bytes"), composed=True),
    "deepseek-r1-qwen": PreTokenizer((QWEN2, "bytes")),
    "tekken": PreTokenizer((TEKKEN, "bytes"), whole_words=True, bos=True),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digit", "bytes")),
}
ALIASES: Mapping[str, str] = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe", "smaug-bpe": "dbrx",
    "starcoder": "smollm", "refact": "smollm", "codeshell": "smollm", "exaone": "smollm", "mpt": "gpt-2", "olmo": "gpt-2",
}  # fmt: skip
"""Further names of llama.cpp -> one of `PRE_TOKENIZERS` that cuts alike."""


def pre_tokenizer(name: str | None) -> PreTokenizer | None:
    """The way that a name means; None for one that is not known.

    Example:
        >>> pre_tokenizer("refact").steps, pre_tokenizer("default")
        (('digit', 'gpt2'), None)
    """
    return PRE_TOKENIZERS.get(ALIASES.get(name or "", name or ""))


def named(steps: tuple[str, ...], whole_words: bool, composed: bool) -> tuple[str, PreTokenizer] | None:
    """llama.cpp's name of a way of cutting, and what it means; None where the steps have no name.

    Where no way with these steps has the other two properties, one that lacks them.

    Example:
        >>> [named((LLAMA3, "bytes"), whole_words, False)[0] for whole_words in (True, False)]
        ['llama-bpe', 'dbrx']
    """
    found = [(name, way) for name, way in PRE_TOKENIZERS.items() if way.steps == steps]
    return max(found, key=lambda pair: (pair[1].whole_words == whole_words) + (pair[1].composed == composed), default=None)
