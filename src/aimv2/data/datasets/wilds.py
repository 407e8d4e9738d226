"""The data sets of WILDS as its archives have them: one table of all images next to them, splits and labels in it.

Columns, places of images and splits are those of the package `wilds`. Its out-of-distribution ``val`` and ``test`` are
the splits here, its in-distribution ones are left out: the paper tests on the former (see `registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aimv2.data.images.forms import Form, Listed, find_home, number_labels, wrong
from aimv2.data.images.readers import ImageFiles
from aimv2.data.images.text_tables import read_delimited

VERSIONS = ("v1.0", "v1.1", "v2.0")
CAMELYON_CENTRES = {"1": "val", "2": "test"}  # hospitals that WILDS keeps out of training, counted from 0
FMOW_FIRST = {"val": "2013", "test": "2016"}  # years from which images count as another distribution


@dataclass(frozen=True)
class WildsSet:
    """A data set of WILDS.

    Attributes:
        name: of its folder.
        table: of all images.
        images: folder of images.
        columns: of the table.
        read: a row and its number in the table -> split ("": left out), image, label.
        classes: names, where the table has numbers.
        is_registered: one of the paper's.
    """

    name: str
    table: str
    images: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, str], int], tuple[str, str, str]]
    classes: tuple[str, ...] | None = None
    is_registered: bool = True

    def form(self, root: Path, source: str) -> Form | None:
        """What a folder holds, if this set's table is there with its columns."""
        inner = (self.name, *(f"{self.name}_{version}" for version in VERSIONS))
        home = find_home(root, (self.table, self.images), inner)
        if home is None or not set(self.columns) <= set(next(_cells(home / self.table, source), [])):
            return None
        splits = {split: partial(self._list, home / self.table, source, split) for split in ("train", "val", "test")}
        return Form(f"the table of WILDS' {self.name}", splits, self.name if self.is_registered else None)

    def _list(self, table: Path, source: str, split: str) -> Listed:
        rows = _cells(table, source)
        header = next(rows)
        keys, words, everything = list[str](), list[str](), set[str]()
        for number, cells in enumerate(rows):
            if len(cells) != len(header):
                raise wrong(source, f"row {number + 1} of {table.name} has {len(cells)} cells, {len(header)} expected")
            found, key, word = self.read(dict(zip(header, cells)), number)
            everything.add(word)
            if found == split:
                keys.append(key)
                words.append(word)
        if keys and not (table.parent / keys[0]).is_file():
            raise wrong(source, f"{table.name} names {keys[0]}, which is not there")
        # where the classes have names here, the table has their numbers
        labels, names = number_labels(words, () if self.classes else sorted(everything), self.classes, source)
        return Listed(keys, labels, names, ImageFiles(table.parent, keys))


def _cells(table: Path, source: str) -> Iterator[list[str]]:
    try:
        yield from (cells for _, cells in read_delimited(table))
    except (OSError, UnicodeError) as error:
        raise wrong(source, f"{table.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_camelyon17(row: dict[str, str], number: int) -> tuple[str, str, str]:
    at = f"patient_{row['patient']}_node_{row['node']}"
    name = f"patches/{at}/patch_{at}_x_{row['x_coord']}_y_{row['y_coord']}.png"
    return CAMELYON_CENTRES.get(row["center"], "train" if row["split"] == "0" else ""), name, row["tumor"]


def _read_rxrx1(row: dict[str, str], number: int) -> tuple[str, str, str]:
    """Of the experiments that ``train`` names, the images of site 2 are WILDS' in-distribution test."""
    name = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
    within = row["dataset"] == "train" and row["site"] == "2"
    return ("" if within else row["dataset"]), name, row["sirna_id"]


def _read_fmow(row: dict[str, str], number: int) -> tuple[str, str, str]:
    """Training images are of before 2013, ``val`` of 2013 to 2015, ``test`` of 2016 and later."""
    split, year = row["split"], row["timestamp"][:4]
    time = "test" if year >= FMOW_FIRST["test"] else "val" if year >= FMOW_FIRST["val"] else "train"
    return (split if split == time else ""), f"images/rgb_img_{number}.png", row["category"]


def _read_iwildcam(row: dict[str, str], number: int) -> tuple[str, str, str]:
    """The images of all splits are in ``train/``."""
    return row["split"], f"train/{row['filename']}", row["y"]


WILDS = (
    WildsSet(  # 96 x 96 patches of lymph nodes
        *("camelyon17", "metadata.csv", "patches"),
        columns=("patient", "node", "x_coord", "y_coord", "tumor", "center", "split"),
        read=_read_camelyon17,
        classes=("normal", "tumor"),
    ),
    WildsSet(  # cells under one of 1,139 treatments
        *("rxrx1", "metadata.csv", "images"),
        columns=("experiment", "plate", "well", "site", "dataset", "sirna_id"),
        read=_read_rxrx1,
    ),
    WildsSet("fmow", "rgb_metadata.csv", "images", ("split", "timestamp", "category"), _read_fmow),
    WildsSet("iwildcam", "metadata.csv", "train", ("split", "filename", "y"), _read_iwildcam, is_registered=False),
)
