"""Rows of text files: CSV and its kin, JSON lines, JSON lists and COCO; one reader for captions, labels and metadata."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from aimv2.data.images.catalogue import Columns, is_image
from aimv2.data.images.entries import NOT_UTF8, Captions, Reject
from aimv2.data.shards.format import clean_captions
from aimv2.errors import UsageError

CaptionRow = tuple[str, Captions, dict[str, Any]]  # image name, captions by field, what else is known


def delimiter_of(first: str, file: Path) -> str:
    """The delimiter of a file by its first line: a tab, else what comes first of comma, semicolon and bar."""
    if "\t" in first or file.suffix.lower() == ".tsv":
        return "\t"
    found = re.search(r"[,;|]", first)
    return found[0] if found else ","


def read_delimited(file: Path, errors: str = "strict", width: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Rows of CSV, TSV and the like, with the number of the line where each ends; rows without a cell are left out.

    Args:
        file: of text in UTF-8, with or without a byte order mark.
        errors: as of :func:`open`.
        width: number of columns; what is beyond them belongs to the last, which may hold the delimiter unquoted. 0: any.

    Raises:
        UsageError: a row that is no CSV.
        UnicodeDecodeError: not UTF-8.
    """
    with open(file, encoding="utf-8-sig", errors=errors, newline="") as lines:
        mark = delimiter_of(lines.readline(), file)
        lines.seek(0)
        rows = csv.reader(lines, delimiter=mark, skipinitialspace=mark == "|")
        try:
            for row in rows:
                if len(row) > width > 0:
                    row[width - 1 :] = [mark.join(row[width - 1 :])]
                if row:
                    yield rows.line_num, row
        except csv.Error as error:
            raise UsageError(f"{file} line {rows.line_num}: {error}; expected a CSV row", code="unreadable") from error


def read_json_lines(file: Path, errors: str = "strict") -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank; None where it is not JSON."""
    with open(file, encoding="utf-8-sig", errors=errors) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, None


# ---- captions files ----


def caption_rows(file: Path, columns: Columns) -> Iterator[CaptionRow | Reject]:
    """Rows of a captions file of any kind.

    Raises:
        UsageError: it is not one, or its columns are not found.
    """
    try:
        yield from READERS.get(file.suffix.lower(), _delimited_captions)(file, columns)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} {NOT_UTF8} ({error.reason} at byte {error.start}); convert it first", code="unreadable"
        ) from error


def captions_by_field(row: dict[str, Any], fields: dict[str, str]) -> Captions:
    """Captions of a row; a cell may be one caption, a list, or {field: captions}."""
    found: Captions = {}
    for column, name in fields.items():
        value = row.get(column)
        found |= clean_captions(value if isinstance(value, dict) else {name: value})
    return found


def _delimited_captions(file: Path, columns: Columns) -> Iterator[CaptionRow | Reject]:
    """CSV and its kin, with a header, or without one: image, caption."""
    header = [cell.strip() for cell in next(read_delimited(file), (1, []))[1]]
    bare = len(header) > 1 and is_image(header[0].partition("#")[0]) and columns == Columns()
    if bare:
        header = ["image", "caption"]
    image, fields = columns.find(header, str(file))
    for number, row in islice(read_delimited(file, width=len(header)), 0 if bare else 1, None):
        cells = dict(zip(header, row))
        name = re.sub(r"#\d+$", "", cells.get(image, "").strip())  # Flickr's NAME.jpg#0
        if name:
            yield name, captions_by_field(cells, fields), {}
        else:
            yield Reject("", f"{file.name} line {number}", "no image name")


def _json_captions(rows: Iterable[tuple[int, Any]], columns: Columns, place: str) -> Iterator[CaptionRow | Reject]:
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
        yield name, captions_by_field(row, fields), about


def _json_line_captions(file: Path, columns: Columns) -> Iterator[CaptionRow | Reject]:
    return _json_captions(read_json_lines(file), columns, f"{file.name} line")


def _json_file_captions(file: Path, columns: Columns) -> Iterator[CaptionRow | Reject]:
    """COCO captions, or a list of rows."""
    try:
        record = json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not JSON: {error}", code="unreadable") from error
    if isinstance(record, list):
        yield from _json_captions(enumerate(record, 1), columns, f"{file.name} entry")
        return
    if not isinstance(record, dict) or not {"images", "annotations"} <= record.keys():
        raise UsageError(
            f"{file}: expected COCO captions (images, annotations) or a list of rows; choose another with --captions FILE",
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


READERS: dict[str, Callable[[Path, Columns], Iterator[CaptionRow | Reject]]] = {
    ".jsonl": _json_line_captions,
    ".ndjson": _json_line_captions,
    ".json": _json_file_captions,
}
