"""The packed model as an Orbax checkpoint (v1): restored as arrays that lie sharded on a mesh, each host reading its own part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlr_jax.errors import QLRError
from qlr_jax.formats.files import staged
from qlr_jax.models.checkpoint import open_tensors
from qlr_jax.paths import local, output_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHTS = "weights"  # the checkpoint, in the exported folder
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

    from qlr_jax.formats.dense import check_type, complete
    from qlr_jax.formats.qlr.packed import check_folder, read_config

    check_type(dtype)
    out, dest = local(out), output_folder(dest, sources=[out])
    packed = check_folder(out)
    with staged(dest) as folder:
        arrays = dict(_typed(out, packed, np.dtype(dtype) if dtype != "bfloat16" else jax.numpy.bfloat16.dtype))
        ocp.save(str((folder / WEIGHTS).resolve()), arrays)
        notes = ["The weights are packed as in the original folder; what is not packed is " + dtype + "."]
        size = sum(array.nbytes for array in arrays.values())
        complete(folder, out, read_config(out)[0], target="orbax", snippet=SNIPPET, notes=notes, size=size)
    return dest


def _typed(out: Path, packed: set[str], kind: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, read in open_tensors(out).items():
        yield name, np.asarray(read()) if name in packed else np.asarray(read()).astype(kind)


def is_checkpoint(folder: Path) -> bool:
    """Whether `export_orbax` wrote it."""
    return (folder / WEIGHTS).is_dir()


def readers(folder: Path, mesh: Mesh | None = None) -> Mapping[str, Callable[[], Any]]:
    """Tensor name -> what gives it, all of the checkpoint restored at once; on a mesh as `row_sharding` has it.

    Raises:
        QLRError: a checkpoint that Orbax does not read.
    """
    from orbax.checkpoint import v1 as ocp

    path = str((folder / WEIGHTS).resolve())
    try:
        known = ocp.metadata(path).metadata
        wanted = {
            name: jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=row_sharding(entry.shape, mesh))
            for name, entry in known.items()
        }
        arrays = ocp.load(path, wanted)
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise QLRError(f"{folder}: the Orbax checkpoint cannot be read ({error}); export it again") from None
    return {name: lambda array=array: array for name, array in arrays.items()}


def row_sharding(shape: tuple[int, ...], mesh: Mesh | None) -> Any:
    """Where an array lies: its first axis, rows of tiles, divided along the mesh's first; a copy on each where it does not divide.

    Without a mesh: on the default device.
    """
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    axis = mesh.axis_names[0]
    divides = len(shape) > 1 and shape[0] % mesh.shape[axis] == 0
    return NamedSharding(mesh, PartitionSpec(axis) if divides else PartitionSpec())
