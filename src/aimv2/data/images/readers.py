"""What reads image i of a listed split: files, samples of tars, rows of tables, arrays. Threads may share a reader.

Each is called with a row, raises :class:`aimv2.data.images.decode.ImageError`, and has ``contents(rows)``: a mark of the
images of these rows (int64 [M]), the same as long as none of them has been replaced.

Legend: N images.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from aimv2.data.images.decode import ImageError, decode_image, is_encoded
from aimv2.data.images.entries import read_tar_sample
from aimv2.data.images.names import found_or_written, locate, locate_inside, shared, taken
from aimv2.errors import UsageError, shown
from aimv2.io import read_file, regular

LONGEST_PATH = 4096  # bytes; a longer text is an image in base64
UNKNOWN = "unknown"  # contents of images that cannot be compared


def contents_of_rows(reader: Callable[[int], Image.Image], rows: np.ndarray) -> str:
    """The mark of the images of these rows; ``unknown`` where the reader has none."""
    contents = getattr(reader, "contents", None)
    return UNKNOWN if contents is None else str(contents(rows))


def contents_of_files(files: Iterable[Path]) -> str:
    """A mark of the sizes and times of change of files; one that is not there counts too."""
    digest = hashlib.sha256()
    for file in files:
        try:
            about = file.stat()
            digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # a name with a zero byte
            digest.update(b"none\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageFiles:
    """Images by their paths, relative to ``root`` or absolute."""

    root: Path
    names: Sequence[str]

    def __call__(self, row: int) -> Image.Image:
        path = locate(self.root, self.names[row])
        if path != self.root / self.names[row] and path in self._several:
            raise ImageError(taken(path.name))
        return decode_image(path)

    @cached_property
    def _several(self) -> set[Path]:
        return shared(found_or_written(self.root, name) for name in dict.fromkeys(self.names))

    def contents(self, rows: np.ndarray) -> str:
        return contents_of_files(found_or_written(self.root, self.names[row]) for row in rows.tolist())


@dataclass(frozen=True)
class ShardImages:
    """Samples of tars: which tar, first byte, end; each [N]."""

    tars: Sequence[Path]
    which: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        tar = self.tars[self.which[row]]
        return decode_image(read_tar_sample(tar, int(self.starts[row]), int(self.ends[row]))[0])

    def contents(self, rows: np.ndarray) -> str:
        spans = np.stack([self.which[rows], self.starts[rows], self.ends[rows]]).astype(np.int64)
        tars = contents_of_files(self.tars[number] for number in np.unique(spans[0]).tolist())
        return hashlib.sha256(tars.encode() + spans.tobytes()).hexdigest()


class Cells(Protocol):
    """Cells of a column of images, by row."""

    def __getitem__(self, row: int) -> Any: ...

    def mark(self) -> str:
        """The same as long as the table is."""

    def paths(self) -> Iterator[str]:
        """See :func:`paths_of`."""


@dataclass(frozen=True)
class TableImages:
    """Images of a column of a table."""

    cells: Cells
    root: Path  # where paths start
    image_root: Path | None = None

    def __call__(self, row: int) -> Image.Image:
        return decode_image(image_cell(self.cells[row], self.root, self.image_root)[0])

    def contents(self, rows: np.ndarray) -> str:
        """Of the table, and of the files that its cells name."""
        mark = self.cells.mark()
        named = list(map(self._located, self.cells.paths()))
        return f"{mark} {contents_of_files(named)}" if named else mark

    def _located(self, name: str) -> Path:
        try:
            return locate_inside(self.root, name, self.image_root)
        except (ImageError, UsageError):
            return self.root / name


def paths_of(cells: Any) -> list[str]:
    """The paths among the cells of an Arrow array of images: where they have no image, or may be paths; read without the images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        cells = cells.flatten()
    if pa.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}:
        cells = pc.struct_field(cells.filter(pc.is_null(pc.struct_field(cells, "bytes"))), "path")
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return []
    short = cells.filter(pc.less(pc.binary_length(cells), LONGEST_PATH))
    return [name for name in short.to_pylist() if name and from_base64(name) is None]


def image_cell(cell: Any, folder: Path = Path(), image_root: Path | None = None) -> tuple[bytes, str | None]:
    """The encoded image of a table's cell and its name.

    A cell is encoded bytes, base64 text (also a data URL), a path from ``folder``, {bytes, path}, or a list of one of these.

    Raises:
        ImageError: none of these, several images, or a file that cannot be read or lies elsewhere.
    """
    if isinstance(cell, list | tuple) and not all(isinstance(part, int | float) for part in cell):
        if len(cell) > 1:
            raise ImageError(f"{len(cell)} images in one row; one is expected")
        cell = cell[0] if cell else None
    if cell is None or cell in ("", {}, []):
        raise ImageError("no image")
    name = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    data = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes | str) else None
    encoded = from_base64(data) if data else None
    if encoded is not None:
        return encoded, name if name != data else None
    if isinstance(data, bytes):
        return data, name
    if not name:
        raise ImageError("no image" if isinstance(cell, dict) else f"no encoded image, but {type(cell).__name__}")
    try:
        return read_file(locate_inside(folder, str(name), image_root)), name
    except (UsageError, ImageError) as error:
        raise ImageError(str(error)) from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{shown(name, 200)} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def from_base64(text: bytes | str) -> bytes | None:
    """What base64 text holds, where that is the beginning of an image; None for anything else, such as a path."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    if raw[:5] == b"data:":
        raw = raw.partition(b",")[2]
    if len(raw) < 64 or not re.fullmatch(rb"[A-Za-z0-9+/_\s-]{64}", raw[:64]):
        return None
    try:
        data = base64.b64decode(raw.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n"), validate=True)
    except ValueError:
        return None
    return data if is_encoded(data) else None


@dataclass(frozen=True)
class ImageArrays:
    """Images that are in memory: uint8 [N, H, W, 3]."""

    pixels: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def contents(self, rows: np.ndarray) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.pixels).data).hexdigest()


def own_set(file: Any, name: str) -> Any:
    """A data set of an open HDF5 file.

    Raises:
        ValueError: it lies in another file, which HDF5 lets it name: any file of this machine could be shown as an image.
    """
    found = file[name]
    if found.file.filename != file.filename or found.external or found.is_virtual:
        raise ValueError(f"{name} lies in another file")
    return found


class HDF5Images:
    """Images of a data set ``x`` [N, H, W, 3] in an HDF5 file, which each process opens for itself.

    h5py has one lock for all threads and holds it over a fork; a lock of our own could be copied while it is held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, Any] | None = None

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]

    def __call__(self, row: int) -> Image.Image:
        import h5py

        try:
            held = self._open
            if held is None or held[0] != os.getpid():
                held = self._open = os.getpid(), own_set(h5py.File(regular(self.path), "r"), "x")
            return Image.fromarray(held[1][row])
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ImageError(f"cannot be read: {error}") from None

    def contents(self, rows: np.ndarray) -> str:
        return contents_of_files([self.path])


@dataclass(frozen=True)
class ChosenImages:
    """Images by their places in ``rows``."""

    image: Callable[[int], Image.Image]
    rows: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        return self.image(int(self.rows[row]))

    def contents(self, rows: np.ndarray) -> str:
        return contents_of_rows(self.image, self.rows[rows])


@dataclass(frozen=True)
class JoinedImages:
    """Images of one reader, then those of another; with the number of each."""

    first: tuple[Callable[[int], Image.Image], int]
    second: tuple[Callable[[int], Image.Image], int]

    def __call__(self, row: int) -> Image.Image:
        count = self.first[1]
        return self.first[0](row) if row < count else self.second[0](row - count)

    def contents(self, rows: np.ndarray) -> str:
        """Of all images, whatever the rows."""
        marks = " ".join(contents_of_rows(image, np.arange(count)) for image, count in (self.first, self.second))
        return hashlib.sha256(marks.encode()).hexdigest()
