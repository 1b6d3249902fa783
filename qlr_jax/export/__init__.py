"""The former address of `qlr_jax.formats`: every public name still resolves here, with one FutureWarning that names the new one."""

import warnings
from typing import Any

from qlr_jax import formats

__all__ = list(formats.__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qlr_jax.export' has no attribute {name!r}")
    if "_warned" not in globals():
        globals()["_warned"] = True
        # past this frame, to the line that asked for the name
        warnings.warn(f"qlr_jax.export is now qlr_jax.formats: import {name} from there", FutureWarning, stacklevel=2)
    return getattr(formats, name)
