"""Captions of a text file, a table or shards, such as a tokenizer is trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aimv2.data.images.catalogue import COLUMNS, Columns, find_column, kind_of
from aimv2.data.images.entries import Reject
from aimv2.data.images.text_tables import answered, caption_rows, delimiter_of, no_text, read_delimited, read_json_lines
from aimv2.data.shards.format import captions_of, clean_captions, find_shards, read_samples
from aimv2.data.shards.tars import is_tar
from aimv2.data.text.encoding import decode_text, open_text, text_lines
from aimv2.errors import UsageError
from aimv2.io import parse_json, read_file


def read_captions(path: str | Path) -> Iterator[str]:
    """Captions of a text file (one a line), a CSV, TSV or JSONL file, or of WebDataset shards.

    A table needs a header with a caption column (:data:`aimv2.data.images.catalogue.COLUMNS`); a ``.txt`` that begins with
    such a header (``image,caption``) is a table too. JSONL lines, and entries of a JSON list, are strings or objects with such
    a key; COCO's and Karpathy's JSON are read as well.
    """
    file = Path(path).expanduser()
    try:
        yield from _captions(file, path)
    except UnicodeError:
        raise no_text(file, "CAPTIONS") from None


def _captions(file: Path, path: str | Path) -> Iterator[str]:
    kind = file.suffix.lower()
    if not file.is_file() or is_tar(file.name):
        return _of_shards(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        return _of_json_lines(file)
    return _of_table(file) if kind in (".csv", ".tsv") or _has_header(file) else text_lines(file)


def _of_shards(path: str | Path) -> Iterator[str]:
    if kind_of(str(path))[0] in ("missing", "hub"):
        raise UsageError(
            f"CAPTIONS: {str(path)!r} does not exist, expected a txt, CSV, TSV or JSONL file, or shards",
            code="not-found",
        )
    for shard in find_shards(path, "train", option="CAPTIONS"):
        for _, sample in read_samples(shard):
            for captions in captions_of(sample).values():
                yield from captions


def _has_header(file: Path) -> bool:
    """Whether the first line is one like ``image,caption``: bare column names, one the caption's."""
    with open_text(file) as lines:
        first = lines.readline(4096).strip()
    names = first.split(delimiter_of(first, file))
    bare = all(re.fullmatch(r'"?[A-Za-z_]\w*"?', name) for name in names)
    return len(names) > 1 and bare and find_column([name.strip('"') for name in names], "caption") is not None


def _of_table(file: Path) -> Iterator[str]:
    rows = (row for _, row in read_delimited(file))
    header = next(rows, [])
    column = find_column(header, "caption")
    if column is None:
        names, wanted = ", ".join(header) or "(none)", ", ".join(COLUMNS["caption"])
        raise UsageError(f"CAPTIONS: {file} has the columns {names}, expected one of {wanted}", code="missing")
    at = header.index(column)
    yield from (row[at] for row in rows if len(row) > at and row[at].strip())


def _of_json_lines(file: Path) -> Iterator[str]:
    rows: Iterable[tuple[int, Any]] = read_json_lines(file)
    if file.suffix.lower() == ".json":  # a list, captions of COCO, or JSON lines all the same
        try:
            whole = parse_json(decode_text(read_file(file), str(file)))
        except json.JSONDecodeError:
            whole = None
        if isinstance(whole, dict) and "images" in whole:
            found = (row for row in caption_rows(file, Columns()) if not isinstance(row, Reject))
            rows = ((number, {"captions": captions}) for number, (_, captions, _) in enumerate(found, 1))
        elif isinstance(whole, list):
            rows = enumerate(whole, 1)
    for number, row in rows:
        if row is None:
            raise UsageError(
                f"CAPTIONS: {file} line {number} is not JSON, expected one value a line", code="unreadable"
            )
        if isinstance(row, dict):
            row = answered(row)
            row = next((row[key] for key in ("captions", *COLUMNS["caption"]) if row.get(key)), None)
        yield from (caption for field in clean_captions(row).values() for caption in field)
