"""Rows of text files: CSV and its kin, JSON lines, JSON lists and COCO; one reader for captions, labels and metadata."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from aimv2.data.images.catalogue import DIALOGUES, TURNS, Columns, find_column, is_image
from aimv2.data.images.entries import Captions, Reject
from aimv2.data.passed import COLUMNS, PassedOver
from aimv2.data.shards.format import answers, captions_by_field, clean_captions
from aimv2.data.text.encoding import CHUNK, NOT_TEXT, decode_text, open_text
from aimv2.errors import UsageError, first_line
from aimv2.io import POINTER, is_pointer, parse_json, read_file

LONGEST_ROW = 1 << 28  # characters of an entry of a JSON list
UNCLOSED = (
    'a quotation mark that is not closed takes several cells or rows for one; close it, and write "" within a cell'
)
CaptionRow = tuple[str, Captions, dict[str, Any]]  # image name, captions by field, what else is known


def delimiter_of(first: str, file: Path) -> str:
    """The delimiter of a file by its first line: a tab, else what comes first of comma, semicolon and bar."""
    if "\t" in first or file.suffix.lower() == ".tsv":
        return "\t"
    found = re.search(r"[,;|]", first)
    return found[0] if found else ","


def read_delimited(file: Path, width: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Rows of CSV, TSV and the like, with the number of the line where each ends; rows without a cell are left out.

    Cells between tabs or bars are not quoted: a quotation mark belongs to the text, but for a pair of them around a whole cell,
    as spreadsheets write it.

    Args:
        file: of text (:mod:`aimv2.data.text.encoding`).
        width: number of columns; what is beyond them belongs to the last, which may hold the delimiter unquoted. 0: any.

    Raises:
        UsageError: a row that is no CSV.
        UnicodeError: no text.
    """
    csv.field_size_limit(2**31 - 1)
    with open_text(file, newline="") as lines:
        mark = delimiter_of(lines.readline(), file)
        lines.seek(0)
        quoted = mark not in "\t|"
        rows = csv.reader(lines, delimiter=mark, quoting=0 if quoted else csv.QUOTE_NONE, strict=True)
        try:
            for row in rows:
                if len(row) > width > 0:
                    row[width - 1 :] = [mark.join(row[width - 1 :])]
                if quoted and any(_holds_rows(cell, mark, row[0].isdigit()) for cell in row):
                    raise csv.Error(UNCLOSED)
                if row:
                    row = list(map(str.strip, row)) if mark == "|" else row
                    yield rows.line_num, row if quoted else list(map(_unquoted, row))
        except csv.Error as error:
            why = UNCLOSED if re.search("expected after|end of data", str(error)) else error
            raise UsageError(f"{file} line {rows.line_num}: {why}; expected a CSV row", code="unreadable") from error


def _mark_of(file: Path) -> str:
    with open_text(file) as lines:
        return delimiter_of(lines.readline(), file)


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "")
    is_whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if is_whole else cell


def _holds_rows(cell: str, mark: str, numbered: bool) -> bool:
    """Whether a cell of several lines goes on with rows of the table, each beginning with an image's name or a number."""
    firsts = (line.partition(mark)[0].strip() for line in cell.splitlines()[1:] if mark in line)
    return "\n" in cell and any(is_image(first) or (numbered and first.isdigit()) for first in firsts)


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank; None where it is not JSON."""
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, parse_json(line)
                except ValueError:
                    yield number, None


def read_json_list(file: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of the entries of a JSON list, one at a time: the file, which may be large, is never in memory as a whole.

    Raises:
        UsageError: it is no list, or broken.
        NotText, OSError: see :func:`aimv2.data.text.encoding.open_text`.
    """
    decode, number, at = json.JSONDecoder().raw_decode, 0, 0
    between = re.compile(r"\s*\[\s*(?=\S)")
    with open_text(file) as stream:
        text = stream.read(CHUNK)
        while True:
            found = between.match(text, at)
            try:
                if found is None:
                    raise json.JSONDecodeError("a comma expected" if number else "a list expected", text, at)
                if text[found.end()] == "]":
                    return
                value, end = decode(text, found.end())
                if end == len(text):  # a number may go on
                    raise json.JSONDecodeError("a comma expected", text, end)
            except json.JSONDecodeError as error:
                more = stream.read(max(CHUNK, len(text) - at)) if len(text) - at < LONGEST_ROW else ""
                if not more:
                    where = f" after entry {number:,}" if number else ""
                    raise UsageError(f"{file} is no JSON list: {error.msg}{where}", code="unreadable") from None
                text, at = text[at:] + more, 0
                continue
            except (RecursionError, ValueError) as error:
                why = "a number of too many digits" if isinstance(error, ValueError) else "nested too deep"
                raise UsageError(f"{file} is no JSON list: {why} in entry {number + 1:,}", code="unreadable") from None
            number, at, between = number + 1, end, re.compile(r"\s*(?:,\s*(?=\S)|(?=\]))")
            yield number, value


# ---- captions files ----

FIRST = 1000  # rows without an image or a caption, after which a file is no captions file


def caption_rows(file: Path, columns: Columns, passed: PassedOver | None = None) -> Iterator[CaptionRow | Reject]:
    """Rows of a captions file of any kind; ``passed`` counts the columns that are not read and the rows that lack some.

    Raises:
        UsageError: it is not one, or its columns are not found.
    """
    passed = PassedOver() if passed is None else passed
    try:
        yield from READERS.get(file.suffix.lower(), _delimited_captions)(file, columns, passed)
    except UnicodeError as error:
        raise no_text(file) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: no captions as COCO, Karpathy or LLaVA write them ({first_line(error)}); choose another with --captions FILE",
            option="--captions",
            code="unreadable",
        ) from error


def no_text(file: Path, option: str = "") -> UsageError:
    """What to say of a file whose encoding is not known."""
    why = f"is {POINTER}" if is_pointer(file) else NOT_TEXT
    return UsageError(f"{option} {file} {why}".strip(), option=option or None, code="unreadable")


def _delimited_captions(file: Path, columns: Columns, passed: PassedOver) -> Iterator[CaptionRow | Reject]:
    """CSV and its kin, with a header, or without one: image, caption."""
    header = [cell.strip() for cell in next(read_delimited(file), (1, []))[1]]
    bare = len(header) > 1 and is_image(header[0].partition("#")[0]) and columns == Columns()
    if bare and len(header) > 2 and _mark_of(file) in "\t|":
        raise UsageError(
            f"{file}: rows of {len(header)} cells and no header; give it one, such as image, caption, score",
            code="missing",
        )
    if bare:
        header = ["image", "caption"]
    image, fields = columns.find(header, str(file))
    passed.add(COLUMNS, *(name for name in header if name not in (image, *fields) and name.lower() != "split"))
    width = len(header) if header[-1] in fields else 0  # a comma in the last cell is the caption's
    for number, row in islice(read_delimited(file, width=width), 0 if bare else 1, None):
        cells = dict(zip(header, row))
        if any(map(str.strip, row[len(header) :])):
            why = f"{len(row)} cells, {len(header)} expected; a caption with the delimiter in it needs quotation marks"
            yield Reject("", f"{file.name} line {number}", why)
            continue
        if len(row) < len(header):
            passed.add("cells that rows lack", f"{file.name} line {number}", number=len(header) - len(row))
        name = re.sub(r"#\d+$", "", cells.get(image, "").strip())  # Flickr's NAME.jpg#0
        if name:
            stated = {key.lower(): cell for key, cell in cells.items() if key.lower() == "split"}
            yield name, captions_by_field(cells, fields), stated
        else:
            yield Reject("", f"{file.name} line {number}", "no image name")


def _json_captions(
    rows: Iterable[tuple[int, Any]], columns: Columns, place: str, passed: PassedOver
) -> Iterator[CaptionRow | Reject]:
    """Rows that are objects, each read by its own keys.

    Raises:
        UsageError: no image and caption in any of the first ones.
    """
    fields, waiting, lacks = dict[str, str](), list[CaptionRow | Reject](), None
    for number, row in rows:
        try:
            found, own = _json_row(row, columns, f"{place} {number}", fields, passed)
        except UsageError as error:  # no such columns: no captions file, if no other row has them
            lacks = lacks or error
            waiting.append(_without_captions(row, columns, f"{place} {number}"))
            if fields:
                yield from waiting
                waiting.clear()
            elif len(waiting) == FIRST:
                raise lacks from None
            continue
        fields = fields or own
        yield from (*waiting, found)
        waiting.clear()
    if lacks is not None and not fields:
        raise lacks
    yield from waiting


def _json_row(
    row: Any, columns: Columns, place: str, fields: dict[str, str], passed: PassedOver
) -> tuple[CaptionRow | Reject, dict[str, str]]:
    """What a row holds, and its caption columns; ``fields``: those of the first row, which name them."""
    if not isinstance(row, dict):
        return Reject("", place, "not a JSON object"), {}
    row = answered(row, place, passed)
    stated = [key for key, value in row.items() if value not in (None, "", [])] if fields else row
    image, own = columns.find(stated, place)
    cell = row.get(image)
    if isinstance(cell, list):
        if len(cell) > 1:
            return Reject("", place, f"{len(cell)} images in one row; one is expected"), own
        cell = cell[0] if cell else None
    name = "" if cell is None else str(cell).strip()
    if not name:
        return Reject("", place, "no image name"), own
    about = {key: value for key, value in row.items() if key != image and key not in own}
    return (name, captions_by_field(row, {key: fields.get(key, field) for key, field in own.items()}), about), own


def _without_captions(row: dict[str, Any], columns: Columns, place: str) -> CaptionRow | Reject:
    image = find_column(row, "image") if columns.image is None else columns.image
    name = str(row.get(image or "") or "").strip()
    return (name, {}, {}) if name else Reject("", place, "no image name")


def answered(row: dict[str, Any], place: str = "", passed: PassedOver | None = None) -> dict[str, Any]:
    """A row of LLaVA's: the first answer in its dialogue is the caption."""
    turns = next((name for name in TURNS if isinstance(row.get(name), list)), None)
    said = answers(row[turns]) if turns else []
    if not said or said[0] is None:
        return row
    if passed is not None:
        passed.add(DIALOGUES, place)
        if len(said) > 1:
            passed.add("answers after the first of a dialogue", place, number=len(said) - 1)
    others = {key: value for key, value in row.items() if key != turns}
    return {**others, "image": row.get("image") or row.get("images"), "caption": said[0]}


def _json_line_captions(file: Path, columns: Columns, passed: PassedOver) -> Iterator[CaptionRow | Reject]:
    return _json_captions(read_json_lines(file), columns, f"{file.name} line", passed)


def _json_file_captions(file: Path, columns: Columns, passed: PassedOver) -> Iterator[CaptionRow | Reject]:
    """COCO captions, Karpathy's splits of them, or a list of rows."""
    try:
        record = parse_json(decode_text(read_file(file), str(file)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not JSON: {error}", code="unreadable") from error
    if isinstance(record, list):
        yield from _json_captions(enumerate(record, 1), columns, f"{file.name} entry", passed)
        return
    images = record.get("images") if isinstance(record, dict) else None
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        stated = {key for image in images for sentence in image.get("sentences") or [] for key in sentence}
        _check_stated(file, columns, stated)
        yield from map(partial(_karpathy_image, columns), images)
        return
    if not isinstance(record, dict) or not {"images", "annotations"} <= record.keys():
        raise UsageError(
            f"{file}: expected COCO captions (images, annotations) or a list of rows; choose another with --captions FILE",
        )
    keys = columns.captions or ("caption",)
    texts = defaultdict[Any, dict[str, list[str]]](dict)
    for annotation in record["annotations"]:
        for key in set(keys) & annotation.keys():
            field = key if len(keys) > 1 else "caption"
            texts[annotation.get("image_id")].setdefault(field, []).append(annotation[key])
    if record["annotations"] and not texts:
        boxed = ", or take its boxes with --boxes true" * any("bbox" in one for one in record["annotations"])
        keys_of = "`, `".join(keys)
        raise UsageError(
            f"{file}: captions missing: its annotations have no `{keys_of}`; choose with --captions FILE{boxed}"
        )
    _check_stated(file, columns, {key for annotation in record["annotations"] for key in annotation})
    known = {image.get("id") for image in record["images"]}
    for lost in texts.keys() - known:
        yield Reject("", f"image_id {lost}", "an annotation's image that is not among the images")
    for image in record["images"]:
        name = str(image.get(columns.image or "file_name") or image.get("id"))
        yield name, clean_captions(texts[image.get("id")]), {"image_id": image.get("id")}


def _check_stated(file: Path, columns: Columns, stated: set[str]) -> None:
    """Raises UsageError where the user names a key that no caption has."""
    if lost := next((key for key in columns.captions or () if key not in stated), None):
        raise UsageError(
            f"{file}: captions missing: none has the key `{lost}`; choose with --caption-column",
            option="--caption-column",
            code="missing",
        )


def _karpathy_image(columns: Columns, image: dict[str, Any]) -> CaptionRow:
    """An image of Karpathy's JSON: its folder and name, its sentences, its split."""
    name = "/".join(str(image[key]) for key in ("filepath", "filename") if image.get(key))
    given = str(image.get(columns.image)) if columns.image else name
    keys = columns.captions or ("raw",)
    texts = {key: [sentence.get(key) for sentence in image.get("sentences") or []] for key in keys}
    about: dict[str, Any] = {key: image[key] for key in ("split", "cocoid", "imgid") if key in image}
    return given, clean_captions(texts if len(keys) > 1 else texts[keys[0]]), about


READERS: dict[str, Callable[[Path, Columns, PassedOver], Iterator[CaptionRow | Reject]]] = {
    ".jsonl": _json_line_captions,
    ".ndjson": _json_line_captions,
    ".json": _json_file_captions,
}
