"""The forms of labelled images: class folders, WebDataset shards, CSV lists, tables.

Each function looks at a source and returns the splits that it has (:class:`Form`); a split is listed when it is needed
(:class:`Listed`: names, labels, and what reads an image), and an image is read when *it* is needed.

Legend: N images, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2.data.images.caption_files import are_classes
from aimv2.data.images.catalogue import find_column, walk
from aimv2.data.images.class_names import class_folders, names_beside, same_class, say_odd_classes, subfolders
from aimv2.data.images.names import NameFinder, normal
from aimv2.data.images.readers import ImageFiles, ShardImages, TableImages
from aimv2.data.images.splits import SPLITS, stated_split
from aimv2.data.images.table_rows import DatasetRows, FileRows, Rows, parquet_splits, saved_splits
from aimv2.data.images.tables import hub_files, hub_library
from aimv2.data.images.text_tables import read_delimited
from aimv2.data.passed import PICTURES, PassedOver, passed_lines
from aimv2.data.shards.format import NO_VALUE, find_shards, split_shards
from aimv2.data.shards.listing import list_shard
from aimv2.data.shards.tars import tars_in, why_unreadable
from aimv2.data.text.encoding import say_once, text_lines
from aimv2.errors import UsageError, first_line
from aimv2.io import regular

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
        dataset: the only registered set with this form.
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


def find_home(root: Path, marks: tuple[str, ...], inner: tuple[str, ...]) -> Path | None:
    """The folder that holds all of ``marks``: ``root`` or the one that its archive unpacks to."""
    for folder in (root, *(root / name for name in inner)):
        if all((folder / mark).exists() for mark in marks):
            return folder
    return None


def read_lines(path: Path, source: str) -> list[str]:
    """Lines of a text file that hold anything."""
    try:
        return list(text_lines(path))
    except (OSError, UnicodeError) as error:
        raise wrong(source, f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_matrix(path: Path, source: str) -> dict[str, Any]:
    """What a .mat file holds."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise wrong(
            source, f"{path.name} needs scipy (pip install scipy); or write train.csv and test.csv: path,label"
        ) from None
    try:
        return loadmat(regular(path), squeeze_me=True)
    except Exception as error:  # scipy raises many kinds for a broken file
        raise wrong(source, f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}") from None


# ---- class folders ----


def split_folders(root: Path, source: str) -> Form | None:
    """``ROOT/SPLIT/CLASS/*``; order and names of classes: :func:`aimv2.data.images.class_names.class_folders`."""
    # a folder `train` with nothing but images is a class of vehicles
    return _folder_form(
        root, _by_split((root / name for name in subfolders(root) if subfolders(root / name)), source), source
    )


def plain_folders(root: Path, source: str) -> Form | None:
    """``ROOT/CLASS/*``, which is training data; see :func:`split_folders`."""
    return _folder_form(root, {"train": root} if subfolders(root) else {}, source)


def _folder_form(root: Path, parts: dict[str, Path], source: str) -> Form | None:
    listed = {split: partial(_list_class_folders, root, parts, source, split) for split in parts}
    return Form("class folders", listed) if listed else None


def _list_class_folders(root: Path, parts: dict[str, Path], source: str, split: str) -> Listed:
    train, own = parts.get("train", parts[split]), parts[split]
    folders = subfolders(train)
    if len(folders) > 1 and not are_classes(folders):
        raise wrong(
            source,
            f"{own} holds {', '.join(folders[:3])}, which are no classes; a folder for each class's images expected",
        )
    classes = class_folders(folders, names_beside(root), f"--data {source}")
    there = same_class(folders, subfolders(own), f"--data {source}: {own.name}")
    inner = "" if own == root else f"{own.name}/"
    keys, counts, passed = list[str](), [], PassedOver()
    for folder, _ in classes:
        before = len(keys)
        if folder in there:
            keys += walk(root, f"{inner}{there[folder]}/", passed)
        counts.append(len(keys) - before)
    for line in passed_lines({kind: about for kind, about in passed.result().items() if kind in PICTURES}):
        say_once(f"--data {source}: {line}")
    if split == "train" and keys and 0 in counts:
        empty = own / classes[counts.index(0)][0]
        raise wrong(source, f"{empty} is a class without an image; give it images, or remove folder and name")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return Listed(keys, labels, tuple(name for _, name in classes), ImageFiles(root, keys))


# ---- shards ----


def shard_folder(root: Path, source: str) -> Form | None:
    """Tars of samples: named by split, or in folders of splits (CLIP_benchmark's)."""
    if tars_in(root):
        groups = split_shards(root, option="--data")
    else:
        inner = _by_split((path for path in root.iterdir() if path.is_dir() and tars_in(path)), source)
        groups = {split: tars_in(path) for split, path in inner.items()}
    return _shard_form(groups, [root], source)


def shard_pattern(path: Path, source: str) -> Form | None:
    """The tars of a pattern, or one.

    Raises:
        UsageError: a pattern that fits nothing.
    """
    tars = find_shards(source, "train", option="--data")
    groups = {split: [tar for tar in tars if _split_of(tar) == split] for split in ("train", "val", "test")}
    folder = tars[0].parent
    return _shard_form(groups, [folder, *([folder.parent] if folder.name.lower() in SPLITS else [])], source)


def _shard_form(groups: Mapping[str, list[Path]], homes: list[Path], source: str) -> Form | None:
    """``homes``: folders that may hold class names."""
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
            raise wrong(source, f"{tar.name} {why_unreadable(tar, error)}") from None
        keys += found
        labels.append(numbers)
        which.append(np.full(len(found), number, np.int32))
        starts.append(edges[:-1])
        ends.append(edges[1:])
    images = ShardImages(tars, *map(np.concatenate, (which, starts, ends)))
    return Listed(keys, np.concatenate(labels), names_beside(*homes), images)


# ---- lists ----


def list_folder(root: Path, source: str) -> Form | None:
    """CSV or TSV files of paths and labels: ``train.csv``, ``test.csv``, ...

    Paths are relative to the list's folder. Labels are numbers from 0, or names: then classes.txt next to the list, or the
    order of the alphabet in the training list, numbers them.
    """
    lists = (path for path in root.iterdir() if path.suffix.lower() in LISTS and path.is_file())
    return _list_form(_by_split(lists, source), source)


def list_file(path: Path, source: str) -> Form | None:
    """One such file; named like a split, with its siblings."""
    if path.suffix.lower() not in LISTS:
        return None
    if path.stem.lower() not in SPLITS:
        stated = sorted({split or "train" for split in _read_list(path, source)[2]})
        return _list_form(dict.fromkeys(stated, path), source)
    siblings = (other for other in path.parent.iterdir() if other.suffix.lower() == path.suffix.lower())
    return _list_form(_by_split(siblings, source), source)


def _list_form(files: dict[str, Path], source: str) -> Form | None:
    listed = {split: partial(_list_file, files, split, source) for split in files}
    return Form("lists", listed) if listed else None


def _list_file(files: dict[str, Path], split: str, source: str) -> Listed:
    file = files[split]
    keys, words = _of_split(file, split, source)
    training = words if split == "train" or "train" not in files else _of_split(files["train"], "train", source)[1]
    labels, classes = number_labels(words, training, names_beside(file.parent), source)
    return Listed(keys, labels, classes, ImageFiles(file.parent, keys))


def _of_split(file: Path, split: str, source: str) -> tuple[list[str], list[str]]:
    """Paths and labels of the rows of a split; a file that is named like one holds that one only."""
    keys, words, stated = _read_list(file, source)
    named = SPLITS.get(file.stem.lower())
    if named and (other := next((row for row in stated if row not in ("", named)), None)):
        raise wrong(source, f"{file.name} has rows of the split {other}; rename the file, or put them into {other}.csv")
    own = [row for row, of in enumerate(stated) if (of or named or "train") == split]
    return [keys[row] for row in own], [words[row] for row in own]


def _read_list(file: Path, source: str) -> tuple[list[str], list[str], list[str]]:
    """Paths and labels, as they are written, and the splits that the rows state ("": none)."""
    try:
        rows = [[cell.strip() for cell in row] for _, row in read_delimited(file) if any(row)]
    except (OSError, UnicodeError) as error:
        raise wrong(source, f"{file.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise wrong(source, f"{file.name} is empty; path,label a line expected")
    header = rows[0]
    image, label = (find_column(header, kind) for kind in ("image", "label"))
    if image is not None and label is not None:
        places = header.index(image), header.index(label)
        rows = rows[1:]
    elif image is None and label is None and len(header) >= 2 and "." in header[0]:
        places = 0, 1  # no header
    else:
        lacks = "labels" if image is not None else "images"
        raise wrong(source, f"no column of {lacks} among {', '.join(header)} of {file.name}; path,label expected")
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= max(places)), None)
    if short is not None:
        raise wrong(source, f"row {short} of {file.name} has {len(rows[short - 1])} cells; path,label expected")
    if not rows:
        raise wrong(source, f"{file.name} has a header and no row")
    named = [] if image is None else [name.lower() for name in header]
    cells = [row[named.index("split")] if "split" in named and len(row) == len(named) else "" for row in rows]
    splits = [stated_split(cell, f"--data {source}: {file.name}") for cell in cells]
    return [row[places[0]] for row in rows], [row[places[1]] for row in rows], splits


NUMBER = re.compile(r"-?\d+(\.0+)?")  # pandas writes 1.0 where a cell of the column is empty
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
SEVERAL = re.compile(r"\[.*\]|-?\d+(\.0+)?([\s,;|]+-?\d+(\.0+)?)+")


def number_labels(
    words: Sequence[str], train: Sequence[str], names: tuple[str, ...] | None, source: str
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as written, to int64 [N], -1 for none (see :data:`aimv2.data.shards.format.NO_VALUE`), and the classes' names, if any.

    Args:
        words: of this split.
        train: of the training split, which decides.
        names: of classes.txt.

    Raises:
        UsageError: a class that training does not know, several labels of one image.
    """
    names = tuple(map(normal, names)) if names else None
    nothing = NO_VALUE.difference(names or ())
    words, train = (["" if (own := normal(word)) in nothing else own for word in given] for given in (words, train))
    if several := next(
        (word for word in (*train, *words) if SEVERAL.fullmatch(word) and word not in (names or ())), None
    ):
        raise wrong(source, f"label {several!r}: several labels of one image; one label an image expected")
    numeric = all(NUMBER.fullmatch(word) or FRACTION.fullmatch(word) for word in train if word)
    if numeric and not names and (part := next((word for word in train if word and not NUMBER.fullmatch(word)), None)):
        raise wrong(source, f"label {part}: one label an image expected, a whole number or a name")
    if all(NUMBER.fullmatch(word) for word in train if word):
        if strange := next((word for word in words if word and not NUMBER.fullmatch(word)), None):
            raise wrong(source, f"label {strange}: a number expected, as in the training split")
        return np.array([int(word.partition(".")[0] or -1) for word in words], np.int64), names
    names = names or tuple(sorted(set(train) - {""}))
    say_odd_classes(names, source)
    numbers, finder = {"": -1, **{name: number for number, name in enumerate(names)}}, NameFinder(names)
    for word in {*words}.difference(numbers):
        found = finder.find(word, stems=False)
        if len(found) != 1:
            raise wrong(source, f"label {word}: not among the {len(names)} classes ({', '.join(names[:3])}, ...)")
        numbers[word] = numbers[found[0]]
    return np.array([numbers[word] for word in words], np.int64), names


# ---- tables: Parquet, saved to disk, from the hub ----


def saved_form(root: Path, source: str) -> Form | None:
    """A folder that ``save_to_disk`` of the library `datasets` wrote, or one of Parquet files."""
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and not any(next(root.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet")):
        return None
    try:
        parts = FileRows.of_splits(saved_splits(root) if saved else parquet_splits(root), source)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise wrong(source, f"not a folder of `save_to_disk`: {first_line(error)}") from None
    return _table_form("a folder of `save_to_disk`" if saved else "Parquet files", parts, source, root)


def hub_form(path: Path, source: str) -> Form:
    """A data set of the hub, downloaded by `datasets` into its own cache.

    Raises:
        UsageError: no such data set, or the hub can't be reached.
    """
    with hub_library(source, "--data") as datasets:
        tables = datasets.load_dataset(source)
    parts = tables if isinstance(tables, dict) else {tables.split or "train": tables}
    rows = {str(name): DatasetRows(table) for name, table in parts.items()}
    return _table_form("`datasets`", rows, source, hub_files())


def _table_form(kind: str, parts: Mapping[str, Rows], source: str, root: Path) -> Form:
    found = dict[str, Rows]()
    for name, rows in parts.items():
        for split, own in _stated_parts(rows, SPLITS.get(name.lower(), ""), source).items():
            if split in found:
                raise wrong(
                    source, f"{name} and another part both hold rows of the split {split}; one of them expected"
                )
            found[split] = own
    if not found:
        raise wrong(source, f"has the splits {', '.join(parts)}; train, validation or test expected")
    labelled = {split: rows for split, rows in found.items() if not _is_unlabelled(rows)}  # ImageNet's test, for one
    found = labelled or found
    return Form(kind, {split: partial(_list_table, found, split, source, root) for split in found})


def _stated_parts(rows: Rows, named: str, source: str) -> dict[str, Rows]:
    """The rows by the splits that a column states; without one, as the part that they are in is named."""
    column = next((name for name in rows.columns if name.lower() == "split"), None)
    if column is None:
        return {named: rows} if named else {}
    kinds = rows.names(column)
    cells = [kinds[cell] if kinds and cell is not None else cell for cell in rows.values(column)]
    places: dict[str, list[int]] = {}
    for row, cell in enumerate(cells):
        places.setdefault(stated_split(cell, f"--data {source}: {column}") or named or "train", []).append(row)
    return {split: rows.select(own) if len(places) > 1 else rows for split, own in places.items()}


def _column(rows: Rows, kind: str) -> str | None:
    return find_column(rows.columns, kind, rows.types)


def _is_unlabelled(rows: Rows) -> bool:
    label = _column(rows, "label")
    return label is None or all(value in (-1, None) or value != value for value in rows.values(label))


def _label_words(rows: Rows, column: str, source: str) -> list[str]:
    """The cells of a label column as words, "" for a missing one.

    Raises:
        UsageError: a cell that is no label.
    """

    def word(cell: Any) -> str:
        if isinstance(cell, list) and len(cell) == 1:
            cell = cell[0]
        if cell is None or cell != cell:  # NaN
            return ""
        if isinstance(cell, list | dict) or (isinstance(cell, float) and not cell.is_integer()):
            raise wrong(source, f"{column} {str(cell)[:40]}: one label an image expected, a whole number or a name")
        return str(int(cell)) if isinstance(cell, float | bool) else str(cell)

    return list(map(word, rows.values(column)))


def _list_table(parts: dict[str, Rows], split: str, source: str, root: Path) -> Listed:
    rows = parts[split]
    image, label = _column(rows, "image"), _column(rows, "label")
    if image is None or label is None:
        lacks = "labels" if image is not None else "images"
        raise wrong(source, f"no column of {lacks} among {', '.join(rows.columns)}; image and label expected")
    words = _label_words(rows, label, source)
    train = _label_words(parts["train"], label, source) if split != "train" and "train" in parts else words
    names = rows.names(label)
    labels, classes = number_labels(words, train, tuple(names) if names else None, source)
    keys = [f"{split}-{row:08d}" for row in range(len(rows))]
    return Listed(keys, labels, classes, TableImages(rows.cells(image), root))
