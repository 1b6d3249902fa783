"""Whether a model computes what transformers computes from the same folder."""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama

BLOCKS, TOKENS, LIMIT = 2, 48, 2e-4
"""Blocks and tokens that are compared; the largest difference of logits allowed, relative to the largest logit (float32: 1e-5)."""


def differs(model: Llama, folder: Path, blocks: int = BLOCKS) -> tuple[int, float, float] | None:
    """Compare the logits of the first blocks, the head behind them, with transformers' reading of the folder.

    max |ours − theirs| / max |theirs|

    Args:
        model: as it was read from `folder`.
        folder: with config.json and weights.
        blocks: how many, at most.

    Raises:
        QLRError: transformers cannot read the folder; says why.

    Returns:
        How many blocks were compared, the difference, and what is allowed; None where torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    config = model.config
    blocks = min(blocks, config.num_hidden_layers)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, min(TOKENS, config.max_position_embeddings)))
    try:
        theirs = _transformers_logits(folder, config.traits.architecture, blocks, tokens)
    except Exception as error:  # of many kinds, from validation to a type of weights that it does not load
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QLRError(f"transformers cannot read {folder} ({why})") from error
    x, rope = model.embed(jnp.asarray(tokens)), model.rope(tokens.shape[1])
    for i in range(blocks):
        x = model.block(i)(x, rope)
    ours = np.asarray(model.head(x), np.float64)
    return blocks, float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)), LIMIT


def _transformers_logits(folder: Path, architecture: str, blocks: int, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    # its own classes, never code that the folder brings
    kind: Any = getattr(transformers, architecture)
    config = kind.config_class.from_pretrained(folder, num_hidden_layers=blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    logs, (level, bars) = (
        transformers.logging,
        (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
    )
    logs.set_verbosity_error()  # the weights of further blocks are left out on purpose
    logs.disable_progress_bar()
    try:
        theirs = kind.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
    with torch.no_grad():
        return theirs(torch.tensor(tokens)).logits.double().numpy()
