"""Where arrays lie, and which device computes what: the one place that knows of devices.

A `Placement` is a mesh of this process's devices, or none where one device does it all. Three users share it:

    the solver (`matrix_placement`)       matrices of a batch shared out, and the rows of each where devices are left over
    calibration (`sequence_placement`)    sequences of a pass through the model, each device with a copy of the block
    adaptation (`batch_placement`)        sequences of a training batch, each device with a copy of the model

Arrays carry where they lie, and computation follows them. Of the solver, a function that is `sharded` runs on every device for the
matrices that lie there, and no device waits for another. Where a matrix has several devices, each holds all of it and does the same
as the others, except for what goes `by_rows`: there each does its share of the rows, and the shares are gathered.

A matrix that is alone on its devices comes out as on one device to the last bit, as far as a row of a product does not depend
on how many rows the product has (on CPUs it does not). Of a batch each device has fewer matrices than one alone would, and XLA may
then sum over a matrix in another order: scales can differ in their last bit, and a near tie among codes falls the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError

MATRICES, ROWS, SEQUENCES = "matrices", "rows", "sequences"
LEAST_ROWS = 512  # that are worth a device of their own: eight tile rows of a trellis, which are searched together
REPEATED = 0.1  # of a solve, about, is done on every device that a matrix has: factors, scales
# Where factorizations go one device after another: on a CPU their kernels wait, in the thread pool that its devices share, for work
# that they put into it, and once as many wait as it has threads they wait for ever (jaxlib 0.10.2, ParallelBatchMap).
ONE_AFTER_ANOTHER = ("cpu",)


@dataclass(frozen=True)
class Placement:
    """Devices, and how arrays are put on them.

    Attributes:
        mesh: its first axis shares out what there are many of, matrices or sequences; None is one device, the default one.

    Example:
        >>> HERE.count, HERE.shard(np.arange(2)).tolist()
        (1, [0, 1])
    """

    mesh: Mesh | None = None

    @property
    def count(self) -> int:
        """Devices along the axis that is shared out."""
        return 1 if self.mesh is None else self.mesh.shape[self.mesh.axis_names[0]]

    def shard(self, tree: Any, axis: int = 0) -> Any:
        """Arrays shared out along `axis`, whose length is a multiple of `count`."""
        if self.mesh is None:
            return jax.device_put(tree)  # jnp.asarray would compile a program for every shape
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.mesh.axis_names[0])))

    def replicate(self, tree: Any) -> Any:
        """A copy of all arrays on every device."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def place(self, array: Any) -> Any:
        """An array of one entry a matrix, (b, ...), shared out, or with b = 1 a copy on every device.

        Where b is no multiple of `count`, the last entry is repeated. On one device the array stays as it is.
        """
        if self.mesh is None:
            return array
        if len(array) == 1:
            return self.replicate(array)
        if fill := -len(array) % self.count:
            array = (jnp if isinstance(array, jax.Array) else np).concatenate([array, *[array[-1:]] * fill])
        return self.shard(array)


HERE = Placement()
"""One device."""


def device_kind() -> str:
    """What the default device calls itself, for reports."""
    return jax.devices()[0].device_kind


def sequence_placement(sequences: int, devices: int | None = None) -> Placement:
    """Devices for a pass of so many sequences, at most `devices` of this process's (None: all); `HERE` where one does it all.

    Example:
        >>> sequence_placement(1).count
        1
    """
    return line(min(available(devices), sequences))


@lru_cache
def line(count: int) -> Placement:
    """The first `count` of this process's devices, in a row.

    Example:
        >>> line(1) is HERE
        True
    """
    return HERE if count == 1 else _line(jax.local_devices()[:count])


def batch_placement(batch: int, devices: int | None = None) -> Placement:
    """Devices along which a training batch is divided: `devices` of this process's, or as many as divide it (None).

    Raises:
        QLRError: more devices than there are, or a number that does not divide the batch.
    """
    local = jax.local_devices()
    count = devices or math.gcd(batch, len(local))
    if count > len(local) or batch % count:
        raise QLRError(f"devices {count} cannot share a batch of {batch} here; pass a divisor of it, at most {len(local)}")
    return _line(local[:count])


def _line(devices: list[Any]) -> Placement:
    return Placement(Mesh(np.asarray(devices), (SEQUENCES,), axis_types=(AxisType.Auto,)))


def shares(matrices: int, rows: int, devices: int) -> tuple[int, int]:
    """(devices along the batch, devices a matrix) that leave the least work to each device.

    Args:
        matrices: of the batch.
        rows: of each matrix.
        devices: that there are.

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


def matrix_placement(matrices: int, rows: int, devices: int | None = None) -> Placement:
    """Devices for a batch of matrices; `HERE` where one does it all.

    Args:
        matrices: of the batch.
        rows: of each matrix.
        devices: how many of this process's to use at most; None: all.

    Raises:
        QLRError: `devices` below 1.
    """
    along, each = shares(matrices, rows, available(devices))
    return Placement(_mesh(along, each)) if along * each > 1 else HERE


@lru_cache
def _mesh(along: int, each: int) -> Mesh:
    # by hand rather than by jax.make_mesh: any number of devices will do, and there is too little traffic to order them for
    chosen = np.array(jax.local_devices()[: along * each]).reshape(along, each)
    return Mesh(chosen, (MATRICES, ROWS), axis_types=(AxisType.Auto,) * 2)


def placement_of(array: Any) -> Placement:
    """Where an array of matrices was placed (`matrix_placement`); `HERE` if it was not."""
    return Placement(_mesh_of(array))


def _mesh_of(array: Any) -> Mesh | None:
    if isinstance(array, Tracer) or not isinstance(array, jax.Array) or not isinstance(array.sharding, NamedSharding):
        return None
    mesh = array.sharding.mesh
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == (MATRICES, ROWS) else None


def sharded(function: Callable[..., Any], *, factors: bool = False) -> Callable[..., Any]:
    """The function, run by each device for its own matrices where an argument was placed on a mesh, and as it is elsewhere.

    Args:
        function: of arrays (b or 1, ...) and whatever is the same for all matrices, by position, and of static values by keyword;
            all its results are (b, ...).
        factors: whether it factors matrices or solves with factors: on the devices of a CPU that goes one device after another.

    Returns:
        A function of the same arguments; `function` itself is its `__wrapped__`.

    Example:
        >>> double = sharded(jax.jit(lambda x: 2 * x))
        >>> double(np.arange(3)).tolist()
        [0, 2, 4]
    """

    @wraps(function)
    def call(*arguments: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        mesh = next((found for leaf in leaves if (found := _mesh_of(leaf)) is not None), None)
        if mesh is None:
            return function(*arguments, **static)
        split = tuple(_mesh_of(leaf) is not None and leaf.sharding.spec[:1] == (MATRICES,) for leaf in leaves)
        key = function, mesh, tree, split, tuple(sorted(static.items()))
        if factors and mesh.devices.flat[0].platform in ONE_AFTER_ANOTHER:
            return _one_after_another(key, leaves)
        return _sharded(*key)(*leaves)

    return call


@lru_cache(maxsize=256)
def _sharded(function: Callable[..., Any], mesh: Mesh, tree: Any, split: tuple[bool, ...], static: tuple) -> Callable[..., Any]:
    """Compiled once for what these are."""

    def of_one_device(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(tree, leaves), **dict(static))

    specs = tuple(PartitionSpec(MATRICES) if s else PartitionSpec() for s in split)
    # loops begin with zeros that are the same everywhere, which is what the check would object to
    return jax.jit(jax.shard_map(of_one_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(MATRICES), check_vma=False))


def _one_after_another(key: tuple, leaves: list[Any]) -> Any:
    """What `_sharded` does, each device by itself; of those that one matrix has the first, and the others get copies."""
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


def one_by_one(function: Callable[..., Any], arrays: tuple[Any, ...], *rest: Any, **static: Any) -> Any:
    """`function(*arrays, *rest)`, a matrix at a time where one CPU has them all.

    Its factorizations go one after another anyway, and one program then serves batches of every size.

    Args:
        function: all of its results are (b, ...).
        arrays: (b or 1, ...), or None.
        rest, static: what is the same for all matrices.

    Example:
        >>> one_by_one(lambda x, y: x + y, (np.arange(3), np.ones(1, int))).tolist()
        [1, 2, 3]
    """
    count = max(len(array) for array in arrays if array is not None)
    if count == 1 or jax.default_backend() != "cpu" or any(_mesh_of(array) is not None for array in arrays):
        return function(*arrays, *rest, **static)
    # numpy slices and joins them: JAX would compile that for every shape
    host = [None if array is None else np.asarray(array) for array in arrays]
    found = [function(*(a if a is None or len(a) == 1 else a[i : i + 1] for a in host), *rest, **static) for i in range(count)]
    return jax.tree.map(lambda *parts: jax.device_put(np.concatenate([np.asarray(part) for part in parts])), *found)


def _part(leaf: Any, device: Any) -> Any:
    """What of a leaf lies on a device; a leaf that was not placed goes anywhere."""
    if _mesh_of(leaf) is None:
        return leaf
    return next(shard.data for shard in leaf.addressable_shards if shard.device == device)


def by_rows(function: Callable[..., Any], arrays: tuple[Array, ...], unit: int = 1) -> Any:
    """`function(*arrays)`, each of the devices that hold the arrays doing its share of rows; as it is where one device does.

    Args:
        function: treats all rows alike; its results are (b, rows / anything that divides `unit`, ...).
        arrays: (b, rows, ...), the first of them surely; (b, 1, ...) are the same for all rows.
        unit: rows that must stay together, a divisor of all rows.
    """
    count = _devices_a_matrix()
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


def _devices_a_matrix() -> int:
    """Along the axis of rows, inside a function that is `sharded`; JAX compiles again where that axis is another one."""
    try:
        return lax.axis_size(ROWS)
    except NameError:
        return 1


def product_by_rows(left: Array, right: Array) -> Array:
    """left · right for (b, m, k) and (b, k, n), the rows of `left` shared out (`by_rows`)."""
    return by_rows(lambda rows: jnp.matmul(rows, right, precision="highest"), (left,))


__all__ = [
    "HERE",
    "Placement",
    "available",
    "batch_placement",
    "by_rows",
    "device_kind",
    "matrix_placement",
    "one_by_one",
    "placement_of",
    "product_by_rows",
    "sequence_placement",
    "sharded",
    "shares",
]
