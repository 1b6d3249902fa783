"""Text to calibrate, train and evaluate on: the user's files, or the Python standard library that is always at hand."""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from qlr_jax.calibration.corpus import Corpus
from qlr_jax.errors import QLRError

SPLITS = ("train", "calibration", "heldout")

# Below the standard library but not of it, or removed from slim installations.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"})


def split_of(relative: str) -> str:
    """The split of a module, by the first four bytes of sha256 of its path below the library: 10 % held out, 5 % calibration.

    Example:
        >>> split_of("json/decoder.py") in SPLITS
        True
    """
    share = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "big") / 2**32
    return "heldout" if share < 0.10 else "calibration" if share < 0.15 else "train"


def standard_library(split: str, root: str | Path | None = None) -> str:
    """The text of the standard library's modules of one split, in order of their paths.

    Test packages, site-packages and files that are not UTF-8 are left out.

    Args:
        split: "train", "calibration" or "heldout".
        root: where the library lies; None: that of the running interpreter.

    Raises:
        QLRError: an unknown split, or no module found.
    """
    if split not in SPLITS:
        raise QLRError(f"split {split!r} is unknown; give one of {', '.join(SPLITS)}")
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    modules = []
    for parent, folders, names in os.walk(folder):
        folders[:] = set(folders) - LEFT_OUT  # not even looked into: site-packages may hold more files than all else
        for path in (Path(parent, name) for name in names if name.endswith(".py")):
            relative = path.relative_to(folder).as_posix()
            if split_of(relative) == split:
                modules.append((relative, path))
    texts = []
    for _, path in sorted(modules):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    if not texts:
        raise QLRError(f"no Python module of split {split!r} lies below {folder}; give text files instead")
    return "\n".join(texts)


def read_text(paths: Sequence[str | Path] | str | Path) -> str:
    """The text of one or several files, folders or patterns (`calibration.files`), joined by a newline.

    Raises:
        QLRError: a file that is missing, empty or not UTF-8, or none given; weights.
    """
    return Corpus.read(paths).text(None)
