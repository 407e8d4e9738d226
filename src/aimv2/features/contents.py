"""Content identity of images, for fingerprints: sizes and modification times of their files, or a hash of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.datasets.archives import TableOfImages
from aimv2.data.datasets.registry import ImageArrays
from aimv2.data.images.forms import ImageFiles, ShardImages
from aimv2.data.images.hub import TableImages
from aimv2.data.images.labelled import Labelled, _Chosen, _Joined
from aimv2.data.images.pictures import Picture


def contents_of(data: Labelled) -> str:
    """A hash that changes where an image of a labelled split is replaced; ``unknown`` where nothing can tell.

    Of files and shards it covers sizes and modification times, of arrays in memory their bytes, of tables the fingerprint that
    `datasets` keeps of them.
    """
    image: Any = data.image
    rows = np.arange(len(data.keys))
    while isinstance(image, _Chosen):
        image, rows = image.image, image.rows[rows]
    if isinstance(image, _Joined):
        return hashlib.sha256(f"{contents_of(image.first)} {contents_of(image.second)}".encode()).hexdigest()
    if isinstance(image, ImageFiles):
        return contents_of_files(image.root / image.names[row] for row in rows.tolist())
    if isinstance(image, ShardImages):
        spans = np.stack([image.which[rows], image.starts[rows], image.ends[rows]]).astype(np.int64)
        tars = contents_of_files(image.tars[number] for number in np.unique(spans[0]).tolist())
        return hashlib.sha256(tars.encode() + spans.tobytes()).hexdigest()
    if isinstance(image, ImageArrays):
        return hashlib.sha256(np.ascontiguousarray(image.pixels).data).hexdigest()
    if isinstance(image, TableOfImages):
        return contents_of_files([image.path])
    if isinstance(image, TableImages):
        return str(getattr(image.rows, "_fingerprint", "unknown"))
    return "unknown"


def contents_of_files(files: Iterable[Path]) -> str:
    """A hash of the sizes and modification times of files; a missing file counts too."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file_identity(file))
    return digest.hexdigest()


def file_identity(file: Path) -> bytes:
    """Size and modification time in one line."""
    try:
        about = file.stat()
    except (OSError, ValueError):
        return b"none\n"
    return f"{about.st_size} {about.st_mtime_ns}\n".encode()


class ListedImages:
    """Counts images and hashes their keys and contents while they are listed."""

    def __init__(self) -> None:
        self.count, self._keys, self._contents = 0, hashlib.sha256(), hashlib.sha256()

    def pass_through(self, listed: Iterable[Picture]) -> Iterator[Picture]:
        """The images, each with its key in one line."""
        for name, read in listed:
            key = one_line_key(name)
            self.count += 1
            self._keys.update(key.encode() + b"\n")
            self._contents.update(reader_identity(read))
            yield key, read

    def fingerprint(self) -> dict[str, Any]:
        """The images' keys of a fingerprint."""
        return {
            "images": self.count,
            "keys_sha256": self._keys.hexdigest(),
            "contents_sha256": self._contents.hexdigest(),
        }


def reader_identity(read: Callable[[], bytes]) -> bytes:
    """Identity of what a reader of :func:`aimv2.data.images.pictures.pictures` will read: its file and its place in it."""
    given = getattr(read, "args", ())
    files = b"".join(file_identity(one) for one in given if isinstance(one, Path))
    return files + repr([one for one in given if not isinstance(one, Path)]).encode()


def one_line_key(name: str) -> str:
    """A name as JSON writes a string, without the quotes around it: one line, valid UTF-8, ``json.loads`` reads it back.

    Quotes, backslashes, line ends and other control characters are escaped, and so are the bytes of a file name that is not
    UTF-8 (``\\udcXX``; ``os.fsencode`` of what ``json.loads`` gives is the name on disk).
    """
    text = json.dumps(name, ensure_ascii=False)[1:-1]
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
