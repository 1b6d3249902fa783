"""The `inspect` command: what is inside a compressed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlr_jax.formats.qlr.packed import read_config, read_matrices
from qlr_jax.models import is_linear
from qlr_jax.paths import local


def inspect(out: str | Path) -> dict[str, Any]:
    """Every matrix of a compressed folder with its spec and bytes, and the totals.

    Args:
        out: what `compress` wrote.

    Returns:
        settings; matrices: [{name, spec, shape, bytes, bits}]; compressed_bytes, compressed_weights, bits_per_weight,
        safetensors_bytes; with a packed embedding or head, which bits_per_weight does not count,
        bits_per_weight_with_embedding_and_head too.

    Raises:
        QLRError: no compressed folder.
    """
    matrices = read_matrices(out)
    rows = [
        {"name": name, "spec": str(matrix.spec), "shape": list(matrix.shape), "bytes": matrix.nbytes, "bits": matrix.bits}
        for name, matrix in matrices.items()
    ]
    total, count = sum(r["bytes"] for r in rows), sum(r["shape"][0] * r["shape"][1] for r in rows)
    linear = [(r["bytes"], r["shape"][0] * r["shape"][1]) for r in rows if is_linear(r["name"])]
    settings = {k: v for k, v in read_config(out)[1].items() if k != "matrices"}
    size = sum(f.stat().st_size for f in local(out).glob("*.safetensors"))
    return {
        "settings": settings, "matrices": rows, "compressed_bytes": total, "compressed_weights": count,
        **({"bits_per_weight_with_embedding_and_head": 8 * total / count} if len(linear) < len(rows) else {}),
        "bits_per_weight": 8 * sum(size for size, _ in linear) / sum(n for _, n in linear) if linear else None,
        "safetensors_bytes": size,
    }  # fmt: skip
