"""Small changes of an allocation: one block takes something else, or two blocks do at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocators.exact.hull import Blocks

MOST = 800  # moves that are paired with each other


@dataclass(frozen=True)
class Moves:
    """Changes of single blocks from one allocation; each leaves the ties intact.

    Args:
        block: which block each of them changes, (moves,).
        number: its number within the block, (moves,).
        size: change of bytes, (moves,).
        options: by block, option numbers of its rows after each of its moves.
    """

    block: np.ndarray
    number: np.ndarray
    size: np.ndarray
    options: list[np.ndarray]

    def apply(self, blocks: Blocks, picks: np.ndarray, *moves: int) -> np.ndarray:
        """The allocation after some moves of different blocks.

        Args:
            blocks: the table that the moves are of.
            picks: option number by row, before, (rows,).
            moves: numbers of the moves.
        """
        picks = picks.copy()
        for move in moves:
            k = int(self.block[move])
            picks[list(blocks.blocks[k].rows)] = self.options[k][self.number[move]]
        return picks


def moves(blocks: Blocks, picks: np.ndarray) -> Moves:
    """Every other option of every lone row; of tied rows every corner of their joint hulls, and every change of one row alone."""
    options, sizes = [], []
    for block, (rows, keys) in zip(blocks.blocks, blocks.groups, strict=True):
        own = picks[list(rows)]
        if len(rows) == 1:
            found = np.concatenate([key[0] for key in keys])[:, None]
        else:
            under = next(key for key in keys if all(k in among for k, among in zip(own, key, strict=True)))
            alone = []
            for place, among in enumerate(under):
                one = np.repeat(own[None, :], len(among), axis=0)
                one[:, place] = among
                alone.append(one)
            found = np.concatenate([block.choice, *alone])
        found = found[(found != own).any(axis=1)]
        now = sum(int(blocks.size[i][k]) for i, k in zip(rows, own, strict=True))
        options.append(found)
        sizes.append(sum((blocks.size[i][found[:, place]] for place, i in enumerate(rows)), np.zeros(len(found), np.int64)) - now)
    count = [len(size) for size in sizes]
    return Moves(
        np.repeat(np.arange(len(count)), count), np.concatenate([np.arange(n) for n in count]), np.concatenate(sizes), options
    )


def promising(size: np.ndarray, change: np.ndarray, most: int = MOST) -> np.ndarray:
    """Indices of the moves worth pairing: those that lose least damage per byte freed, and those that save most per byte spent.

    Args:
        size: change of bytes of each move, (moves,).
        change: change of damage of each move, (moves,).
        most: how many to return, half of either kind at most.
    """
    rate = np.where(size == 0, np.where(change < 0, -np.inf, np.inf), change / np.maximum(np.abs(size), 1))
    order = np.argsort(rate, kind="stable")
    frees = size[order] < 0
    return np.sort(np.concatenate((order[frees][: most // 2], order[~frees][: most // 2])))
