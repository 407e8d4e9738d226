"""The explorer's HTTP server: one page, its API, uploads. No file is read by a path from a request."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import traceback
import webbrowser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import product
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aimv2.errors import UsageError
from aimv2.explorer.album import RequestError
from aimv2.explorer.answers import CHAT_BYTES, Answers, as_dict, tab_of
from aimv2.explorer.connection import LimitedConnection
from aimv2.explorer.decoder import WORKERS, Decoders
from aimv2.explorer.guard import App, Guard, is_loopback
from aimv2.io import say

SCRIPTS = ("explorer", "address", "chat", "draw", "rove", "talk", "words")
PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/explorer.css": ("explorer.css", "text/css; charset=utf-8"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in SCRIPTS},
}
DRAINED = 8  # multiple of the upload limit that is read and discarded, so that a browser receives the error response
WARMED = ("seen", "pca", "painting", "caption")  # computed for the first image at the start
GRACE = 1  # seconds for pending responses at shutdown

T = TypeVar("T")


def make_app(answers: Answers, host: str) -> App:
    """The explorer as an ASGI application, with its guard.

    Args:
        answers: the API.
        host: host that the server will be bound to.
    """
    models = ThreadPoolExecutor(1, "models")  # models are used only in this thread
    images = ThreadPoolExecutor(1, "album")  # lists don't wait for a model, nor for a picture that is decoded
    small = ThreadPoolExecutor(1, "thumbnails")
    uploads, decoders = ThreadPoolExecutor(WORKERS, "uploads"), Decoders()
    album, about = answers.study.album, answers.about({})

    def warm(parts: Iterator[tuple[str, int]]) -> None:
        """One part, the others later: neither a question nor the end waits for all of them."""
        for what, index in parts:
            answers.warm(index, what)
            models.submit(warm, parts)
            break

    models.submit(warm, product(WARMED, range(len(answers.study.models))))

    async def work(worker: ThreadPoolExecutor, function: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(worker, function, *given)

    async def api(request: Request) -> Response:
        name = request.path_params["name"]
        call = answers.by_name.get(name)
        if call is None:
            raise RequestError(404, "There is no such API call.")
        if name == "about":
            return JSONResponse(about)
        return JSONResponse(await work(images if name in ("images", "entry") else models, call, request.query_params))

    async def thumbnail(request: Request) -> Response:
        png = await work(small, album.thumbnail, request.path_params["number"])
        return Response(png, media_type="image/png")

    async def upload(request: Request) -> Response:
        limit = answers.upload_bytes
        name, tab = request.query_params.get("name", ""), tab_of(request.query_params)
        content = await read_body(
            request, limit, f"The file is larger than the limit of {in_mb(limit)} MB (option upload-mb)."
        )
        with decoders.place():
            decoded = await work(uploads, decoders.decode, content)
        return JSONResponse(as_dict(await work(images, album.upload, content, name, tab, decoded)))

    async def example(request: Request) -> Response:
        return JSONResponse(as_dict(await work(images, album.example, tab_of(request.query_params))))

    async def remove(request: Request) -> Response:
        return JSONResponse(await work(images, answers.remove, request.query_params))

    async def chat(request: Request) -> Response:
        content = await read_body(request, CHAT_BYTES, "The conversation is too long; start over.")
        return JSONResponse(await work(models, answers.chat, request.query_params, content))

    routes = [
        *(Route(path, static(*what), methods=["GET"]) for path, what in PAGE.items()),
        Route("/api/upload", upload, methods=["POST"]),
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/example", example, methods=["POST"]),
        Route("/api/remove", remove, methods=["POST"]),
        Route("/api/thumbnail/{number:int}.png", thumbnail, methods=["GET"]),
        Route("/api/{name:str}", api, methods=["GET"]),
    ]
    handlers: Any = {RequestError: request_error, HTTPException: not_found, 500: internal_error}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)


def static(name: str, kind: str) -> Callable[[Request], Any]:
    """Handler that serves a file of the package, read once."""
    content = files("aimv2.explorer").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, headers={"content-type": kind})

    return answer


async def request_error(request: Request, error: Exception) -> Response:
    """Response to a :class:`RequestError`."""
    assert isinstance(error, RequestError)
    return JSONResponse({"error": str(error)}, error.status)


async def not_found(request: Request, error: Exception) -> Response:
    """Response for an unknown address or method."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": "There is nothing at this address."}, error.status_code)


async def internal_error(request: Request, error: Exception) -> Response:
    """Response to an internal error, without details; the traceback goes to the terminal."""
    traceback.print_exception(error)
    return JSONResponse({"error": "Internal error of the explorer; see the terminal."}, 500)


async def read_body(request: Request, limit: int, why: str) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is larger than ``limit`` bytes; ``why`` is the sentence. The connection broke before its end.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > DRAINED * limit:
                break
            if size <= limit:
                parts.append(part)
    except ClientDisconnect:
        say(f"explorer: a request broke off after {size:,} bytes of its body")
        raise RequestError(400, "The request broke off.") from None
    if size > limit:
        raise RequestError(413, why)
    return b"".join(parts)


def in_mb(size: int) -> str:
    """Bytes in MB, rounded."""
    return f"{size / 1e6:.3g}"


# ---- the process ----


def serve(answers: Answers, host: str, listening: socket.socket, open_browser: bool) -> None:
    """Print the address and serve until Ctrl-C (KeyboardInterrupt) or SIGTERM.

    Args:
        answers: the API.
        host, listening: see :func:`listen`.
        open_browser: open the address in a browser.
    """
    if not is_loopback(host):
        print(
            f"warning: --host {host}: anyone who can reach this machine over the network can use the explorer and see the "
            "images; there is no password",
            file=sys.stderr,
        )
    if left_out := answers.study.album.left_out:
        say(left_out)
    url = url_of(host, listening)
    print(f"explorer: {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if open_browser:
        webbrowser.open(url)
    http_server(answers, host).run(sockets=[listening])


def http_server(answers: Answers, host: str) -> uvicorn.Server:
    """The HTTP server, without access log; ``host`` as for :func:`make_app`."""
    config = uvicorn.Config(
        make_app(answers, host),
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        http=LimitedConnection,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    return uvicorn.Server(config)


def url_of(host: str, listening: socket.socket) -> str:
    """The address of the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


def listen(host: str, port: int) -> socket.socket:
    """Bind a listening socket; port 0: any free port.

    Raises:
        UsageError: a port in use or out of range, a host that is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: 0 (a free one) to 65535 expected")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no address of this machine ({error})") from None
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"--port {port}: already in use; give another one, or 0 for any that is free", code="exists"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UsageError(f"--port {port}: not allowed here; give one from 1024 up, or 0 for a free one") from None
        raise UsageError(f"--host {host}: can't be bound ({error.strerror or error})") from None
    return listening
