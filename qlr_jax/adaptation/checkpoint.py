"""Checkpoints of a training that is under way: arrays through orbax, numbers and history as JSON, one replaced by the next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from qlr_jax.errors import QLRError

LAST = "last"
Trees = dict[str, dict[str, dict[str, Any]]]
"""Title -> a tree of two levels: name of a matrix or norm -> its arrays by name."""


def save(folder: Path, trees: Trees, optimizer: Any, run: dict[str, Any]) -> None:
    """Write a checkpoint beside the old one, then put it in its place.

    Args:
        folder: of the checkpoints.
        trees: arrays by title, by matrix or norm, and by name.
        optimizer: its state, a tree.
        run: numbers and history, as JSON takes them.
    """
    new, last, old = (folder / name for name in (f"{LAST}.new", LAST, f"{LAST}.old"))
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    arrays = {f"{title}/{name}/{key}": a for title, tree in trees.items() for name, own in tree.items() for key, a in own.items()}
    # a list of leaves: the optimizer's own types are put back by the tree of a new one
    arrays |= {f"optimizer/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(optimizer))}
    ocp.save(str((new / "arrays").resolve()), {key: np.asarray(a) for key, a in arrays.items()})
    (new / "run.json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    if last.exists():
        last.rename(old)
    new.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, fingerprint: str) -> tuple[Trees, list[jax.Array], dict[str, Any]] | None:
    """(trees, the optimizer's leaves, numbers and history) of the last complete checkpoint in `folder`; None where there is none.

    Raises:
        QLRError: it belongs to another model, text or setting.
    """
    at = next((folder / name for name in (LAST, f"{LAST}.old") if (folder / name / "run.json").is_file()), None)
    if at is None:
        return None
    run = json.loads((at / "run.json").read_text(encoding="utf-8"))
    if run["fingerprint"] != fingerprint:
        raise QLRError(f"the checkpoint in {folder} is of another model, text or setting; give those, or another folder")
    trees: Trees = {}
    leaves: dict[int, jax.Array] = {}
    for path, array in ocp.load(str((at / "arrays").resolve())).items():
        title, rest = path.split("/", 1)
        if title == "optimizer":
            leaves[int(rest)] = jnp.asarray(array)
        else:
            name, key = rest.split("/")
            trees.setdefault(title, {}).setdefault(name, {})[key] = jnp.asarray(array)
    return trees, [leaves[i] for i in range(len(leaves))], run
