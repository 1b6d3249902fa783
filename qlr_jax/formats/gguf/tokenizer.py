"""A Hugging Face tokenizer as GGUF metadata: byte-level BPE as `gpt2`, BPE with byte fallback as `llama` (SentencePiece).

A vocabulary that llama.cpp would not split as the original does is not written at all: nearly right, it would mislead silently.
Keys: github.com/ggml-org/ggml, docs/gguf.md; algorithms: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.models import LlamaConfig
from qlr_jax.models.folder import load_tokenizer
from qlr_jax.models.gguf.pre_tokenizers import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, named


class _Unsupported(Exception):
    """Why llama.cpp cannot have this tokenizer."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF describes it.

    Attributes:
        model: "gpt2", "llama", or "no_vocab".
        tokens, types: by id, one for every row of the embedding.
        merges: of gpt2, "left right", the earliest first.
        scores: of llama, by id: the pair whose whole has the highest is merged first.
        pre: of gpt2, the pre-tokenizer's name in llama.cpp.
        flags, ids: further keys below "tokenizer.ggml.", e.g. add_bos_token, bos_token_id.
        template: chat template, or "".
        notes: sentences for people.
    """

    model: str
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pre: str = ""
    flags: tuple[tuple[str, bool], ...] = ()
    ids: tuple[tuple[str, int], ...] = ()
    template: str = ""
    notes: tuple[str, ...] = ()

    def write(self, writer: Any) -> None:
        """Add everything to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        if self.tokens:
            writer.add_token_list(self.tokens)
            writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, flag in self.flags:
            writer.add_bool(f"tokenizer.ggml.{name}", flag)
        for name, number in self.ids:
            writer.add_uint32(f"tokenizer.ggml.{name}", number)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, config: LlamaConfig) -> Vocabulary:
    """The vocabulary of a model folder's tokenizer; `no_vocab`, with the reason as a note, where GGUF cannot describe it."""
    try:
        try:
            tokenizer = load_tokenizer(folder)
            description = json.loads(tokenizer.backend_tokenizer.to_str())
        except (QLRError, AttributeError, ValueError) as error:
            raise _Unsupported(str(error)) from None
        return _vocabulary(tokenizer, description, config)
    except _Unsupported as why:
        return Vocabulary(
            "no_vocab",
            notes=(
                f"There is no vocabulary in model.gguf ({why}): llama-server and llama-cli stop without one; "
                "a program of your own runs it by giving llama_decode token ids.",
            ),
        )


def _vocabulary(tokenizer: Any, description: dict[str, Any], config: LlamaConfig) -> Vocabulary:
    model, added = description["model"], description.get("added_tokens") or []
    if model.get("type") != "BPE":
        raise _Unsupported(f"its tokenizer is {model.get('type')}, and llama.cpp merges pairs for this architecture")
    tokens, types, notes = _tokens(model["vocab"], added, model.get("unk_token"), bool(model["byte_fallback"]), config.vocab_size)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    flags, ids = _special(tokenizer, config)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    shared = {"tokens": tokens, "types": types, "ids": ids, "template": template}
    if model["byte_fallback"]:
        prefix, why = _space_prefix(description)
        scores = _scores(tokens, types, merges)
        wholes = [whole for whole, _ in groupby("".join(pair) for pair in merges)]
        if len(set(wholes)) < len(wholes):
            why.append("Merges that make one token are ranked apart in this tokenizer: llama.cpp may cut a few texts differently.")
        return Vocabulary("llama", scores=scores, flags=(*flags, ("add_space_prefix", prefix)), notes=(*notes, *why), **shared)
    pre, why = _pre_tokenizer(description)
    texts = tuple(" ".join(pair) for pair in merges)
    return Vocabulary("gpt2", merges=texts, pre=pre, flags=flags, notes=(*notes, *why), **shared)


def _tokens(
    vocab: dict[str, int], added: Sequence[dict[str, Any]], unknown: str | None, bytes_too: bool, size: int
) -> tuple[tuple[str, ...], tuple[int, ...], list[str]]:
    """(tokens, types, notes) of `size` ids: those that no token has are filled up, tokens beyond them are left out."""
    by_id = {i: (text, NORMAL) for text, i in vocab.items()}
    if bytes_too:
        by_id |= {vocab[text]: (text, BYTE) for text in (f"<0x{byte:02X}>" for byte in range(256)) if text in vocab}
    by_id |= {entry["id"]: (entry["content"], CONTROL if entry["special"] else USER_DEFINED) for entry in added}
    if unknown in vocab:
        by_id[vocab[unknown]] = unknown, UNKNOWN
    beyond = [text for i, (text, _) in by_id.items() if i >= size]
    notes = [f"Tokens that the embedding has no row for are left out: {', '.join(map(repr, beyond[:5]))}."] if beyond else []
    filled = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    return tuple(text for text, _ in filled), tuple(kind for _, kind in filled), notes


def _special(tokenizer: Any, config: LlamaConfig) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, int], ...]]:
    """(flags, ids): what is put around a text, as the tokenizer itself does it, and the ids that end one."""
    begin = config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = next(iter(config.eos_ids), None) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    further = [i for i in config.eos_ids if i != end]  # of all that end a text llama.cpp has three by id
    ids = {"bos": begin, "eos": end, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ids |= dict(zip(("eot", "eom"), further, strict=False))
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    flags = {"bos": whole[:1] == [begin] != bare[:1], "eos": whole[-1:] == [end] != bare[-1:]}
    known = tuple((f"{name}_token_id", i) for name, i in ids.items() if i is not None and 0 <= i < config.vocab_size)
    return tuple((f"add_{name}_token", bool(flag)) for name, flag in flags.items()), known


def _pre_tokenizer(description: dict[str, Any]) -> tuple[str, list[str]]:
    """(llama.cpp's name, notes) of what cuts a text before pairs are merged."""
    steps = _steps(description.get("pre_tokenizer"))
    if not {"gpt2", "bytes"} & set(steps):
        raise _Unsupported("its tokenizer works neither on bytes nor with byte fallback")
    ignoring = bool(description["model"].get("ignore_merges"))
    normalizer = description.get("normalizer")
    found = named(steps, ignoring, (normalizer or {}).get("type") == "NFC")
    if found is None or normalizer is not None:
        name = found[0] if found else "default"
        return name, [
            f"The way this tokenizer cuts text before merging is none that qlr-jax knows by name, so `tokenizer.ggml.pre` is "
            f"{name!r}: llama.cpp may cut some texts differently. Compare token ids before you rely on them."
        ]
    name, way = found
    differ = "A word that is a token stays whole here" if way.whole_words else "A word that is a token may be cut here"
    return name, [] if way.whole_words == ignoring else [f"{differ}, unlike in the original, where its own merges do not make it."]


def _steps(pre: dict[str, Any] | None) -> tuple[str, ...]:
    """A pre-tokenizer's steps as short words; a regular expression stands for itself."""
    steps = []
    for step in (pre or {}).get("pretokenizers") or [pre or {}]:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append("gpt2" if step.get("use_regex", True) else "bytes")
        elif kind == "Digits" and step.get("individual_digits"):
            steps.append("digit")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(step["pattern"].get("Regex", ""))
        else:
            steps.append(str(kind))
    return tuple(steps)


def _space_prefix(description: dict[str, Any]) -> tuple[bool, list[str]]:
    """(whether a text gets a space in front, notes) of a SentencePiece-like tokenizer."""
    pre, normalizer = description.get("pre_tokenizer"), description.get("normalizer")
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = {part["type"]: part for part in parts}
    if pre is None and "Replace" in kinds and set(kinds) <= {"Prepend", "Replace"} and kinds["Replace"]["content"] == SPACE:
        return "Prepend" in kinds, []
    if pre is None or pre.get("type") != "Metaspace" or pre.get("split") or pre["replacement"] != SPACE or parts:
        raise _Unsupported("its tokenizer has byte fallback, but cuts text unlike SentencePiece")
    scheme = pre["prepend_scheme"]
    if scheme == "never":
        return False, []
    where = "after special tokens, or before" if scheme == "first" else "before"
    return True, [f"llama.cpp puts a space before every piece of text; the original puts none {where} what begins with a space."]


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """By id minus the rank of the first merge that makes the token, so that the highest score is the earliest merge.

    llama.cpp merges any two neighbours whose whole is a token. So every way to cut a token in two must be a merge.
    """
    plain = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    known = set(merges)
    for text in plain:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in plain and pair[1] in plain and pair not in known:
                raise _Unsupported(f"its tokenizer does not merge {pair[0]!r} and {pair[1]!r}, and SentencePiece would")
    return tuple(-float(ranks.get(text, len(merges))) if text in plain else 0.0 for text in tokens)
