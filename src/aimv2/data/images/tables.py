"""Rows of tables: Parquet and Arrow files, and what the library `datasets` reads (hub, saved to disk).

Planning reads row counts and schemas, never an image; readers fetch rows by position, a batch at a time.
What cannot be fetched is rejected: a broken row group late in a long import must not end it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from aimv2.data.images.catalogue import DIALOGUES, TURNS, Columns, find_column, walk_files
from aimv2.data.images.decode import ImageError
from aimv2.data.images.entries import (
    UNREAD,
    Loaded,
    PlannedSource,
    Reader,
    Reject,
    SourceEntry,
    loaded_or_reject,
    read_label,
)
from aimv2.data.images.names import inside
from aimv2.data.images.readers import image_cell, paths_of
from aimv2.data.images.splits import StatedSplits
from aimv2.data.passed import COLUMNS, PassedOver
from aimv2.data.shards.format import captions_by_field, safe_key
from aimv2.errors import UsageError, first_line, need
from aimv2.interop.hub import unreachable
from aimv2.io import POINTER, is_pointer, parse_json, regular

BATCH_ROWS = 128
BUFFER = 1 << 20  # bytes of a column read at once; without it a whole row group's are


@dataclass(frozen=True)
class RowLayout:
    """Columns of a table that a sample is made of: image, {caption column: field}, label; and the root of paths in it."""

    image: str
    fields: dict[str, str]
    label: str | None
    image_root: Path | None = None

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        columns: Columns,
        source: str,
        types: Mapping[str, str],
        passed: PassedOver,
        image_root: Path | None = None,
    ) -> RowLayout:
        """Found among ``names``; see :meth:`Columns.find`. ``passed`` counts the columns that are not read."""
        image, fields = columns.find(names, source, types)
        label = find_column([name for name in names if name not in fields], "label", types)
        layout = cls(image, fields, label, image_root)
        passed.add(DIALOGUES, *(name for name in fields if name.lower() in TURNS))
        if unread := [name for name in names if name not in layout.names()]:
            passed.add(COLUMNS, *unread)
        return layout

    def names(self) -> list[str]:
        """The columns to read."""
        return [self.image, *self.fields, *([self.label] if self.label else [])]

    def sample(self, row: dict[str, Any], folder: Path) -> Loaded:
        """A row as a sample; paths start at ``folder``.

        Raises:
            ImageError: no image, or no caption.
        """
        data, name = image_cell(row[self.image], folder, self.image_root)
        captions = captions_by_field(row, self.fields)
        if not captions:
            raise ImageError("no caption")
        label, odd = read_label(row[self.label] if self.label else None)
        return Loaded(data, captions, label, {"source": name} if name else {}, odd)


class TableLayout(Protocol):
    """What a row of a table becomes: :class:`RowLayout`, or one of conversations."""

    @property
    def image(self) -> str | None: ...

    @property
    def image_root(self) -> Path | None: ...

    def names(self) -> list[str]: ...

    def sample(self, row: dict[str, Any], folder: Path) -> Loaded: ...


LayoutOf = Callable[[Iterable[str], Columns, str, Mapping[str, str], PassedOver, Path | None], TableLayout]


# ---- Parquet and Arrow files ----


def is_table(name: str) -> bool:
    """Whether a file is a Parquet or Arrow table by its extension."""
    return name.lower().endswith((".parquet", ".arrow"))


def tables_in(folder: Path, split: str | None) -> list[Path]:
    """Tables under a folder, of one split where their names (``train-00000-of-00002``) tell several."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder / name for name, error in walk_files(folder) if error is None and is_table(name)):
        if path.is_file() and not path.name.startswith(("cache-", ".")) and not is_download_note(path):
            match = re.match(r"(train|valid|val|validation|test)(?![a-z])", path.name)
            groups.setdefault(match[1] if match else "", []).append(path)
    if split is not None and {*groups} - {""}:
        if split not in groups:
            raise UsageError(f"--split {split}: {folder} has the splits {', '.join(filter(None, groups))}")
        return groups[split]
    if len(groups) > 1:
        names = ", ".join(name or "(no name)" for name in groups)
        raise UsageError(f"SOURCE: {folder} holds tables of several splits ({names}); choose one with --split")
    return next(iter(groups.values()), [])


def is_download_note(table: Path) -> bool:
    """Whether a table is what img2dataset notes of the tar or the folder of images of the same name."""
    return table.stem.isdigit() and any(table.with_suffix(end).exists() for end in ("", ".tar"))


def open_tables(
    files: list[Path],
    root: Path,
    columns: Columns,
    image_root: Path | None = None,
    split: str | None = None,
    layout_of: LayoutOf | None = None,
) -> PlannedSource:
    """Plan the rows of Parquet or Arrow files, in order of path.

    Args:
        image_root: where else paths in them may lead.
        split: of their rows, where a column states it.
        layout_of: as :meth:`RowLayout.of`, which None means: what a row becomes.

    Raises:
        UsageError: a file is broken, the columns are not found, or no row is of the split.
    """
    import pyarrow

    stated = dict[str, list[Any]]()
    shapes = list(map(table_shape, files))
    schema, counts = shapes[0][0], [sum(groups) for _, groups in shapes]
    column = next((name for name in schema.names if name.lower() == "split"), "")
    try:
        for file in files if column else ():
            batches = (batch for _, read in row_groups(file) for batch in read([column]))
            stated[str(file)] = [row.get(column) for batch in batches for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise _no_table(file, error) from error
    passed = PassedOver()
    types = {name: str(about["_type"]) for name, about in stated_features(schema).items()}
    names = [name for name in schema.names if name != column]
    layout = (layout_of or RowLayout.of)(names, columns, str(files[0]), types, passed, image_root)
    _check_first_paths(files[0], layout)
    reader = TableReader(layout)
    cells = (cell for own in stated.values() for cell in own)
    splits = StatedSplits(str(files[0]), cells, split if stated else None)

    def items() -> Iterator[SourceEntry | Reject]:
        for file, count in zip(files, counts):
            stem = safe_key(file.relative_to(root).with_suffix("").as_posix())
            for row in range(count):
                key, name, cell = (
                    f"{stem}-{row:08d}",
                    f"{file.name} row {row}",
                    stated[str(file)][row] if stated else "",
                )
                if splits.is_read(cell) and (why := splits.refusal(cell)):
                    yield Reject(key, name, why)
                elif splits.is_read(cell):
                    yield SourceEntry(key, name, (str(file), row), UNREAD, None, UNREAD, reader)

    total = sum(map(splits.is_read, (cell for own in stated.values() for cell in own))) if stated else sum(counts)
    has_val = any(splits.is_val(cell) for cell in {cell for own in stated.values() for cell in own})
    return PlannedSource(
        *("table", items(), total),
        unique_keys=True,
        passed=passed,
        split=splits.wanted,
        is_val=(lambda entry: splits.is_val(stated[entry.where[0]][entry.where[1]])) if has_val else None,
    )


def _check_first_paths(file: Path, layout: TableLayout) -> None:
    """Paths in the first rows lead to where they may; a row further down is rejected by itself.

    Raises:
        UsageError: one does not.
    """
    import pyarrow

    try:
        wanted = [layout.image] if layout.image else []
        first = next((batch for _, read in row_groups(file) for batch in read(wanted)), None) if wanted else None
    except (pyarrow.ArrowException, OSError):  # its rows are rejected
        return
    for name in [] if first is None else paths_of(first.column(0)[:BATCH_ROWS]):
        inside(file.parent, name, layout.image_root, file.name)


def table_shape(file: Path, place: str = "") -> tuple[Any, list[int]]:
    """Schema of a Parquet or Arrow file, and the number of rows of each group.

    Args:
        file: the table.
        place: how a message begins.

    Raises:
        UsageError: it is broken.
    """
    import pyarrow

    try:
        if is_pointer(file):
            raise UsageError(f"{place}{file} is {POINTER}", code="unreadable")
        return _schema(file), [count for count, _ in row_groups(file)]
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_table(file, error, place) from error


def _no_table(file: Path, error: Exception, place: str = "") -> UsageError:
    return UsageError(f"{place}{file} is not a Parquet or Arrow file: {first_line(error)}", code="unreadable")


def stated_features(schema: Any) -> dict[str, dict[str, Any]]:
    """{column: type and class names} as `datasets` notes them in a schema; {} where it did not write it."""
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: about for name, about in features.items() if "_type" in about}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


@dataclass(frozen=True)
class TableReader(Reader):
    """Reads rows of Parquet and Arrow files, a batch at a time; ``where`` is (file, row)."""

    layout: TableLayout

    def read(self, entry: SourceEntry) -> Loaded:
        (found,) = self.load([entry])
        if isinstance(found, Reject):
            raise ImageError(found.reason)
        return found

    def load(self, entries: Sequence[SourceEntry]) -> Iterator[Loaded | Reject]:
        import pyarrow

        for name, group in groupby(entries, lambda entry: entry.where[0]):
            file, left = Path(name), deque(group)
            reason = "no such row any more"
            try:
                for row in _rows_of(file, self.layout.names(), [entry.where[1] for entry in left]):
                    yield loaded_or_reject(left[0], partial(self.layout.sample, row, file.parent))
                    left.popleft()
            except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
                reason = f"cannot be read: {first_line(error)}"
            yield from (Reject(entry.key, entry.image, reason) for entry in left)


def _rows_of(file: Path, columns: list[str], rows: list[int]) -> Iterator[dict[str, Any]]:
    """The given rows (ascending) of a file, holding one batch at a time; groups without a wanted row are skipped."""
    at = start = 0
    for count, read in row_groups(file):
        if at == len(rows):
            return
        offset, start = start, start + count
        if rows[at] >= start:
            continue
        for batch in read(columns):
            while at < len(rows) and rows[at] < offset + batch.num_rows:
                yield batch.slice(rows[at] - offset, 1).to_pylist()[0]
                at += 1
            offset += batch.num_rows


def row_groups(file: Path) -> Iterator[tuple[int, Callable[[list[str]], Iterable[Any]]]]:
    """Number of rows of each group of a file, and what reads the batches of a group."""
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(regular(file), buffer_size=BUFFER, pre_buffer=False) as parquet:
            for group in range(parquet.num_row_groups):
                read = partial(parquet.iter_batches, BATCH_ROWS, [group])
                yield parquet.metadata.row_group(group).num_rows, read
        return
    with _arrow_reader(file) as reader:
        numbers = range(getattr(reader, "num_record_batches", 0))
        for batch in map(reader.get_batch, numbers) if numbers else reader:
            yield batch.num_rows, partial(_select, batch)


def table_cells(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of some columns of a file.

    Raises:
        UsageError: it is broken.
    """
    import pyarrow

    try:
        return [row for _, read in row_groups(file) for batch in read(columns) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, LookupError, UnicodeDecodeError) as error:
        raise _no_table(file, error, "SOURCE: ") from error


def whole_column(file: Path, group: int | None, column: str) -> Any:
    """A column of a row group of a Parquet file; of an Arrow file (``group`` None) all of it, mapped and not loaded."""
    import pyarrow.parquet

    if group is not None:
        with pyarrow.parquet.ParquetFile(regular(file)) as parquet:
            return parquet.read_row_group(group, [column], use_threads=False).column(column)
    with _arrow_reader(file) as reader:
        found = reader.read_all().column(column)
        found.validate(full=True)
        return found


def _select(batch: Any, columns: list[str]) -> list[Any]:
    found = batch.select(columns)
    found.validate(full=True)  # what damaged offsets point to would end the process
    return [found]


@contextmanager
def _arrow_reader(file: Path) -> Iterator[Any]:
    """A reader of a stream (as `datasets` writes) or a Feather file."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(regular(file))) as memory:
        feather = memory.read(6) == b"ARROW1"
        memory.seek(0)
        yield pyarrow.ipc.open_file(memory) if feather else pyarrow.ipc.open_stream(memory)


def _schema(file: Path) -> Any:
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_schema(regular(file))
    with _arrow_reader(file) as reader:
        return reader.schema


# ---- the library `datasets` ----


@contextmanager
def hub_library(source: str, option: str) -> Iterator[Any]:
    """The library `datasets`; what it raises within becomes one line.

    Where the hub can't be reached it looks into its cache at once; it would first retry for half a minute.

    Raises:
        UsageError: no such data set, the hub can't be reached, or the library is not installed.
    """
    need("datasets", "hub", f"{option} {source}: no path here; a data set of the hub")
    import datasets

    was_offline, why = datasets.config.HF_HUB_OFFLINE, unreachable()
    try:
        datasets.config.HF_HUB_OFFLINE = was_offline or bool(why)
        yield datasets
    except UsageError:
        raise
    except Exception as error:  # network, missing repository, configurations, scripts: `datasets` raises anything
        words = f"the hub can't be reached ({why})" if why else f"the hub gives no such data set: {first_line(error)}"
        raise UsageError(f"{option} {source}: no path here, and {words}", code="not-found") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def hub_files() -> Path:
    """The folder of all that `datasets` downloads, in which the rows of a hub data set may name images."""
    import datasets

    home, cache = (Path(getattr(datasets.config, name)) for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"))
    return home if cache.is_relative_to(home) else cache


def types_of(rows: Any) -> dict[str, str]:
    """{column: type} of a `datasets.Dataset`."""
    return {name: type(feature).__name__ for name, feature in rows.features.items()}


def encoded_images(rows: Any, column: str) -> Any:
    """The same `datasets.Dataset`, its images left encoded."""
    import datasets

    given, plain = rows.features[column], datasets.Image(decode=False)
    if isinstance(getattr(given, "feature", None), datasets.Image):  # a list of them
        return rows.cast_column(column, datasets.List(plain))
    return rows.cast_column(column, plain) if isinstance(given, datasets.Image) else rows


def open_hub(
    source: str,
    split: str | None,
    columns: Columns,
    image_root: Path | None = None,
    layout_of: LayoutOf | None = None,
) -> PlannedSource:
    """Plan a split of a hub data set, downloaded by `datasets` into its own cache, where its rows may name images.

    Raises:
        UsageError: not found, or without such a split or columns.
    """
    with hub_library(source, "SOURCE") as datasets:
        if split is None:
            names = datasets.get_dataset_split_names(source)
            split = "train" if "train" in names else names[0]
            if len(names) > 1 and split != "train":
                raise UsageError(f"{source} has the splits {', '.join(names)}; choose one with --split")
        rows = datasets.load_dataset(source, split=split)
    passed = PassedOver()
    layout = (layout_of or RowLayout.of)(rows.column_names, columns, source, types_of(rows), passed, image_root)
    rows = encoded_images(rows, layout.image) if layout.image else rows
    rows = rows.select_columns(layout.names())
    # a split expression such as train[:10%] as part of keys
    stem = safe_key(split.replace("[", "-").replace("]", "").replace(":", "to").replace("%", "pct"))
    reader = DatasetReader(rows, layout)
    entries = (
        SourceEntry(f"{stem}-{row:08d}", f"{split} row {row}", (row,), UNREAD, None, UNREAD, reader)
        for row in range(len(rows))
    )
    return PlannedSource(f"hub data set {source}", entries, len(rows), unique_keys=True, passed=passed)


@dataclass(frozen=True)
class DatasetReader(Reader):
    """Reads rows of a `datasets.Dataset` (memory-mapped: it pickles as file names); ``where`` is (row,)."""

    rows: Any
    layout: TableLayout

    def read(self, entry: SourceEntry) -> Loaded:
        try:
            row = self.rows[entry.where[0]]
        except Exception as error:  # decoding a cell may raise anything
            raise ImageError(f"cannot be read: {first_line(error)}") from None
        return self.layout.sample(row, hub_files())
