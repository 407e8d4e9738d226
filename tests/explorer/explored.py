"""What the explorer's tests look at: a model taught six plain pictures within seconds, a pair, a server in this process."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from aimv2.batch import make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.data.stream.transforms import image_transform
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.explorer.prepare import prepare
from aimv2.explorer.server import http_server, listen, url_of
from aimv2.interop.model_folder import save_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.objectives.pretrain import PretrainObjective

COLOURS = {
    "red": (215, 30, 40),
    "green": (30, 150, 60),
    "blue": (35, 70, 225),
    "yellow": (250, 225, 50),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
STEPS = 60
PATCHES = 4  # a side
ARTIFACTS = Path(__file__).parents[2] / "artifacts"


def sentence(colour: str) -> str:
    """What the model is taught to say of a plain picture."""
    return f"a {colour} sheet"


def plain_pictures(folder: Path) -> Path:
    """A folder with a plain picture a colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    return folder


def taught(folder: Path) -> Path:
    """A model folder: encoder, decoder and tokeniser, 16 patches, taught the plain pictures."""
    options: dict = {"width": 32, "heads": 2, "hidden": 48, "depth": 3, "decoder_width": 32, "decoder_heads": 2}
    tokenizer = train_tokenizer([sentence(colour) for colour in COLOURS] * 4, 300)
    options |= {"decoder_hidden": 48, "decoder_depth": 2, "decoder_vocab_size": tokenizer.vocab_size}
    model = create_model("aimv2-tiny-patch8-32", decoder=True, seed=0, **options)
    assert isinstance(model, AIMv2)
    see = image_transform(model)
    images = torch.stack([see(Image.new("RGB", (40, 40), colour)) for colour in COLOURS.values()])
    captions = [tokenizer.encode(sentence(colour)) for colour in COLOURS]
    objective = PretrainObjective(ObjectiveConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        batch = make_batch(images, captions, [1 + (step + i) % 15 for i in range(len(captions))], 16)
        terms = objective(model, batch)
        loss = sum(objective.weights[name] * total / count for name, (total, count) in terms.items())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    save_model(model.eval(), folder)
    tokenizer.save(folder)
    return folder


@contextlib.contextmanager
def serving(
    model: Path, images: Path | None = None, other: Path | None = None, limit: int = 0, upload_mb: float = 1.0
) -> Iterator[str]:
    """The address of an explorer that runs in a thread of this process."""
    given = [None if path is None else str(path) for path in (images, other)]
    answers = prepare(str(model), given[0], given[1], limit, upload_mb, "cpu")
    listening = listen("127.0.0.1", 0)
    server = http_server(answers, "127.0.0.1")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield url_of("127.0.0.1", listening)
    finally:
        server.should_exit = True
        thread.join(10)


class Reply:
    """What a server answered."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one sentence of a refusal."""
        assert self.json.keys() == {"error"}
        return self.json["error"]


def ask(
    url: str, path: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
) -> Reply:
    """One request, its path sent as it is written."""
    to = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        to.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            to.putheader(name, value)
        if body is not None:
            to.putheader("Content-Length", str(len(body)))
        to.endheaders(body)
        return Reply(to.getresponse())
    finally:
        to.close()


class Screen:
    """A page and what is on it; mistakes of its scripts fail the test."""

    def __init__(self, page: Any) -> None:
        self.page, self.mistakes = page, list[str]()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: self.mistakes.append(str(error)))
        page.on("console", lambda line: self.mistakes.append(line.text) if self._bad(line) else None)
        page.on("request", lambda asked: self.mistakes.append(asked.url) if "127.0.0.1" not in asked.url[:20] else None)

    @staticmethod
    def _bad(line: Any) -> bool:
        """An answer that refuses is logged as an error by the browser itself, and is none of ours."""
        return line.type == "error" and "Failed to load resource" not in line.text

    def open(self, url: str) -> Screen:
        self.page.goto(url)
        self.settled()
        return self

    def settled(self) -> None:
        """Until nothing is under way."""
        self.page.wait_for_selector("main[aria-busy=false]")

    def drawn(self, query: str) -> np.ndarray:
        """What a canvas shows, uint8 [H, W, 3]."""
        uri = self.page.eval_on_selector(query, "(x) => x.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#file", path)
        self.settled()

    def click_patch(self, row: int, column: int, side: int = PATCHES, at: int = 0) -> None:
        canvas = self.page.locator(".pick canvas").nth(at)
        box = canvas.bounding_box()
        canvas.click(position={"x": (column + 0.5) * box["width"] / side, "y": (row + 0.5) * box["height"] / side})
        self.settled()

    def text(self, query: str) -> str:
        return self.page.inner_text(query)

    def width(self) -> int:
        """What is scrolled over, pixels."""
        return self.page.evaluate("document.documentElement.scrollWidth")
