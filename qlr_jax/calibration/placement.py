"""Where a pass through the model runs: its sequences shared out over this process's devices, each of which holds the block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Placement(NamedTuple):
    """How arrays are put on the devices.

    Attributes:
        spread: (sequences, ...) -> shared out; so many sequences as a multiple of `count`.
        copied: a tree of arrays -> on all devices.
        count: of devices.
    """

    spread: Callable[[Any], Any]
    copied: Callable[[Any], Any]
    count: int


HERE = Placement(jnp.asarray, lambda tree: tree, 1)
"""One device."""


def placement(sequences: int, devices: int | None = None) -> Placement:
    """The devices for so many sequences, at most `devices` of this process's (None: all).

    Example:
        >>> placement(1).count
        1
    """
    used = jax.local_devices()[: min(devices or sequences, sequences)]
    if len(used) == 1:
        return HERE
    mesh = jax.make_mesh((len(used),), ("sequences",), axis_types=(AxisType.Auto,), devices=used)
    shared, everywhere = NamedSharding(mesh, PartitionSpec("sequences")), NamedSharding(mesh, PartitionSpec())
    return Placement(lambda array: jax.device_put(array, shared), lambda tree: jax.device_put(tree, everywhere), len(used))
