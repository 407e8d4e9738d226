"""The fourteen data sets of the paper's frozen evaluation, and the forms on disk that are their own.

Sizes are those of AIMV2, Table B1. Where a set has its own form (pickles, lists in ``meta/``), a function here finds
it in a folder and says what its splits hold; more of them are in `labelled_archives` and `labelled_wilds`, and forms
that any data set may have in `labelled_forms`.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2.data.datasets.archives import eurosat, imagenet, pcam
from aimv2.data.datasets.wilds import camelyon17, fmow, iwildcam, rxrx1
from aimv2.data.images.forms import Form, ImageFiles, Listed, find_home, read_lines, read_matrix, wrong
from aimv2.errors import UsageError, nearest

METRIC = "top-1 accuracy"  # of all fourteen


@dataclass(frozen=True)
class Registered:
    """A data set of the paper.

    Attributes:
        name: for ``--dataset``.
        column: its name in the paper's tables.
        classes: how many.
        train: images that the paper trains its probes on; a validation split may be part of them.
        test: images that the paper tests on.
        metric: what the paper reports.
        test_split: which split, of a set that comes with both, has the paper's number of test images.
    """

    name: str
    column: str
    classes: int
    train: int
    test: int
    metric: str = METRIC
    test_split: str = "test"


# AIMV2, Table B1. The WILDS sets (Camelyon17, RxRx1, fMoW) have 85,054, 34,432 and 22,108 images in ``test``: the
# paper's numbers are those of their out-of-distribution ``val``.
_TABLE = (
    Registered("imagenet1k", "IN-1k", 1000, 1_281_167, 50_000),
    Registered("inat18", "iNat-18", 8142, 437_513, 24_426),
    Registered("cifar10", "CIFAR-10", 10, 50_000, 10_000),
    Registered("cifar100", "CIFAR-100", 100, 50_000, 10_000),
    Registered("food101", "Food101", 101, 75_750, 25_250),
    Registered("dtd", "DTD", 47, 3_760, 1_880),
    Registered("pets", "Pets", 37, 3_680, 3_669),
    Registered("cars", "Cars", 196, 8_144, 8_041),
    Registered("camelyon17", "Camelyon17", 2, 302_436, 34_904, test_split="val"),
    Registered("pcam", "PCAM", 2, 262_144, 32_768),
    Registered("rxrx1", "RxRx1", 1139, 40_612, 9_854, test_split="val"),
    Registered("eurosat", "EuroSAT", 10, 16_200, 5_400),
    Registered("fmow", "fMoW", 62, 76_863, 19_915, test_split="val"),
    Registered("infograph", "Infograph", 345, 36_023, 15_582),
)
DATASETS: dict[str, Registered] = {one.name: one for one in _TABLE}


def registered(name: str) -> Registered:
    """A data set by its name or the paper's, whatever the case and the hyphens.

    Raises:
        UsageError: it is not one of the fourteen.
    """
    known = {_plain(word): one for one in _TABLE for word in (one.name, one.column)}
    if found := known.get(_plain(name)):
        return found
    raise UsageError(
        f"--dataset {name}: not registered{nearest(_plain(name), DATASETS)} (there: {', '.join(DATASETS)}); "
        "any other data set is read without --dataset"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def known_form(root: Path, source: str) -> Form | None:
    """What a folder holds, if it has a form that only one of the sets has.

    Raises:
        UsageError: it has that form, but a file of it is missing or broken.
    """
    finders = (
        *(_cifar, _food101, _dtd, _pets, _cars, _inat18, _infograph),
        *(eurosat, imagenet, pcam, camelyon17, rxrx1, fmow, iwildcam),
    )
    return next((form for finder in finders if (form := finder(root, source))), None)


# ---- CIFAR ----

_BATCHES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    "cifar100": ("cifar-100-python", ["train"], ["test"]),
}
_META = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
_SIDE = 32


@dataclass(frozen=True)
class ImageArrays:
    """Images that are in memory: uint8 [N, 32, 32, 3]."""

    pixels: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])


def _cifar(root: Path, source: str) -> Form | None:
    """The Python version of CIFAR-10 and CIFAR-100, its folder or the one around it."""
    found = {}
    for name, (inner, train, test) in _BATCHES.items():
        homes = [folder for folder in (root, root / inner) if (folder / _META[name][0]).is_file()]
        if homes:
            found[name] = (homes[0], train, test)
    if len(found) > 1:
        inner_names = " and ".join(_BATCHES[name][0] for name in found)
        raise wrong(source, f"holds {inner_names}; give one of them")
    for name, (folder, train, test) in found.items():
        batches = {"train": train, "test": test}
        return Form(
            "CIFAR pickles",
            {split: partial(_list_cifar, folder, name, files, source) for split, files in batches.items()},
            name,
        )
    return None


def _list_cifar(folder: Path, name: str, files: list[str], source: str) -> Listed:
    meta, names_key = _META[name]
    keys, labels, arrays = list[str](), list[int](), list[Any]()
    for file in files:
        batch = load_pickle(folder / file)
        pixels: Any = batch.get("data")
        numbers: Any = batch.get("fine_labels", batch.get("labels"))
        whole = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(numbers, list)
        if not whole or pixels.shape != (len(numbers), 3 * _SIDE * _SIDE):
            raise wrong(source, f"{file} is not a CIFAR batch: data [N, 3072] of bytes and N labels expected")
        arrays.append(pixels)
        labels += numbers
        keys += [f"{file}-{row:05d}" for row in range(len(numbers))]
    classes = tuple(_text(one) for one in load_pickle(folder / meta).get(names_key, ()))
    pixels = np.concatenate(arrays).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Listed(keys, np.array(labels, np.int64), classes, ImageArrays(np.ascontiguousarray(pixels)))


def load_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of numbers, text, lists and numeric arrays; nothing else is let in.

    Args:
        path: written by Python 2 or 3.

    Returns:
        Its keys as text.

    Raises:
        UsageError: missing, broken, or it asks for anything that such a dictionary does not need.
    """
    try:
        with path.open("rb") as file:
            value = _Arrays(file, encoding="bytes").load()
    except OSError as error:
        raise UsageError(f"--data {path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a broken or planted pickle may raise anything
        raise UsageError(f"--data {path}: not a pickle of CIFAR ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(value, dict):
        raise UsageError(f"--data {path}: not a pickle of CIFAR (a {type(value).__name__}, a dictionary expected)")
    return {_text(key): entry for key, entry in value.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _ArrayKind:
    """Stands for ``numpy.ndarray`` in a pickle, where it is an argument only."""


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """As numpy's ``_reconstruct``: an array that the pickle's state fills."""
    return np.empty(0, np.uint8)


def _filled_array(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """As numpy's ``_frombuffer``, of pickles of protocol 5."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _number_kind(code: Any, align: bool = False, copy: bool = False) -> np.dtype:
    """A numeric dtype; a copy, since the pickle's state is written into it."""
    if not re.fullmatch(r"[|<>=]?[buif][1248]", _text(code)):
        raise pickle.UnpicklingError(f"refused: arrays of {_text(code)}")
    return np.dtype(_text(code), False, True)


class _Arrays(pickle.Unpickler):
    """Builds numeric arrays with functions of ours; every other global of a pickle is refused by name."""

    allowed: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _ArrayKind,
        ("numpy", "dtype"): _number_kind,
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy.core.numeric", "_frombuffer"): _filled_array,
        ("numpy._core.numeric", "_frombuffer"): _filled_array,
    }

    def find_class(self, module: str, name: str) -> Any:
        if found := self.allowed.get((module, name)):
            return found
        raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}")


# ---- lists beside images ----


def _food101(root: Path, source: str) -> Form | None:
    """``meta/train.txt`` and ``meta/test.txt`` with ``CLASS/ID`` a line; ``images/CLASS/ID.jpg``."""
    home = find_home(root, ("meta/train.txt", "meta/test.txt", "images"), ("food-101",))
    if home is None:
        return None

    def listing(split: str) -> Listed:
        classes = sorted({line.split("/")[0] for line in read_lines(home / "meta" / "train.txt", source)})
        names = [f"{line}.jpg" for line in read_lines(home / "meta" / f"{split}.txt", source)]
        return _by_folder(home, names, classes, source)

    return Form("Food-101's lists", {split: partial(listing, split) for split in ("train", "test")}, "food101")


def _dtd(root: Path, source: str) -> Form | None:
    """``labels/train1.txt``, ``val1.txt``, ``test1.txt`` (the first of ten partitions) with ``CLASS/NAME.jpg`` a line."""
    home = find_home(root, ("labels/train1.txt", "labels/test1.txt", "images"), ("dtd", "dtd/dtd"))
    if home is None:
        return None

    def listing(split: str) -> Listed:
        classes = sorted({line.split("/")[0] for line in read_lines(home / "labels" / "train1.txt", source)})
        return _by_folder(home, read_lines(home / "labels" / f"{split}1.txt", source), classes, source)

    splits = [split for split in ("train", "val", "test") if (home / "labels" / f"{split}1.txt").is_file()]
    return Form("DTD's lists, partition 1", {split: partial(listing, split) for split in splits}, "dtd")


def _by_folder(home: Path, names: list[str], classes: list[str], source: str) -> Listed:
    """Images ``images/CLASS/NAME`` by the names ``CLASS/NAME``."""
    numbers = {name: number for number, name in enumerate(classes)}
    if strange := next((name for name in names if name.split("/")[0] not in numbers), None):
        raise wrong(source, f"{strange} is of a class that the training list lacks")
    labels = np.array([numbers[name.split("/")[0]] for name in names], np.int64)
    keys = [f"images/{name}" for name in names]
    return Listed(keys, labels, tuple(classes), ImageFiles(home, keys))


def _pets(root: Path, source: str) -> Form | None:
    """``annotations/trainval.txt`` and ``test.txt``: ``Breed_name_ID CLASS SPECIES BREED`` a line, classes from 1."""
    home = find_home(root, ("annotations/trainval.txt", "annotations/test.txt", "images"), ("oxford-iiit-pet",))
    if home is None:
        return None

    def rows(file: str) -> list[tuple[str, int]]:
        listed = [line.split() for line in read_lines(home / "annotations" / file, source) if not line.startswith("#")]
        if broken := next((row for row in listed if len(row) < 2 or not row[1].isdigit()), None):
            raise wrong(source, f"annotations/{file}: NAME CLASS ... expected, not {' '.join(broken)[:80]}")
        return [(row[0], int(row[1]) - 1) for row in listed]

    def listing(file: str) -> Listed:
        breeds = {label: name.rpartition("_")[0].replace("_", " ") for name, label in rows("trainval.txt")}
        chosen = rows(file)
        keys = [f"images/{name}.jpg" for name, _ in chosen]
        labels = np.array([label for _, label in chosen], np.int64)
        return Listed(keys, labels, _names_by_number(breeds), ImageFiles(home, keys))

    splits = {"train": partial(listing, "trainval.txt"), "test": partial(listing, "test.txt")}
    return Form("Oxford-IIIT Pet's lists", splits, "pets")


def _names_by_number(names: dict[int, str]) -> tuple[str, ...]:
    """{label: class name} as a tuple; a number that no image has keeps its number for a name."""
    return tuple(names.get(number, str(number)) for number in range(max(names, default=-1) + 1))


def _cars(root: Path, source: str) -> Form | None:
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


def _inat18(root: Path, source: str) -> Form | None:
    """``train2018.json`` and ``val2018.json`` in COCO's form; the paper tests on the latter (24,426 images)."""
    home = find_home(root, ("train2018.json", "val2018.json"), ())
    if home is None:
        return None

    def listing(file: str) -> Listed:
        try:
            record = json.loads((home / file).read_bytes())
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


def _infograph(root: Path, source: str) -> Form | None:
    """DomainNet's ``infograph_train.txt`` and ``infograph_test.txt``: ``infograph/CLASS/NAME.jpg LABEL`` a line."""
    home = find_home(root, ("infograph_train.txt", "infograph_test.txt"), ())
    if home is None:
        return None

    def rows(split: str) -> list[tuple[str, int]]:
        listed = [line.rpartition(" ") for line in read_lines(home / f"infograph_{split}.txt", source)]
        if broken := next((row for row in listed if not row[0] or not row[2].isdigit()), None):
            raise wrong(source, f"infograph_{split}.txt: PATH LABEL expected, not {''.join(broken)[:80]}")
        return [(path.strip(), int(label)) for path, _, label in listed]

    def listing(split: str) -> Listed:
        classes = {label: Path(path).parent.name for path, label in rows("train")}
        chosen = rows(split)
        keys = [path for path, _ in chosen]
        labels = np.array([label for _, label in chosen], np.int64)
        return Listed(keys, labels, _names_by_number(classes), ImageFiles(home, keys))

    return Form("DomainNet's lists", {split: partial(listing, split) for split in ("train", "test")}, "infograph")
