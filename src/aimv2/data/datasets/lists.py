"""Data sets of which files list the splits: lines of text, MATLAB's matrices, COCO's JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from aimv2.data.images.forms import Form, Listed, find_home, read_lines, read_matrix, wrong
from aimv2.data.images.readers import ImageFiles
from aimv2.io import parse_json, read_file


@dataclass(frozen=True)
class LineListed:
    """A data set with an image a line in its lists.

    Attributes:
        name: in the registry.
        kind: in words.
        lists: split -> file; those of train and test mark the form.
        folders: what must be there too.
        inner: folders that its archive unpacks to.
        line: pattern of a line, with the groups ``name`` (of the class), ``id`` and ``label``; without ``label`` the order of
            the names in training numbers the classes.
        image: path of the image; ``{line}`` and the groups are filled in.
        wanted: a line in words.
        first: the smallest label.
        spaces: underscores in the names of classes stand for spaces.
    """

    name: str
    kind: str
    lists: dict[str, str]
    folders: tuple[str, ...]
    inner: tuple[str, ...]
    line: str
    image: str
    wanted: str
    first: int = 0
    spaces: bool = False

    def form(self, root: Path, source: str) -> Form | None:
        """What a folder holds, if it is this data set."""
        home = find_home(root, (self.lists["train"], self.lists["test"], *self.folders), self.inner)
        if home is None:
            return None
        splits = {
            split: partial(self._list, home, split, source)
            for split, file in self.lists.items()
            if (home / file).is_file()
        }
        return Form(self.kind, splits, self.name)

    def _list(self, home: Path, split: str, source: str) -> Listed:
        train = self._rows(home, "train", source)
        rows = train if split == "train" else self._rows(home, split, source)
        if rows and rows[0][1] is None:
            classes = tuple(sorted({name for _, _, name in train}))
            numbers = {name: number for number, name in enumerate(classes)}
            if strange := next((key for key, _, name in rows if name not in numbers), None):
                raise wrong(source, f"{strange} is of a class that the training list lacks")
            labels = [numbers[name] for _, _, name in rows]
        else:
            classes = _names_by_number({label: name for _, label, name in train if label is not None})
            labels = [label for _, label, _ in rows if label is not None]
        keys = [key for key, _, _ in rows]
        return Listed(keys, np.array(labels, np.int64), classes, ImageFiles(home, keys))

    def _rows(self, home: Path, split: str, source: str) -> list[tuple[str, int | None, str]]:
        """Image, label and class name of each line."""
        rows = []
        for line in read_lines(home / self.lists[split], source):
            if line.startswith("#"):
                continue
            found = re.fullmatch(self.line, line)
            if found is None:
                raise wrong(source, f"{self.lists[split]}: {self.wanted} expected, not {line[:80]}")
            parts = found.groupdict()
            label = int(parts["label"]) - self.first if "label" in parts else None
            name = parts["name"].replace("_", " ") if self.spaces else parts["name"]
            rows.append((self.image.format(line=line, **parts), label, name))
        return rows


LINE_LISTED = (
    LineListed(
        "food101",
        "Food-101's lists",
        {"train": "meta/train.txt", "test": "meta/test.txt"},
        folders=("images",),
        inner=("food-101",),
        line=r"(?P<name>[^/]+).*",
        image="images/{line}.jpg",
        wanted="CLASS/ID",
    ),
    LineListed(
        "dtd",
        "DTD's lists, partition 1",  # the first of ten
        {"train": "labels/train1.txt", "val": "labels/val1.txt", "test": "labels/test1.txt"},
        folders=("images",),
        inner=("dtd", "dtd/dtd"),
        line=r"(?P<name>[^/]+).*",
        image="images/{line}",
        wanted="CLASS/NAME.jpg",
    ),
    LineListed(
        "pets",
        "Oxford-IIIT Pet's lists",
        {"train": "annotations/trainval.txt", "test": "annotations/test.txt"},
        folders=("images",),
        inner=("oxford-iiit-pet",),
        line=r"(?P<id>(?P<name>\S*)_[^_\s]*)\s+(?P<label>\d+)(\s.*)?",
        image="images/{id}.jpg",
        wanted="NAME CLASS ...",
        first=1,
        spaces=True,
    ),
    LineListed(
        "infograph",
        "DomainNet's lists",
        {"train": "infograph_train.txt", "test": "infograph_test.txt"},
        folders=(),
        inner=(),
        line=r"(?P<id>(?:.*/)?(?P<name>[^/]+)/[^/]+?)\s+(?P<label>\d+)",
        image="{id}",
        wanted="PATH LABEL",
    ),
)


def _names_by_number(names: dict[int, str]) -> tuple[str, ...]:
    """{label: class name} as a tuple; a number that no image has keeps its number for a name."""
    return tuple(names.get(number, str(number)) for number in range(max(names, default=-1) + 1))


def cars(root: Path, source: str) -> Form | None:
    """``devkit/cars_train_annos.mat``, ``cars_test_annos_withlabels.mat``, ``cars_train/``, ``cars_test/``."""
    home = find_home(root, ("devkit/cars_train_annos.mat", "cars_train"), ("stanford_cars",))
    if home is None:
        return None
    labelled = "cars_test_annos_withlabels.mat"  # the devkit's own list of test images has no labels
    places = {"train": ["devkit/cars_train_annos.mat"], "test": [labelled, f"devkit/{labelled}"]}
    files = {split: next((f for f in names if (home / f).is_file()), None) for split, names in places.items()}

    def listing(split: str, file: str) -> Listed:
        annotations = np.atleast_1d(read_matrix(home / file, source)["annotations"])
        keys = [f"cars_{split}/{one['fname']}" for one in annotations]
        labels = np.array([int(one["class"]) - 1 for one in annotations], np.int64)
        meta = home / "devkit" / "cars_meta.mat"
        names = tuple(map(str, read_matrix(meta, source)["class_names"])) if meta.is_file() else None
        return Listed(keys, labels, names, ImageFiles(home, keys))

    splits = {split: partial(listing, split, file) for split, file in files.items() if file}
    return Form("Stanford Cars' devkit", splits, "cars")


def inat18(root: Path, source: str) -> Form | None:
    """``train2018.json`` and ``val2018.json`` in COCO's form; the paper tests on the latter (24,426 images)."""
    home = find_home(root, ("train2018.json", "val2018.json"), ())
    if home is None:
        return None

    def listing(file: str) -> Listed:
        try:
            record = parse_json(read_file(home / file))
            names = {entry["id"]: str(entry["name"]) for entry in record["categories"]}
            numbers = {one: number for number, one in enumerate(sorted(names))}
            label_of_image = {entry["image_id"]: numbers[entry["category_id"]] for entry in record["annotations"]}
            keys = [entry["file_name"] for entry in record["images"]]
            labels = np.array([label_of_image.get(entry["id"], -1) for entry in record["images"]], np.int64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise wrong(source, f"{file}: images, annotations and categories as in COCO expected ({error!r})") from None
        return Listed(keys, labels, tuple(names[one] for one in sorted(names)), ImageFiles(home, keys))

    splits = {"train": partial(listing, "train2018.json"), "val": partial(listing, "val2018.json")}
    return Form("iNaturalist's JSON", splits, "inat18")
