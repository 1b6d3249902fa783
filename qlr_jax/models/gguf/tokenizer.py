"""A GGUF file's vocabulary as the tokenizer files of a Hugging Face folder; it cuts text as llama.cpp does, or is refused.

    gpt2     byte-level BPE: tokens and merges, cut beforehand as `tokenizer.ggml.pre` says
    llama    SentencePiece: of two neighbours that are a token together, those with the highest score are merged first

Keys: github.com/ggml-org/ggml, docs/gguf.md; algorithms: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.models.gguf.config import token_id, token_ids
from qlr_jax.models.gguf.file import GGUF
from qlr_jax.models.gguf.pre_tokenizers import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
)  # fmt: skip

BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class _Unsupported(Exception):
    """Why a vocabulary cannot be taken over."""


def companion_texts(file: GGUF) -> dict[str, str]:
    """Name -> content of what a Hugging Face folder holds beside config.json and weights: the tokenizer, generation_config.json.

    A vocabulary that is not supported is replaced by tokenizer.json beside the file, if that has the same tokens.

    Raises:
        QLRError: the vocabulary is not supported, and there is no such tokenizer.json; or it is damaged.
    """
    generation = {"_from_model_config": True, **token_ids(file)}
    try:
        texts = _tokenizer_texts(file)
    except _Unsupported as why:
        texts = _texts_beside(file, str(why))
    except QLRError:
        raise
    except Exception as error:  # tokenizers raises many kinds for lists that do not fit together
        raise QLRError(f"{file.path}: the vocabulary is damaged ({str(error).splitlines()[0]}); get the file again") from None
    return {**texts, "generation_config.json": json.dumps(generation, indent=2) + "\n"}


def _tokenizer_texts(file: GGUF) -> dict[str, str]:
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    model = file.keys.get("tokenizer.ggml.model")
    if model not in makers:
        raise _Unsupported(f"its vocabulary is of kind {model!r}, and known are {', '.join(makers)}")
    tokens, types = file.keys["tokenizer.ggml.tokens"], file.keys.get("tokenizer.ggml.token_type")
    types = types or [NORMAL] * len(tokens)
    # Rows of the embedding that no token has are filled up with [PAD…]; they are no part of a tokenizer.
    listed = [(i, t, k) for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k != UNUSED or t != f"[PAD{i}]"]
    tokenizer, begins = makers[model](file, listed)
    ends = False
    begins, ends = (bool(file.keys.get(f"tokenizer.ggml.add_{n}_token", v)) for n, v in (("bos", begins), ("eos", ends)))
    special = {name: None if (i := token_id(file, key)) is None else tokens[i] for name, key in SPECIAL.items()}
    _add_special(tokenizer, listed, set(special.values()))
    begins, ends = begins and special["bos_token"] is not None, ends and special["eos_token"] is not None
    _add_template(tokenizer, special["bos_token"] if begins else None, special["eos_token"] if ends else None)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in special.items() if v is not None}}
    config |= {"add_bos_token": begins, "add_eos_token": ends, "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": file.get("context_length")} if file.get("context_length") else {}
    if template := _chat_template(file):
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _byte_level(file: GGUF, listed: Sequence[tuple[int, str, int]]) -> tuple[Any, bool]:
    """(tokenizer, whether a text begins with BOS where the file does not say)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.keys.get("tokenizer.ggml.pre")
    way = pre_tokenizer(name)
    if way is None:
        said = "does not say how its tokenizer cuts text" if name in (None, "default") else f"cuts text in the way {name!r}"
        raise _Unsupported(f"it {said} before merging (tokenizer.ggml.pre), and known are {', '.join(PRE_TOKENIZERS)}")
    vocab = {text: i for i, text, _ in listed}
    merges = [_pair(text) for text in file.keys.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=way.whole_words))
    if way.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps = {
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digit": lambda: pre_tokenizers.Digits(individual_digits=True),
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [steps[step]() if step in steps else pre_tokenizers.Split(Regex(step), "isolated") for step in way.steps]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, way.bos


def _sentencepiece(file: GGUF, listed: Sequence[tuple[int, str, int]]) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.keys.get("tokenizer.ggml.scores")
    if not scores:
        raise _Unsupported("its SentencePiece vocabulary has no scores")
    vocab = {text: i for i, text, _ in listed}
    plain = {text for _, text, kind in listed if kind == NORMAL}
    pairs = [
        (-scores[i], i, text[:cut], text[cut:])
        for i, text, kind in listed
        if kind == NORMAL
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    ]
    merges = [(left, right) for _, _, left, right in sorted(pairs)]
    unknown = next((text for _, text, kind in listed if kind == UNKNOWN), None)
    bytes_too = any(kind == BYTE for _, _, kind in listed)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=unknown is not None, byte_fallback=bytes_too)
    )
    spaced = bool(file.keys.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if spaced else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)
    return tokenizer, True


def _add_special(tokenizer: Any, listed: Sequence[tuple[int, str, int]], named: set[str | None]) -> None:
    """Tokens that are found in a text before it is cut: control tokens, those with a role, and those that users defined."""
    from tokenizers import AddedToken

    for _, text, kind in listed:
        special = kind in (CONTROL, UNKNOWN) or text in named
        if special or kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])


def _add_template(tokenizer: Any, begin: str | None, end: str | None) -> None:
    from tokenizers import processors

    if begin is None and end is None:
        return
    around = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys((begin, end)) if text is not None]
    one = lambda part: " ".join(filter(None, (begin, part, end)))  # noqa: E731
    tokenizer.post_processor = processors.TemplateProcessing(one("$A"), f"{one('$A')} {one('$B:1')}", around)


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of "left right"; the space between is never the first character."""
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _chat_template(file: GGUF) -> str | list[dict[str, str]] | None:
    """The template, or where there are several a list with their names, both as tokenizer_config.json has them."""
    default = file.keys.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    others = {key.removeprefix(prefix): value for key, value in file.keys.items() if key.startswith(prefix)}
    if not others:
        return default or None
    every = ({"default": default} if default else {}) | others
    return [{"name": name, "template": template} for name, template in every.items()]


def _texts_beside(file: GGUF, why: str) -> dict[str, str]:
    folder = file.path.parent
    advice = "put the original's tokenizer.json and tokenizer_config.json beside it"
    if not (folder / "tokenizer.json").is_file():
        raise QLRError(f"{file.path}: {why}; {advice}")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in BESIDE if (folder / name).is_file()}
    tokens = file.keys.get("tokenizer.ggml.tokens")
    if tokens and not _same_tokens(texts["tokenizer.json"], tokens, file.keys.get("tokenizer.ggml.token_type")):
        raise QLRError(f"{file.path}: {why}; {folder / 'tokenizer.json'} has other tokens, so {advice}")
    return texts


def _same_tokens(text: str, tokens: Sequence[str], types: Sequence[int] | None) -> bool:
    from tokenizers import Tokenizer

    try:
        vocab = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception:  # what it raises has no class of its own
        return False
    types = types or [NORMAL] * len(tokens)
    return all(vocab.get(token) == i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == NORMAL)


def write_companions(file: GGUF, folder: Path) -> None:
    """Write `companion_texts` into a folder."""
    for name, text in companion_texts(file).items():
        (folder / name).write_text(text, encoding="utf-8")
