"""Segmentation and depth sets in the forms that their archives unpack to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aimv2 import api
from aimv2.data.datasets.dense import CITYSCAPES, DENSE_SETS, dense_pairs, dense_set
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.sizes import EncoderConfig

SIZE = (64, 48)  # width, height


def put(root: Path, image: str, mapped: str, values: np.ndarray) -> None:
    """An image and its map, at their places."""
    for name in (image, mapped):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (int(values.max()) % 256, 40, 90)).save(root / image)
    Image.fromarray(values).save(root / mapped)


def ids(*values: int) -> np.ndarray:
    """uint8 [48, 64], in columns of these values."""
    return np.resize(np.repeat(np.array(values, np.uint8), -(-SIZE[0] // len(values)))[: SIZE[0]], (SIZE[1], SIZE[0]))


def ade20k(root: Path) -> None:
    for split, count in (("training", 3), ("validation", 2)):
        for n in range(count):
            place = f"ADEChallengeData2016/{{}}/{split}/ADE_{split}_{n}"
            put(root, place.format("images") + ".jpg", place.format("annotations") + ".png", ids(0, 1, 150))


def voc(root: Path) -> None:
    home = "VOCdevkit/VOC2012"
    for split, names in (("train", ["2007_1", "2007_2", "2007_3"]), ("val", ["2008_1", "2008_2"])):
        for name in names:
            put(root, f"{home}/JPEGImages/{name}.jpg", f"{home}/SegmentationClass/{name}.png", ids(0, 20, 255))
        (root / home / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / home / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")


def cityscapes(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for n in range(count):
            stem = f"{split}/aachen/aachen_{n:06}_000019"
            put(root, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png", ids(0, 7, 33, 4, 26))


def nyu(root: Path) -> None:
    for folder, count in (("sync", 3), ("official_splits/test", 2)):
        for n in range(count):
            depth = np.full((SIZE[1], SIZE[0]), 2000 + n, np.uint16)
            depth[10] = 12_000  # beyond 10 m
            put(root, f"{folder}/kitchen/rgb_{n:05}.jpg", f"{folder}/kitchen/sync_depth_{n:05}.png", depth)


def kitti(root: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        lines = []
        for n in range(count):
            drive = "2011_09_26_drive_0002_sync"
            image, depth = (
                f"2011_09_26/{drive}/image_02/data/{n:010}{split}.png",
                f"{drive}/proj_depth/{n:010}{split}.png",
            )
            part = "train" if split == "train" else "val"
            put(
                root,
                f"raw/{image}",
                f"data_depth_annotated/{part}/{depth}",
                np.full((SIZE[1], SIZE[0]), 2560, np.uint16),
            )
            lines.append(f"{image} {depth} 721.5377")
        more = ["2011_09_26/x/image_02/data/9.png None 721.5377"] if split == "test" else []
        (root / f"kitti_eigen_{split}_files_with_gt.txt").write_text("\n".join([*lines, *more]) + "\n")


FORMS: dict[str, Callable[[Path], None]] = {
    "ade20k": ade20k, "voc": voc, "cityscapes": cityscapes, "nyuv2": nyu, "kitti": kitti,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path)
    train, test, split = dense_pairs(DENSE_SETS[name], str(tmp_path))
    assert (len(train), len(test)) == (3, 2) and split in ("validation", "val", "test")
    for pair in (*train, *test):
        assert pair.image.is_file() and pair.map.is_file()
    assert not {pair.image for pair in train} & {pair.image for pair in test}
    test[1].map.unlink()
    with pytest.raises(UsageError, match=re.escape(test[1].map.name)):
        dense_pairs(DENSE_SETS[name], str(tmp_path))


def test_what_maps_hold(tmp_path: Path) -> None:
    for name, make in FORMS.items():
        make(tmp_path / name)
    read = {name: dense_pairs(DENSE_SETS[name], str(tmp_path / name)) for name in FORMS}
    kinds = {name: DENSE_SETS[name].kinds() for name in FORMS}
    first = {name: kinds[name][1].read(read[name][1][0].map) for name in FORMS}
    assert sorted(np.unique(first["ade20k"])) == [-1, 0, 149]  # 0 is nothing, 150 the last of 150 classes
    assert sorted(np.unique(first["voc"])) == [-1, 0, 20]
    assert sorted(np.unique(first["cityscapes"])) == [-1, 0, 13, 18]  # road, car, bicycle
    assert len(CITYSCAPES) == DENSE_SETS["cityscapes"].classes
    whole, cropped = (kind.read(read["nyuv2"][1][0].map) for kind in kinds["nyuv2"])
    assert whole[10].max() == 0 and whole[0].max() == 2.0
    top, left = int(45 / 480 * SIZE[1]), int(41 / 640 * SIZE[0])
    assert cropped[:top].max() == 0 and cropped[:, :left].max() == 0 and cropped[top, left] == 2.0
    assert kinds["kitti"][0].read(read["kitti"][0][0].map).max() == 10.0  # 256 units a metre
    assert first["kitti"][: int(0.4 * SIZE[1])].max() == 0


def test_commands_take_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(build(EncoderConfig("tiny", 16, 2, 2, 24, 8, 32), None, seed=0).eval(), tmp_path / "m", "safetensors")
    voc(tmp_path / "voc")
    kitti(tmp_path / "kitti")
    quick: dict[str, Any] = {"epochs": 1, "batch_size": 2, "rates": "1e-3"}
    found = api.segment(str(tmp_path / "m"), str(tmp_path / "voc"), dataset="voc", **quick)
    assert found["data"]["name"] == "voc" and found["data"]["classes"] == 21
    assert "3 training images, voc has 1,464" in caplog.text
    near = api.depth(str(tmp_path / "m"), str(tmp_path / "kitti"), dataset="kitti", **quick)
    assert near["protocol"]["depth_scale"] == 256 and near["protocol"]["deepest"] == 80
    assert near["data"]["train_depths_metres"] == [10.0, 10.0]


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("segment", {"dataset": "vocs"}, "--dataset", "unknown"),
    ("segment", {"dataset": "kitti"}, "--dataset", "conflict"),
    ("segment", {"dataset": "voc", "classes": 21}, "--classes", "conflict"),
    ("segment", {"dataset": "voc", "val_fraction": 0.5}, "--val-fraction", "conflict"),
    ("segment", {"dataset": "cityscapes"}, "--data", "invalid"),
    ("depth", {"dataset": "nyuv2", "depth_scale": 1.0}, "--depth-scale", "conflict"),
    ("depth", {"dataset": "kitti"}, "--data", "invalid"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "option", "code"), WRONG)
def test_wrong_use(command: str, options: dict[str, Any], option: str, code: str, tmp_path: Path) -> None:
    convert(build(EncoderConfig("tiny", 16, 2, 2, 24, 8, 32), None, seed=0).eval(), tmp_path / "m", "safetensors")
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError) as refused:
        getattr(api, command)(str(tmp_path / "m"), str(tmp_path / "data"), **options)
    assert (refused.value.option, refused.value.code) == (option, code)


def test_registered_once() -> None:
    assert {one.verb for one in DENSE_SETS.values()} == {"segment", "depth"}
    assert all(bool(one.classes) == (one.verb == "segment") for one in DENSE_SETS.values())
    assert dense_set("ade20k", "segment").classes == 150
