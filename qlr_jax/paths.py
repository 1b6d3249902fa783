"""Paths that a person gives: each goes through `local`, and each place that is written through `output_folder` or `output_file`."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlr_jax.errors import QLRError

LOCK, PARTIAL = ".qlr-lock", ".partial-"  # in a folder that is being written: who does so, and what is not whole yet


def local(given: str | os.PathLike[str]) -> Path:
    """The absolute path that a person means: `~` is a home, `..` is what lies above even behind a link.

    The last part keeps its name where it is a link: files of the hub's cache are links to names without a suffix.

    Args:
        given: as it was typed.

    Raises:
        QLRError: nothing was given, a home that nobody has, or a character that no path holds.

    Example:
        >>> local("some/../model.gguf") == Path("model.gguf").absolute(), local("~") == Path.home()
        (True, True)
    """
    text = os.fspath(given)
    if not str(text).strip():
        raise QLRError("an empty path is given; pass the name of a file or folder ('.' for the current one)")
    if "\0" in text:
        raise QLRError(f"path {text!r} holds a null character, which no file has in its name; pass another")
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise QLRError(f"path {text} names a home that does not exist; pass the whole path") from None
    if ".." not in path.parts:
        return path
    return resolved(path) if path.name == ".." else resolved(path.parent) / path.name


def resolved(path: Path) -> Path:
    """The path with no link and no `..` in it; a circle of links is left as it is."""
    return Path(os.path.realpath(path))


def output_folder(
    out: str | os.PathLike[str], keep: Collection[str] | None = (), sources: Iterable[str | os.PathLike[str] | None] = ()
) -> Path:
    """A folder that can be written: its absolute path, links followed. Nothing is left there by the check.

    Args:
        out: as it was given; new, or empty but for entries named in `keep`.
        keep: names of those entries; None: whatever lies there.
        sources: what is read to write it: it may not lie inside one of them.

    Raises:
        QLRError: in one sentence, why it cannot be written.
    """
    path = resolved(local(out))
    place = _existing(path)
    if not place.is_dir():
        if place != path:
            raise QLRError(f"{path} cannot be made, since {place} is a file; give another folder")
        raise QLRError(f"{path} is a file; " + ("pass --out a folder, new or not" if keep is None else "give a folder to write to"))
    if keep is not None:
        refuse_occupied(path, keep)
    for source in sources:
        if source is not None and (folder := resolved(local(source))).is_dir() and path.is_relative_to(folder):
            raise QLRError(f"{path} lies inside {folder}, which is read; give a folder outside of it")
    _try_writing(place, path)
    return path


def output_file(file: str | os.PathLike[str]) -> Path:
    """A file that can be written, in a folder that exists: its absolute path. One that is there will be replaced.

    Raises:
        QLRError: in one sentence, why it cannot be written.
    """
    path = local(file)
    if path.is_dir():
        raise QLRError(f"{path} is a folder; pass the name of a file")
    if not path.parent.is_dir():
        why = "Not a directory" if path.parent.exists() else "No such file or directory"
        raise QLRError(f"{path} cannot be written: {why} ({path.parent}); pass a file in a folder that exists")
    _try_writing(path.parent, path)
    return path


@contextmanager
def enough_space(place: Path) -> Iterator[None]:
    """A disk that is full, or cannot be written any more, becomes one sentence; what was being written is removed by who wrote it.

    Raises:
        QLRError: that sentence.
    """
    try:
        yield
    except Exception as error:  # safetensors has an error of its own
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            free = shutil.disk_usage(_existing(place)).free
            why = f"the disk of {place} is full ({free / 1e6:.0f} MB left); free some of it"
        elif number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            why = f"{place} cannot be written any more ({os.strerror(number)}); mend that"
        else:
            raise
        raise QLRError(f"{why} and go on with --resume, where the command takes it") from None


def refuse_occupied(out: Path, keep: Collection[str] = ()) -> None:
    """Raise QLRError if `out` is a file, or a folder with anything in it but what `keep` names and what a killed writer left."""
    if out.exists() and not out.is_dir():
        raise QLRError(f"{out} is a file; give a folder to write to")
    left = lambda name: (name in keep and (out / name).is_dir()) or name == LOCK or name.startswith(PARTIAL)  # noqa: E731
    try:
        others = sorted(p.name for p in out.iterdir() if not left(p.name)) if out.is_dir() else []
    except OSError as error:
        raise QLRError(f"folder {out} cannot be read: {error.strerror or error}; give another") from None
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise QLRError(f"{out} already holds {others[0]}{more}; give a new or empty folder")


def _existing(path: Path) -> Path:
    """The path itself, or the nearest above it that exists."""
    for place in (path, *path.parents):
        try:
            os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # no way through, a circle of links, a name that is too long
            raise QLRError(f"{path} cannot be written: {error.strerror or error}; give another place") from None
        return place
    return path


def _try_writing(place: Path, path: Path) -> None:
    """QLRError unless a folder can be made in `place`: by trying, since a disk may refuse what the permissions allow."""
    try:
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(0, "Permission denied")
        os.rmdir(tempfile.mkdtemp(prefix=PARTIAL, dir=place))
    except OSError as error:
        raise QLRError(f"{path} cannot be written: {error.strerror or error} ({place}); give another place") from None
