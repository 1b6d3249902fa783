"""Text -> calibration sequences of one length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from qlr_jax.errors import QLRError
from qlr_jax.models.vocabulary import check_tokens

SHORTEST, WANTED = 32, 4  # tokens of a sequence and number of sequences, where a text is too short for a long one


def encode(text: str, tokenizer: Any, vocabulary: int | None = None) -> Int[np.ndarray, "tokens"]:
    """Token ids of the whole text with no special tokens added; the text may be longer than the model's context.

    Args:
        text: to read.
        tokenizer: of the model.
        vocabulary: of the model, where ids (BOS too, which is put before them) are to be held to it.

    Raises:
        QLRError: a token that the model has no row for.
    """
    # The tokenizer warns about lengths beyond the context; here the ids are cut into windows, so it has no meaning.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = np.asarray(ids, np.int32)
    if vocabulary is not None:
        check_tokens(found, vocabulary, tokenizer)
        check_tokens([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], vocabulary, tokenizer)
    return found


def evenly_spaced(rows: int, count: int) -> Int[np.ndarray, "some"]:
    """Indices of `count` of `rows`, at least one and at most all, in equal distances.

    Example:
        >>> evenly_spaced(10, 4).tolist(), evenly_spaced(3, 5).tolist()
        ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.linspace(0, rows - 1, min(rows, max(1, count))).round().astype(int)


def subsample(rows: Int[np.ndarray, "rows length"], tokens: int) -> Int[np.ndarray, "some length"]:
    """Rows in equal distances, at most `tokens` tokens of them but at least one row: a text's beginning need not be like the rest.

    Example:
        >>> subsample(np.arange(20).reshape(10, 2), 8)[:, 0].tolist()
        [0, 6, 12, 18]
    """
    return rows[evenly_spaced(len(rows), tokens // rows.shape[1])]


def fitting_length(tokens: int, length: int, wanted: int = WANTED) -> int:
    """The length of a sequence; where the text does not fill one, that which gives as many as are wanted, unless they get short.

    Args:
        tokens: that the text has.
        length: of a sequence where there is text enough.
        wanted: sequences of a text that is too short for one of `length`.

    Example:
        >>> fitting_length(5000, 2048), fitting_length(1500, 2048), fitting_length(9, 2048)
        (2048, 375, 9)
    """
    return length if tokens >= length else max(2, min(tokens, max(SHORTEST, tokens // wanted)))


def shares(counts: Sequence[int], weights: Sequence[float], sequences: int, body: int) -> list[int]:
    """How many sequences each of several texts gives, in the proportion of their weights, at least one.

    Where a text has too few for its share, all give less, so that the proportion holds.

    Args:
        counts: tokens of each text.
        weights: of each.
        sequences: in all, at most.
        body: tokens of a text that a sequence takes.

    Example:
        >>> shares([9000, 9000], [2, 1], 256, 10), shares([9000, 50], [2, 1], 256, 10), shares([90], [1], 256, 10)
        ([171, 85], [10, 5], [9])
    """
    available, whole = [count // body for count in counts], sum(weights)
    total = min([sequences, *(int(own * whole / weight) for own, weight in zip(available, weights, strict=True))])
    exact = [total * weight / whole for weight in weights]
    found = [int(share) for share in exact]
    for at in sorted(range(len(found)), key=lambda at: found[at] - exact[at])[: total - sum(found)]:
        found[at] += 1
    return [min(max(share, 1), own) for share, own in zip(found, available, strict=True)]


def spread(ids: Int[np.ndarray, "tokens"], sequences: int, length: int, bos: int | None) -> Int[np.ndarray, "sequences length"]:
    """Windows that never overlap, evenly spaced over the ids, each behind BOS where there is one; there have to be enough."""
    body = length if bos is None else length - 1
    starts = np.arange(sequences) * (len(ids) - body) // max(sequences - 1, 1)
    out = np.stack([ids[s : s + body] for s in starts])
    return out if bos is None else np.concatenate([np.full((sequences, 1), bos, np.int32), out], axis=1)


def calibration_tokens(text: str, tokenizer: Any, sequences: int, length: int) -> Int[np.ndarray, "sequences length"]:
    """Windows of one length, evenly spaced over the text, that never overlap; each starts with BOS if the tokenizer has one.

    Args:
        text: of calibration.
        tokenizer: of the model.
        sequences: how many windows.
        length: tokens of each, BOS included.

    Raises:
        QLRError: fewer than one sequence of two tokens; a text with too few tokens, naming how many there are and are needed.
    """
    if sequences < 1 or length < 2:
        raise QLRError(f"{sequences} sequences of {length} tokens are asked for; give at least 1 sequence of 2 tokens")
    ids, bos = encode(text, tokenizer), tokenizer.bos_token_id
    body = length if bos is None else length - 1
    if len(ids) < sequences * body:
        raise QLRError(
            f"the calibration text has {len(ids)} tokens, but {sequences} sequences of {length} need {sequences * body}; "
            "give more text, or ask for fewer or shorter sequences"
        )
    return spread(ids, sequences, length, bos)
