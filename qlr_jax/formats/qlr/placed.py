"""Where the arrays of a packed model lie: its rows of tiles divided along a mesh; and reading them so from an Orbax checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qlr_jax.errors import QLRError

WEIGHTS = "weights"  # the checkpoint, in a folder that `formats.orbax` wrote


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
    # whatever a mesh's axes are: XLA finds where results lie
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    divides = len(shape) > 1 and shape[0] % mesh.shape[axis] == 0
    return NamedSharding(mesh, PartitionSpec(axis) if divides else PartitionSpec())
