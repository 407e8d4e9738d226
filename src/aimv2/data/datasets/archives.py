"""EuroSAT, ImageNet and PatchCamelyon as their archives unpack.

Legend: N images.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from aimv2.data.images.catalogue import is_hidden, walk
from aimv2.data.images.class_names import class_folders, names_beside
from aimv2.data.images.forms import (
    Form,
    Listed,
    find_home,
    read_lines,
    read_matrix,
    split_folders,
    wrong,
)
from aimv2.data.images.readers import HDF5Images, ImageFiles, own_set
from aimv2.errors import UsageError
from aimv2.io import regular

log = logging.getLogger(__name__)

# ---- EuroSAT ----

_LAND = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
_FRACTIONS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}  # 16,200, 5,400 and 5,400 of 27,000
_SEED = 0


def eurosat(root: Path, source: str) -> Form | None:
    """``2750/CLASS/*.jpg``: all images in one folder a class, without splits.

    The lists ``eurosat-{train,val,test}.txt`` of TorchGeo, where they are next to it, give the splits; else a fixed draw
    has the sizes of VTAB's, which the paper counts.
    """
    home = find_home(root, _LAND, ("2750", "EuroSAT/2750", "eurosat/2750", "EuroSAT_RGB", "EuroSAT"))
    if home is None:
        return None
    lists = next(
        (d for d in (root, home, home.parent) if all((d / f"eurosat-{s}.txt").is_file() for s in _FRACTIONS)), None
    )
    how = "TorchGeo's lists" if lists else f"drawn with seed {_SEED}, 60/20/20%"
    splits = {split: partial(_list_eurosat, home, lists, source, split) for split in _FRACTIONS}
    return Form(f"EuroSAT's folders, splits: {how}", splits, "eurosat")


def _list_eurosat(home: Path, lists: Path | None, source: str, split: str) -> Listed:
    keys = [key for name in _LAND for key in walk(home, f"{name}/")]
    if lists:
        wanted = {Path(line).stem for line in read_lines(lists / f"eurosat-{split}.txt", source)}
        keys = [key for key in keys if Path(key).stem in wanted]
        if len(keys) != len(wanted):
            raise wrong(source, f"eurosat-{split}.txt names {len(wanted):,} images, {len(keys):,} of them are there")
    else:
        _say_once(f"{source}: EuroSAT comes without splits; drawn with seed {_SEED}: 60% train, 20% val, 20% test")
        low, high = (round(fraction * len(keys)) for fraction in _FRACTIONS[split])
        drawn = np.random.default_rng(_SEED).permutation(len(keys))[low:high]
        keys = [keys[row] for row in np.sort(drawn)]
    numbers = {name: number for number, name in enumerate(_LAND)}
    labels = np.array([numbers[key.split("/")[0]] for key in keys], np.int64)
    return Listed(keys, labels, _LAND, ImageFiles(home, keys))


@cache
def _say_once(words: str) -> None:
    log.warning(words)


# ---- ImageNet ----

_SOLUTION = "LOC_val_solution.csv"  # of Kaggle
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # of the devkit
_MAPPING = "LOC_synset_mapping.txt"
_DEVKITS = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data")
_INNER = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")


def imagenet(root: Path, source: str) -> Form | None:
    """``train/WNID/*.JPEG`` and ``val/``: sorted by class, or flat with labels in a file above; Kaggle's folders too.

    Raises:
        UsageError: a flat ``val`` whose labels are not found.
    """
    home = find_home(root, ("train", "val"), _INNER)
    if home is None:
        return None
    wnids = [name for name in _children(home / "train") if re.fullmatch(r"n\d{8}", name)]
    inside = _children(home / "val")
    flat = [name for name in inside if name.lower().endswith((".jpeg", ".jpg"))]
    if not set(wnids).isdisjoint(inside):
        flat = []  # sorted by class; an image next to the folders is a stray
    if not wnids or (home == root and not flat):
        return None  # not ImageNet's, or class folders like any other
    dataset = "imagenet1k" if len(wnids) == 1000 else None
    if not flat:
        form = split_folders(home, source)
        return form and Form("ImageNet's class folders", form.splits, dataset)
    above = [*dict.fromkeys((home, *list(home.parents)[: len(home.relative_to(root).parts)], root, root.parent))]
    splits = {
        "train": partial(_list_imagenet_train, home, wnids, above, source),
        "val": partial(_list_imagenet_val, home, flat, wnids, above, source),
    }
    return Form("ImageNet's folders, val flat", splits, dataset)


def _children(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except NotADirectoryError:
        return []


def _list_imagenet_train(home: Path, wnids: Sequence[str], above: Sequence[Path], source: str) -> Listed:
    keys, counts = list[str](), []
    classes = _imagenet_classes(wnids, above, source)
    for wnid, _ in classes:
        before = len(keys)
        keys += walk(home, f"train/{wnid}/")
        counts.append(len(keys) - before)
    labels = np.repeat(np.arange(len(wnids), dtype=np.int64), counts)
    return Listed(keys, labels, tuple(name for _, name in classes), ImageFiles(home, keys))


def _list_imagenet_val(
    home: Path, flat: Sequence[str], wnids: Sequence[str], above: Sequence[Path], source: str
) -> Listed:
    of_image = _wnids_of_val(flat, above, source)
    classes = _imagenet_classes(wnids, above, source)
    numbers = {wnid: number for number, (wnid, _) in enumerate(classes)}
    for name in flat:
        wnid = of_image.get(Path(name).stem)
        if wnid not in numbers:
            what = f"its class {wnid} is not in train" if wnid else f"not in {_SOLUTION}"
            raise wrong(source, f"val/{name}: {what}")
    labels = np.array([numbers[of_image[Path(name).stem]] for name in flat], np.int64)
    keys = [f"val/{name}" for name in flat]
    return Listed(keys, labels, tuple(name for _, name in classes), ImageFiles(home, keys))


def _wnids_of_val(flat: Sequence[str], above: Sequence[Path], source: str) -> dict[str, str]:
    """{name of a validation image without its ending: WNID}, of Kaggle's solution or the devkit's ground truth."""
    if solution := _first(folder / _SOLUTION for folder in above):
        rows = [line.split(",") for line in read_lines(solution, source)[1:]]
        return {row[0]: row[1].split(" ")[0] for row in rows if len(row) > 1}
    truth = _first(folder / inner / _TRUTH for folder in above for inner in ("", *_DEVKITS))
    if truth and (truth.parent / "meta.mat").is_file():
        wnids = _wnids_of_devkit(truth.parent / "meta.mat", source)
        lines = read_lines(truth, source)
        if len(lines) != len(flat):
            raise wrong(source, f"{_TRUTH} has {len(lines):,} lines, val has {len(flat):,} images")
        return {Path(name).stem: wnids.get(line, line) for name, line in zip(flat, lines)}
    lacks = f"meta.mat next to {_TRUTH}" if truth else f"{_SOLUTION} (Kaggle) or ILSVRC2012_devkit_t12/data"
    raise wrong(
        source,
        f"val has no class folders and its labels are missing: {lacks} expected; or sort val into val/WNID/*.JPEG",
    )


def _wnids_of_devkit(path: Path, source: str) -> dict[str, str]:
    """{number of a class as the ground truth writes it: WNID}; superclasses are among them, with numbers above 1000."""
    matrix = read_matrix(path, source)
    try:
        return {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in np.atleast_1d(matrix["synsets"])}
    except (KeyError, ValueError, TypeError, IndexError):
        raise wrong(source, f"{path.name}: synsets with ILSVRC2012_ID and WNID expected, as in the devkit") from None


def _imagenet_classes(wnids: Sequence[str], above: Sequence[Path], source: str) -> list[tuple[str, str]]:
    """(WNID, name) in the order of the labels: names of classes.txt, else the first ones of Kaggle's mapping, else WNIDs."""
    if names := names_beside(*above):
        return class_folders(wnids, names, f"--data {source}")
    mapping = _first(folder / _MAPPING for folder in above)
    pairs = (line.partition(" ") for line in read_lines(mapping, source)) if mapping else ()
    words = {wnid: text.split(",")[0] for wnid, _, text in pairs}
    return [(wnid, words.get(wnid, wnid)) for wnid in wnids]


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


# ---- PatchCamelyon ----

_PCAM = "camelyonpatch_level_2_split_{}_{}.h5"
_PCAM_SPLITS = {"train": "train", "val": "valid", "test": "test"}


def pcam(root: Path, source: str) -> Form | None:
    """``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``; read by h5py.

    Raises:
        UsageError: the archives are still compressed.
    """
    for folder in (root, root / "pcam", root / "pcamv1"):
        files = {split: folder / _PCAM.format(word, "x") for split, word in _PCAM_SPLITS.items()}
        if there := {split: file for split, file in files.items() if file.is_file()}:
            splits = {split: partial(_list_pcam, file, source) for split, file in there.items()}
            return Form("PatchCamelyon's HDF5", splits, "pcam")
        if packed := next((file for file in files.values() if file.with_name(f"{file.name}.gz").is_file()), None):
            raise _packed(packed, source)
    return None


def _packed(file: Path, source: str) -> UsageError:
    return wrong(source, f"{file.name}.gz is compressed; gunzip {_PCAM.format('*', '*')}.gz first")


def _list_pcam(x: Path, source: str) -> Listed:
    try:
        import h5py
    except ImportError:
        raise wrong(source, f"{x.name} needs h5py (pip install h5py)") from None
    y = x.with_name(x.name.replace("_x.h5", "_y.h5"))
    if not y.is_file():
        raise _packed(y, source) if y.with_name(f"{y.name}.gz").is_file() else wrong(source, f"{y.name} is missing")
    try:
        with h5py.File(regular(x), "r") as images, h5py.File(regular(y), "r") as labels:
            shape, kind = own_set(images, "x").shape, images["x"].dtype
            found = np.asarray(own_set(labels, "y")).reshape(-1).astype(np.int64)
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise wrong(source, f"{x.name} or {y.name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if len(shape) != 4 or shape[0] != len(found) or shape[3] != 3 or kind != np.uint8:
        raise wrong(
            source,
            f"{x.name}: images [N, 96, 96, 3] of bytes and N labels expected, {list(shape)} of {kind} and {len(found)} found",
        )
    keys = [f"{x.stem}-{row:06d}" for row in range(len(found))]
    return Listed(keys, found, ("normal", "tumor"), HDF5Images(x))
