"""Request filter and security headers of the explorer.

A page of another site can make a browser send requests to this machine by address (detected by ``Origin`` and
``Sec-Fetch-Site``) or by a host name that resolves to it (DNS rebinding, detected by ``Host``). Both are rejected before routing.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
ONCE = ("host", "origin", "sec-fetch-site", "sec-fetch-mode", "content-length")
METHODS = ("GET", "HEAD", "POST")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware: rejects foreign hosts and foreign pages, adds HEADERS to every response."""

    def __init__(self, app: App, host: str) -> None:
        """``host``: host that the server is bound to."""
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return  # no websockets, no lifespan
        fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        rejected = rejection(scope["method"], scope["path"], dict(fields), self.host)
        names = [name for name, _ in fields]
        if twice := next((name for name in ONCE if names.count(name) > 1), None):  # a dictionary hides the other one
            rejected = 400, f"The request has several headers {twice}."

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        if rejected is None:
            await self.app(scope, receive, with_headers)
            return
        status, sentence = rejected
        body = json.dumps({"error": sentence}).encode()
        about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await with_headers({"type": "http.response.start", "status": status, "headers": about})
        await send({"type": "http.response.body", "body": body})


def rejection(method: str, path: str, headers: dict[str, str], host: str) -> tuple[int, str] | None:
    """Status and message if a request is rejected, else None.

    Args:
        method, path: method and path of the request.
        headers: headers by lower-case name.
        host: host that the server is bound to.
    """
    if method not in METHODS:
        return 405, f"Method {method} is not supported."
    named = headers.get("host", "")
    if not known_host(named, host):
        return 400, "This host name is not the explorer's; open the address that it printed at the start."
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{named}":
        return 403, "The explorer accepts requests only from its own page."
    site = headers.get("sec-fetch-site", "same-origin")
    # a browser says where a request is from; curl says nothing
    if method == "POST" and origin is None and site != "same-origin":
        return 403, "The explorer accepts requests only from its own page."
    opened = path == "/" and method == "GET" and headers.get("sec-fetch-mode") == "navigate"  # a link was followed
    if site not in ("same-origin", "none") and not opened:
        return 403, "The explorer accepts requests only from its own page."
    return None


def known_host(header: str, host: str) -> bool:
    """Whether a ``Host`` header names this server.

    Any port, since a tunnel may change it and rebinding needs a name, not a port. Bound to loopback, only loopback names. Bound
    to another host, also numeric addresses (rebinding needs a name) and this machine's own name.
    """
    name = hostname(header)
    if name in LOOPBACK_NAMES:
        return True
    if is_loopback(host):
        return name == host.lower()
    return name in (host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()) or is_address(name)


def hostname(header: str) -> str:
    """A ``Host`` header without its port, in lower case, IPv6 without brackets; "" if malformed."""
    text = header.strip().lower()
    if text.startswith("["):
        inner, closed, rest = text[1:].partition("]")
        return inner if closed and (not rest or (rest[1:].isdigit() and rest[0] == ":")) else ""
    name, colon, port = text.partition(":")
    return name if not colon or port.isdigit() else ""


def is_address(name: str) -> bool:
    """Whether ``name`` is a numeric address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reachable only from this machine."""
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
