"""The explorer under attack: connections that never end, bombs, headers that say two things; over real sockets."""

from __future__ import annotations

import http.client
import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from explored import ask, plain_pictures, serving
from PIL import Image

from aimv2.explorer import album, connection, decoder
from aimv2.explorer.album import Album, RequestError
from aimv2.explorer.decoder import Decoders
from aimv2.interop.model_folder import save_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("limits")
    save_model(VisionEncoder(EncoderConfig("tiny", 16, 1, 2, 32, 4, 8)), folder / "model")
    with serving(folder / "model", plain_pictures(folder / "pictures"), upload_mb=3) as url:
        yield url


def picture(size: tuple[int, int] = (20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def bomb(number: int) -> bytes:
    """A progressive JPEG of 4 megapixels whose last scan is repeated 5,000 times: minutes of work in a megabyte."""
    file = io.BytesIO()
    Image.new("L", (2000, 2000), number).save(file, "JPEG", progressive=True)
    plain = file.getvalue()
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * 5000 + plain[-2:]


def raw(url: str, *lines: bytes) -> socket.socket:
    """A connection on which these lines were sent."""
    at = urlsplit(url)
    opened = socket.create_connection((at.hostname, at.port), timeout=60)
    opened.sendall(b"".join(line + b"\r\n" for line in lines))
    return opened


def answer(opened: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    with opened:
        try:
            while part := opened.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
    return b"".join(parts)


HALF = {
    "nothing": (),
    "half a request": (b"GET /api/images HTTP/1.1", b"Host: localhost"),
    "half a body": (b"POST /api/upload HTTP/1.1", b"Host: localhost", b"Content-Length: 500", b"", b"abc"),
    "a body that nobody wants": (b"GET /api/nothing HTTP/1.1", b"Host: localhost", b"Content-Length: 500", b"", b"abc"),
}


@pytest.mark.parametrize("kind", HALF)
def test_half_open_connections_end(url: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(connection, "HEADERS", 0.5)
    monkeypatch.setattr(connection, "BODY", 0.5)
    assert b"200 OK" not in answer(raw(url, *HALF[kind]))  # would time out
    monkeypatch.undo()
    assert ask(url, "/api/images").status == 200


def test_a_second_request_that_never_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS", 1.0)
    opened = raw(url, b"GET /api/about HTTP/1.1", b"Host: localhost", b"", b"GET /api/about HTTP/1.1")
    assert answer(opened).count(b"200 OK") == 1


def test_connections_are_limited(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS", 3)
    held = [raw(url, b"GET /api/images HTTP/1.1") for _ in range(12)]
    ended = 0
    for one in held:
        one.settimeout(2)
        try:
            ended += one.recv(1) == b""
        except ConnectionResetError:
            ended += 1
        except TimeoutError:
            pass
    for one in held:
        one.close()
    assert ended >= 9


@pytest.mark.parametrize(
    "twice",
    [
        (b"Host: localhost", b"Host: evil.example"),
        (b"Host: localhost", b"Origin: http://evil.example", b"Origin: http://localhost"),
        (b"Host: localhost", b"Origin: http://localhost", b"origin: http://localhost"),
        (b"Host: localhost", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Site: same-origin"),
        (b"Host: localhost", b"Content-Length: 0", b"Content-Length: 4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("request_line", [b"GET /api/images HTTP/1.1", b"POST /api/example HTTP/1.1"])
def test_a_header_that_comes_twice_is_refused(url: str, request_line: bytes, twice: tuple[bytes, ...]) -> None:
    opened = raw(url, request_line, *twice, b"Connection: close", b"", b"")
    assert answer(opened).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ({"Sec-Fetch-Site": ""}, 403),
    ],
    ids=str,
)
def test_a_post_without_origin(url: str, headers: dict[str, str], status: int) -> None:
    assert ask(url, "/api/upload", "POST", picture(), headers).status == status


def test_an_upload_that_breaks_off_is_a_line(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    opened = raw(url, b"POST /api/upload HTTP/1.1", b"Host: localhost", b"Content-Length: 5000", b"", b"abc")
    opened.close()
    said, until = "", time.monotonic() + 60
    while "broke off" not in said and time.monotonic() < until:  # the server notices in its own time
        assert ask(url, "/api/about").status == 200
        said += capfd.readouterr().err
    assert said.strip() == "explorer: a request broke off after 5 bytes of its body"


def test_bombs_cost_themselves(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six at a time: each is refused, and the page goes on meanwhile."""
    monkeypatch.setattr(decoder, "SECONDS", 0)  # and one more
    with ThreadPoolExecutor(6) as pool:
        under_way = [pool.submit(patient, url, bomb(number)) for number in range(6)]
        while not all(one.done() for one in under_way):
            assert ask(url, "/api/images").status == ask(url, "/api/thumbnail/0.png").status == 200
        assert [one.result() for one in under_way] == [413] * 6
    monkeypatch.undo()
    assert ask(url, "/api/upload", "POST", picture((30, 30))).status == 200


def patient(url: str, content: bytes) -> int:
    """The status of an upload, however long it takes."""
    to = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    try:
        to.request("POST", "/api/upload", content)
        return to.getresponse().status
    finally:
        to.close()


def test_memory_of_a_decoder_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MEMORY", 450_000_000)
    decoders = Decoders()
    try:
        with pytest.raises(RequestError) as error:
            decoders.decode(picture((7000, 7000)))
        assert error.value.status in (413, 415)
        assert decoders.decode(picture()).image.getpixel((3, 3)) == (200, 30, 30)
        assert Image.open(io.BytesIO(decoders.decode(picture((900, 300))).thumbnail)).size == (192, 64)
    finally:
        decoders.close()


def test_a_decoder_that_can_not_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decoders = Decoders()
    monkeypatch.setattr(decoder.sys, "executable", str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"can't be started \(No such file or directory\)\.") as error:
        decoders.decode(picture())
    assert error.value.status == 503
    ends = tmp_path / "python"
    ends.write_text("#!/bin/sh\nexit 3\n")
    ends.chmod(0o755)
    monkeypatch.setattr(decoder.sys, "executable", str(ends))
    with pytest.raises(RequestError, match=r"can't be started \(exit code 3; see the terminal\)\."):
        decoders.decode(picture())
    ends.write_text("#!/bin/sh\nprintf '\\005\\0\\0\\0\\0\\0\\0\\0ready'\nread -r line\nkill -SEGV $$\n")
    with pytest.raises(RequestError, match=r"ended on this one \(signal 11\)\.") as error:
        decoders.decode(b"\n" * 20)
    assert error.value.status == 422
    monkeypatch.undo()
    for _ in range(decoder.WORKERS):
        assert decoders.decode(picture()).image.size == (20, 20)
    decoders.close()


class Line:
    """A transport with so many bytes that wait to be taken, and an event loop that calls by hand."""

    def __init__(self) -> None:
        self.waiting, self.aborted, self.later = 0, False, list[tuple[float, Callable[[], None]]]()

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True

    def call_later(self, seconds: float, function: Callable[..., None], *given: object) -> None:
        self.later.append((seconds, lambda: function(*given)))

    def fire(self) -> bool:
        """What was to be called; whether the connection was ended."""
        seconds, function = self.later.pop()
        assert (seconds, self.later) == (connection.BODY, [])
        function()
        return self.aborted


def test_an_answer_that_took_a_minute_can_be_taken() -> None:
    line, held = Line(), object.__new__(connection.LimitedConnection)
    held.transport = held.loop = line  # type: ignore[assignment]
    held.cycle = SimpleNamespace(response_complete=False, more_body=False)  # type: ignore[assignment]
    held.watch()
    assert not line.fire()  # a model is at work
    line.waiting = 5000
    assert not line.fire()  # the answer came a moment ago
    line.waiting = 0
    assert not line.fire()  # taken; the next part is at work
    line.waiting = 5000
    assert not line.fire()
    line.waiting = 4000
    assert line.fire()  # not taken within the time


def test_lower_limits_of_the_system_are_kept() -> None:
    code = (
        "import resource; from aimv2.explorer.decoder import limit; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "limit(500, 2_000_000_000); print(resource.getrlimit(resource.RLIMIT_CPU)[0])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "60\n"


def test_a_picture_that_is_removed_while_it_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Album(None, 0, 32)
    number = pictures.upload(picture(), "a.png", "tab").number

    def removed(image: Image.Image) -> bytes:
        pictures.remove(number, "tab")
        return b"png"

    monkeypatch.setattr(album, "small_png", removed)
    assert pictures.thumbnail(number) == b"png"
    assert number not in pictures.thumbnails


def test_more_uploads_than_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "WAITING", 1)
    decoders = Decoders()
    with decoders.place(), pytest.raises(RequestError, match="try again"), decoders.place():
        pass
    with decoders.place():
        pass
