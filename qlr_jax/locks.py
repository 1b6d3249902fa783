"""One job in one folder: a lock file that says who is at work there, and since when.

The file is made by a link, which is there whole or not at all, on shared disks too. A process that holds it touches it again and
again. A lock is stale where its process is dead on this machine, or, of another machine, where nobody has touched it for a while by
the clock of the disk; a stale one is taken over.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.paths import LOCK, PARTIAL

TOUCHED, LOST = 15.0, 120.0  # seconds between two touches, and after which another machine's lock is stale


@dataclass
class _Held:
    """A lock of this process.

    Attributes:
        made: folders that were made for it, the innermost first.
        uses: how many contexts hold it.
        pid: of this process; a fork of it does not hold the lock.
        over: set when it is released.
    """

    made: list[Path]
    uses: int = 0
    pid: int = field(default_factory=os.getpid)
    over: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """`out`, made where it is missing, belongs to this process while the block runs; a block inside a block is fine.

    Afterwards the lock is removed, and so is `out` where it was made here and nothing was written into it.

    Args:
        out: an absolute path, as `output_folder` returns it.

    Raises:
        QLRError: another job is at work there; it cannot be written.
    """
    take(out)
    held = _held[out]
    held.uses += 1
    try:
        yield
    finally:
        held.uses -= 1
        if not held.uses:
            release(out)


def take(out: Path) -> None:
    """Lock `out` until this process ends, or the next `locked` block on it does.

    Raises:
        QLRError: as `locked`.
    """
    if out in _held:
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out / LOCK)
    except OSError as error:
        _remove_empty(made)
        raise QLRError(f"{out} cannot be written: {error.strerror or error}; give another place") from None
    except QLRError:
        _remove_empty(made)
        raise
    held = _held[out] = _Held(made)
    threading.Thread(target=_touch, args=(out / LOCK, held.over), daemon=True).start()
    for left in out.glob(f"{PARTIAL}*"):  # by a writer that was killed
        shutil.rmtree(left, ignore_errors=True)


def release(out: Path) -> None:
    """Remove the lock of `out`, if this process holds it, and the folder, if it was made for it and is empty."""
    if held := _held.pop(out, None):
        held.over.set()
        (out / LOCK).unlink(missing_ok=True)
        _remove_empty(held.made)


def refuse_locked(out: Path) -> None:
    """Raise QLRError where another process, or another job of this one, is at work in `out`."""
    if out in _held and _held[out].uses:
        raise QLRError(f"another job of this process is at work in {out}; wait for it, or give another folder")
    if out not in _held and (owner := _owner(out / LOCK)) is not None:
        raise QLRError(_sentence(out / LOCK, owner))


@atexit.register
def _release_all() -> None:
    for out in [out for out, held in _held.items() if held.pid == os.getpid()]:
        with suppress(OSError):
            release(out)


def _claim(lock: Path) -> None:
    """Make the lock file, or take over a stale one."""
    pid = os.getpid()
    card = {"pid": pid, "host": platform.node(), "machine": _machine(), "started": _started(pid), "since": time.time()}
    handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=lock.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(card, file)
        for _ in range(3):
            try:
                _place(name, lock)
                return
            except FileExistsError:
                if (owner := _owner(lock)) is not None:
                    raise QLRError(_sentence(lock, owner)) from None
                _remove_stale(lock, Path(f"{name}.stale"))
        raise QLRError(f"another job is about to begin in {lock.parent}; wait for it, or give another folder")
    finally:
        for left in (name, f"{name}.stale"):
            with suppress(OSError):
                os.unlink(left)


def _remove_stale(lock: Path, aside: Path) -> None:
    """Remove a stale lock, moved first: of two processes that find it stale one alone gets the file."""
    with suppress(FileNotFoundError):
        os.rename(lock, aside)
        if (owner := _owner(aside)) is not None:  # another has just taken it over: given back
            with suppress(OSError):
                os.link(aside, lock)
            raise QLRError(_sentence(lock, owner))


def _place(name: str, lock: Path) -> None:
    try:
        os.link(name, lock)
    except FileExistsError:
        raise
    except OSError:  # a disk without links
        with open(lock, "x", encoding="utf-8") as file, open(name, encoding="utf-8") as card:
            file.write(card.read())


def _owner(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock; None where there is none or it is stale."""
    try:
        with lock.open(encoding="utf-8") as file:  # opened first: a shared disk then has the time as it is
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    try:
        owner = json.loads(text)
        pid, where = int(owner["pid"]), (owner["host"], owner["machine"])
    except (ValueError, KeyError, TypeError):
        owner, pid, where = {}, 0, None
    if where == (platform.node(), _machine()):
        alive = pid != os.getpid() and _runs(pid) and owner.get("started") == _started(pid)
    else:
        alive = _disk_time(lock.parent) - touched < LOST
    return owner | {"touched": touched} if alive else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did, which tells it from a later one of the same number.

    None where that is not known, and of one that is dead though its parent has not looked.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _machine() -> str | None:
    """What tells two machines, or two containers, of one name apart; None where there is no such thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _disk_time(folder: Path) -> float:
    """What time it is by the clock of the disk, which need not be this machine's."""
    try:
        with tempfile.NamedTemporaryFile(prefix=PARTIAL, dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _sentence(lock: Path, owner: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("since") or owner["touched"]))
    who = f"process {owner['pid']} on {owner['host']}" if owner.get("pid") else "who does not say"
    return (
        f"another job is at work in {lock.parent} since {since} ({who}); wait for it, or give another folder, "
        f"or remove {lock} if that job is gone"
    )


def _touch(lock: Path, over: threading.Event) -> None:
    while not over.wait(TOUCHED):
        with suppress(OSError):
            os.utime(lock)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
