"""Text -> evaluation windows by the protocol of GPTQ, QuIP# and CALDERA; how models are run over them in batches."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from qlr_jax.calibration.corpus import Corpus
from qlr_jax.calibration.tokens import WANTED, encode, fitting_length
from qlr_jax.errors import QLRError


@dataclasses.dataclass(frozen=True)
class Windows:
    """A text cut into windows, and what the cut left out.

    Attributes:
        rows: the tokens; the first of the first window is BOS where the tokenizer has one.
        bos: its id, None where there is none.
        dropped: tokens at the end that fill no window.
    """

    rows: Int[np.ndarray, "windows length"]
    bos: int | None
    dropped: int


def cut(text: str, tokenizer: Any, length: int, vocabulary: int | None = None) -> Windows:
    """The whole text tokenized once after one BOS, cut into windows of `length` that do not overlap, the remainder dropped.

    Args:
        text: to evaluate on.
        tokenizer: of the model.
        length: tokens of a window, at least 2.
        vocabulary: of the model, as for `encode`.

    Raises:
        QLRError: not one window can be filled; a token that the model has no row for.
    """
    return cut_ids(encode(text, tokenizer, vocabulary), tokenizer.bos_token_id, length)


def cut_ids(ids: Int[np.ndarray, "tokens"], bos: int | None, length: int) -> Windows:
    """`cut` of a text's token ids.

    Args:
        ids: of the whole text, without BOS.
        bos: id of the token that comes before them, None for none.
        length: tokens of a window, at least 2.

    Raises:
        QLRError: not one window can be filled.
    """
    if length < 2:
        raise QLRError(f"windows of {length} tokens are asked for; at least 2 are needed")
    ids = ids if bos is None else np.concatenate([np.asarray([bos], np.int32), ids])
    count = len(ids) // length
    if not count:
        raise QLRError(f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text or a shorter window")
    return Windows(ids[: count * length].reshape(count, length), bos, len(ids) - count * length)


def cut_corpus(
    corpus: Corpus, tokenizer: Any, length: int, vocabulary: int, say: Callable[[str], None] | None = None, *, wanted: int = WANTED
) -> Windows:
    """`cut` of a corpus, whose windows may be shorter than `length` where its text is too short for one.

    Args:
        corpus: without weights.
        tokenizer, length, vocabulary: as for `cut`.
        say: is told of shorter windows; None: they are refused.
        wanted: windows, where they are shorter.

    Raises:
        QLRError: as `cut` and `Corpus.text`.
    """
    corpus.text(tokenizer)  # refuses weights
    ids, bos = corpus.ids(tokenizer, vocabulary)[0], tokenizer.bos_token_id
    count = len(ids) + (bos is not None)
    if say is not None and (shorter := fitting_length(count, length, wanted)) < length:
        say(f"the text has {count:,} tokens, too few for a window of {length:,}: {count // shorter} windows of {shorter} are taken")
        length = shorter
    return cut_ids(ids, bos, length)


def windows(text: str, tokenizer: Any, length: int, vocabulary: int | None = None) -> Int[np.ndarray, "windows length"]:
    """The rows of `cut`, (windows, length).

    Args:
        text, tokenizer, length, vocabulary: as for `cut`.
    """
    return cut(text, tokenizer, length, vocabulary).rows


def batches(rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """(rows of one batch, how many of them count); the last batch is filled up with its last row: one compilation serves all.

    Args:
        rows: (windows, ...), tokens or what belongs to them.
        batch: rows of a batch, at most.

    Raises:
        QLRError: a batch below 1.
    """
    if batch < 1:
        raise QLRError(f"batch is {batch}; give at least 1")
    batch = min(batch, len(rows))
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        yield np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)]), len(part)


def fitting_batch(vocab_size: int, length: int, most: int = 8, max_bytes: int = 1_000_000_000) -> int:
    """How many windows a batch may have, so that one float32 array of its logits stays below `max_bytes`; at least 1.

    Args:
        vocab_size: of the model.
        length: tokens of a window.
        most: windows of a batch.
        max_bytes: of the logits.

    Example:
        >>> fitting_batch(2048, 256), fitting_batch(128_256, 2048)
        (8, 1)
    """
    return max(1, min(most, max_bytes // (4 * vocab_size * length)))
