"""The data sets of WILDS as its archives have them: one table of all images beside them, splits and labels in it.

Columns, places of images and splits are those of the package `wilds`. Its out-of-distribution ``val`` and ``test`` are
the splits here, its in-distribution ones are left out: the paper tests on the former (see `datasets`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from aimv2.data.images.forms import Form, ImageFiles, Listed, find_home, number_labels, wrong

Row = dict[str, str]
# a row and its number in the table -> split, image, label
Reader = Callable[[Row, int], tuple[str, str, str]]
CAMELYON_CENTRES = {"1": "val", "2": "test"}  # hospitals that WILDS keeps out of training, counted from 0
FMOW_FIRST = {"val": "2013", "test": "2016"}  # years from which images count as another distribution


def camelyon17(root: Path, source: str) -> Form | None:
    """``metadata.csv`` and ``patches/``: 96 x 96 patches of lymph nodes; tumour is 1."""

    def read(row: Row, number: int) -> tuple[str, str, str]:
        at = f"patient_{row['patient']}_node_{row['node']}"
        name = f"patches/{at}/patch_{at}_x_{row['x_coord']}_y_{row['y_coord']}.png"
        split = CAMELYON_CENTRES.get(row["center"], "train" if row["split"] == "0" else "")
        return split, name, row["tumor"]

    columns = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    classes = ("normal", "tumor")
    return _form(root, source, "camelyon17", ("metadata.csv", "patches"), columns, read, classes)


def rxrx1(root: Path, source: str) -> Form | None:
    """``metadata.csv`` and ``images/EXPERIMENT/PlateN/WELL_sSITE.png``: cells under one of 1,139 treatments.

    Of the experiments that ``train`` names, the images of site 2 are WILDS' in-distribution test.
    """

    def read(row: Row, number: int) -> tuple[str, str, str]:
        name = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
        within = row["dataset"] == "train" and row["site"] == "2"
        return ("" if within else row["dataset"]), name, row["sirna_id"]

    columns = ("experiment", "plate", "well", "site", "dataset", "sirna_id")
    return _form(root, source, "rxrx1", ("metadata.csv", "images"), columns, read)


def fmow(root: Path, source: str) -> Form | None:
    """``rgb_metadata.csv`` and ``images/rgb_img_NUMBER.png``, the number being that of the row.

    Training images are of before 2013, ``val`` of 2013 to 2015, ``test`` of 2016 and later.
    """

    def read(row: Row, number: int) -> tuple[str, str, str]:
        split, year = row["split"], row["timestamp"][:4]
        time = "test" if year >= FMOW_FIRST["test"] else "val" if year >= FMOW_FIRST["val"] else "train"
        return (split if split == time else ""), f"images/rgb_img_{number}.png", row["category"]

    return _form(root, source, "fmow", ("rgb_metadata.csv", "images"), ("split", "timestamp", "category"), read)


def iwildcam(root: Path, source: str) -> Form | None:
    """``metadata.csv`` and ``train/``, where the images of all splits lie. (Not one of the paper's.)"""

    def read(row: Row, number: int) -> tuple[str, str, str]:
        return row["split"], f"train/{row['filename']}", row["y"]

    return _form(root, source, "iwildcam", ("metadata.csv", "train"), ("split", "filename", "y"), read)


def _form(
    root: Path,
    source: str,
    name: str,
    marks: tuple[str, str],
    columns: tuple[str, ...],
    read: Reader,
    classes: tuple[str, ...] | None = None,
) -> Form | None:
    """The form of a set, if its table is there with its columns; ``marks``: the table and the images' folder."""
    versions = ("v1.0", "v1.1", "v2.0")
    home = find_home(root, marks, (name, *(f"{name}_{version}" for version in versions)))
    if home is None:
        return None
    table = home / marks[0]
    header = next(_cells(table, source), [])
    if not set(columns) <= set(header):
        return None
    listing = partial(_list, table, source, read, classes)
    splits = {split: partial(listing, split) for split in ("train", "val", "test")}
    return Form(f"the table of WILDS' {name}", splits, None if name == "iwildcam" else name)


def _cells(table: Path, source: str) -> Iterator[list[str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            yield from (cells for cells in csv.reader(file) if cells)  # a blank line is no row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise wrong(source, f"{table.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _list(table: Path, source: str, read: Reader, classes: tuple[str, ...] | None, split: str) -> Listed:
    rows = _cells(table, source)
    header = next(rows)
    keys, words, everything = list[str](), list[str](), set[str]()
    for number, cells in enumerate(rows):
        if len(cells) != len(header):
            raise wrong(source, f"row {number + 1} of {table.name} has {len(cells)} cells, {len(header)} expected")
        found, key, word = read(dict(zip(header, cells)), number)
        everything.add(word)
        if found == split:
            keys.append(key)
            words.append(word)
    if keys and not (table.parent / keys[0]).is_file():
        raise wrong(source, f"{table.name} names {keys[0]}, which is not there")
    # where the classes have names here, the table has their numbers
    labels, names = number_labels(words, () if classes else sorted(everything), classes, source)
    return Listed(keys, labels, names, ImageFiles(table.parent, keys))
