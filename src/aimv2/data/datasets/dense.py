"""Public data sets with a map a pixel, in the forms that their archives unpack to: ADE20K, VOC, Cityscapes, NYU, KITTI.

Sizes and classes are those of the data sets' own papers and servers; crops and largest depths those of Eigen et al. (2014) and Garg et
al. (2016), as public depth tables use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from aimv2.data.images.catalogue import walk
from aimv2.data.images.forms import find_home, read_lines, wrong
from aimv2.data.images.maps import MapKind, MappedImage, depths, masks, open_pairs
from aimv2.errors import UsageError, nearest

Pairs = tuple[list[MappedImage], list[MappedImage], str]
CITYSCAPES = (
    7,
    8,
    11,
    12,
    13,
    17,
    19,
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    31,
    32,
    33,
)  # its 34 ids -> the 19 that count
KITTI_LISTS = ("eigen_train_files_with_gt.txt", "eigen_test_files_with_gt.txt")
NYU_LISTS = ("nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt")


@dataclass(frozen=True)
class DenseSet:
    """A data set for ``--dataset`` of segment or depth.

    Attributes:
        name: of the option.
        verb: segment or depth.
        train, test: images.
        find: the pairs of both splits and the test split's name, in a folder; see :func:`dense_pairs`.
        classes: of masks; 0: depth.
        reduce_zero: value 0 of a mask is ignored, and ids begin with 1.
        scale: units of a depth map per metre.
        deepest: metres; depths beyond count as none.
        crop: top, bottom, left and right of the part of a test map that counts, as parts of its sides; None: all.
    """

    name: str
    verb: str
    train: int
    test: int
    find: Callable[[Path, str], Pairs]
    classes: int = 0
    reduce_zero: bool = False
    scale: float = 1000.0
    deepest: float = 0.0
    crop: tuple[float, float, float, float] | None = None

    def kinds(self) -> tuple[MapKind, MapKind]:
        """Of the training maps and of the test maps."""
        if self.classes:
            kind = masks(255, self.reduce_zero)
            if self.name == "cityscapes":
                kind = replace(kind, read=partial(read_cityscapes, read=kind.read))
            return kind, kind
        kind = depths(self.scale, (0,))
        near = replace(kind, read=partial(read_near, read=kind.read, deepest=self.deepest))
        return near, near if self.crop is None else replace(
            near, read=partial(read_cropped, read=near.read, crop=self.crop)
        )


def read_cityscapes(path: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """A mask of Cityscapes' 19 classes: ``labelTrainIds`` holds them, the ids of ``labelIds`` are mapped to them."""
    ids = read(path)
    if not path.stem.endswith("_labelIds"):
        return ids
    table = np.full(max(int(ids.max(initial=0)), max(CITYSCAPES)) + 1, -1, np.int16)
    table[list(CITYSCAPES)] = range(len(CITYSCAPES))
    return np.where(ids < 0, np.int16(-1), table[ids])


def read_near(path: Path, read: Callable[[Path], np.ndarray], deepest: float) -> np.ndarray:
    """A depth map without the depths beyond ``deepest``, metres."""
    metres = read(path)
    return np.where(metres > deepest, np.float32(0), metres)


def read_cropped(path: Path, read: Callable[[Path], np.ndarray], crop: tuple[float, float, float, float]) -> np.ndarray:
    """A depth map of which only the crop counts."""
    metres = read(path)
    height, width = metres.shape
    top, bottom, left, right = (int(part * side) for part, side in zip(crop, (height, height, width, width)))
    kept = np.zeros_like(metres)
    kept[top:bottom, left:right] = metres[top:bottom, left:right]
    return kept


# ---- their forms ----


def ade20k(root: Path, source: str) -> Pairs:
    """ADEChallengeData2016: ``images/{training,validation}``, ``annotations/{training,validation}``."""
    home = find_home(root, ("images/training", "annotations/training"), ("ADEChallengeData2016",))
    return open_pairs(str(home or root), masks())


def voc(root: Path, source: str, maps: str = "SegmentationClass", train: str = "train") -> Pairs:
    """VOC 2012: ``ImageSets/Segmentation/*.txt`` name the images in ``JPEGImages`` and their maps."""
    lists = f"ImageSets/Segmentation/{train}.txt", "ImageSets/Segmentation/val.txt"
    home = home_of(root, source, ("JPEGImages", maps, *lists), ("VOCdevkit/VOC2012", "VOC2012"))

    def pairs(file: str) -> list[MappedImage]:
        names = [line.split()[0] for line in read_lines(home / file, source)]
        return [pair(f"{n}.jpg", home / "JPEGImages" / f"{n}.jpg", home / maps / f"{n}.png", source) for n in names]

    return pairs(lists[0]), pairs(lists[1]), "val"


def cityscapes(root: Path, source: str) -> Pairs:
    """``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png``, and in ``gtFine`` ``*_gtFine_labelTrainIds.png`` or ``_labelIds.png``."""
    home = home_of(
        root, source, ("leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"), ("cityscapes",)
    )

    def pairs(split: str) -> list[MappedImage]:
        found, images = [], home / "leftImg8bit" / split
        for name in walk(images):
            stem = name.removesuffix(".png").removesuffix("_leftImg8bit")
            maps = [home / "gtFine" / split / f"{stem}_gtFine_{ids}.png" for ids in ("labelTrainIds", "labelIds")]
            found.append(pair(name, images / name, next((one for one in maps if one.is_file()), maps[1]), source))
        return found

    return pairs("train"), pairs("val"), "val"


def nyu(root: Path, source: str) -> Pairs:
    """NYU Depth v2 as depth estimators have it: ``sync/SCENE/rgb_N.jpg`` and ``sync_depth_N.png``, ``official_splits/test`` the same.

    With the lists ``nyudepthv2_{train,test}_files_with_gt.txt`` their lines, else all pairs.
    """
    home = home_of(root, source, ("sync", "official_splits/test"), ("nyu_depth_v2", "nyu"))

    def pairs(folder: str, file: str) -> list[MappedImage]:
        place = home / folder
        if (listed := next((one for one in (home / file, root / file) if one.is_file()), None)) is not None:
            rows = [line.split()[:2] for line in read_lines(listed, source)]
        else:
            names = [name for name in walk(place) if Path(name).name.startswith("rgb_")]
            rows = [[name, str(Path(name).with_name(f"sync_depth_{Path(name).stem[4:]}.png"))] for name in names]
        return [
            pair(image.strip("/"), place / image.strip("/"), place / depth.strip("/"), source) for image, depth in rows
        ]

    return pairs("sync", NYU_LISTS[0]), pairs("official_splits/test", NYU_LISTS[1]), "test"


def kitti(root: Path, source: str) -> Pairs:
    """KITTI in Eigen's split: its lists of image, depth map and focal length a line, ``raw`` and ``data_depth_annotated``.

    Images of the test list without a depth map ("None") are left out, as public tables do: 652 of 697 remain.
    """
    found = {one: next(root.rglob(f"*{one}"), None) for one in KITTI_LISTS}
    if lost := next((one for one, file in found.items() if file is None), None):
        raise wrong(source, f"no list kitti_{lost} there, of Eigen's split: image, depth map and focal length a line")
    images = [one for name in ("raw", "raw_data", ".") if (one := root / name).is_dir()]
    depth_roots = (
        "data_depth_annotated/train",
        "data_depth_annotated/val",
        "data_depth_annotated",
        "gts",
        "train",
        "val",
        ".",
    )
    maps = [one for name in depth_roots if (one := root / name).is_dir()]

    def pairs(file: Path | None) -> list[MappedImage]:
        assert file is not None
        rows = [line.split() for line in read_lines(file, source)]
        if short := next((" ".join(row) for row in rows if len(row) < 2), None):
            raise wrong(
                source, f"{file.name}: '{short}' holds no depth map; image, depth map and focal length expected"
            )
        kept = [(row[0], row[1]) for row in rows if row[1] != "None"]
        return [pair(image, under(images, image), under(maps, depth), source) for image, depth in kept]

    return pairs(found[KITTI_LISTS[0]]), pairs(found[KITTI_LISTS[1]]), "test"


def under(folders: list[Path], name: str) -> Path:
    """The file in the first folder that has it, its image as JPEG where the PNG is gone; else where it would be."""
    names = (name, str(Path(name).with_suffix(".jpg")))
    return next((folder / one for folder in folders for one in names if (folder / one).is_file()), folders[0] / name)


def home_of(root: Path, source: str, marks: tuple[str, ...], inner: tuple[str, ...]) -> Path:
    """As :func:`aimv2.data.images.forms.find_home`.

    Raises:
        UsageError: nowhere.
    """
    home = find_home(root, marks, inner)
    if home is None:
        lost = next((mark for mark in marks if not (root / mark).exists()), marks[0])
        raise wrong(source, f"no {lost} there; {', '.join(marks)} expected")
    return home


def pair(key: str, image: Path, depth_or_mask: Path, source: str) -> MappedImage:
    """
    Raises:
        UsageError: one of the two files is not there.
    """
    for file in (image, depth_or_mask):
        if not file.is_file():
            raise wrong(source, f"{file} is not there, which its lists or its folders name")
    return MappedImage(key, image, depth_or_mask)


_NYU = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
_GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
DENSE_SETS: dict[str, DenseSet] = {
    one.name: one
    for one in (
        DenseSet("ade20k", "segment", 20_210, 2_000, ade20k, 150, reduce_zero=True),
        DenseSet("voc", "segment", 1_464, 1_449, voc, 21),
        DenseSet("voc_aug", "segment", 10_582, 1_449, partial(voc, maps="SegmentationClassAug", train="trainaug"), 21),
        DenseSet("cityscapes", "segment", 2_975, 500, cityscapes, 19),
        DenseSet("nyuv2", "depth", 24_231, 654, nyu, deepest=10.0, crop=_NYU),
        DenseSet("kitti", "depth", 23_158, 652, kitti, scale=256.0, deepest=80.0, crop=_GARG),
    )
}


def dense_set(name: str, verb: str) -> DenseSet:
    """
    Raises:
        UsageError: no such set, or one of the other command.
    """
    there = {one.name: one for one in DENSE_SETS.values() if one.verb == verb}
    if name in there:
        return there[name]
    if name in DENSE_SETS:
        raise UsageError(
            f"--dataset {name}: is of `aimv2 {DENSE_SETS[name].verb}`", option="--dataset", code="conflict"
        )
    raise UsageError(
        f"--dataset {name}: not registered{nearest(name, there)} (there: {', '.join(there)}); any other data set is read without "
        "--dataset",
        option="--dataset",
        code="unknown",
    )


def dense_pairs(one: DenseSet, source: str) -> Pairs:
    """Training pairs, test pairs, and the name of the test split.

    Raises:
        UsageError: another form, a file that a list names and that is not there.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UsageError(f"--data {source}: no such folder", code="not-found")
    return one.find(root, source)
