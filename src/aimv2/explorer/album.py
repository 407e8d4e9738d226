"""The images of the explorer, from a folder, generated examples and uploads; addressed by number, never by path."""

from __future__ import annotations

import io
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

from PIL import Image

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.pictures import Picture, pictures
from aimv2.data.scenes import scene_of

TYPES = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000  # per upload, from its header
LONGEST = 2048  # longer side of an image on the page in pixels
KEPT = 16  # uploads and further examples; the oldest is dropped
DECODED = 32  # decoded images of the folder in memory
THUMBNAIL = 192  # pixels per side
EXAMPLES = 12  # generated if no folder is given
NAME = 80  # characters of a name that are shown
SPLIT = "val"  # held out from the demo's training


class RequestError(Exception):
    """A request that can't be answered.

    Attributes:
        status: HTTP status of the response.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Entry:
    """An image by number; ``kind`` is folder, example or upload, ``says`` the caption of an example, else ""."""

    number: int
    name: str
    kind: str
    says: str = ""


class Album:
    """All images by number: 0..N-1 are the folder's (or the first examples), later ones uploads and further examples.

    Not thread-safe: called only from the server's one worker.
    """

    def __init__(self, source: str | None, limit: int, example_size: int, image_root: Path | None = None) -> None:
        """
        Args:
            source: any source of :func:`aimv2.data.images.pictures.pictures`; None: examples are generated.
            limit: use only the first images of the source; 0: all.
            example_size: pixels per side of examples.
            image_root: a folder outside a list's own, below which it may name images.

        Raises:
            UsageError: no image in the source.
        """
        self.example_size, self.drawn = example_size, itertools.count()
        self.listed: list[Picture] = []
        self.entries: dict[int, Entry] = {}
        self.added: OrderedDict[int, Image.Image] = OrderedDict()
        self.uploads: dict[int, bytes] = {}
        self.decoded: OrderedDict[int, Image.Image] = OrderedDict()
        self.thumbnails: dict[int, bytes] = {}
        if source is None:
            fixed = [self._scene() for _ in range(EXAMPLES)]
            self.scenes = [image for image, _ in fixed]
            self.entries = {at: Entry(at, f"example {at + 1}", "example", says) for at, (_, says) in enumerate(fixed)}
        else:
            self.listed = list(islice(pictures(source, "--images", image_root), limit or None))
            self.entries = {
                at: Entry(at, PurePath(name).name[-NAME:], "folder") for at, (name, _) in enumerate(self.listed)
            }
        self.fixed = len(self.entries)
        self.numbers = itertools.count(self.fixed)

    def shown(self) -> list[Entry]:
        """Entries that the page lists: additions, newest first, then the folder."""
        return [self.entries[number] for number in (*reversed(self.added), *range(self.fixed))]

    def entry(self, number: int) -> Entry:
        """
        Raises:
            RequestError: no such image.
        """
        if number not in self.entries:
            raise RequestError(404, "This image is no longer stored; open it again.")
        return self.entries[number]

    def image(self, number: int) -> Image.Image:
        """The upright RGB image.

        Raises:
            RequestError: no such image, or one of the folder that can't be read.
        """
        entry = self.entry(number)
        if number in self.added:
            return self.added[number]
        if entry.kind == "example":
            return self.scenes[number]
        if number not in self.decoded:
            self.decoded[number] = fitted(self._read(number))
            if len(self.decoded) > DECODED:
                self.decoded.popitem(last=False)
        self.decoded.move_to_end(number)
        return self.decoded[number]

    def whole(self, number: int) -> Image.Image:
        """The upright RGB image at its own size, which a model sees; what the page shows is shrunk to LONGEST.

        Raises:
            RequestError: see :meth:`image`.
        """
        image = self.image(number)
        if max(image.size) < LONGEST:
            return image
        return decode_upload(self.uploads[number]) if number in self.added else self._read(number)

    def _read(self, number: int) -> Image.Image:
        try:
            return decode_image(self.listed[number][1]())
        except ImageError as error:
            raise RequestError(422, f"{self.entries[number].name} can't be shown: {error}.") from None
        except OSError as error:
            raise RequestError(
                422, f"{self.entries[number].name} can't be read: {error.strerror or 'no reason'}."
            ) from None

    def thumbnail(self, number: int) -> bytes:
        """A small PNG.

        Raises:
            RequestError: see :meth:`image`.
        """
        if number not in self.thumbnails:
            small = self.image(number).copy()
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            file = io.BytesIO()
            small.save(file, "PNG")
            self.thumbnails[number] = file.getvalue()
        return self.thumbnails[number]

    def upload(self, content: bytes, name: str) -> Entry:
        """Add an encoded image.

        Raises:
            RequestError: not a JPEG, PNG or WebP, broken, too large.
        """
        entry = self._add(fitted(decode_upload(content)), name.strip()[-NAME:] or "upload", "upload")
        self.uploads[entry.number] = content
        return entry

    def example(self) -> Entry:
        """Generate and add a further example."""
        image, says = self._scene()
        return self._add(image, "example", "example", says)

    def _scene(self) -> tuple[Image.Image, str]:
        scene = scene_of(SPLIT, next(self.drawn), size=self.example_size)
        return Image.fromarray(scene.image), scene.caption

    def _add(self, image: Image.Image, name: str, kind: str, says: str = "") -> Entry:
        entry = Entry(next(self.numbers), name, kind, says)
        self.added[entry.number], self.entries[entry.number] = image, entry
        while len(self.added) > KEPT:
            oldest, _ = self.added.popitem(last=False)
            del self.entries[oldest]
            self.thumbnails.pop(oldest, None)
            self.uploads.pop(oldest, None)
        return entry

    def readable(self) -> Iterator[int]:
        """Numbers of the folder's images (or the first examples)."""
        return iter(range(self.fixed))


def decode_upload(content: bytes) -> Image.Image:
    """Decode an uploaded file, whatever its name.

    Raises:
        RequestError: not a JPEG, PNG or WebP, broken, too many pixels.
    """
    if not content:
        raise RequestError(400, "The file is empty.")
    try:
        with Image.open(io.BytesIO(content), formats=TYPES):
            pass
    except Image.DecompressionBombError:
        raise RequestError(413, f"The image has more than {MAX_PIXELS:,} pixels.") from None
    except Exception:  # with a broken header, Pillow's plugins raise nearly anything
        raise RequestError(415, "This file can't be read as an image: a JPEG, PNG or WebP is expected.") from None
    try:
        return decode_image(content, MAX_PIXELS)
    except ImageError as error:
        raise RequestError(415, f"This image can't be used: {error}.") from None


def fitted(image: Image.Image) -> Image.Image:
    """Shrink an image to a longer side of at most LONGEST, for the page."""
    if max(image.size) > LONGEST:
        image = image.copy()
        image.thumbnail((LONGEST, LONGEST), reducing_gap=3.0)
    return image
