"""Moved to `qlr_jax.formats`; every public name is found here as before."""

from typing import Any

from qlr_jax import formats

__all__ = formats.__all__


def __getattr__(name: str) -> Any:
    return getattr(formats, name)
