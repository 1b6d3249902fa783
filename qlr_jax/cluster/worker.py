"""What a worker of a cluster runs: pieces, one at a time, on all devices of its host."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qlr_jax.core.blas import one_blas_thread
from qlr_jax.engine import Call, Maker, Pinned
from qlr_jax.errors import QLRError


@dataclass(frozen=True)
class Slot:
    """The place of what another piece returned, among the arguments of a piece."""

    number: int


@dataclass(frozen=True)
class Unlike:
    """Why a worker is not used."""

    why: str


def facts() -> dict[str, str]:
    """What of this process must be that of every other one of a job, so that all leave the same bytes.

    Example:
        >>> sorted(facts())
        ['Python', 'XLA_FLAGS', 'devices', 'jax', 'numpy', 'qlr-jax']
    """
    import jax

    from qlr_jax.core.sharding import available

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    python = ".".join(platform.python_version_tuple()[:2])
    found = {"qlr-jax": installed("qlr-jax"), "jax": jax.__version__, "numpy": installed("numpy"), "Python": python}
    flags = " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())) or "none"  # other code may add up in another order
    return found | {"devices": f"{available()} of kind {jax.devices()[0].device_kind}", "XLA_FLAGS": flags}


_lock, _makers = threading.Lock(), dict[str, Maker]()


def run(job: str, wanted: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any], found: Sequence[Any]) -> Any:
    """A piece.

    Args:
        job: whose it is: a worker keeps what is `Pinned` by one job, until one of another comes.
        wanted: the facts of the process that the job runs in.
        function, arguments: of the piece, with a `Slot` in the place of what others returned.
        found: what those returned.

    Raises:
        QLRError: a worker of other versions or devices.
    """
    with _lock, one_blas_thread():  # loops of two pieces that overlap can wait for each other for ever (settings.host)
        if job not in _makers:
            check(wanted)
            _makers.clear()
            _makers[job] = Maker()
        maker = _makers[job]
        return function(*(maker.made(filled(argument, found)) for argument in arguments))


def check(wanted: Mapping[str, str]) -> None:
    """Refuse a worker whose results would be others.

    Raises:
        QLRError: with what differs.
    """
    _begin()
    if other := differences(wanted, facts()):
        raise QLRError(f"a worker on {platform.node()} {other}; give all workers what the job's own process has")


def differences(wanted: Mapping[str, str], have: Mapping[str, str]) -> str:
    """What differs, in words.

    Example:
        >>> differences({"jax": "0.10.2", "devices": "1"}, {"jax": "0.11.2", "devices": "1"})
        'has jax 0.11.2 where the job has 0.10.2'
    """
    return "; ".join(f"has {key} {have[key]} where the job has {own}" for key, own in wanted.items() if have.get(key) != own)


def filled(value: Any, found: Sequence[Any]) -> Any:
    """The value with what pieces returned in the place of every `Slot`."""
    if isinstance(value, Slot):
        return found[value.number]
    if isinstance(value, Call):
        return replace(value, arguments=filled(value.arguments, found))
    if isinstance(value, Pinned):
        return value
    if type(value) in (list, tuple):
        return type(value)(filled(own, found) for own in value)
    if type(value) is dict:
        return {key: filled(own, found) for key, own in value.items()}
    return value


def part(value: Any, key: Any) -> Any:
    """A part of what a piece returned."""
    return value[key]


_begun = False


def _begin() -> None:
    """As a job begins, where this process has not started JAX yet."""
    global _begun
    if not _begun:
        from qlr_jax.settings.host import prepare

        prepare()
        _begun = True
