"""Conversations that people bring to `data import`: LLaVA's JSON, tables of messages and images, WebDataset tars.

As in :mod:`aimv2.data.images.sources` a source is listed without opening an image. A JSON file is read twice, an entry at a time: first
for what makes it unusable as a whole, then for its entries.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aimv2.data.images.catalogue import Columns, find_column, kind_of
from aimv2.data.images.decode import ImageError
from aimv2.data.images.entries import (
    UNREAD,
    Loaded,
    PlannedSource,
    Reader,
    Reject,
    RowError,
    SourceEntry,
    read_tar_parts,
)
from aimv2.data.images.names import locate_inside
from aimv2.data.images.readers import from_base64, image_cell
from aimv2.data.images.sources import SourceOptions, open_source
from aimv2.data.images.splits import StatedSplits, stated_word
from aimv2.data.images.tables import tables_in
from aimv2.data.images.text_tables import FIRST, no_text, read_json_lines, read_json_list
from aimv2.data.passed import COLUMNS, PassedOver
from aimv2.data.shards.format import captions_of, json_of, safe_key
from aimv2.data.shards.tars import tars_in
from aimv2.data.text.conversations import (
    FORMS,
    ConversationError,
    conversation_of,
    holds_conversation,
    image_cells,
    images_of,
)
from aimv2.data.text.encoding import open_text
from aimv2.errors import UsageError

EXPECTED = (
    "LLaVA's JSON (.json, .jsonl) whose rows have `conversations` or `messages`, tables with such a column, or WebDataset tars with "
    "such a KEY.json"
)
LISTS, LINES = (".json",), (".jsonl", ".ndjson")
IMAGES = ("image", "images")
HEAD = 1 << 16  # characters of a JSON file that show whether it holds conversations


def open_conversations(source: str, options: SourceOptions) -> PlannedSource:
    """Find out where the conversations of a source are and plan them.

    Raises:
        UsageError: it holds none, or can't be imported.
    """
    kind, path = kind_of(source)
    if options.captions is not None and kind != "folder":
        raise UsageError(f"--captions {options.captions}: {source} is no folder; leave the option out", code="conflict")
    if kind == "file" and path.suffix.lower() in (*LISTS, *LINES):
        return _json_source(path, path.parent, options)
    in_folder = kind == "folder" and not (tars_in(path) or tables_in(path, options.split))
    if in_folder or (kind == "folder" and options.captions is not None):
        return _json_source(_json_in(path, options.captions), path, options)
    if kind == "file" and path.suffix.lower() not in (".parquet", ".arrow"):
        raise UsageError(f"SOURCE: {source} holds no conversations; expected {EXPECTED}", code="mismatch")
    planned = open_source(source, replace(options, layout_of=ConversationLayout.of))
    if planned.kind == "WebDataset tars":
        reader = ConversationTarReader()
        listed = planned.items
        planned.items = (item if isinstance(item, Reject) else item._replace(reader=reader) for item in listed)
    return planned


def conversation_loaded(
    row: Mapping[str, Any], folder: Path, image_root: Path | None = None, about: dict[str, Any] | None = None
) -> Loaded:
    """A row as a conversation with its images; paths start at ``folder``.

    Raises:
        RowError: it is none, or an image of it can't be found.
    """
    cells, images, names = image_cells(row), list[bytes](), list[str]()
    try:
        talk = conversation_of({form: row.get(form) for form in FORMS}, len(cells))
    except ConversationError as error:
        raise RowError(error.code, str(error)) from None
    for cell in cells:
        try:
            data, name = image_cell(cell, folder, image_root)
        except ImageError as error:
            raise RowError("image-missing", str(error)) from None
        images.append(data)
        names += [name] if name else []
    known = {"source": names[0] if len(names) == 1 else names} if names else {}
    return Loaded(b"", {}, None, known | (about or {}), turns=talk.record(), images=tuple(images))


@dataclass(frozen=True)
class ConversationLayout:
    """Columns of a table whose rows are conversations: of turns, and of images (None: text only); and the root of paths in it."""

    turns: str
    image: str | None
    image_root: Path | None

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        columns: Columns,
        source: str,
        types: Mapping[str, str],
        passed: PassedOver,
        image_root: Path | None = None,
    ) -> ConversationLayout:
        """As :meth:`aimv2.data.images.tables.RowLayout.of`.

        Raises:
            UsageError: no column of turns, or not the column of images that the user names.
        """
        names = list(names)
        known = {name.lower(): name for name in names}
        turns = next((known[form] for form in FORMS if form in known), None)
        if turns is None:
            raise UsageError(
                f"SOURCE: no column {' or '.join(FORMS)} in {source}, which has {', '.join(names)}", code="missing"
            )
        image = (
            find_column(names, "image", types) if columns.image is None else known.get(columns.image.strip().lower())
        )
        if columns.image is not None and image is None:
            raise UsageError(
                f"--image-column {columns.image}: not among {', '.join(names)} of {source}",
                option="--image-column",
                code="missing",
            )
        layout = cls(turns, image, image_root)
        passed.add(COLUMNS, *(name for name in names if name not in layout.names()))
        return layout

    def names(self) -> list[str]:
        """The columns to read."""
        return [self.turns, *([self.image] if self.image else [])]

    def sample(self, row: dict[str, Any], folder: Path) -> Loaded:
        """A row as a conversation with its images; see :func:`conversation_loaded`."""
        cell = row[self.image] if self.image else None
        return conversation_loaded({self.turns.lower(): row[self.turns], "image": cell}, folder, self.image_root)


@dataclass(frozen=True)
class ConversationTarReader(Reader):
    """Reads samples of tars whose KEY.json holds a conversation; ``where`` is (tar, start, end)."""

    def read(self, entry: SourceEntry) -> Loaded:
        parts = read_tar_parts(*entry.where)
        images = images_of(parts)
        try:
            talk = conversation_of(json_of(parts), len(images))
        except ConversationError as error:
            raise RowError(error.code, str(error)) from None
        about = {key: value for key, value in json_of(parts).items() if key not in (*IMAGES, *FORMS)}
        return Loaded(b"", captions_of(parts), None, about, turns=talk.record(), images=tuple(images))


# ---- JSON ----


@dataclass(frozen=True)
class ConversationReader(Reader):
    """Reads the images of rows of JSON; ``where`` is (the folder of their paths, the row)."""

    image_root: Path | None

    def read(self, entry: SourceEntry) -> Loaded:
        folder, row = entry.where
        about = {key: value for key, value in row.items() if key not in (*IMAGES, *FORMS)}
        return conversation_loaded(row, Path(folder), self.image_root, about)


def _json_in(folder: Path, chosen: str | None) -> Path:
    """The JSON file of a folder that holds conversations.

    Raises:
        UsageError: none, or several to choose from.
    """
    if chosen is not None:
        file = next((path for path in (folder / chosen, Path(chosen).expanduser()) if path.is_file()), None)
        if file is None:
            raise UsageError(f"--captions {chosen}: no such file, neither in {folder} nor here", code="not-found")
        return file
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (*LISTS, *LINES) and _may_hold(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(
            f"SOURCE: {folder} has several files of conversations: {names}; choose one with --captions FILE",
            code="conflict",
        )
    if not found:
        raise UsageError(f"SOURCE: no conversations in {folder}; expected {EXPECTED}", code="missing")
    return found[0]


def _may_hold(file: Path) -> bool:
    try:
        with open_text(file) as text:
            return re.search(rf'"({"|".join(FORMS)})"\s*:', text.read(HEAD)) is not None
    except (UnicodeError, OSError):
        return False


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of a JSON list or of JSON lines, whatever the file's extension."""
    with open_text(file) as text:
        is_list = text.read(HEAD).lstrip().startswith("[")
    yield from read_json_list(file) if is_list else read_json_lines(file)


def _json_source(file: Path, root: Path, options: SourceOptions) -> PlannedSource:
    words, total = _scanned(file, root, options)
    splits = StatedSplits(str(file), words, options.split)
    reader = ConversationReader(options.image_root)

    def items() -> Iterator[SourceEntry | Reject]:
        for number, row in _json_rows(file):
            place = f"{file.name} entry {number}"
            if not isinstance(row, dict):
                yield Reject("", place, "no JSON object", "not-json")
                continue
            row = _with_image(row, options.columns)
            if not splits.is_read(row.get("split")):
                continue
            first = next(iter(image_cells(row)), None)
            named = first if isinstance(first, str) and len(first) < HEAD else None
            image = named or place
            key = safe_key(named or str(row.get("id") or f"{file.stem}-{number:08d}"))
            name = ", ".join(
                ([f"entry {number}"] if named else []) + ([f"id {row['id']}"] if row.get("id") is not None else [])
            )
            if why := splits.refusal(row.get("split")):
                yield Reject(key, image, why, row=name)
            else:
                yield SourceEntry(key, image, (str(root), row), UNREAD, None, UNREAD, reader, name)

    has_val = any(map(splits.is_val, words))
    return PlannedSource(
        *(f"captions file {file.name}", items(), total),
        split=splits.wanted,
        is_val=(lambda entry: splits.is_val(entry.where[1].get("split"))) if has_val else None,
        by_image=True,
    )


def _with_image(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The row, its images under ``image`` where the user names their key."""
    return row if columns.image is None else {**row, "image": row.get(columns.image), "images": None}


def _scanned(file: Path, root: Path, options: SourceOptions) -> tuple[set[str], int]:
    """The splits that the rows of a JSON file state, and their number.

    Raises:
        UsageError: broken JSON, no conversation in its first rows, or none of the images of these.
    """
    words, total, is_file, named, found = set[str](), 0, False, list[str](), False
    try:
        for _, row in _json_rows(file):
            total += 1
            if isinstance(row, dict):
                words.add(stated_word(row.get("split")))
                is_file = is_file or holds_conversation(row)
                if not found and total <= FIRST:
                    cells = image_cells(_with_image(row, options.columns))
                    names = [cell for cell in cells[:1] if isinstance(cell, str)]
                    named += names
                    found = any(_is_there(name, root, options.image_root) for name in names)
            if total == FIRST and not is_file:
                break
    except UnicodeError as error:
        raise no_text(file) from error
    except OSError as error:
        raise UsageError(f"SOURCE: {file} can't be read: {error.strerror or error}", code="unreadable") from None
    if not is_file:
        raise UsageError(f"SOURCE: no conversations in {file}; expected {EXPECTED}", code="mismatch")
    if named and not found:
        where = " or ".join(map(str, filter(None, (root, options.image_root))))
        raise UsageError(
            f"--image-root: none of the first {len(named):,} images that {file.name} names is in {where} (the first: {named[0]}); "
            "give --image-root DIR, the folder where their paths start",
            option="--image-root",
            code="not-found",
        )
    return words, total


def _is_there(name: str, root: Path, image_root: Path | None) -> bool:
    """Whether a cell is an image, or names one that is there."""
    if from_base64(name) is not None:
        return True
    try:
        return os.path.isfile(locate_inside(root, name, image_root))
    except ImageError:
        return False
