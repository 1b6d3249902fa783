"""Filling what is left of a budget greedily, the most damage saved per byte first."""

from __future__ import annotations

import numpy as np

from allocators.exact.hull import Blocks


def fill(blocks: Blocks, at: np.ndarray, left: int) -> np.ndarray:
    """Improve an allocation within the bytes left: again and again the change of one block that saves most damage per byte.

    Args:
        blocks: the table.
        at: joint choice of every block (of its `size`, `damage`, `choice`), (blocks,).
        left: bytes that may still be spent.

    Returns:
        The joint choices after the last change, (blocks,).
    """
    at = at.copy()
    rate, to = np.zeros(len(at)), at.copy()

    def best(k: int) -> None:
        block = blocks.blocks[k]
        more = block.size - block.size[at[k]]
        saved = block.damage[at[k]] - block.damage
        useful = (saved > 0) & (more <= left)
        rates = np.where(useful, np.where(more > 0, saved / np.maximum(more, 1), np.inf), 0.0)
        to[k] = np.argmax(rates)
        rate[k] = rates[to[k]]

    for k in range(len(at)):
        best(k)
    while True:
        k = int(np.argmax(rate))
        if rate[k] <= 0:
            return at
        block = blocks.blocks[k]
        more = int(block.size[to[k]] - block.size[at[k]])
        if more <= left:
            left -= more
            at[k] = to[k]
        for j in range(len(at)) if more < 0 else (k,):  # a change that frees bytes may let others fit
            best(j)
