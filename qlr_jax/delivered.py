"""What can be asked of a compressed folder: how good it is, and what is inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlr_jax import calibration as calibrating
from qlr_jax import evaluation as evaluating
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import compare
from qlr_jax.export.packed import load, read_config, read_matrices
from qlr_jax.models import find_folder, load_model, load_tokenizer
from qlr_jax.preparation import BUNDLED, BUNDLED_NAME, spread
from qlr_jax.progress import Progress, silent


def evaluate(
    out: str | Path,
    *,
    text: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    progress: Progress | None = None,
    windows: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a compressed folder and its divergence from the original, on a text.

    Args:
        out: what `compress` wrote.
        text: file(s); the held-out part of this machine's standard library where none is given and the model is the bundled one.
        original: folder or name of the original; what the folder's config names where not given.
        windows: how many windows at most, spread over the text.
    """
    progress = progress or silent()
    with progress.stage("loading"):
        base = original or read_config(out)[1].get("settings", {}).get("base_model")
        if not base:
            raise QLRError(f"{out} does not say what it was compressed from; pass the original model's folder (--original)")
        base = BUNDLED if base == BUNDLED_NAME else base
        compressed, tokenizer, first = load(out).densified(), load_tokenizer(out), load_model(base)
    if not text and find_folder(base) != BUNDLED:
        raise QLRError("no text was given to evaluate on; pass --text FILE")
    content = calibrating.read_text(text) if text else calibrating.standard_library("heldout")
    rows = evaluating.windows(content, tokenizer, min(2048, compressed.config.max_position_embeddings))
    rows = rows if windows is None else spread(rows, windows * rows.shape[1])
    with progress.stage(f"evaluating {rows.size} tokens"):
        found = compare(first, compressed, rows)
    protocol = (
        f"one BOS, {len(rows)} windows of {rows.shape[1]} tokens that do not overlap, mean over windows; tokenizer of the model"
    )
    return dataclasses.asdict(found) | {
        "perplexity_ratio": found.perplexity_ratio,
        "window": int(rows.shape[1]),
        "protocol": protocol,
    }


def inspect(out: str | Path) -> dict[str, Any]:
    """What is inside a compressed folder: every matrix with its spec and bytes, and the totals."""
    matrices = read_matrices(Path(out))
    rows = [
        {
            "name": n,
            "spec": str(m.spec),
            "shape": list(m.shape),
            "bytes": m.nbytes,
            "bits": 8 * m.nbytes / (m.shape[0] * m.shape[1]),
        }
        for n, m in matrices.items()
    ]
    total, count = sum(r["bytes"] for r in rows), sum(r["shape"][0] * r["shape"][1] for r in rows)
    settings = {k: v for k, v in read_config(out)[1].items() if k != "matrices"}
    size = sum(f.stat().st_size for f in Path(out).glob("*.safetensors"))
    return {
        "settings": settings, "matrices": rows, "compressed_bytes": total, "compressed_weights": count,
        "bits_per_weight": 8 * total / count if count else None, "safetensors_bytes": size,
    }  # fmt: skip
