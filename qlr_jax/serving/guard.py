"""Who may ask: those with the API key, or, where there is none, those who name this machine. Importing it needs starlette."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from qlr_jax.serving.replies import refused


class Guard:
    """Refuses who may not ask. The page and /health need no key: they tell nothing.

    A page of any site could otherwise have its name point to this machine and read the answers (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app, self._key = app, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._key is None:
            host = headers.get("host", "")
            if _is_local(host):
                return None
            return refused(
                f"the request names the host {host[:80]!r}, and without an API key only localhost and loopback addresses are "
                "answered; start qlr serve with --api-key",
                403,
                code="host_not_allowed",
            )
        if not scope["path"].startswith("/v1/"):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() == "bearer" and same:
            return None
        why = "the API key is not this server's" if given else "no API key is given"
        return refused(
            f"{why}; send it as the header Authorization: Bearer KEY", 401, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"}
        )


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:  # no address
        return False
