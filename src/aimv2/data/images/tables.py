"""Sources whose plan is positions (Parquet, Arrow, hub data sets, tars), and the choice among all kinds.

Planning reads row counts and tar headers, never an image; readers fetch bytes by position, a batch at a time.
What cannot be fetched is rejected: a broken row group late in a long import must not end it.
"""

import re
import tarfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2.data.images.sources import EXPECTED, Columns, Item, Loaded, Reject, Source, open_folder, safe_key
from aimv2.data.shards.format import (
    captions_of,
    clean_captions,
    find_shards,
    image_of,
    json_of,
    read_sample,
    scan_shard,
    split_shards,
)
from aimv2.errors import UsageError

BATCH_ROWS = 128
LABEL_COLUMNS = ("label", "cls")


# ---- Parquet and Arrow ----


def open_tables(files: list[Path], root: Path, columns: Columns) -> Source:
    """Plan the rows of Parquet or Arrow files, in order of path.

    Raises:
        UsageError: a file is broken, or the columns are not found.
    """
    import pyarrow

    counts = []
    try:
        for file in files:
            counts.append(_row_count(file))
        names = _schema(files[0]).names
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file} is not a Parquet or Arrow file: {_first_line(error)}") from error
    image, fields = columns.find(names, str(files[0]))
    label = next((name for name in LABEL_COLUMNS if name in names and name not in fields), None)

    def items() -> Iterator[Item]:
        for file, count in zip(files, counts):
            stem = safe_key(file.relative_to(root).with_suffix("").as_posix())
            for row in range(count):
                yield Item(f"{stem}-{row:08d}", f"{file.name} row {row}", (str(file), row), {})

    return Source("table", items(), TableReader(image, fields, label), sum(counts), unique_keys=True)


@dataclass(frozen=True)
class TableReader:
    """Reads rows of Parquet and Arrow files; ``where`` is (file, row)."""

    image: str
    fields: dict[str, str]
    label: str | None

    def load(self, items: Sequence[Item]) -> Iterator[Loaded | Reject]:
        import pyarrow

        start = 0
        while start < len(items):
            file, stop = items[start].where[0], start
            while stop < len(items) and items[stop].where[0] == file:
                stop += 1
            wanted = [self.image, *self.fields, *([self.label] if self.label else [])]
            rows = _rows_of(Path(file), wanted, [item.where[1] for item in items[start:stop]])
            try:
                for row in rows:
                    yield _loaded(items[start], row, self.image, self.fields, self.label, Path(file).parent)
                    start += 1
                reason = "no such row any more"
            except (pyarrow.ArrowException, OSError, KeyError) as error:
                reason = f"cannot be read: {_first_line(error)}"
            for item in items[start:stop]:
                yield Reject(item.key, item.image, reason)
            start = stop


def _row_count(file: Path) -> int:
    import pyarrow.parquet

    if file.suffix == ".parquet":
        return pyarrow.parquet.read_metadata(file).num_rows
    return sum(batch.num_rows for batch in _arrow_batches(file))


def _schema(file: Path) -> Any:
    import pyarrow.parquet

    if file.suffix == ".parquet":
        return pyarrow.parquet.read_schema(file)
    with _arrow_file(file) as memory:
        return _arrow_reader(memory).schema


def _arrow_file(file: Path) -> Any:
    import pyarrow

    return pyarrow.memory_map(str(file))


def _arrow_reader(memory: Any) -> Any:
    """A reader of a stream (as `datasets` writes) or a Feather file."""
    import pyarrow.ipc

    feather = memory.read(6) == b"ARROW1"
    memory.seek(0)
    return pyarrow.ipc.open_file(memory) if feather else pyarrow.ipc.open_stream(memory)


def _arrow_batches(file: Path) -> Iterator[Any]:
    with _arrow_file(file) as memory:
        reader = _arrow_reader(memory)
        if hasattr(reader, "num_record_batches"):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _rows_of(file: Path, columns: list[str], rows: list[int]) -> Iterator[dict[str, Any]]:
    """The given rows (ascending) of a file, holding one batch at a time."""
    at = 0
    for start, batch in _batches(file, columns, rows):
        while at < len(rows) and rows[at] < start + batch.num_rows:
            yield batch.slice(rows[at] - start, 1).select(columns).to_pylist()[0]
            at += 1
        if at == len(rows):
            return


def _batches(file: Path, columns: list[str], rows: list[int]) -> Iterator[tuple[int, Any]]:
    """(first row, batch) in order; Parquet row groups without a wanted row are skipped."""
    import pyarrow.parquet

    start = 0
    if file.suffix != ".parquet":
        for batch in _arrow_batches(file):
            yield start, batch
            start += batch.num_rows
        return
    with pyarrow.parquet.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            first = bisect_left(rows, start)
            if first < len(rows) and rows[first] < start + count:
                offset = start
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    yield offset, batch
                    offset += batch.num_rows
            start += count


def _loaded(
    item: Item, row: dict[str, Any], image: str, fields: dict[str, str], label: str | None, folder: Path
) -> Loaded | Reject:
    """A table row as a sample: the image cell may be bytes, {bytes, path} or a path."""
    cell = row[image]
    name = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    data = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    if data is None and not name:
        return Reject(item.key, item.image, "no image")
    if data is None:
        try:
            data = (folder / str(name)).read_bytes()
        except OSError as error:
            return Reject(item.key, item.image, f"{name} cannot be read: {error.strerror or error}")
    captions: dict[str, list[str]] = {}
    for column, into in fields.items():
        value = row[column]
        captions |= clean_captions(value if isinstance(value, dict) else {into: value})
    if not captions:
        return Reject(item.key, item.image, "no caption")
    number = row[label] if label else None
    about = {"source": name} if name else {}
    return Loaded(data, captions, str(number) if isinstance(number, int) and number >= 0 else None, about)


# ---- hub ----


def open_hub(source: str, split: str | None, columns: Columns) -> Source:
    """Plan a split of a hub data set, downloaded by `datasets` into its own cache.

    Raises:
        UsageError: not found, or without such a split or columns.
    """
    import datasets

    try:
        if split is None:
            names = datasets.get_dataset_split_names(source)
            split = "train" if "train" in names else names[0]
            if len(names) > 1 and split != "train":
                raise UsageError(f"{source} has the splits {', '.join(names)}; choose one with --split")
        rows = datasets.load_dataset(source, split=split)
    except UsageError:
        raise
    except Exception as error:  # network, missing repository, configurations, scripts: `datasets` raises anything
        raise UsageError(
            f"SRC: {source} is no path here, and as a hub data set it cannot be loaded: {_first_line(error)}"
        ) from error
    image, fields = columns.find(rows.column_names, source)
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    label = next((name for name in LABEL_COLUMNS if name in rows.column_names and name not in fields), None)
    rows = rows.select_columns([image, *fields, *([label] if label else [])])
    stem = safe_key(_split_words(split))

    def items() -> Iterator[Item]:
        for row in range(len(rows)):
            yield Item(f"{stem}-{row:08d}", f"{split} row {row}", (row,), {})

    reader = HubReader(rows, image, fields, label)
    return Source(f"hub data set {source}", items(), reader, len(rows), unique_keys=True)


@dataclass(frozen=True)
class HubReader:
    """Reads rows of a `datasets.Dataset` (memory-mapped: it pickles as file names); ``where`` is (row,)."""

    rows: Any
    image: str
    fields: dict[str, str]
    label: str | None

    def load(self, items: Sequence[Item]) -> Iterator[Loaded | Reject]:
        for item in items:
            try:
                row = self.rows[item.where[0]]
            except Exception as error:  # decoding a cell may raise anything
                yield Reject(item.key, item.image, f"cannot be read: {_first_line(error)}")
                continue
            yield _loaded(item, row, self.image, self.fields, self.label, Path())


def _split_words(split: str) -> str:
    """A split expression such as ``train[:10%]`` as part of keys."""
    return split.replace("[", "-").replace("]", "").replace(":", "to").replace("%", "pct")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


# ---- tars ----


def open_tars(tars: list[Path]) -> Source:
    """Plan the samples of WebDataset tars, to shard them anew."""

    def items() -> Iterator[Item | Reject]:
        for tar in tars:
            scan = scan_shard(tar)
            for number, key in enumerate(scan.keys):
                where = (str(tar), scan.offsets[number], scan.offsets[number + 1])
                yield Item(safe_key(key), f"{tar.name}/{key}", where, {})
            if scan.cut:
                yield Reject("", tar.name, scan.cut)

    return Source("WebDataset tars", items(), TarReader())


def open_tar_folder(folder: Path) -> Source:
    """Plan a folder of tars, all of one split.

    Raises:
        UsageError: tars of several splits, which would end up mixed.
    """
    groups = {split: tars for split, tars in split_shards(folder, option="SRC").items() if tars}
    if len(groups) > 1:
        raise UsageError(
            f"SRC: {folder} holds the splits {', '.join(groups)}; import one at a time, such as"
            f" '{folder}/{next(iter(groups))}-*.tar'"
        )
    return open_tars(next(iter(groups.values())))


class TarReader:
    """Reads samples of tars; ``where`` is (tar, start, end)."""

    def load(self, items: Sequence[Item]) -> Iterator[Loaded | Reject]:
        for item in items:
            tar, start, end = item.where
            try:
                parts = read_sample(Path(tar), start, end)
            except (OSError, tarfile.TarError) as error:
                yield Reject(item.key, item.image, f"cannot be read: {_first_line(error)}")
                continue
            image = image_of(parts)
            if image is None:
                yield Reject(item.key, item.image, "no image")
                continue
            label = parts["cls"].decode("utf-8", "replace").strip() if "cls" in parts else None
            yield Loaded(image[1], captions_of(parts), label or None, json_of(parts))


# ---- any ----


def open_source(
    source: str,
    captions: str | None,
    columns: Columns,
    template: str,
    split: str | None,
    skip: Path | None = None,
    class_folders: bool = False,
) -> Source:
    """Find out what a source is and plan it.

    Raises:
        UsageError: it is nothing that can be imported.
    """
    path = Path(source).expanduser()
    if class_folders and (captions is not None or not path.is_dir()):
        other = f"--captions {captions}" if captions is not None else f"{source}, which is no folder"
        raise UsageError(f"--class-folders: got {other} too; a folder of class folders, and no captions file, expected")
    if class_folders:
        return open_folder(path, None, columns, template, skip, class_folders)
    if path.is_dir():
        if captions is None and any(path.glob("*.tar")):
            return open_tar_folder(path)
        if captions is None and (tables := _tables_in(path, split)):
            return open_tables(tables, path, columns)
        return open_folder(path, captions, columns, template, skip)
    kind = path.suffix.lower()
    if path.is_file() and kind in (".parquet", ".arrow"):
        return open_tables([path], path.parent, columns)
    if path.is_file() and kind in (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json"):
        return open_folder(path.parent, path.name, columns, template, skip)
    if path.is_file() and kind != ".tar":
        raise UsageError(f"SRC: {source} is a {kind or 'nameless'} file; expected {EXPECTED}")
    if kind == ".tar":
        return open_tars(find_shards(source, "train", option="SRC"))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not path.parent.exists():
        return open_hub(source, split, columns)
    raise UsageError(f"SRC: {source} does not exist; expected {EXPECTED}")


def _tables_in(folder: Path, split: str | None) -> list[Path]:
    """Tables under a folder, of one split where their names (``train-00000-of-00002``) tell several."""
    groups: dict[str, list[Path]] = {}
    for path in sorted([*folder.rglob("*.parquet"), *folder.rglob("*.arrow")]):
        if path.is_file() and not path.name.startswith(("cache-", ".")):  # `datasets` leaves results beside
            match = re.match(r"(train|valid|val|validation|test)(?![a-z])", path.name)
            groups.setdefault(match[1] if match else "", []).append(path)
    if split is not None and groups:
        if split not in groups:
            raise UsageError(f"--split {split}: {folder} has the splits {', '.join(filter(None, groups))}")
        return groups[split]
    if len(groups) > 1:
        names = ", ".join(name or "(no name)" for name in groups)
        raise UsageError(f"SRC: {folder} holds tables of several splits ({names}); choose one with --split")
    return next(iter(groups.values()), [])
