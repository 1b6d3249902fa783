"""The devices of one process: matrices of a batch are shared out over them, and rows of a matrix where devices are left over.

A mesh has two axes, `matrices` and `rows`. Arrays carry where they lie, and computation follows them: what is called by way of
`spread` runs on every device for the matrices that lie there, and no device waits for another. Where a matrix has several devices,
each holds all of it and does the same as the others, except for what goes `by_rows`: there each does its share of the rows, and
the shares are gathered.

A matrix that is alone on its devices comes out as on one device to the last bit, as far as a row of a product does not depend
on how many rows the product has (on CPUs it does not). Of a batch each device has fewer matrices than one alone would, and XLA may
then sum over a matrix in another order: scales can differ in their last bit, and a near tie among codes falls the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError

MATRICES, ROWS = "matrices", "rows"
LEAST_ROWS = 512  # that are worth a device of their own: eight walks of a trellis, which are searched together
REPEATED = 0.1  # of a solve, about, is done on every device that a matrix has: factors, scales
# Where factorizations go one device after another: on a CPU their kernels wait, in the thread pool that its devices share, for work
# that they put into it, and once as many wait as it has threads they wait for ever (jaxlib 0.10.2, ParallelBatchMap).
ONE_AFTER_ANOTHER = ("cpu",)


def shares(matrices: int, rows: int, devices: int) -> tuple[int, int]:
    """(devices along the batch, devices a matrix) that leave the least work to each device.

    Example:
        >>> shares(16, 256, 8), shares(2, 4096, 8), shares(3, 4096, 8), shares(1, 1024, 8)
        ((8, 1), (2, 4), (3, 2), (1, 2))
    """
    split = {k: min(devices // k, max(1, rows // LEAST_ROWS)) for k in range(min(matrices, devices), 0, -1)}
    along = min(split, key=lambda k: -(-matrices // k) * (REPEATED + (1 - REPEATED) / split[k]))
    return along, split[along]


def available(devices: int | None = None) -> int:
    """How many of this process's devices to use where at most `devices` are wanted; None: all.

    Raises:
        QLRError: `devices` below 1.
    """
    if devices is not None and devices < 1:
        raise QLRError(f"devices={devices} leaves nothing to compute on; pass 1 or more, or None for all")
    return jax.local_device_count() if devices is None else min(devices, jax.local_device_count())


def mesh_for(matrices: int, rows: int, devices: int | None = None) -> Mesh | None:
    """The mesh for a batch of matrices of so many rows on at most so many devices (`available`); None where one does it all."""
    along, each = shares(matrices, rows, available(devices))
    return _mesh(along, each) if along * each > 1 else None


@lru_cache
def _mesh(along: int, each: int) -> Mesh:
    # by hand rather than by jax.make_mesh: any number of devices will do, and there is too little traffic to order them for
    chosen = np.array(jax.local_devices()[: along * each]).reshape(along, each)
    return Mesh(chosen, (MATRICES, ROWS), axis_types=(AxisType.Auto,) * 2)


def place(array: Any, mesh: Mesh | None) -> Any:
    """An array of one entry a matrix, (b, ...), shared out over the mesh, or with b = 1 a copy on every device.

    Where b is no multiple of the devices along the batch, the last entry is repeated. With no mesh the array stays as it is.
    """
    if mesh is None:
        return array
    count, along = len(array), mesh.shape[MATRICES]
    if count == 1:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
    if fill := -count % along:
        array = (jnp if isinstance(array, jax.Array) else np).concatenate([array, *[array[-1:]] * fill])
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(MATRICES)))


def mesh_of(array: Any) -> Mesh | None:
    """Where an array was placed."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array) or not isinstance(array.sharding, NamedSharding):
        return None
    mesh = array.sharding.mesh
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == (MATRICES, ROWS) else None


def rows_shared(array: Any) -> int:
    """Devices that a matrix of a placed array has: what `by_rows` takes as `count`."""
    mesh = mesh_of(array)
    return mesh.shape[ROWS] if mesh is not None else 1


def spread(function: Callable[..., Any], factors: bool = False) -> Callable[..., Any]:
    """The function, run by each device for its own matrices where an argument was placed on a mesh, and as it is elsewhere.

    Args:
        function: of arrays (b or 1, ...) and whatever is the same for all matrices, by position, and of static values by keyword;
            all its results are (b, ...).
        factors: whether it factors matrices or solves with factors: on the devices of a CPU that goes one device after another.

    Example:
        >>> double = spread(jax.jit(lambda x: 2 * x))
        >>> double(np.arange(3)).tolist()
        [0, 2, 4]
    """

    def call(*arguments: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        mesh = next((found for leaf in leaves if (found := mesh_of(leaf)) is not None), None)
        if mesh is None:
            return function(*arguments, **static)
        shared = tuple(mesh_of(leaf) is not None and leaf.sharding.spec[:1] == (MATRICES,) for leaf in leaves)
        key = function, mesh, tree, shared, tuple(sorted(static.items()))
        if factors and mesh.devices.flat[0].platform in ONE_AFTER_ANOTHER:
            return _one_after_another(key, leaves)
        return _spread(*key)(*leaves)

    return call


@lru_cache(maxsize=256)
def _spread(function: Callable[..., Any], mesh: Mesh, tree: Any, shared: tuple[bool, ...], static: tuple) -> Callable[..., Any]:
    """Compiled once for what these are."""

    def of_one_device(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(tree, leaves), **dict(static))

    specs = tuple(PartitionSpec(MATRICES) if s else PartitionSpec() for s in shared)
    # loops begin with zeros that are the same everywhere, which is what the check would object to
    return jax.jit(jax.shard_map(of_one_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(MATRICES), check_vma=False))


def _one_after_another(key: tuple, leaves: list[Any]) -> Any:
    """What `_spread` does, each device by itself; of those that one matrix has the first, and the others get copies."""
    function, mesh, tree, _, static = key
    sharding, found = NamedSharding(mesh, PartitionSpec(MATRICES)), []
    for device in mesh.devices[:, 0]:
        own = [_part(leaf, device) for leaf in leaves]
        found.append(jax.block_until_ready(function(*jax.tree.unflatten(tree, own), **dict(static))))

    def assembled(*parts: Array) -> Array:
        copies = [jax.device_put(part, device) for part, row in zip(parts, mesh.devices, strict=True) for device in row]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, copies)

    return jax.tree.map(assembled, *found)


def _part(leaf: Any, device: jax.Device) -> Any:
    """What of a leaf lies on a device; a leaf that was not placed goes anywhere."""
    if mesh_of(leaf) is None:
        return leaf
    return next(shard.data for shard in leaf.addressable_shards if shard.device == device)


def by_rows(function: Callable[..., Any], arrays: tuple[Array, ...], count: int, unit: int = 1) -> Any:
    """`function(*arrays)`, each of the `count` devices that hold the arrays doing its share of rows: inside `spread` only.

    Args:
        function: treats all rows alike; its results are (b, rows / anything that divides `unit`, ...).
        arrays: (b, rows, ...), the first of them surely; (b, 1, ...) are the same for all rows.
        count: devices; with 1 the function is called as it is.
        unit: rows that must stay together, a divisor of all rows.
    """
    if count == 1:
        return function(*arrays)
    rows = arrays[0].shape[1]
    share = -(-rows // (unit * count)) * unit

    def mine(array: Array) -> Array:
        if array.shape[1] == 1:
            return array
        filled = jnp.pad(array, [(0, 0), (0, share * count - rows), *[(0, 0)] * (array.ndim - 2)])
        return lax.dynamic_slice_in_dim(filled, lax.axis_index(ROWS) * share, share, axis=1)

    def gathered(found: Array) -> Array:
        whole = lax.all_gather(found, ROWS, axis=1, tiled=True)
        return whole[:, : rows * found.shape[1] // share]

    return jax.tree.map(gathered, function(*map(mine, arrays)))


__all__ = ["available", "by_rows", "mesh_for", "mesh_of", "place", "rows_shared", "shares", "spread"]
