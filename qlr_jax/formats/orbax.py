"""The packed model as an Orbax checkpoint (v1), which `qlr_jax.load` restores on a mesh, each host reading its own part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlr_jax.formats.dense import check_type, complete
from qlr_jax.formats.files import staged
from qlr_jax.formats.qlr.packed import check_folder, read_config
from qlr_jax.formats.qlr.placed import WEIGHTS
from qlr_jax.models.checkpoint import open_tensors
from qlr_jax.paths import local, output_folder

SNIPPET = """import jax
import qlr_jax as qlr

mesh = jax.make_mesh((jax.device_count(),), ("rows",))
model = qlr.load("path/to/this/folder", mesh=mesh)
"""


def export_orbax(out: str | Path, dest: str | Path, dtype: str = "bfloat16") -> Path:
    """Write a packed folder as an Orbax checkpoint: a flat tree, tensor name -> array, codes and scales as they are.

    Args:
        out: a packed folder.
        dest: the folder to write; new or empty. The checkpoint is `dest`/weights, beside config.json and the tokenizer.
        dtype: of what is not packed, one of bfloat16, float16, float32.

    Returns:
        `dest`, which `qlr_jax.load` reads, with a mesh or without.

    Raises:
        QLRError: `out` cannot be loaded, `dest` already holds something, an unknown dtype.
    """
    from orbax.checkpoint import v1 as ocp

    check_type(dtype)
    out, dest = local(out), output_folder(dest, sources=[out])
    packed = check_folder(out)
    with staged(dest) as folder:
        arrays = dict(_typed(out, packed, np.dtype(getattr(ml_dtypes, dtype, dtype))))
        ocp.save(str((folder / WEIGHTS).resolve()), arrays)
        notes = ["The weights are packed as in the original folder; what is not packed is " + dtype + "."]
        size = sum(array.nbytes for array in arrays.values())
        raw, quantization = read_config(out)
        complete(folder, out, raw | {"quantization_config": quantization}, target="orbax", snippet=SNIPPET, notes=notes, size=size)
    return dest


def _typed(out: Path, packed: set[str], kind: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, read in open_tensors(out).items():
        yield name, np.asarray(read()) if name in packed else np.asarray(read()).astype(kind)
