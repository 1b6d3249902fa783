"""A socket, and the server that listens on it until it is stopped. Importing it needs uvicorn."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from qlr_jax.errors import QLRError

GRACE = 5  # seconds that answers under way have to end once the server is to stop


def bind(host: str, port: int, api_key: str | None) -> socket.socket:
    """A socket of the address that is asked for; it does not listen yet.

    Args:
        host: a name or an address.
        port: 0 for a free one.
        api_key: without one only loopback addresses are bound.

    Raises:
        QLRError: a host that is not known or not this machine's, another than loopback without an API key, a key that no header
            can carry, a port that is taken or not allowed.
    """
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise QLRError(
            "the API key is empty or has spaces or other signs than ASCII's, which a header cannot carry; give another one"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError):
        raise QLRError(f"host {host!r} is not known; pass an address of this machine, such as 127.0.0.1") from None
    if api_key is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise QLRError(
            f"host {host} can be reached from other machines, which needs an API key; pass --api-key or set QLR_API_KEY, or leave "
            "--host out for this machine alone"
        )
    found = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share a port that is taken
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise _refused(error, host, port) from None
    return found


def listen(bound: socket.socket) -> None:
    """Let clients connect.

    Raises:
        QLRError: another program listens on this port since it was bound.
    """
    try:
        bound.listen()
    except OSError as error:
        raise _refused(error, *bound.getsockname()[:2]) from None


def url(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, without its logs and what it guesses; `run(sockets=[…])` returns once it was interrupted or `should_exit` is set.

    Args:
        application: answers.
        on_start: called once it answers.
        on_stop: called before it waits for answers under way, so that they end.
    """

    def __init__(self, application: ASGIApp, on_start: Callable[[], object], on_stop: Callable[[], object]):
        self._on_start, self._on_stop = on_start, on_stop
        fixed = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off", "server_header": False}
        quiet = {"log_config": None, "log_level": "warning", "access_log": False}
        super().__init__(uvicorn.Config(application, timeout_graceful_shutdown=GRACE, **fixed, **quiet))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        await super().shutdown(sockets)


def _refused(error: OSError, host: str, port: int) -> QLRError:
    why = {
        errno.EADDRINUSE: f"port {port} of {host} is in use; pass another one with --port, or 0 for any that is free",
        errno.EACCES: f"port {port} is not open to this user; pass one from 1024 on with --port",
        errno.EADDRNOTAVAIL: f"host {host} is no address of this machine; pass one that is, such as 127.0.0.1",
    }
    return QLRError(why.get(error.errno or 0, f"port {port} of {host} cannot be opened ({error.strerror}); pass another one"))
