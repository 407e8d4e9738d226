"""What people bring: captions files, sidecars, COCO, class folders. Each becomes a list of samples to import.

A source is planned without opening an image: items in a stable order, each with the place where its reader
finds the bytes later, in another process. Tables and tars, whose plan is only positions, are in `tables`.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aimv2.data.images.caption_files import are_classes, are_splits, may_hold_captions, names_images, why_no_captions
from aimv2.data.shards.format import IMAGE_EXTENSIONS, captions_of, clean_captions, json_of, safe_key
from aimv2.errors import UsageError

IMAGE_COLUMNS = (
    *("image", "file", "filename", "file_name", "path", "filepath", "image_path", "image_name"),
    *("image_file", "img", "jpg", "image_id"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "alt", "alt_text", "title", "description", "comment", "sentence"),
    *("sentences",),
)
EXPECTED = (
    "a folder (images with a captions file, .txt/.json sidecars or class folders; Parquet, Arrow or tars), "
    "one such file, or a hub data set id"
)
NOT_UTF8 = "is not UTF-8"

Captions = dict[str, list[str]]


class Item(NamedTuple):
    """One sample to import.

    Attributes:
        image: Its name as the source gives it, for messages.
        where: What the source's reader needs to find it.
    """

    key: str
    image: str
    where: tuple[Any, ...]
    captions: Captions
    label: str | None = None
    about: dict[str, Any] = {}  # noqa: RUF012  never written to


class Reject(NamedTuple):
    """One sample that cannot be imported, and why, in words."""

    key: str
    image: str
    reason: str


class Loaded(NamedTuple):
    """What a reader found for an item: the encoded image and the rest of the sample."""

    data: bytes
    captions: Captions
    label: str | None
    about: dict[str, Any]


class Reader(Protocol):
    """Finds the items' bytes; picklable and light, since it goes to other processes."""

    def load(self, items: Sequence[Item]) -> Iterator[Loaded | Reject]:
        """One result for each item, in order."""


@dataclass
class Source:
    """A planned source.

    Attributes:
        total: Number of items, if known before they are listed.
        classes: Class names in label order, if it is a class-folder tree.
        unique_keys: The items' keys cannot repeat, so nobody needs to remember them.
    """

    kind: str
    items: Iterable[Item | Reject]
    reader: Reader
    total: int | None = None
    classes: list[str] = field(default_factory=list)
    unique_keys: bool = False


@dataclass(frozen=True)
class Columns:
    """Which columns the user named; None finds them by their usual names."""

    image: str | None = None
    captions: tuple[str, ...] | None = None

    def find(self, names: Iterable[str], source: str) -> tuple[str, dict[str, str]]:
        """(image column, {caption column: field}) among ``names``.

        A single caption column is field ``caption``; several are fields of their own names.

        Raises:
            UsageError: a column is missing.
        """
        known = {name.strip().lower(): name for name in names}
        listed = ", ".join(known.values())
        image = self.image or next((name for name in IMAGE_COLUMNS if name in known), "")
        if image.lower() not in known:
            wanted = f"{image!r}" if image else "of the usual names (image, file_name, path, ...)"
            raise UsageError(f"{source}: no image column {wanted} among {listed}; give --image-column")
        captions = self.captions or tuple(name for name in CAPTION_COLUMNS if name in known and name != image.lower())
        for name in captions:
            if name.lower() not in known:
                raise UsageError(f"{source}: no column {name!r} among {listed}; change --caption-column")
        if not captions:
            raise UsageError(f"{source}: captions missing: no caption column among {listed}; give --caption-column")
        fields = {known[name.lower()]: name if len(captions) > 1 else "caption" for name in captions}
        return known[image.lower()], fields


class FileReader:
    """Reads image files; ``where`` is the path, then paths of a .txt and a .json sidecar ("" for none)."""

    def load(self, items: Sequence[Item]) -> Iterator[Loaded | Reject]:
        for item in items:
            path, *sidecars = item.where
            try:
                data = Path(path).read_bytes()
                captions, about = self._sidecars(*sidecars) if sidecars else (item.captions, item.about)
            except ValueError as error:
                yield Reject(item.key, item.image, str(error))
                continue
            except OSError as error:
                yield Reject(item.key, item.image, f"cannot be read: {error.strerror or error}")
                continue
            yield Loaded(data, captions, item.label, about)

    def _sidecars(self, text: str, record: str) -> tuple[Captions, dict[str, Any]]:
        """Raises ValueError for a file that is no text in UTF-8, or no JSON."""
        raw = Path(record).read_bytes() if record else b"{}"
        parts = {"json": raw}
        captions = captions_of(parts)
        if not captions and record:
            try:
                captions = clean_captions(json.loads(raw))  # a bare list of captions
            except ValueError as error:
                what = NOT_UTF8 if isinstance(error, UnicodeDecodeError) else "is no JSON"
                raise ValueError(f"{Path(record).name} {what}") from None
        if not captions and text:
            try:
                captions = clean_captions(Path(text).read_text("utf-8-sig").splitlines())
            except UnicodeDecodeError:
                raise ValueError(f"{Path(text).name} {NOT_UTF8}") from None
        return captions, json_of(parts)


# ---- folders ----


def open_folder(
    root: Path,
    captions: str | None,
    columns: Columns,
    template: str,
    skip: Path | None = None,
    class_folders: bool = False,
) -> Source:
    """Plan a folder of image files.

    Args:
        captions: The captions file, relative to the folder or to the working folder; None finds it.
        template: Caption of a class-folder tree, ``{}`` standing for the class.
        skip: A folder inside ``root`` that is not part of it (the output).
        class_folders: The user says that the folders are classes, whatever else lies there.

    Raises:
        UsageError: no image, no captions, several captions files to choose from, or files that may hold captions and are
            not understood.
    """
    files = _list_files(root, skip)
    images = [name for name in files if _is_image(name)]
    if captions is not None:
        file = next((path for path in (root / captions, Path(captions).expanduser()) if path.is_file()), None)
        if file is None:
            raise UsageError(f"--captions {captions}: no such file, neither in {root} nor here")
        return open_captions(file, root, images, columns)
    if class_folders:
        return _class_source(root, images, template)
    candidates, refused = _captions_candidates(root, files, images, columns)
    if len(candidates) > 1:
        raise UsageError(f"{root} has several captions files: {', '.join(candidates)}; choose one with --captions FILE")
    if candidates:
        for name, why in refused.items():
            if why.startswith(NOT_UTF8) and names_images(root / name, images):
                raise UsageError(
                    f"{root} has several captions files: {candidates[0]}, and {name}, which {why}; choose one with "
                    "--captions FILE"
                )
        return open_captions(root / candidates[0], root, images, columns)
    if not images:
        raise UsageError(f"SRC: no image in {root}; expected {EXPECTED}")
    known = set(files)
    if any(f"{_stem(name)}.{kind}" in known for name in images for kind in ("txt", "json")):
        return _sidecar_source(root, images, known)
    folders = sorted({name.partition("/")[0] for name in images if "/" in name})
    in_folders = all("/" in name for name in images)
    others = may_hold_captions(root, files, images)
    if in_folders and not others and (are_classes(folders) or are_splits(folders)):
        return _class_source(root, images, template)
    raise UsageError(f"{root}: captions missing: {why_no_captions(others, refused, folders if in_folders else [])}")


def open_captions(file: Path, root: Path, images: list[str], columns: Columns) -> Source:
    """Plan the images that a captions file names, looked up under ``root`` (its listing: ``images``)."""
    finder = _ImageFinder(root, file.parent, images)
    captions = dict[str, Captions]()
    about = dict[str, dict[str, Any]]()
    planned: list[Item | Reject] = []
    for row in _rows(file, columns):
        if isinstance(row, Reject):
            planned.append(row)
            continue
        name, found, more = row
        merged = captions.setdefault(name, {})
        for column, more_texts in found.items():
            merged.setdefault(column, []).extend(more_texts)
        about.setdefault(name, more)
    used = set[str]()
    for name, texts in captions.items():
        path, reason = finder.find(name)
        used.add(path)
        if not reason and not texts:
            reason = "no caption"
        if reason:
            planned.append(Reject(safe_key(name), name, reason))
        else:
            planned.append(Item(safe_key(name), name, (path,), texts, None, about[name]))
    if not images and not any(isinstance(item, Item) for item in planned):
        raise UsageError(f"SRC: no image in {root}, and none where {file.name} points; expected its images there")
    planned += [Reject(safe_key(name), name, "no caption") for name in images if str(root / name) not in used]
    total = sum(isinstance(item, Item) for item in planned)
    return Source(f"captions file {file.name}", planned, FileReader(), total)


def _sidecar_source(root: Path, images: list[str], known: set[str]) -> Source:
    planned: list[Item | Reject] = []
    for name in images:
        found = [f"{_stem(name)}.{kind}" for kind in ("txt", "json")]
        paths = [str(root / side) if side in known else "" for side in found]
        if any(paths):
            planned.append(Item(safe_key(name), name, (str(root / name), *paths), {}))
        else:
            planned.append(Reject(safe_key(name), name, "no caption"))
    return Source("sidecar captions", planned, FileReader(), sum(isinstance(i, Item) for i in planned))


def _class_source(root: Path, images: list[str], template: str) -> Source:
    if loose := [name for name in images if "/" not in name]:
        raise UsageError(
            f"--class-folders: {root / loose[0]} lies in no class folder; move it, or leave the option out"
        )
    classes = sorted({name.split("/", 1)[0] for name in images})
    if not images:
        raise UsageError(f"SRC: no image in {root}; expected {EXPECTED}")
    if are_splits(classes):
        raise UsageError(f"SRC: {root} holds splits ({', '.join(classes)}), not classes; import each by itself")
    labels = {name: str(number) for number, name in enumerate(classes)}
    planned: list[Item | Reject] = []
    for name in images:
        kind = name.split("/", 1)[0]
        caption = template.replace("{}", kind.replace("_", " "))
        item = Item(safe_key(name), name, (str(root / name),), {"caption": [caption]}, labels[kind], {"class": kind})
        planned.append(item)
    return Source("class folders", planned, FileReader(), len(planned), classes)


def _list_files(root: Path, skip: Path | None) -> list[str]:
    """All files under a folder as relative POSIX paths, sorted; links followed, nothing hidden."""
    found: list[str] = []
    visited = set[str]()
    for folder, inner, names in os.walk(root, followlinks=True):
        here = Path(folder)
        if (real := os.path.realpath(folder)) in visited:  # a link to a folder above would never end
            inner.clear()
            continue
        visited.add(real)
        inner[:] = [
            name
            for name in inner
            if not name.startswith((".", "__MACOSX")) and (skip is None or (here / name).resolve() != skip)
        ]
        found += [(here / name).relative_to(root).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


class _ImageFinder:
    """Finds the file that a captions file means by a name."""

    def __init__(self, root: Path, beside: Path, images: list[str]) -> None:
        self.root, self.beside, self.images = root, beside, set(images)
        self.by_name, self.by_stem = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for image in images:
            name = image.rpartition("/")[2]
            self.by_name[name].append(image)
            self.by_stem[_stem(name)].append(image)

    def find(self, name: str) -> tuple[str, str]:
        """(path, "") or ("", reason)."""
        name = name.replace("\\", "/").removeprefix("./")
        for inner in (name, f"images/{name}"):
            if inner in self.images:
                return str(self.root / inner), ""
        for folder in (self.root, self.beside):
            if ("/" in name or _is_image(name)) and (folder / name).is_file():
                return str(folder / name), ""
        last = name.rpartition("/")[2]
        found = self.by_name.get(last) or self.by_stem.get(last) or []
        if len(found) > 1:
            return "", f"several images of that name: {', '.join(found[:3])}"
        return (str(self.root / found[0]), "") if found else ("", "no such image")


# ---- captions files ----


def _captions_candidates(
    root: Path, files: list[str], images: list[str], columns: Columns
) -> tuple[list[str], dict[str, str]]:
    """Files of a folder that read like captions of images, and why others that were tried do not."""
    sidecars = {*map(_stem, images), *images}  # a.txt and a.jpg.txt
    found, refused = [], dict[str, str]()
    for name in files:
        kind = name.rpartition(".")[2].lower()
        here = "/" not in name
        if _stem(name) in sidecars:
            continue
        if kind in ("csv", "tsv", "txt", "jsonl", "ndjson") and here:
            try:
                row = next(iter(_rows(root / name, columns)), None)
            except UsageError as error:
                refused[name] = (
                    str(error).removeprefix(f"{root / name}").lstrip(": ").removeprefix("captions missing: ")
                )
                continue
            if row is not None and not isinstance(row, Reject):
                found.append(name)
        elif kind == "json" and (here or (name.startswith("annotations/") and "caption" in name.lower())):
            with open(root / name, "rb") as file:
                head = file.read(65536)
            if re.search(rb'"(annotations|images|captions?|file_name)"\s*:', head):
                found.append(name)
    return found, refused


Row = tuple[str, Captions, dict[str, Any]]  # image name, captions by field, what else is known


def _rows(file: Path, columns: Columns) -> Iterator[Row | Reject]:
    """Rows of any captions file.

    Raises:
        UsageError: it is not one, or its columns are not found.
    """
    kind = file.suffix.lower()
    try:
        if kind in (".jsonl", ".ndjson"):
            yield from _json_lines(file, columns)
        elif kind == ".json":
            yield from _json_file(file, columns)
        else:
            yield from _delimited(file, columns)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} {NOT_UTF8} ({error.reason} at byte {error.start}); convert it first") from error


def _delimited(file: Path, columns: Columns) -> Iterator[Row | Reject]:
    """CSV and its kin. A caption in the last column may hold the delimiter unquoted."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        mark = _delimiter(first, file)
        lines.seek(0)
        rows = csv.reader(lines, delimiter=mark, skipinitialspace=mark == "|")
        try:
            header = [cell.strip() for cell in next(rows, [])]
        except csv.Error as error:
            raise UsageError(f"{file} line 1: {error}; expected a CSV row") from error
        if len(header) > 1 and _is_image(header[0].partition("#")[0]) and columns == Columns():
            lines.seek(0)  # no header: image, caption
            header = ["image", "caption"]
        image, fields = columns.find(header, str(file))
        try:
            for row in rows:
                if not row:
                    continue
                if len(row) > len(header):
                    row[len(header) - 1 :] = [mark.join(row[len(header) - 1 :])]
                cells = dict(zip(header, row))
                name = re.sub(r"#\d+$", "", cells.get(image, "").strip())  # Flickr's NAME.jpg#0
                if not name:
                    yield Reject("", f"{file.name} line {rows.line_num}", "no image name")
                    continue
                yield name, _by_field(cells, fields), {}
        except csv.Error as error:
            raise UsageError(f"{file} line {rows.line_num}: {error}; expected a CSV row") from error


def _delimiter(first: str, file: Path) -> str:
    if "\t" in first or file.suffix.lower() == ".tsv":
        return "\t"
    return next((mark for mark in (",", "|", ";") if mark in first), ",")


def _by_field(row: dict[str, Any], fields: dict[str, str]) -> Captions:
    """Captions of a row by field; a cell may be one caption, a list, or {field: captions}."""
    found: Captions = {}
    for column, name in fields.items():
        value = row.get(column)
        found |= clean_captions(value if isinstance(value, dict) else {name: value})
    return found


def _json_lines(file: Path, columns: Columns) -> Iterator[Row | Reject]:
    def objects(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, None

    with open(file, encoding="utf-8-sig") as lines:
        yield from _json_rows(objects(lines), columns, f"{file.name} line")


def _json_rows(rows: Iterable[tuple[int, Any]], columns: Columns, place: str) -> Iterator[Row | Reject]:
    """Rows that are objects; the first one decides about the columns, later ones may lack some."""
    found: tuple[str, dict[str, str]] | None = None
    for number, row in rows:
        if not isinstance(row, dict):
            yield Reject("", f"{place} {number}", "not a JSON object")
            continue
        if found is None:
            found = columns.find(row, f"{place} {number}")
        image, fields = found
        name = str("" if row.get(image) is None else row[image]).strip()
        if not name:
            yield Reject("", f"{place} {number}", "no image name")
            continue
        about = {key: value for key, value in row.items() if key != image and key not in fields}
        yield name, _by_field(row, fields), about


def _json_file(file: Path, columns: Columns) -> Iterator[Row | Reject]:
    """COCO captions, or a list of rows."""
    try:
        record = json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if isinstance(record, list):
        yield from _json_rows(enumerate(record, 1), columns, f"{file.name} entry")
        return
    if not isinstance(record, dict) or not {"images", "annotations"} <= record.keys():
        raise UsageError(
            f"{file}: expected COCO captions (images, annotations) or a list of rows; choose another with --captions FILE"
        )
    texts = defaultdict[Any, list[str]](list)
    for annotation in record["annotations"]:
        if "caption" in annotation:
            texts[annotation.get("image_id")].append(annotation["caption"])
    if record["annotations"] and not texts:
        raise UsageError(f"{file}: captions missing: its annotations have no `caption`; choose with --captions FILE")
    for image in record["images"]:
        name = str(image.get("file_name") or image.get("id"))
        yield name, clean_captions(texts[image.get("id")]), {"image_id": image.get("id")}
