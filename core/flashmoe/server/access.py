"""Access control of the server, as ASGI middleware in front of the application.

Without an API key, every program on this machine may use the server. That includes the browser, in
which any web page runs code. Two checks keep web pages out:

- A page's requests carry an Origin header. They are refused unless that origin is allowed, or is
  the server itself.
- A page may point a host name of its own at this machine (DNS rebinding). Its requests then carry
  that name in the Host header, so without a key the Host must be a loopback name.

With a key, the page would have to know the key, so the Host header is not checked.
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
from .openai_errors import ApiError, body_for

#: Paths that need no key. They tell nothing but that the server runs: the page asks its user for
#: the key, and sends it with each of its requests.
PUBLIC_PATHS = ("/health", "/")


def is_loopback(host: str) -> bool:
    """Return whether an address or host name belongs to the loopback interface."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_key(host: str, key: str | None) -> None:
    """Refuse to open the server to other machines without a key, and keys that cannot be sent.

    Raises:
        SettingError: the key is missing, empty or not printable ASCII.
    """
    if key is None and not is_loopback(host):
        raise SettingError(
            f"host={host!r} lets other machines connect, so an API key is required: set "
            "FLASHMOE_API_KEY or pass --api-key, or leave out --host to serve this machine only"
        )
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise SettingError("the API key must be printable ASCII and must not be empty")


class AccessMiddleware:
    """Passes allowed requests on to an application and answers all others with an error.

    Args:
        app: the ASGI application to protect.
        key: the API key that clients must send; None: no key is needed.
        origins: origins of web pages that may use the server, such as "https://chat.example".
            "*" allows all.
    """

    def __init__(self, app: ASGIApp, key: str | None = None, origins: Sequence[str] = ()):
        self._app = app
        self._key = None if key is None else key.encode()
        self._origins = frozenset(origins)
        self._with_key_check: ASGIApp = self._check_key
        if origins:
            # CORS goes first: it answers preflight requests, which carry no key.
            self._with_key_check = CORSMiddleware(
                self._check_key,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                # A page that is allowed in is a page of the internet, and this address is not.
                allow_private_network=True,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        # The server's own page sends its origin, too. A page of another server has another host.
        own = origin is not None and origin.partition("://")[2] == host
        if origin is not None and not own and not self._origins & {origin, "*"}:
            error = ApiError(
                403,
                f"web pages of {origin[:200]!r} may not use this server: start it with "
                "--allow-origin to allow them",
                code="origin_not_allowed",
            )
            await send_error(error, scope, receive, send)
        elif self._key is None and not is_loopback(_hostname(host)):
            error = ApiError(
                403,
                f"Host {host[:200]!r} is not a name of this machine: connect to localhost, or "
                "start the server with an API key",
                code="host_not_allowed",
            )
            await send_error(error, scope, receive, send)
        else:
            await self._with_key_check(scope, receive, send)

    async def _check_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or scope["path"] in PUBLIC_PATHS or _carries_key(scope, self._key):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong: send it as Authorization: Bearer KEY or as x-api-key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await send_error(error, scope, receive, send)


def _carries_key(scope: Scope, key: bytes) -> bool:
    headers = Headers(scope=scope)
    scheme, _, given = headers.get("authorization", "").partition(" ")
    bearer = given if scheme.lower() == "bearer" else ""
    # Anthropic's clients send x-api-key. compare_digest takes the same time wherever the first
    # difference is.
    sent = [text.strip().encode("latin-1") for text in (bearer, headers.get("x-api-key", ""))]
    return any([hmac.compare_digest(text, key) for text in sent])


def _hostname(host: str) -> str:
    """Return the name in a Host header without the port; "" if the header is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error as the whole response, in the form of the API that the path belongs to."""
    response = JSONResponse(body_for(scope["path"], error), error.status, error.headers)
    await response(scope, receive, send)
