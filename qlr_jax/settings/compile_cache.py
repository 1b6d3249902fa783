"""Compiled programs are kept on disk from one job to the next, by JAX's own cache; nothing is changed by an import."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

VARIABLE = "QLR_COMPILE_CACHE"  # an environment variable: a folder, or none
NONE = "none"
LARGEST = 2**28  # bytes of one folder: some ten thousand programs


def keep_compiled(place: str | None = None) -> str:
    """Keep what is compiled from now on in a folder of the user's cache directory, for the rest of this process.

    The folder belongs to one version of jax and one kind of processor, as compiled code does. A cache that the user has set in JAX
    (JAX_COMPILATION_CACHE_DIR) is left as it is, and so is one that was set or switched off by a call before.

    Args:
        place: a folder that is used instead, or "none"; None: what QLR_COMPILE_CACHE says, else the user's cache directory.

    Returns:
        Why nothing is kept in a folder that was asked for, in a sentence; else empty. No job fails for it.

    Example:
        >>> keep_compiled()
        ''
    """
    import jax

    if place is None and (jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]):
        return ""
    asked = place or os.environ.get(VARIABLE, "")
    if asked == NONE:
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    try:
        folder = (Path(asked).expanduser() if asked else cache_directory()).absolute() / kind()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # code is run from it: nobody else writes there
        tempfile.TemporaryFile(dir=folder).close()
        trim(folder, LARGEST)
    except (OSError, RuntimeError) as error:  # RuntimeError: a home that is not known
        return f"compiled programs are not kept: {error}; pass a folder that can be written, or none" if asked else ""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # JAX's default: most of a job's programs take less
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # a disk that fills up costs time later, and is told by what else is written; a line for each program would tell nothing more
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    return ""


def cache_directory() -> Path:
    """Where this user's compiled programs are kept, for all versions and processors."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "qlr-jax" / "compiled"


def kind() -> str:
    """Versions and processor that compiled code is of, as a folder's name; the processor by its instructions too.

    Example:
        >>> kind().startswith("jax-") and platform.machine() in kind()
        True
    """
    import jax
    import jaxlib.version

    processor = platform.processor()
    with suppress(OSError):  # Linux: code for one processor may be illegal on another of the same family
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
        processor = "\n".join(line for line in lines if line.partition("\t")[0].partition(":")[0].strip() in told)
    digest = hashlib.sha256(processor.encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-jaxlib-{jaxlib.version.__version__}-{platform.machine()}-{digest}"


def trim(folder: Path, largest: int) -> None:
    """Remove what was used longest ago until at most `largest` bytes are left.

    JAX's own bound (jax_compilation_cache_max_size) reads the whole folder for each program that it writes, a quarter of a second
    once there are some thousands, and locks it: here it is done once a job.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another job is at it too
                if entry.is_file(follow_symlinks=False):
                    info = entry.stat()
                    found.append((max(info.st_atime, info.st_mtime), info.st_size, entry.path))
    size = sum(bytes for _, bytes, _ in found)
    for _, bytes, path in sorted(found):
        if size <= largest:
            return
        with suppress(OSError):
            os.unlink(path)
            size -= bytes
