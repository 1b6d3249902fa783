"""Token ids that a model has no row for: they are refused wherever tokens come in, since an array lookup would clamp them."""

from typing import Any

import numpy as np
from jax.core import Tracer

from qlr_jax.errors import QLRError


def check_tokens(tokens: Any, vocabulary: int, tokenizer: Any = None) -> None:
    """Refuse ids that are negative or beyond the vocabulary. What is traced by JAX has no values yet and passes.

    Args:
        tokens: ids, of any shape.
        vocabulary: rows of the embedding.
        tokenizer: that made them, to name the token.

    Raises:
        QLRError: naming the first such token, how many tokens there are, and what to do.

    Example:
        >>> check_tokens([[0, 63]], 64)
        >>> check_tokens([[0, 64]], 64)
        Traceback (most recent call last):
            ...
        qlr_jax.errors.QLRError: token 64 is not in the model's vocabulary of 64; use the tokenizer of this model, or ...
    """
    if isinstance(tokens, Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    if not ids.size or not np.issubdtype(ids.dtype, np.integer) or (ids.min() >= 0 and ids.max() < vocabulary):
        return
    wrong = int(ids[(ids < 0) | (ids >= vocabulary)][0])
    name, size = str(wrong), "the tokenizer"
    if tokenizer is not None:
        text = tokenizer.convert_ids_to_tokens(wrong) if hasattr(tokenizer, "convert_ids_to_tokens") else None
        name = f"{text!r} (id {wrong})" if text is not None else name
        size = f"the {len(tokenizer)} tokens of this tokenizer" if hasattr(tokenizer, "__len__") else size
    raise QLRError(
        f"token {name} is not in the model's vocabulary of {vocabulary}; use the tokenizer of this model, or resize the original's "
        f"embedding to {size} (resize_token_embeddings in transformers) and start from that"
    )
