"""The fourteen data sets of the paper: their own forms on disk, their numbers, and pickles that are refused."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_labelled import encoded, opened, put, refused, samples, seen, shard

from aimv2.data.datasets import registry as datasets
from aimv2.data.datasets.cifar import load_pickle
from aimv2.data.images import opening as module
from aimv2.data.images.opening import open_labelled
from aimv2.errors import UsageError

# ---- forms of their own ----


def cifar(root: Path, protocol: int, count: int = 4) -> np.ndarray:
    """CIFAR-10's folder with ``count`` images a batch; returns the training pixels, [5 * count, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (5 * count, 3072), dtype=np.uint8)
    for i in range(5):
        labels = [(i * count + j) % 10 for j in range(count)]
        batch = {b"data": planes[i * count : (i + 1) * count], b"labels": labels, b"batch_label": b"x"}
        put(root / f"data_batch_{i + 1}", pickle.dumps(batch, protocol))
    put(root / "test_batch", pickle.dumps({b"data": planes[:2], b"labels": [0, 1]}, protocol))
    put(root / "batches.meta", pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, protocol))
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_cifar10_pickles(tmp_path: Path, protocol: int, caplog: pytest.LogCaptureFixture) -> None:
    pixels = cifar(tmp_path / "cifar-10-batches-py", protocol)
    for source in (tmp_path, tmp_path / "cifar-10-batches-py"):
        train, test = opened(source, "train"), opened(source, "test")
        assert train.name == "cifar10" and train.classes == tuple(f"c{i}" for i in range(10))
        assert train.labels.tolist() == [*range(10), *range(10)] and test.labels.tolist() == [0, 1]
        np.testing.assert_array_equal(np.asarray(train.image(7)), pixels[7])
    assert "50,000 train images expected, 20 found" in caplog.text
    assert "--dataset cifar10: 50,000 train images expected, 20 found" in refused(tmp_path, "train", "cifar10")
    assert "is cifar10 by its form" in refused(tmp_path, "train", "cifar100")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert "data_batch_3: cannot be read: No such file" in refused(tmp_path)


def test_cifar_as_python_2_wrote_it(tmp_path: Path) -> None:
    """Protocol 2 with byte strings and numpy's old module names, as the released files are."""
    path = tmp_path / "batch"
    path.write_bytes(
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x01K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89U\x03\x07\x08\x09tbU\x06labels](K\x01eu."
    )
    found = load_pickle(path)
    assert found["labels"] == [1] and found["data"].tolist() == [[7, 8, 9]] and found["data"].dtype == np.uint8


def test_cifar100_pickles(tmp_path: Path) -> None:
    labels = list(range(100))
    batch = {b"data": np.zeros((100, 3072), np.uint8), b"fine_labels": labels, b"coarse_labels": [0] * 100}
    for name in ("train", "test"):
        put(tmp_path / "cifar-100-python" / name, pickle.dumps(batch, 4))
    names = {b"fine_label_names": [b"n%d" % i for i in labels], b"coarse_label_names": [b"c"]}
    put(tmp_path / "cifar-100-python" / "meta", pickle.dumps(names, 4))
    train = opened(tmp_path, "train")
    assert train.name == "cifar100" and train.classes[99] == "n99" and train.labels.tolist() == labels


class Planted:
    def __init__(self, call: Callable[..., object], *words: object) -> None:
        self.call, self.words = call, words

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.words


@pytest.mark.parametrize(
    ("call", "words", "name"),
    [
        (os.system, ("touch {}",), "system"),
        (eval, ("__import__('os').system('touch {}')",), "builtins.eval"),
        (getattr, (os, "system"), "getattr"),
        (np.load, ("{}",), "load"),
        (np.dtype, ("O",), "arrays of O"),
    ],
)
def test_a_planted_pickle_is_refused(tmp_path: Path, call: Callable[..., object], words: tuple, name: str) -> None:
    cifar(tmp_path, 4)
    mark = tmp_path / "ran"
    given = [word.format(mark) if isinstance(word, str) else "os" for word in words]
    put(tmp_path / "data_batch_2", pickle.dumps({b"data": Planted(call, *given), b"labels": []}, 4))
    said = refused(tmp_path)
    assert "data_batch_2: not a pickle of CIFAR (refused: " in said and name in said and not mark.exists()


def test_food101(tmp_path: Path) -> None:
    lists = {"train": ["pie/1", "ice/2", "pie/3"], "test": ["ice/4"]}
    for split, names in lists.items():
        put(tmp_path / "food-101" / "meta" / f"{split}.txt", "\n".join(names) + "\n")
        for name in names:
            put(tmp_path / "food-101" / "images" / f"{name}.jpg", encoded(int(name[-1])))
    train = opened(tmp_path, "train")
    assert (train.name, train.classes) == ("food101", ("ice", "pie"))
    assert seen(train) == [("images/pie/1.jpg", 1, 1), ("images/ice/2.jpg", 0, 2), ("images/pie/3.jpg", 1, 3)]
    assert seen(opened(tmp_path / "food-101", "test")) == [("images/ice/4.jpg", 0, 4)]


def test_dtd(tmp_path: Path) -> None:
    lists = {"train": ["dots/1.jpg", "bars/2.jpg"], "val": ["bars/3.jpg"], "test": ["dots/4.jpg"]}
    for split, names in lists.items():
        put(tmp_path / "labels" / f"{split}1.txt", "\n".join(names))
        for name in names:
            put(tmp_path / "images" / name, encoded(int(name[-5])))
    assert seen(opened(tmp_path, "train")) == [("images/dots/1.jpg", 1, 1), ("images/bars/2.jpg", 0, 2)]
    assert [row[1:] for split in ("val", "test") for row in seen(opened(tmp_path, split))] == [(0, 3), (1, 4)]
    said = refused(tmp_path, "train", "dtd")
    assert "47 classes expected, 2 found; 3,760 train images expected, 2 found (3 with val)" in said


def test_pets(tmp_path: Path) -> None:
    put(tmp_path / "annotations" / "trainval.txt", "British_Shorthair_1 2 1 1\nAbyssinian_2 1 1 1\n")
    put(tmp_path / "annotations" / "test.txt", "#Image CLASS-ID SPECIES BREED\nBritish_Shorthair_3 2 1 1\n")
    for name in ("British_Shorthair_1", "Abyssinian_2", "British_Shorthair_3"):
        put(tmp_path / "images" / f"{name}.jpg", encoded(int(name[-1])))
    train = opened(tmp_path, "train")
    assert train.classes == ("Abyssinian", "British Shorthair") and [row[1:] for row in seen(train)] == [(1, 1), (0, 2)]
    assert [row[1:] for row in seen(opened(tmp_path, "test"))] == [(1, 3)]


def test_cars(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    kind = np.dtype([("class", "O"), ("fname", "O")])

    def annotate(file: str, rows: list[tuple[int, str]]) -> None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        savemat(tmp_path / file, {"annotations": np.array([rows], dtype=kind)})

    annotate("devkit/cars_train_annos.mat", [(2, "00001.jpg"), (1, "00002.jpg")])
    annotate("cars_test_annos_withlabels.mat", [(2, "00001.jpg")])
    savemat(tmp_path / "devkit" / "cars_meta.mat", {"class_names": np.array([["AM Hummer", "Audi TT"]], dtype="O")})
    for split, numbers in (("train", (1, 2)), ("test", (1,))):
        for i in numbers:
            put(tmp_path / f"cars_{split}" / f"{i:05d}.jpg", encoded(i + 10 * (split == "test")))
    train = opened(tmp_path, "train")
    assert train.classes == ("AM Hummer", "Audi TT") and [row[1:] for row in seen(train)] == [(1, 1), (0, 2)]
    assert [row[1:] for row in seen(opened(tmp_path, "test"))] == [(1, 11)]


def test_inaturalist(tmp_path: Path) -> None:
    for split, rows in (("train", [(5, 70), (6, 30)]), ("val", [(9, 70)])):
        images = [{"id": i, "file_name": f"train_val2018/{i}.jpg"} for i, _ in rows]
        annotations = [{"image_id": i, "category_id": c} for i, c in reversed(rows)]
        record = {"images": images, "annotations": annotations, "categories": [{"id": c, "name": c} for c in (70, 30)]}
        put(tmp_path / f"{split}2018.json", json.dumps(record))
        for i, _ in rows:
            put(tmp_path / "train_val2018" / f"{i}.jpg", encoded(i))
    train = opened(tmp_path, "train")
    assert (train.name, train.classes) == ("inat18", ("30", "70")) and [r[1:] for r in seen(train)] == [(1, 5), (0, 6)]
    assert [row[1:] for row in seen(opened(tmp_path, "test"))] == [(1, 9)]


def test_infograph(tmp_path: Path) -> None:
    for split, i in (("train", 1), ("test", 3)):
        lines = [f"infograph/{name}/{split} {i + label}.jpg {label}" for label, name in enumerate(("zoo", "bat"))]
        put(tmp_path / f"infograph_{split}.txt", "\n".join(lines))
        for label, name in enumerate(("zoo", "bat")):
            put(tmp_path / "infograph" / name / f"{split} {i + label}.jpg", encoded(i + label))
    assert opened(tmp_path, "train").classes == ("zoo", "bat")
    assert [row[1:] for row in seen(opened(tmp_path, "test"))] == [(0, 3), (1, 4)]


# ---- registered sets ----


TABLE_B1 = """
IN-1k 1,281,167 50,000 1000 | iNat-18 437,513 24,426 8142 | CIFAR-10 50,000 10,000 10 | CIFAR-100 50,000 10,000 100
| Food101 75,750 25,250 101 | DTD 3,760 1,880 47 | Pets 3,680 3,669 37 | Cars 8,144 8,041 196
| Camelyon17 302,436 34,904 2 | PCAM 262,144 32,768 2 | RxRx1 40,612 9,854 1139 | EuroSAT 16,200 5,400 10
| fMoW 76,863 19,915 62 | Infograph 36,023 15,582 345
"""  # AIMV2: training images, test images, classes


def test_the_fourteen_of_the_paper() -> None:
    rows = [(row.column, row.train, row.test, row.classes) for row in datasets.DATASETS.values()]
    printed = [cell.replace(",", "").split() for cell in TABLE_B1.split("|")]
    assert rows == [(name, *map(int, numbers)) for name, *numbers in printed] and len(rows) == 14
    for word in ("IN-1k", "ImageNet1k", "imagenet1k"):
        assert datasets.registered(word).name == "imagenet1k"
    with pytest.raises(UsageError, match="--dataset cifar11: not registered; did you mean 'cifar10'"):
        datasets.registered("cifar11")


def test_numbers_of_a_registered_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of 3 classes, 4 images to train on and 2 to test on."""
    small = datasets.Registered("pcam", "PCAM", 3, 4, 2)
    monkeypatch.setattr(module, "registered", lambda name: small)
    shard(tmp_path / "train-0.tar", samples([0, 1, 2, 0]))
    shard(tmp_path / "test-0.tar", samples([0, 1]))
    assert opened(tmp_path, "train", "pcam").name == "pcam" and opened(tmp_path, "test", "pcam").classes == (
        "0",
        "1",
        "2",
    )
    shard(tmp_path / "test-0.tar", samples([0, 1, 1]))
    assert "--dataset pcam: 2 test images expected, 3 found" in refused(tmp_path, "test", "pcam")
    shard(tmp_path / "test-0.tar", samples([0, 3]))
    assert "label 3 of s1 in test: 0 to 2 expected (3 classes)" in refused(tmp_path, "test", "pcam")
    shard(tmp_path / "train-0.tar", samples([0, 1, 2, 3]))
    assert "--dataset pcam: 3 classes expected, 4 found" in refused(tmp_path, "train", "pcam")
    shard(tmp_path / "train-0.tar", samples([0, 1, 2]))
    assert "4 train images expected, 3 found" in refused(tmp_path, "train", "pcam")
    shard(tmp_path / "val-0.tar", samples([0]))  # 3 + 1: the paper trains on both
    assert len(opened(tmp_path, "train", "pcam").labels) == 3 and len(opened(tmp_path, "val", "pcam").labels) == 1
    monkeypatch.setattr(module, "registered", lambda name: replace(small, test=1, test_split="val"))
    assert len(opened(tmp_path, "test", "pcam").labels) == 1 and open_labelled(str(tmp_path), "val", "pcam") is None
