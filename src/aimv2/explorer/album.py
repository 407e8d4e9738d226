"""The images of the explorer, from a folder, generated examples and uploads; addressed by number, never by path."""

from __future__ import annotations

import hashlib
import io
import itertools
import secrets
import time
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
KEPT = 16  # uploads and further examples of a tab; its oldest is dropped
STORED = 4 * KEPT  # those of all tabs
COUNTING = 1.0  # seconds for counting the images that the limit leaves out
THUMBNAIL = 192  # pixels per side
EXAMPLES = 12  # generated if no folder is given
NAME = 80  # characters of a name that are shown
NUMBERS = 2**52  # additions have numbers from here to twice this, which a browser still counts exactly
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
class Added:
    """An upload (its bytes) or a further example (its image), and the tab of the browser that added it."""

    tab: str
    content: bytes | Image.Image
    digest: str = ""


@dataclass(frozen=True)
class Entry:
    """An image by number; ``kind`` is folder, example or upload, ``says`` the caption of an example, else ""."""

    number: int
    name: str
    kind: str
    says: str = ""


class Album:
    """All images by number: 0..N-1 are the folder's (or the first examples), others uploads and further examples.

    Additions belong to the tab that made them, have numbers that can't be guessed, and change only in the server's album
    thread; the threads of models and of thumbnails read.
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
        self.added: dict[int, Added] = {}
        self.latest: tuple[int, Image.Image] | None = None  # decoded
        self.sizes: dict[int, tuple[int, int]] = {}
        self.thumbnails: dict[int, bytes] = {}
        self.total, self.counted = EXAMPLES, True
        if source is None:
            fixed = [self._scene() for _ in range(EXAMPLES)]
            self.scenes = [image for image, _ in fixed]
            self.entries = {at: Entry(at, f"example {at + 1}", "example", says) for at, (_, says) in enumerate(fixed)}
        else:
            found = pictures(source, "--images", image_root)
            self.listed = list(islice(found, limit or None))
            self.entries = {
                at: Entry(at, shortened(PurePath(name).name), "folder") for at, (name, _) in enumerate(self.listed)
            }
            self._count(found)
        self.fixed = len(self.entries)

    def _count(self, others: Iterator[Picture]) -> None:
        until = time.monotonic() + COUNTING
        self.total = len(self.listed)
        for _ in others:
            self.total += 1
            if time.monotonic() > until:
                self.counted = False
                break

    @property
    def left_out(self) -> str:
        """What the limit leaves out, as a sentence; "" if nothing."""
        if self.total == self.fixed:
            return ""
        total = f"{self.total:,}" if self.counted else f"more than {self.total:,}"
        return f"The first {self.fixed:,} of {total} images are shown; start with --limit 0 for all, --limit N for N."

    def shown(self, tab: str) -> list[Entry]:
        """Entries that the page lists in a tab: its additions, newest first, then the folder."""
        own = [number for number, one in list(self.added.items()) if one.tab == tab]
        return [self.entries[number] for number in (*reversed(own), *range(self.fixed))]

    def entry(self, number: int) -> Entry:
        """
        Raises:
            RequestError: no such image.
        """
        if (found := self.entries.get(number)) is None:
            raise RequestError(404, "This image is no longer stored; open it again.")
        return found

    def image(self, number: int) -> Image.Image:
        """The upright RGB image at its own size; the latest one is kept.

        Raises:
            RequestError: no such image, or one of the folder that can't be read.
        """
        if (latest := self.latest) is not None and latest[0] == number and number in self.entries:
            return latest[1]
        image = self._decoded(number)
        self.latest, self.sizes[number] = (number, image), image.size
        return image

    def size(self, number: int) -> tuple[int, int]:
        """Width and height of the upright image in pixels.

        Raises:
            RequestError: see :meth:`image`.
        """
        return self.sizes.get(number) or self.image(number).size

    def _decoded(self, number: int, side: int | None = None) -> Image.Image:
        """``side``: a JPEG may come out smaller, with a shorter side of at least as many pixels."""
        added, entry = self.added.get(number), self.entry(number)
        if added is not None:
            return added.content if isinstance(added.content, Image.Image) else decode_upload(added.content, side)
        if entry.kind == "example":
            return self.scenes[number]
        try:
            return decode_image(self.listed[number][1](), draft_size=side)
        except ImageError as error:
            raise RequestError(422, f"{entry.name} can't be shown: {error}.") from None
        except OSError as error:
            raise RequestError(422, f"{entry.name} can't be read: {error.strerror or 'no reason'}.") from None

    def thumbnail(self, number: int) -> bytes:
        """A small PNG.

        Raises:
            RequestError: see :meth:`image`.
        """
        if (found := self.thumbnails.get(number)) is None:
            found = small_png(self._decoded(number, THUMBNAIL))
            if number in self.entries:  # else it was removed meanwhile
                self.thumbnails[number] = found
        return found

    def upload(
        self, content: bytes, name: str, tab: str = "", decoded: tuple[Image.Image, bytes] | None = None
    ) -> Entry:
        """Add an encoded image; one that the tab has added before is not added again.

        Args:
            content: the file.
            name: for the list.
            tab: of the browser.
            decoded: the image and its thumbnail, where they are known.

        Raises:
            RequestError: not a JPEG, PNG or WebP, broken, too large.
        """
        digest = hashlib.sha256(content).hexdigest()
        for number, one in self.added.items():
            if (one.tab, one.digest) == (tab, digest):
                return self.entries[number]
        image = decode_upload(content) if decoded is None else decoded[0]
        entry = self._add(Added(tab, content, digest), shortened(name.strip()) or "upload", "upload")
        self.sizes[entry.number] = image.size
        self.latest = entry.number, image
        if decoded is not None:
            self.thumbnails[entry.number] = decoded[1]
        return entry

    def example(self, tab: str = "") -> Entry:
        """Generate and add a further example."""
        image, says = self._scene()
        return self._add(Added(tab, image), "example", "example", says)

    def remove(self, number: int, tab: str = "") -> None:
        """Forget an upload or a further example of a tab.

        Raises:
            RequestError: none of this tab's.
        """
        if number not in self.added or self.added[number].tab != tab:
            raise RequestError(404, "Only images that were added in this tab can be removed.")
        del self.entries[number], self.added[number]  # entries first, as the other thread goes from one to the other
        self.thumbnails.pop(number, None)
        self.sizes.pop(number, None)
        if self.latest is not None and self.latest[0] == number:
            self.latest = None

    def _scene(self) -> tuple[Image.Image, str]:
        scene = scene_of(SPLIT, next(self.drawn), size=self.example_size)
        return Image.fromarray(scene.image), scene.caption

    def _add(self, added: Added, name: str, kind: str, says: str = "") -> Entry:
        number = NUMBERS + secrets.randbelow(NUMBERS)
        while number in self.entries:
            number = NUMBERS + secrets.randbelow(NUMBERS)
        entry = Entry(number, name, kind, says)
        self.entries[number], self.added[number] = (
            entry,
            added,
        )  # entries first: the other thread goes from one to the other
        own = [other for other, one in self.added.items() if one.tab == added.tab]
        for oldest in own[:-KEPT] or list(self.added)[:-STORED]:
            self.remove(oldest, self.added[oldest].tab)
        return entry

    def readable(self) -> Iterator[int]:
        """Numbers of the folder's images (or the first examples)."""
        return iter(range(self.fixed))


def shortened(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"


def small_png(image: Image.Image) -> bytes:
    """A PNG of at most THUMBNAIL pixels a side."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "PNG")
    return file.getvalue()


def decode_upload(content: bytes, side: int | None = None) -> Image.Image:
    """Decode an uploaded file, whatever its name; ``side``: see :func:`decode_image`.

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
        return decode_image(content, MAX_PIXELS, side)
    except ImageError as error:
        raise RequestError(415, f"This image can't be used: {error}.") from None
