"""C++ for the CPU, optional: where it was not built, or for another version of its sources, everything runs without it.

`pip install` builds it where a C++ compiler is there (setup.py). The library lies beside its sources, in the package that is
installed or built in place; a checkout that is imported beside an installed package takes that one's library if its sources
are the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import lru_cache
from importlib import metadata
from pathlib import Path

SOURCES = Path(__file__).parent
SWITCH = "QLR_NATIVE"  # an environment variable: 0 leaves the library out


def digest() -> str:
    """SHA-256 of the C++ sources: a library says of which ones it was built."""
    found = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def library() -> ctypes.CDLL | None:
    """The library, or None where there is none that fits."""
    return _find()[0]


def missing() -> str:
    """Why there is no library, and what to do about it, in a sentence; empty where there is one.

    Example:
        >>> (library() is None) == bool(missing())
        True
    """
    return _find()[1] or _refused


_refused = ""


@lru_cache
def registered(*names: str) -> bool:
    """Whether JAX calls these functions of the library: `<name>_call`, as targets of its foreign function interface.

    It refuses a library that was built with the headers of a newer jaxlib; `missing` says so from then on.
    """
    global _refused
    found = library()
    if found is None:
        return False
    import jax

    try:
        for name in names:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(found, f"{name}_call")), platform="cpu")
    except jax.errors.JaxRuntimeError:
        _refused = "it was built for a newer jaxlib than is installed; install qlr-jax again (pip install --force-reinstall)"
        return False
    return True


@lru_cache
def _find() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH} is 0"
    why = "it was not built; install a C++ compiler (g++ or clang), then qlr-jax again (pip install --force-reinstall)"
    for folder in _folders():
        for path in sorted(folder.glob("_kernels*.so")):
            try:
                found = ctypes.CDLL(str(path))
                found.qlr_sources.restype = ctypes.c_char_p
                built_of = found.qlr_sources().decode()
            except (OSError, AttributeError) as error:
                why = f"{path.name} cannot be loaded ({error}); install qlr-jax again"
                continue
            found.qlr_widest.restype = ctypes.c_char_p
            if built_of == digest():
                if found.qlr_widest() == b"portable":  # slower than XLA's
                    return None, "this processor has neither AVX2 nor NEON"
                return found, ""
            why = f"{path.name} was built of other sources; install qlr-jax again"
    return None, why


def _folders() -> list[Path]:
    """Beside the sources, and in what is installed: all of that name, since a build leaves its metadata in the checkout too."""
    installed = [Path(str(found.locate_file("qlr_jax/native"))) for found in metadata.distributions(name="qlr-jax")]
    return list(dict.fromkeys([SOURCES, *installed]))
