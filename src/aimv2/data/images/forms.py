"""The forms in which labelled images lie about: class folders, WebDataset shards, CSV lists.

Each function looks at a source and says which splits it has (:class:`Form`); a split is listed when it is asked for
(:class:`Listed`: names, labels, and what reads an image), and an image is read when *it* is asked for.

Legend: N images, C classes.
"""

from __future__ import annotations

import csv
import logging
import mmap
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2.data.images.caption_files import are_classes
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.pictures import walk
from aimv2.data.images.sources import IMAGE_COLUMNS
from aimv2.data.shards.format import find_shards, image_of, label_of, read_sample, scan_shard, split_shards
from aimv2.errors import UsageError

log = logging.getLogger(__name__)

SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
NAMES_FILES = ("classes.txt", "classnames.txt")  # ours, CLIP_benchmark's
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "category")
LISTS = (".csv", ".tsv")


@dataclass(frozen=True)
class Listed:
    """A split, listed: N keys, labels int64 [N], C class names (None: they are numbers), and what reads image i."""

    keys: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...] | None
    image: Callable[[int], Image.Image]


@dataclass(frozen=True)
class Form:
    """What a source holds.

    Attributes:
        kind: in words.
        splits: train, val, test -> what lists it.
        dataset: the registered set that alone has this form.
    """

    kind: str
    splits: Mapping[str, Callable[[], Listed]]
    dataset: str | None = None


def wrong(source: str, words: str) -> UsageError:
    """A mistake in a data set, to be raised."""
    return UsageError(f"--data {source}: {words}")


def _by_split(paths: Iterable[Path], source: str) -> dict[str, Path]:
    """Paths that are named like splits, by the split's name here."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        split = SPLITS.get((path.stem if path.suffix.lower() in LISTS else path.name).lower())
        if split and split in found:
            raise wrong(source, f"{found[split].name} and {path.name} are both a {split} split; one of them expected")
        if split:
            found[split] = path
    return found


def names_beside(*folders: Path) -> tuple[str, ...] | None:
    """Class names, a line each in label order, of classes.txt or classnames.txt; None where there is neither."""
    for path in (folder / name for folder in folders for name in NAMES_FILES):
        if path.is_file():
            lines = path.read_text("utf-8-sig", "replace").splitlines()
            return tuple(name for line in lines if (name := line.strip()))
    return None


def find_home(root: Path, marks: tuple[str, ...], inner: tuple[str, ...]) -> Path | None:
    """The folder that holds all of ``marks``: ``root`` or the one that its archive unpacks to."""
    for folder in (root, *(root / name for name in inner)):
        if all((folder / mark).exists() for mark in marks):
            return folder
    return None


def read_lines(path: Path, source: str) -> list[str]:
    """Lines of a text file that hold anything."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(source, f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_matrix(path: Path, source: str) -> dict[str, Any]:
    """What a .mat file holds."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise wrong(
            source, f"{path.name} needs scipy (pip install scipy); or write train.csv and test.csv: path,label"
        ) from None
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises many kinds for a broken file
        raise wrong(source, f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}") from None


@dataclass(frozen=True)
class ImageFiles:
    """Images by their paths, relative to ``root`` or absolute."""

    root: Path
    names: Sequence[str]

    def __call__(self, row: int) -> Image.Image:
        return decode_image(self.root / self.names[row])


# ---- class folders ----


def class_folders(root: Path, source: str, split: bool) -> Form | None:
    """``ROOT/SPLIT/CLASS/*`` (``split``), or ``ROOT/CLASS/*``, which is training data; labels in order of names.

    classnames.txt in ROOT may name the classes: one line a folder, in the order of the folders' names; or the
    folders' own names in another order, which then is the labels' order.
    """
    here = [root / name for name in _folders(root)]
    # a folder `train` of images alone is a class of vehicles
    parts = _by_split((path for path in here if _folders(path)), source) if split else {"train": root} if here else {}
    if not parts:
        return None
    listing = partial(_list_class_folders, root, parts, source)
    return Form("class folders", {name: partial(listing, name) for name in parts})


def _folders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith((".", "__")) and entry.is_dir())


def _list_class_folders(root: Path, parts: dict[str, Path], source: str, split: str) -> Listed:
    folders = _folders(parts.get("train", parts[split]))
    if strange := set(_folders(parts[split])) - set(folders):
        name = sorted(strange)[0]
        raise wrong(source, f"{parts[split].name}/{name} is a class that train lacks ({len(folders)} classes there)")
    if len(folders) > 1 and not are_classes(folders):
        raise wrong(
            source,
            f"{parts[split]} holds {', '.join(folders[:3])}, which are no classes; a folder for each class's images expected",
        )
    classes = names = names_beside(root) or tuple(folders)
    if set(names) == set(folders):
        folders = list(names)
    elif len(names) != len(folders):
        raise wrong(source, f"{len(names)} class names in {' or '.join(NAMES_FILES)}, {len(folders)} class folders")
    inner = "" if parts[split] == root else f"{parts[split].name}/"
    keys, counts = list[str](), []
    for name in folders:
        before = len(keys)
        if (root / inner / name).is_dir():
            keys += walk(root, f"{inner}{name}/")
        counts.append(len(keys) - before)
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    return Listed(keys, labels, tuple(classes), ImageFiles(root, keys))


# ---- shards ----


@dataclass(frozen=True)
class ShardImages:
    """Samples of tars: which tar, first byte, end; each [N]."""

    tars: Sequence[Path]
    which: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        try:
            parts = read_sample(self.tars[self.which[row]], int(self.starts[row]), int(self.ends[row]))
        except (OSError, tarfile.TarError) as error:
            raise ImageError(f"cannot be read: {error}") from None
        found = image_of(parts)
        if found is None:
            raise ImageError("no image in its sample")
        return decode_image(found[1])


def shard_form(source: str) -> Form | None:
    """Tars of samples: named by split, in folders of splits (CLIP_benchmark's), or given by a pattern.

    Raises:
        UsageError: a pattern that fits nothing.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        if any(root.glob("*.tar")):
            groups, homes = split_shards(root, option="--data"), [root]
        else:
            inner = _by_split((path for path in root.iterdir() if path.is_dir() and any(path.glob("*.tar"))), source)
            groups, homes = {split: sorted(path.glob("*.tar")) for split, path in inner.items()}, [root]
    elif root.suffix.lower() == ".tar" or any(mark in source for mark in "*?[{"):
        tars = find_shards(source, "train", option="--data")
        groups = {split: [tar for tar in tars if _split_of(tar) == split] for split in ("train", "val", "test")}
        homes = [tars[0].parent, *([tars[0].parent.parent] if tars[0].parent.name.lower() in SPLITS else [])]
    else:
        return None
    listed = {split: partial(_list_shards, tars, homes, source) for split, tars in groups.items() if tars}
    return Form("WebDataset shards", listed) if listed else None


def _split_of(tar: Path) -> str:
    """The split that a tar's name states, or its folder's; train where neither does."""
    stated = re.match(r"(train|val|test)-", tar.name)
    return stated[1] if stated else SPLITS.get(tar.parent.name.lower(), "train")


def _list_shards(tars: list[Path], homes: list[Path], source: str) -> Listed:
    keys, labels, which, starts, ends = list[str](), [], [], [], []
    for number, tar in enumerate(tars):
        try:
            found, edges, numbers = list_shard(tar)
        except OSError as error:
            raise wrong(source, f"{tar.name} cannot be read: {error.strerror or error}") from None
        keys += found
        labels.append(numbers)
        which.append(np.full(len(found), number, np.int32))
        starts.append(edges[:-1])
        ends.append(edges[1:])
    images = ShardImages(tars, *map(np.concatenate, (which, starts, ends)))
    return Listed(keys, np.concatenate(labels), names_beside(*homes), images)


def list_shard(tar: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The samples of a tar: keys (N), byte offsets int64 [N + 1], and labels int64 [N], -1 where there is none."""
    if quick := _read_plain_headers(tar):
        keys, offsets, labels = quick
    else:
        marks: list[tuple[int, int]] = []  # places of the labels
        scan = scan_shard(tar, met=partial(_mark_label, marks))
        if scan.cut:
            log.warning("%s: %s; its whole samples are used", tar, scan.cut)
        keys, offsets, labels = scan.keys, list(scan.offsets), [-1] * len(scan.keys)
        with tar.open("rb") as file:
            for at, size in marks:
                row = bisect_right(offsets, at) - 1
                if row < len(labels):  # else of a sample that the file's end cuts
                    file.seek(at)
                    labels[row] = label_of({"cls": file.read(size)})
    return keys, np.array(offsets or [0], np.int64), np.array(labels, np.int64)


def _mark_label(marks: list[tuple[int, int]], member: tarfile.TarInfo) -> None:
    """Notes where the content of a label lies, and its bytes."""
    if member.name.rpartition("/")[2].partition(".")[2].lower() == "cls":
        marks.append((member.offset_data, member.size))


def _read_plain_headers(tar: Path) -> tuple[list[str], list[int], list[int]] | None:
    """Keys, offsets and labels of a tar of plain files; None if it has anything else, which `scan_shard` knows.

    Several times as fast as the standard library, which makes an object of every header.
    """
    keys, offsets, labels = list[str](), list[int](), list[int]()
    size = tar.stat().st_size
    at, start = 0, -1
    if size < 512:
        return None
    with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        while True:
            header = memory[at : at + 512]
            if not header.strip(b"\0") and len(header) == 512:
                return keys, [*offsets, at], labels
            digits = header[124:136].strip(b"\0 ")
            # longer names, sparse files, links, folders: all of them rare in shards
            if header[257:262] != b"ustar" or header[345:500].strip(b"\0") or not digits.isdigit():
                return None
            body, length = at + 512, int(digits, 8)
            kind, name = header[156:157], header[:100].rstrip(b"\0")
            if body + length > size:
                return None
            start, at = (at if start < 0 else start), body + (length + 511) // 512 * 512
            if kind == b"x":  # webdataset's writer puts the time with its fractions here
                if re.search(rb" (path|size|GNU[^=]*)=", memory[body : body + length]):
                    return None
                continue
            base, dot, extension = name.rpartition(b"/")[2].partition(b".")
            if kind not in (b"0", b"\0") or not base or not dot or name.startswith(b"__") or not name.isascii():
                return None
            key = name[: len(name) - len(extension) - 1].decode()
            if not keys or key != keys[-1]:
                keys.append(key)
                offsets.append(start)
                labels.append(-1)
            if extension.lower() == b"cls":
                labels[-1] = label_of({"cls": memory[body : body + length]})
            start = -1


# ---- lists ----


def list_form(path: Path, source: str) -> Form | None:
    """CSV or TSV files of paths and labels: a folder's ``train.csv``, ``test.csv``, ..., or one file and its siblings.

    Paths are relative to the list's folder. Labels are numbers from 0, or names: then classes.txt beside, or the
    order of the alphabet in the training list, numbers them.
    """
    if path.is_dir():
        files = _by_split((p for p in path.iterdir() if p.suffix.lower() in LISTS and p.is_file()), source)
    elif path.suffix.lower() in LISTS and path.is_file():
        named = path.stem.lower() in SPLITS
        siblings = [p for p in path.parent.iterdir() if p.suffix.lower() == path.suffix.lower()] if named else []
        files = _by_split(siblings, source) if named else {"train": path}
    else:
        return None
    listed = {split: partial(_list_rows, files, split, source) for split in files}
    return Form("lists", listed) if listed else None


def _list_rows(files: dict[str, Path], split: str, source: str) -> Listed:
    file = files[split]
    keys, words = _read_list(file, source)
    first = file.parent / keys[0]
    if not first.is_file():
        raise wrong(source, f"{file.name} names {keys[0]}, which is not there; paths start at {file.parent}")
    known = files.get("train", file)
    labels, classes = number_labels(
        words, words if known == file else _read_list(known, source)[1], names_beside(file.parent), source
    )
    return Listed(keys, labels, classes, ImageFiles(file.parent, keys))


def _read_list(file: Path, source: str) -> tuple[list[str], list[str]]:
    """Paths and labels, as they are written."""
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(source, f"{file.name} cannot be read as UTF-8 text: {error}") from None
    first = text.partition("\n")[0]
    mark = "\t" if file.suffix.lower() == ".tsv" or "\t" in first else ";" if ";" in first else ","
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=mark) if any(row)]
    if not rows:
        raise wrong(source, f"{file.name} is empty; path,label a line expected")
    header = [cell.lower() for cell in rows[0]]
    image = next((header.index(name) for name in IMAGE_COLUMNS if name in header), None)
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    if image is None and label is None and len(header) >= 2 and "." in header[0]:
        image, label = 0, 1  # no header
    elif image is None or label is None:
        lacks = "labels" if image is not None else "images"
        raise wrong(source, f"no column of {lacks} among {', '.join(rows[0])} of {file.name}; path,label expected")
    else:
        rows = rows[1:]
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= max(image, label)), None)
    if short is not None:
        raise wrong(source, f"row {short} of {file.name} has {len(rows[short - 1])} cells; path,label expected")
    if not rows:
        raise wrong(source, f"{file.name} has a header and no row")
    return [row[image] for row in rows], [row[label] for row in rows]


def number_labels(
    words: Sequence[str], train: Sequence[str], names: tuple[str, ...] | None, source: str
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as written, to int64 [N], -1 for an empty one, and the classes' names, if they have names.

    Args:
        words: of this split.
        train: of the training split, which decides.
        names: of classes.txt.

    Raises:
        UsageError: a class that training does not know.
    """
    if all(re.fullmatch(r"(-?\d+)?", word) for word in train):
        if strange := next((word for word in words if not re.fullmatch(r"(-?\d+)?", word)), None):
            raise wrong(source, f"label {strange}: a number expected, as in the training split")
        return np.array([int(word or -1) for word in words], np.int64), names
    names = names or tuple(sorted(set(train) - {""}))
    numbers = {"": -1, **{name: number for number, name in enumerate(names)}}
    if strange := next((word for word in words if word not in numbers), None):
        raise wrong(source, f"label {strange}: not among the {len(names)} classes ({', '.join(names[:3])}, ...)")
    return np.array([numbers[word] for word in words], np.int64), names
