"""Rows of labelled tables, by column and by place: Parquet files, folders of ``save_to_disk``, data sets of the hub.

Parquet is read in place, a row group at a time; a file with large ones is copied into the cache, where any row is near.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import yaml

from aimv2.data.images.catalogue import walk_files
from aimv2.data.images.decode import ImageError
from aimv2.data.images.readers import UNKNOWN, contents_of_files, paths_of
from aimv2.data.images.tables import encoded_images, row_groups, stated_features, table_shape, types_of, whole_column
from aimv2.errors import UsageError, first_line
from aimv2.io import parse_json, parse_yaml, read_file, regular
from aimv2.places import cache_folder

LARGE = 32 << 20  # bytes of a row group's images, decompressed; larger ones are copied
HELD = 128 << 20  # bytes of row groups that a process keeps
SEPARATOR = "[-._ 0-9]"
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PLACES = ("{}", f"{{}}{SEPARATOR}.*", f".*{SEPARATOR}{{}}", f".*{SEPARATOR}{{}}{SEPARATOR}.*")  # of a keyword in a name


# ---- the files of each split ----


def split_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by split, as the library `datasets` names them: ``data/SPLIT-00000-of-00001.*``, else by words in the names of
    folders, else in those of files, else all are train.

    Args:
        names: relative paths with slashes, sorted.
    """
    sharded: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*", name):
            sharded.setdefault(found[1], []).append(name)
    if sharded:
        order = [*(split for split in KEYWORDS if split in sharded), *sorted(sharded.keys() - KEYWORDS)]
        return {split: sharded[split] for split in order}
    return _by_words(names, slice(-1)) or _by_words(names, slice(-1, None)) or {"train": list(names)}


def _by_words(names: Sequence[str], parts: slice) -> dict[str, list[str]]:
    found = {}
    for split, words in KEYWORDS.items():
        patterns = [re.compile(place.format(word)) for word in words for place in PLACES]
        own = (
            name
            for pattern in patterns
            for name in names
            if any(map(pattern.fullmatch, PurePosixPath(name).parts[parts]))
        )
        if once := list(dict.fromkeys(own)):
            found[split] = once
    return found


def parquet_splits(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder by split: as the head of its README.md states, else by their names.

    Raises:
        UsageError: the README.md states several configurations.
    """
    files = (name for name, error in walk_files(root) if error is None and name.lower().endswith(".parquet"))
    names = sorted(name for name in files if not re.search(r"(^|/)__[^/]*/", name))
    stated = {split: _matching(names, patterns) for split, patterns in _stated_patterns(root).items()}
    splits = stated if any(stated.values()) else split_files(names)
    return {split: [root / name for name in own] for split, own in splits.items() if own}


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that glob patterns fit; ``**`` crosses folders."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    own = list[str]()
    for pattern in patterns:
        parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
        fits = re.compile("".join(wild.get(part) or re.escape(part) for part in parts))
        own += (name for name in names if fits.fullmatch(name))
    return list(dict.fromkeys(own))


def _stated_patterns(root: Path) -> dict[str, list[str]]:
    """{split: patterns} of the configuration in the head of README.md; {} where it states none."""
    try:
        text = read_file(root / "README.md").decode(errors="replace")
        found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        configs = (parse_yaml(found[1]) or {}).get("configs") or [] if found else []
        chosen = [each for each in configs if each.get("default") or each["config_name"] == "default"] or configs
        files = chosen[0]["data_files"]
        if len(chosen) > 1:
            several = ", ".join(str(each["config_name"]) for each in chosen)
            raise UsageError(f"--data {root}: README.md states the configurations {several}; give the folder of one")
        if isinstance(files, list) and all(isinstance(each, dict) for each in files):
            files = {each["split"]: each["path"] for each in files}
        files = files if isinstance(files, dict) else {"train": files}
        return {str(split): [own] if isinstance(own, str) else list(own) for split, own in files.items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, IndexError):  # none, or one for people only
        return {}


def saved_splits(root: Path) -> dict[str, list[Path]]:
    """The Arrow files of a folder that ``save_to_disk`` wrote, by split.

    Raises:
        OSError, ValueError: not such a folder.
    """
    try:
        if (root / "dataset_dict.json").is_file():
            names = parse_json(read_file(root / "dataset_dict.json"))["splits"]
            return {str(name): next(iter(saved_splits(root / name).values())) for name in names}
        state = parse_json(read_file(root / "state.json"))
        return {state.get("_split") or "train": [root / each["filename"] for each in state["_data_files"]]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"state.json or dataset_dict.json lacks {error}") from None


# ---- rows ----


@dataclass(frozen=True)
class FileRows:
    """Rows of Parquet or Arrow files.

    Attributes:
        files: in order.
        features: {column: what the library `datasets` notes of it}, as the first file of the data set has it.
        columns: names of all columns.
        total: number of rows in the files.
        places: int64 [N], which rows of the files; None: all.
    """

    files: tuple[Path, ...]
    features: Mapping[str, Mapping[str, Any]]
    columns: tuple[str, ...]
    total: int
    places: np.ndarray | None = None

    @classmethod
    def of_splits(cls, splits: Mapping[str, Sequence[Path]], source: str) -> dict[str, FileRows]:
        """The rows of each split.

        Raises:
            UsageError: a file is broken, or its columns are not those of the first one.
        """
        found, first = dict[str, FileRows](), None
        for split, files in splits.items():
            total = 0
            for file in files:
                schema, counts = table_shape(file, f"--data {source}: ")
                total += sum(counts)
                first = schema if first is None else first
                if {*schema.names} != {*first.names}:
                    odd = ", ".join(sorted({*schema.names} ^ {*first.names}))
                    raise UsageError(f"--data {source}: {file.name} has not the columns of the first file ({odd})")
            if first is not None:
                found[split] = cls(tuple(files), stated_features(first), tuple(first.names), total)
        return found

    def __len__(self) -> int:
        return self.total if self.places is None else len(self.places)

    @property
    def types(self) -> dict[str, str]:
        """{column: type}."""
        return {name: str(about["_type"]) for name, about in self.features.items() if "_type" in about}

    def names(self, column: str) -> list[str] | None:
        """The class names of a column, where it states them."""
        return self.features.get(column, {}).get("names")

    def values(self, column: str) -> list[Any]:
        """All cells of a column."""
        batches = (batch for file in self.files for _, read in row_groups(file) for batch in read([column]))
        cells = [cell for batch in batches for cell in batch.column(column).to_pylist()]
        return cells if self.places is None else [cells[place] for place in self.places]

    def select(self, places: Sequence[int]) -> FileRows:
        """These rows of all."""
        return replace(self, places=np.asarray(places, np.int64))

    def cells(self, column: str) -> FileCells:
        """What reads a cell of a column."""
        return FileCells(self.files, column, self.places)


class DatasetRows:
    """Rows of a `datasets.Dataset`; as :class:`FileRows`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.columns, self.types = tuple(rows.column_names), types_of(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self, column: str) -> list[str] | None:
        return getattr(self.rows.features[column], "names", None)

    def values(self, column: str) -> list[Any]:
        return self.rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()

    def select(self, places: Sequence[int]) -> DatasetRows:
        return DatasetRows(self.rows.select(places))

    def cells(self, column: str) -> DatasetCells:
        return DatasetCells(encoded_images(self.rows, column).select_columns([column]), column)


Rows = FileRows | DatasetRows


# ---- cells ----


@dataclass(frozen=True)
class DatasetCells:
    """Cells of a column of a `datasets.Dataset` that leaves images encoded."""

    rows: Any
    column: str

    def __getitem__(self, row: int) -> Any:
        return self.rows[row][self.column]

    def mark(self) -> str:
        """The same as long as the table is."""
        return str(getattr(self.rows, "_fingerprint", UNKNOWN))

    def paths(self) -> Iterator[str]:
        """See :func:`aimv2.data.images.readers.paths_of`."""
        for cells in self.rows.data.column(self.column).chunks:
            yield from paths_of(cells)


@dataclass
class _Held:
    """The row groups that a process keeps, the last used at the end."""

    process: int
    lock: Any = field(default_factory=Lock)
    groups: OrderedDict[int, Any] = field(default_factory=OrderedDict)
    sizes: dict[int, int] = field(default_factory=dict)  # in memory, bytes


class FileCells:
    """Cells of a column of Parquet or Arrow files by place; threads may share it, and each process reads for itself."""

    def __init__(self, files: Sequence[Path], column: str, places: np.ndarray | None) -> None:
        self.files, self.column, self.places = tuple(files), column, places
        self._held: _Held | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        return self.files, self.column, self.places

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __getitem__(self, row: int) -> Any:
        import pyarrow

        place = row if self.places is None else int(self.places[row])
        try:
            groups, firsts = self._groups
            number = int(np.searchsorted(firsts, place, "right")) - 1
            return self._column(number, *groups[number])[place - int(firsts[number])].as_py()
        except (pyarrow.ArrowException, OSError, LookupError, UnicodeDecodeError) as error:
            raise ImageError(f"cannot be read: {first_line(error)}") from None

    @cached_property
    def _groups(self) -> tuple[list[tuple[Path, int | None]], np.ndarray]:
        """(file, row group; None: all of an Arrow file) of all groups, and the place of the first row of each."""
        found, counts = list[tuple[Path, int | None]](), [0]
        for file in self.files:
            own = table_shape(file)[1]
            if _is_large(file, self.column):
                file = _copied(file, self.column)
            if file.suffix.lower() == ".parquet":
                found += ((file, group) for group in range(len(own)))
                counts += own
            else:
                found.append((file, None))
                counts.append(sum(own))
        return found, np.cumsum(counts)[:-1]

    def _column(self, number: int, file: Path, group: int | None) -> Any:
        held = self._held
        if held is None or held.process != os.getpid():  # a lock may be copied while another thread holds it
            held = self._held = _Held(os.getpid())
        with held.lock:
            if number not in held.groups:
                held.groups[number] = cells = whole_column(file, group, self.column)
                held.sizes[number] = 0 if group is None else cells.nbytes  # a mapped file is not in memory
                while sum(held.sizes.values()) > HELD and len(held.groups) > 1:
                    oldest, _ = held.groups.popitem(last=False)
                    del held.sizes[oldest]
            held.groups.move_to_end(number)
            return held.groups[number]

    def mark(self) -> str:
        """The same as long as the files are."""
        return contents_of_files(self.files)

    def paths(self) -> Iterator[str]:
        """See :func:`aimv2.data.images.readers.paths_of`."""
        for file in self.files:
            for holds_images, (_, read) in zip(_holding_images(file, self.column), row_groups(file)):
                for batch in () if holds_images else read([self.column]):
                    yield from paths_of(batch.column(self.column))


def _leaves(file: Path, column: str) -> Iterator[list[tuple[Any, str]]]:
    """(column chunk, logical type) of the parts of a column, for each row group of a Parquet file."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_metadata(regular(file))
    names = [about.schema.column(number).path for number in range(len(about.schema))]
    own = [number for number, name in enumerate(names) if f"{name}.".startswith(f"{column}.")]
    for group in range(about.num_row_groups):
        chunks = about.row_group(group)
        yield [(chunks.column(number), about.schema.column(number).logical_type.type) for number in own]


def _holding_images(file: Path, column: str) -> Iterable[bool]:
    """Whether all cells of a row group hold images, by what a Parquet file notes of itself: then they name no files."""
    if file.suffix.lower() != ".parquet":
        return repeat(False)
    return (
        bool(images := [leaf.statistics for leaf, kind in own if leaf.physical_type == "BYTE_ARRAY" and kind == "NONE"])
        and all(about is not None and about.has_null_count and not about.null_count for about in images)
        for own in _leaves(file, column)
    )


def _is_large(file: Path, column: str) -> bool:
    if file.suffix.lower() != ".parquet":
        return False
    return any(sum(leaf.total_uncompressed_size for leaf, _ in own) > LARGE for own in _leaves(file, column))


def _copied(file: Path, column: str) -> Path:
    """A column of a Parquet file as an Arrow file in the cache.

    Raises:
        UsageError: no room there.
    """
    import pyarrow.ipc

    mark = hashlib.sha256(f"{file.resolve()} {column} {contents_of_files([file])}".encode()).hexdigest()
    try:
        copy = cache_folder("tables") / f"{mark[:32]}.arrow"
        if copy.is_file():
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        aside = copy.with_name(f".{copy.name}.{os.getpid()}.aside")
        try:
            batches = (batch for _, read in row_groups(file) for batch in read([column]))
            first = next(batches)
            with pyarrow.OSFile(str(aside), "wb") as sink, pyarrow.ipc.new_stream(sink, first.schema) as writer:
                for batch in chain([first], batches):
                    writer.write_batch(batch)
            os.replace(aside, copy)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{file} can't be copied into the cache: {first_line(error)}; set XDG_CACHE_HOME") from error
    return copy
