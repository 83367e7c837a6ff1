"""Who may use the server. Pure ASGI: what is refused does not reach the application.

Without a key, everything on this machine may: programs, and so the browser, in which any web page
runs code. A page's requests carry its Origin, and are refused unless that is allowed. One whose own
name leads to this machine (DNS rebinding) carries that name as Host: without a key, Host must be a
name of the loopback. With a key the page would have to know it.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import SettingError
from .openai_errors import ApiError

#: Needs no key: it says that the server is there, and no more.
OPEN = ("/health",)


def is_loopback(host: str) -> bool:
    """Whether an address or name is of this machine alone."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_key(host: str, key: str | None) -> None:
    """
    Raises:
        SettingError: the server would be open to other machines, or the key cannot be one.
    """
    if key is None and not is_loopback(host):
        raise SettingError(
            f"host={host!r} lets other machines in, so a key is required: set FLASHMOE_API_KEY, or "
            "give --api-key; or leave --host out, for this machine alone"
        )
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise SettingError("the API key must be printable ASCII, and not empty")


class Access:
    """Lets requests through to an application, or answers them with what is missing.

    Args:
        key: the API key; None: none is asked for.
        origins: web pages that may use the server, such as "https://chat.example"; "*": all.
    """

    def __init__(self, app: ASGIApp, key: str | None = None, origins: Sequence[str] = ()):
        self._app = app
        self._key = None if key is None else key.encode()
        self._origins = frozenset(origins)
        self._keyed = self._checked
        if origins:
            # It answers preflights, which have no key.
            self._keyed = CORSMiddleware(
                self._checked,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and not self._origins & {origin, "*"}:
            error = ApiError(
                403,
                f"web pages of {origin[:200]!r} may not use this server: start it with "
                "--allow-origin to let them",
                code="origin_not_allowed",
            )
            await respond(error, scope, receive, send)
        elif self._key is None and not is_loopback(_name(host)):
            error = ApiError(
                403,
                f"Host {host[:200]!r} is no name of this machine: use localhost, or start the "
                "server with a key",
                code="host_not_allowed",
            )
            await respond(error, scope, receive, send)
        else:
            await self._keyed(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["path"] in OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await respond(error, scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        return scheme.lower() == "bearer" and same


def _name(host: str) -> str:
    """The name in a Host header, without the port; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error."""
    response = JSONResponse(error.body(), error.status, error.headers)
    await response(scope, receive, send)
