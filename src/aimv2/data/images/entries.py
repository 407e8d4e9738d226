"""One record for a picture of any source: its key, its captions, its label, and the reader that finds its bytes.

A source is listed without opening an image. Readers are light and picklable: an entry may be read in another process.
"""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aimv2.data.images.decode import ImageError
from aimv2.data.images.splits import WORDS, stated_word
from aimv2.data.passed import PassedOver
from aimv2.data.shards.format import (
    Parts,
    ShardScan,
    captions_of,
    class_number,
    clean_captions,
    image_of,
    json_of,
    parts_of_kind,
    read_sample,
    safe_key,
    scan_shard,
    text_of,
    texts_of_sample,
    why_no_image,
)
from aimv2.data.text.encoding import decode_text, say_once
from aimv2.errors import first_line
from aimv2.io import parse_json, read_file

Captions = dict[str, list[str]]
UNREAD: dict[str, Any] = {}  # captions and the rest of an entry whose reader finds them; never written to


class Loaded(NamedTuple):
    """What a reader found for an entry: the encoded image and the rest of the sample."""

    data: bytes
    captions: Captions
    label: str | None
    about: dict[str, Any]
    odd_label: str | None = None  # a label that is no number of a class, which is left out
    turns: list[dict[str, str]] | None = None  # of a conversation, as LLaVA's; then ``data`` is empty and
    images: tuple[bytes, ...] = ()  # are its images
    noted: tuple[tuple[str, str], ...] = ()  # (kind, name) of what is counted and imported all the same


class Reject(NamedTuple):
    """An entry that cannot be used, and why, in words.

    Attributes:
        kind: of a conversation's fault, under which it is counted.
        row: see :class:`SourceEntry`.
    """

    key: str
    image: str
    reason: str
    kind: str = ""
    row: str = ""

    @property
    def place(self) -> str:
        """What names it in a message."""
        return f"{self.image} ({self.row})" if self.row else self.image


class RowError(ImageError):
    """A row that cannot be used, by the kind of its fault."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Reader(ABC):
    """Finds the bytes of entries; picklable and light, since it goes to other processes."""

    @abstractmethod
    def read(self, entry: SourceEntry) -> Loaded:
        """The encoded image and the rest of the sample.

        Raises:
            ImageError: it cannot be used.
        """

    def load(self, entries: Sequence[SourceEntry]) -> Iterator[Loaded | Reject]:
        """One result for each entry, in order."""
        return (loaded_or_reject(entry, partial(self.read, entry)) for entry in entries)


def loaded_or_reject(entry: SourceEntry, read: Callable[[], Loaded]) -> Loaded | Reject:
    """What is read, or the reason why it cannot be used."""
    try:
        return read()
    except ImageError as error:
        return Reject(entry.key, entry.image, str(error), getattr(error, "kind", ""), entry.row)


class SourceEntry(NamedTuple):
    """One picture of a source.

    Attributes:
        image: its name as the source gives it, for messages.
        where: what the reader needs to find it.
        reader: finds it.
        row: number and id of its row, for messages, where its image's name can be that of several.
    """

    key: str
    image: str
    where: tuple[Any, ...]
    captions: Captions
    label: str | None
    about: dict[str, Any]
    reader: Reader
    row: str = ""


@dataclass
class PlannedSource:
    """A source, listed.

    Attributes:
        total: number of entries, if known before they are listed.
        classes: class names in label order, if it is a class-folder tree.
        unique_keys: the entries' keys cannot repeat, so nobody needs to remember them.
        passed: what is passed over; complete once the entries are listed.
        used: files of its folder, besides images, that it is read from.
        own_images: it holds its images itself: those in its folder are none of it.
        split: the only split that is read, of a source whose rows state theirs.
        is_val: which entries are validation data by what the source states.
        by_image: all entries of an image's name are of one split, whatever their keys.
        manifest: what aimv2.json says of the data set besides, such as the names of its classes.
    """

    kind: str
    items: Iterable[SourceEntry | Reject]
    total: int | None = None
    classes: list[str] = field(default_factory=list)
    unique_keys: bool = False
    passed: PassedOver = field(default_factory=PassedOver)
    used: set[str] = field(default_factory=set)
    own_images: bool = False
    split: str = ""
    is_val: Callable[[SourceEntry], bool] | None = None
    by_image: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)


def read_label(value: Any) -> tuple[str | None, str | None]:
    """(the number of a class, None), or (None, what there is instead); (None, None) of an empty cell, which may be NaN."""
    number, nothing = class_number(value), value in (None, "") or value != value
    return number, None if nothing or number is not None else str(value)


# ---- files ----


@dataclass(frozen=True)
class FileReader(Reader):
    """Reads image files; ``where`` is the path, then paths of a text and a JSON sidecar ("" for none).

    Attributes:
        keys: of the sidecar, that hold captions; None: the known ones.
        images_only: its entries have no captions, and are used all the same.
    """

    keys: tuple[str, ...] | None = None
    images_only: bool = False

    def read(self, entry: SourceEntry) -> Loaded:
        path, *sidecars = entry.where
        try:
            data = read_file(Path(path))
            captions, about = _read_sidecars(self.keys, *sidecars) if sidecars else (entry.captions, entry.about)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None
        return Loaded(data, captions, entry.label, about)


def _read_sidecars(keys: tuple[str, ...] | None, *files: str) -> tuple[Captions, dict[str, Any]]:
    """Captions of the text file or the JSON file, as those of a sample in a tar, and the other keys of the JSON file."""
    parts = {}
    for kind, file in zip(("txt", "json"), files):
        try:
            if file:
                parts[kind] = decode_text(read_file(Path(file)), Path(file).name, "texts next to images").encode()
            record = parse_json(parts[kind]) if kind in parts and kind == "json" else None
        except ValueError as error:
            raise ImageError(
                str(error) if isinstance(error, UnicodeError) else f"{Path(file).name} is no JSON"
            ) from None
    captions, about = captions_of(parts, keys), json_of(parts)
    _say_split(about, "images with a .json")
    return captions or ({} if isinstance(record, dict) else clean_captions(record)), about


def _say_split(about: dict[str, Any], what: str) -> None:
    """A line where a sample states that it is no training data: its JSON is read too late to sort it."""
    if WORDS.get(word := stated_word(about.get("split")), word) not in ("", "train"):
        say_once(f"{what} state the split '{word}', which is not followed; --val-list FILE decides what is validation")


# ---- tars ----


def read_tar_parts(tar: Path | str, start: int, end: int) -> Parts:
    """All members of a sample by its offsets.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return read_sample(Path(tar), start, end)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ImageError(f"cannot be read: {first_line(error)}") from None


def read_tar_sample(tar: Path | str, start: int, end: int) -> tuple[bytes, Parts]:
    """The encoded image of a sample and all its members, by its offsets.

    Raises:
        ImageError: it cannot be read, or has no image.
    """
    parts = read_tar_parts(tar, start, end)
    found = image_of(parts)
    if found is None:
        raise ImageError(why_no_image(parts))
    return found[1], parts


def tar_entries(tar: Path, keys: tuple[str, ...] | None = None) -> tuple[ShardScan, Iterator[SourceEntry]]:
    """What the headers of a tar hold, and the entries of its whole samples; ``image`` is the key as the tar has it.

    Raises:
        OSError: it cannot be read.
    """
    scan, reader = scan_shard(tar), TarReader(keys)
    spans = zip(scan.keys, scan.offsets, scan.offsets[1:])
    return scan, (
        SourceEntry(safe_key(key), key, (str(tar), *span), UNREAD, None, UNREAD, reader) for key, *span in spans
    )


@dataclass(frozen=True)
class TarReader(Reader):
    """Reads samples of tars; ``where`` is (tar, start, end), ``keys`` as of :class:`FileReader`."""

    keys: tuple[str, ...] | None = None

    def read(self, entry: SourceEntry) -> Loaded:
        data, parts = read_tar_sample(*entry.where)
        try:
            for name in (*texts_of_sample(parts), *parts_of_kind(parts, "json")):
                decode_text(parts[name], f"its .{name}", "texts in shards")
        except UnicodeError as error:
            raise ImageError(str(error)) from None
        about, (label, odd) = json_of(parts), read_label(text_of(parts, "cls"))
        _say_split(about, "samples in shards")
        return Loaded(data, captions_of(parts, self.keys), label, about, odd)
