"""EuroSAT, ImageNet and PatchCamelyon as their archives unpack, in small: keys, labels, names, splits, and errors."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_labelled import encoded, number_in, opened, put, refused, seen

from aimv2.data.datasets.dense import DENSE_SETS
from aimv2.data.datasets.registry import DATASETS
from aimv2.data.images.decode import ImageError
from aimv2.data.images.labelled import Labelled
from aimv2.data.images.opening import open_labelled, require_labelled
from aimv2.errors import UsageError


def test_the_documentation_names_the_form_of_every_set() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text("utf-8")
    parts = text.split("\n## Data")[1].split("\n## ")[0].split("\n### Segmentation and depth")
    for part, known in zip(parts, (DATASETS, DENSE_SETS), strict=True):
        first = [line.split("|")[1] for line in part.splitlines() if "|" in line]
        assert [name for cell in first[2:] for name in cell.replace("`", "").replace(",", " ").split()] == [*known]


# ---- EuroSAT ----

LAND = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


def eurosat(home: Path, count: int = 5) -> None:
    """``count`` images a class; the number in image i of class c is 10 c + i."""
    for label, name in enumerate(LAND):
        for i in range(1, count + 1):
            put(home / name / f"{name}_{i}.jpg", encoded(10 * label + i))


def test_eurosat_is_drawn_60_20_20(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eurosat(tmp_path / "2750")
    parts = {split: opened(tmp_path, split) for split in ("train", "val", "test")}
    assert [len(part.labels) for part in parts.values()] == [30, 10, 10]
    everything = [row for part in parts.values() for row in seen(part)]
    assert len({key for key, *_ in everything}) == 50
    assert all(LAND[label] == key.split("/")[0] and number // 10 == label for key, label, number in everything)
    assert all((part.name, part.classes) == ("eurosat", LAND) for part in parts.values())
    assert opened(tmp_path, "train").keys == parts["train"].keys
    assert caplog.text.count("EuroSAT comes without splits; drawn with seed 0") == 1
    assert "16,200 train images expected, 30 found (40 with val) in AIMV2's EuroSAT" in caplog.text
    assert "--dataset eurosat: 5,400 test images expected, 10 found" in refused(tmp_path, "test", "eurosat")
    assert "is eurosat by its form (EuroSAT's folders, splits: drawn" in refused(tmp_path, "train", "pcam")


@pytest.mark.parametrize("inner", ["", "2750", "eurosat/2750", "EuroSAT_RGB"])  # torchvision's, Zenodo's
def test_places_of_eurosat(tmp_path: Path, inner: str) -> None:
    """The draw hangs on the images' names alone."""
    eurosat(tmp_path / "known" / "2750", 2)
    eurosat(tmp_path / "given" / inner, 2)
    assert opened(tmp_path / "given", "test").keys == opened(tmp_path / "known", "test").keys


def test_eurosat_by_the_lists_of_torchgeo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eurosat(tmp_path / "2750", 3)
    for split, i in (("train", 2), ("val", 3), ("test", 1)):
        put(tmp_path / f"eurosat-{split}.txt", "".join(f"{name}_{i}.jpg\n" for name in reversed(LAND)))
    for split, i in (("train", 2), ("val", 3), ("test", 1)):
        rows = seen(opened(tmp_path, split))
        assert rows == [(f"{name}/{name}_{i}.jpg", label, 10 * label + i) for label, name in enumerate(LAND)]
    assert len(opened(tmp_path / "2750", "train").labels) == 10 and "drawn" not in caplog.text
    (tmp_path / "2750" / "River" / "River_1.jpg").unlink()
    assert "eurosat-test.txt names 10 images, 9 of them are there" in refused(tmp_path, "test")


# ---- ImageNet ----

WNIDS = ("n01440764", "n01443537", "n02012849")
SOLUTION = "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4 n01440764 5 6 7 8 \n"
SOLUTION += "ILSVRC2012_val_00000001,n02012849 111 108 380 366 \n"
MAPPING = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\n"


def imagenet(home: Path, flat: bool = True) -> None:
    """Two training images a class; validation images 1 of the last class and 2 of the first."""
    for label, wnid in enumerate(WNIDS):
        for i in range(2):
            put(home / "train" / wnid / f"{wnid}_{i}.JPEG", encoded(10 * label + i))
    for i, wnid in ((1, WNIDS[2]), (2, WNIDS[0])):
        name = f"ILSVRC2012_val_0000000{i}.JPEG"
        put(home / "val" / ("" if flat else wnid) / name, encoded(100 + i))


def devkit(home: Path, truth: str) -> None:
    """Three classes and the class above them, numbered in another order than their names have."""
    kind = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    rows = [(1, WNIDS[2], "crane", 0), (2, WNIDS[1], "goldfish", 0), (3, WNIDS[0], "tench", 0), (4, "n00001740", "", 3)]
    put(home / "ILSVRC2012_validation_ground_truth.txt", truth)
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(home / "meta.mat", {"synsets": np.array([[row] for row in rows], dtype=kind)})


VAL = [("val/ILSVRC2012_val_00000001.JPEG", 2, 101), ("val/ILSVRC2012_val_00000002.JPEG", 0, 102)]


def test_imagenet_of_kaggle(tmp_path: Path) -> None:
    put(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "._ILSVRC2012_val_00000001.JPEG", b"of a Mac")
    home = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    imagenet(home)
    put(home / "test" / "ILSVRC2012_test_00000001.JPEG", encoded(0))  # without labels: no split
    put(tmp_path / "LOC_val_solution.csv", SOLUTION)
    put(tmp_path / "LOC_synset_mapping.txt", MAPPING)
    for source in (tmp_path, tmp_path / "ILSVRC"):
        train = opened(source, "train")
        assert train.classes == ("tench", "goldfish", "crane") and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert seen(train)[5] == ("train/n02012849/n02012849_1.JPEG", 2, 21)
        assert seen(opened(source, "test")) == VAL and open_labelled(str(source), "val") is None


def test_imagenet_with_the_devkit(tmp_path: Path) -> None:
    imagenet(tmp_path)
    devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data", "1\n3\n")
    assert seen(opened(tmp_path, "test")) == VAL and opened(tmp_path, "train").classes == WNIDS
    put(tmp_path / "classes.txt", "tench\ngoldfish\ncrane\n")
    assert opened(tmp_path, "train").classes == opened(tmp_path, "test").classes == ("tench", "goldfish", "crane")
    put(tmp_path / "classes.txt", "tench\n")
    assert "1 class names in classes.txt or classnames.txt, 3 class folders" in refused(tmp_path)


@pytest.mark.parametrize("inner", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_sorted_by_class(tmp_path: Path, inner: str) -> None:
    imagenet(tmp_path / inner, flat=False)
    put(tmp_path / inner / "val" / "stray.jpg", encoded(0))
    test = opened(tmp_path, "test")
    assert test.classes == WNIDS and sorted(row[1:] for row in seen(test)) == [(0, 102), (2, 101)]
    assert len(opened(tmp_path, "train").labels) == 6


def test_wrong_labels_of_a_flat_val(tmp_path: Path) -> None:
    imagenet(tmp_path)
    assert len(opened(tmp_path, "train").labels) == 6
    said = refused(tmp_path, "test")
    assert "val has no class folders and its labels are missing: LOC_val_solution.csv (Kaggle) or ILSVRC2012" in said
    assert "sort val into val/WNID/*.JPEG" in said
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    put(kit / "ILSVRC2012_validation_ground_truth.txt", "1\n2\n")
    assert "meta.mat next to ILSVRC2012_validation_ground_truth.txt expected" in refused(tmp_path, "test")
    put(kit / "meta.mat", b"no matrix")
    assert "meta.mat cannot be read" in refused(tmp_path, "test")
    devkit(kit, "1\n2\n3\n")
    assert "ground_truth.txt has 3 lines, val has 2 images" in refused(tmp_path, "test")
    devkit(kit, "1\n4\n")
    assert "val/ILSVRC2012_val_00000002.JPEG: its class n00001740 is not in train" in refused(tmp_path, "test")
    pytest.importorskip("scipy.io").savemat(kit / "meta.mat", {"other": [1]})
    assert "meta.mat: synsets with ILSVRC2012_ID and WNID expected" in refused(tmp_path, "test")
    put(tmp_path / "LOC_val_solution.csv", SOLUTION.replace("n01440764", "n09999999"))
    assert "its class n09999999 is not in train" in refused(tmp_path, "test")
    put(tmp_path / "LOC_val_solution.csv", "\n".join(SOLUTION.splitlines()[::2]))
    assert "val/ILSVRC2012_val_00000002.JPEG: not in LOC_val_solution.csv" in refused(tmp_path, "test")


def test_numbers_of_imagenet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand class folders are the registered set."""
    for i in range(1000):
        put(tmp_path / "train" / f"n{i:08d}" / "0.JPEG", b"")
    put(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", encoded(1))
    put(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,n00000999 1 2 3 4\n")
    assert opened(tmp_path, "test").name == "imagenet1k" and opened(tmp_path, "test").labels.tolist() == [999]
    assert "50,000 test images expected, 1 found in AIMV2's IN-1k" in caplog.text
    said = refused(tmp_path, "train", "IN-1k")
    assert "--dataset imagenet1k: 1,281,167 train images expected, 1,000 found" in said


# ---- PatchCamelyon ----


def pcam(home: Path, split: str, labels: list[int], start: int = 0) -> None:
    h5py = pytest.importorskip("h5py")
    home.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(start, start + len(labels), dtype=np.uint8)
    pixels = np.stack([numbers, np.zeros_like(numbers), 255 - numbers], axis=-1)[:, None, None]
    with h5py.File(home / f"camelyonpatch_level_2_split_{split}_x.h5", "w") as file:
        file["x"] = np.broadcast_to(pixels, (len(labels), 96, 96, 3))
    with h5py.File(home / f"camelyonpatch_level_2_split_{split}_y.h5", "w") as file:
        file["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("inner", ["", "pcam", "pcamv1"])  # torchvision's, Zenodo's
def test_pcam(tmp_path: Path, inner: str, caplog: pytest.LogCaptureFixture) -> None:
    pcam(tmp_path / inner, "train", [1, 0, 1])
    pcam(tmp_path / inner, "valid", [0, 1], start=10)
    pcam(tmp_path / inner, "test", [1], start=20)
    train = opened(tmp_path, "train")
    assert (train.name, train.classes) == ("pcam", ("normal", "tumor")) and train.image(0).size == (96, 96)
    word = "camelyonpatch_level_2_split"
    assert seen(train) == [(f"{word}_train_x-00000{i}", label, i) for i, label in enumerate((1, 0, 1))]
    assert [row[1:] for row in seen(opened(tmp_path, "val"))] == [(0, 10), (1, 11)]
    assert seen(opened(tmp_path, "test")) == [(f"{word}_test_x-000000", 1, 20)]
    assert "262,144 train images expected, 3 found (5 with val) in AIMV2's PCAM" in caplog.text
    assert "--dataset pcam: 32,768 test images expected, 1 found" in refused(tmp_path, "test", "pcam")


class Numbers(torch.utils.data.Dataset[Any]):
    def __init__(self, data: Labelled) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, row: int) -> int:
        return number_in(self.data.image(row))


def test_pcam_in_threads_and_processes(tmp_path: Path) -> None:
    count = 40
    pcam(tmp_path, "train", [i % 2 for i in range(count)])
    data = opened(tmp_path, "train")
    with ThreadPoolExecutor(8) as pool:  # none has the file open yet
        assert list(map(number_in, pool.map(data.image, range(count)))) == list(range(count))
    copy = pickle.loads(pickle.dumps(data))  # of a data set with its file open
    assert [number_in(copy.image(i)) for i in range(count)] == list(range(count))
    loader: Any = torch.utils.data.DataLoader(
        Numbers(data), batch_size=8, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.cat(list(loader)).tolist() == list(range(count)) and number_in(data.image(7)) == 7


def test_broken_pcam(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    pcam(tmp_path, "train", [0, 1])
    pcam(tmp_path, "test", [0, 1])
    x, y = (tmp_path / f"camelyonpatch_level_2_split_train_{word}.h5" for word in "xy")
    with pytest.raises(UsageError, match=r"no val split \(PatchCamelyon's HDF5, train, test only\)"):
        require_labelled(str(tmp_path), "val")
    for path, key, rows, words in (
        (y, "y", np.zeros((3, 1, 1, 1), np.uint8), "[2, 96, 96, 3] of uint8 and 3 found"),
        (y, "z", np.zeros((2, 1, 1, 1), np.uint8), f"{x.name} or {y.name} cannot be read"),
        (x, "x", np.zeros((2, 96, 96), np.uint8), "[2, 96, 96] of uint8 and 2 found"),
        (
            x,
            "x",
            np.zeros((2, 9, 9, 3), np.float32),
            "[N, 96, 96, 3] of bytes and N labels expected, [2, 9, 9, 3] of f",
        ),
        (x, "x/group", np.zeros(2), "cannot be read"),
    ):
        pcam(tmp_path, "train", [0, 1])
        with h5py.File(path, "w") as file:
            file[key] = rows
        assert words in refused(tmp_path), key
    pcam(tmp_path, "train", [0, 1])
    train = opened(tmp_path, "train")
    put(x, b"no HDF5")
    assert "cannot be read: Unable to" in refused(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        train.image(0)
    y.rename(f"{y}.gz")
    assert f"{y.name}.gz is compressed; gunzip" in refused(tmp_path)
    Path(f"{y}.gz").unlink()
    assert f"{y.name} is missing" in refused(tmp_path)


def test_pcam_that_no_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5.gz", b"")
    said = refused(tmp_path)
    assert said.endswith("train_x.h5.gz is compressed; gunzip camelyonpatch_level_2_split_*_*.h5.gz first")
    put(tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5", b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "camelyonpatch_level_2_split_train_x.h5 needs h5py (pip install h5py)" in refused(tmp_path)
