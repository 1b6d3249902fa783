"""The pieces of a job on many machines, by Dask: `--cluster tcp://scheduler:8786 | local:4 | FILE`, or a `distributed.Client`."""

from qlr_jax.cluster.connect import connected
from qlr_jax.cluster.engine import DaskEngine

__all__ = ["DaskEngine", "connected"]
