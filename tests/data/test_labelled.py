"""Labelled data of every form: what is listed, what an image is, and what is refused, in one line."""

import csv
import io
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import datasets as hf
import numpy as np
import pytest
from PIL import Image

from aimv2.data.images.decode import ImageError
from aimv2.data.images.labelled import Labelled, limit, subset
from aimv2.data.images.opening import open_labelled, require_labelled
from aimv2.data.shards import listing
from aimv2.data.shards.format import label_of, read_sample, scan_shard
from aimv2.errors import UsageError
from runs import bytes_read

CLASSES = ("ant", "bee", "cow")


def encoded(number: int, kind: str = "png") -> bytes:
    """An image of one colour, (number, 0, 255 - number)."""
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (number, 0, 255 - number)).save(out, kind)
    return out.getvalue()


def number_in(image: Image.Image) -> int:
    """The number of an image of :func:`encoded`."""
    assert image.mode == "RGB"
    return image.getpixel((2, 2))[0]


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def folders(root: Path, split: str, counts: dict[str, int], start: int = 0) -> None:
    """``counts`` images a class, numbered from ``start``."""
    for name, count in counts.items():
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            put(root / split / name / f"{i}.png", encoded(start := start + 1))


def shard(path: Path, members: list[tuple[str, bytes]], pax: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if pax else 0
            tar.addfile(info, io.BytesIO(content))


def samples(labels: list[int], start: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for i, label in enumerate(labels)
        for member in ((f"s{i}.png", encoded(start + i)), (f"s{i}.cls", b"%d\n" % label))
    ]


def seen(data: Labelled | None) -> list[tuple[str, int, int]]:
    """(key, label, number in the image) of every row."""
    assert data is not None and data.labels.dtype == np.int64 and len(data.keys) == len(data.labels)
    return [(key, int(label), number_in(data.image(i))) for i, (key, label) in enumerate(zip(data.keys, data.labels))]


def opened(source: Path | str, split: str, dataset: str | None = None) -> Labelled:
    data = open_labelled(str(source), split, dataset)  # type: ignore[arg-type]
    assert data is not None
    return data


def refused(source: Path | str, split: str = "train", dataset: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        open_labelled(str(source), split, dataset)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- class folders ----


def test_what_systems_leave_among_class_folders_is_no_class(tmp_path: Path) -> None:
    folders(tmp_path, "train", {"ant": 2, "bee": 1})
    for name in (
        "@eaDir/ant.jpg/SYNOPHOTO_THUMB_M.jpg",
        "ant/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "$RECYCLE.BIN/x.png",
        "bee/._0.png",
    ):
        put(tmp_path / "train" / name, encoded(9))
    found = require_labelled(str(tmp_path), "train")
    assert found.classes == ("ant", "bee") and found.labels.tolist() == [0, 0, 1]


def test_class_folders(tmp_path: Path) -> None:
    folders(tmp_path, "train", {"bee": 2, "ant": 1})
    folders(tmp_path, "test", {"bee": 1}, start=10)
    put(tmp_path / "train" / "bee" / "note.txt", "no image")
    put(tmp_path / "train" / ".cache" / "x.png", encoded(99))
    train = opened(tmp_path, "train")
    assert (train.name, train.split, train.classes) == (tmp_path.name, "train", ("ant", "bee"))
    assert seen(train) == [("train/ant/0.png", 0, 3), ("train/bee/0.png", 1, 1), ("train/bee/1.png", 1, 2)]
    assert seen(opened(tmp_path, "test")) == [("test/bee/0.png", 1, 11)]
    assert open_labelled(str(tmp_path), "val") is None


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["train", "val"], {"train": "train", "test": "val"}),  # ImageNet
        (["Training", "valid", "testing"], {"train": "Training", "val": "valid", "test": "testing"}),
        (["train", "validation", "test"], {"train": "train", "val": "validation", "test": "test"}),
        (["test"], {"test": "test"}),
    ],
)
def test_names_of_splits(tmp_path: Path, there: list[str], wanted: dict[str, str]) -> None:
    for name in there:
        folders(tmp_path, name, {"ant": 1, "bee": 1})
    for split in ("train", "val", "test"):
        data = open_labelled(str(tmp_path), split)  # type: ignore[arg-type]
        assert (data.keys[0].split("/")[0] if data else None) == wanted.get(split)


def test_an_unlabelled_test_folder_is_no_split(tmp_path: Path) -> None:
    """ImageNet's: 100,000 images without classes next to train and val."""
    for name in ("train", "val"):
        folders(tmp_path, name, {"ant": 1, "bee": 1})
    put(tmp_path / "test" / "0.png", encoded(1))
    assert opened(tmp_path, "test").keys[0] == "val/ant/0.png" and open_labelled(str(tmp_path), "val") is None


def test_folders_without_splits_are_training_data(tmp_path: Path) -> None:
    folders(tmp_path, "", {"train": 2, "bus": 1})  # classes of vehicles
    assert opened(tmp_path, "train").classes == ("bus", "train")
    assert open_labelled(str(tmp_path), "test") is None
    with pytest.raises(UsageError, match=r"no test split \(class folders, train only\); ROOT/train/CLASS.* ROOT/test"):
        require_labelled(str(tmp_path), "test")
    assert len(require_labelled(str(tmp_path), "train").labels) == 3


def test_names_of_class_folders(tmp_path: Path) -> None:
    folders(tmp_path, "train", {"n01": 1, "n02": 1, "n03": 1})
    put(tmp_path / "classnames.txt", "tench\ngold fish\nshark\n")
    assert opened(tmp_path, "train").classes == ("tench", "gold fish", "shark")
    put(tmp_path / "classnames.txt", "n03\nn01\nn02")  # the folders themselves: the labels' order
    train = opened(tmp_path, "train")
    assert train.classes == ("n03", "n01", "n02") and [number for *_, number in seen(train)] == [3, 1, 2]
    put(tmp_path / "classnames.txt", "tench\n")
    assert "1 class names" in refused(tmp_path) and "3 class folders" in refused(tmp_path)


# ---- shards ----


def test_shards_of_ours(tmp_path: Path) -> None:
    shard(tmp_path / "train-000000.tar", samples([2, 0]))
    shard(tmp_path / "train-000001.tar", samples([1], start=7))
    shard(tmp_path / "val-000000.tar", samples([1, 1], start=20))
    put(tmp_path / "classes.txt", "\n".join(CLASSES))
    train = opened(tmp_path, "train")
    assert train.classes == CLASSES and seen(train) == [("s0", 2, 0), ("s1", 0, 1), ("s0", 1, 7)]
    assert seen(opened(tmp_path, "test")) == [("s0", 1, 20), ("s1", 1, 21)]
    assert open_labelled(str(tmp_path), "val") is None
    shard(tmp_path / "test-000000.tar", samples([0], start=30))
    assert seen(opened(tmp_path, "test")) == [("s0", 0, 30)] and len(opened(tmp_path, "val").labels) == 2
    (tmp_path / "classes.txt").unlink()
    assert opened(tmp_path, "train").classes == opened(tmp_path, "test").classes == ("0", "1", "2")


def test_a_pattern_never_tests_on_training_data(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", samples([0, 1]))
    shard(tmp_path / "test-0.tar", samples([1], 9))
    assert open_labelled(str(tmp_path / "train-0.tar"), "test") is None
    assert seen(opened(f"{tmp_path}/test-*.tar", "test")) == [("s0", 1, 9)]
    both = f"{tmp_path}/{{train,test}}-0.tar"
    assert [len(opened(both, split).labels) for split in ("train", "test")] == [2, 1]
    with pytest.raises(UsageError, match="no test split"):
        require_labelled(str(tmp_path / "train-0.tar"), "test")


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_clip_benchmark_layout(tmp_path: Path, kind: str) -> None:
    extension = {"jpeg": "jpg"}.get(kind, kind)
    for split, labels in (("train", [1, 0]), ("test", [1])):
        members = [
            member
            for i, label in enumerate(labels)
            for member in ((f"s{i:07d}.cls", str(label).encode()), (f"s{i:07d}.{extension}", encoded(200, kind)))
        ]
        shard(tmp_path / split / "0.tar", members, pax=True)
        put(tmp_path / split / "nshards.txt", "1")
    put(tmp_path / "classnames.txt", "an ant\na bee\n")
    put(tmp_path / "zeroshot_classification_templates.txt", "a photo of {c}.\n")
    train, test = opened(tmp_path, "train"), opened(tmp_path, "test")
    assert train.classes == test.classes == ("an ant", "a bee")
    assert train.labels.tolist() == [1, 0] and test.labels.tolist() == [1] and train.keys[0] == "s0000000"
    assert abs(number_in(train.image(1)) - 200) < 6
    assert opened(f"{tmp_path}/test/*.tar", "test").classes == ("an ant", "a bee")


def slowly(tar: Path) -> tuple[list[str], list[int], list[int]]:
    """What the standard library's reader says of a tar."""
    scan = scan_shard(tar)
    offsets = list(scan.offsets)
    labels = [label_of(read_sample(tar, a, b)) for a, b in pairwise(offsets)]
    return scan.keys, offsets, labels


@pytest.mark.parametrize("pax", [False, True])
def test_quick_listing_is_the_slow_one(tmp_path: Path, pax: bool) -> None:
    plain = [
        *samples([3, 1]),
        ("a.b/x.cls", b"4"),
        ("a.b/x.seg.png", b"p" * 700),
        ("y.CLS", b"7"),
    ]
    shard(tmp_path / "plain.tar", plain, pax)
    awkward = {
        "long": [("d" * 120 + "/k.cls", b"1"), ("d" * 120 + "/k.png", b"2")],
        "words": [("ä.cls", b"1"), ("__meta__.json", b"{}"), ("b.png", b"1")],
        "hidden": [(".hidden", b"1"), ("d/.x", b"2"), ("c.cls", b"5")],
        "notes": [("noextension", b""), ("c.cls", b"5"), ("LICENSE", b"of data")],
        "empty": [],
    }
    for name, members in awkward.items():
        shard(tmp_path / f"{name}.tar", members, pax)
    with tarfile.open(tmp_path / "folder.tar", "w") as tar:
        put(tmp_path / "in" / "a.cls", "3")
        tar.add(tmp_path / "in", "in")
    for path in sorted(tmp_path.glob("*.tar")):
        keys, offsets, labels = listing.list_shard(path)
        wanted = slowly(path)
        assert (keys, labels.tolist()) == (wanted[0], wanted[2]), path
        assert offsets.tolist() == (wanted[1] or [0]), path
    assert listing._read_plain_headers(tmp_path / "plain.tar") is not None
    assert listing.list_shard(tmp_path / "plain.tar")[2].tolist() == [3, 1, 4, 7]


def test_a_cut_shard_gives_what_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train-0.tar"
    shard(path, samples([0, 1, 1]))
    os.truncate(path, 512 * 4 * 2 + 512 * 2 + 5)  # inside the label of the third
    assert [label for _, label, _ in seen(opened(tmp_path, "train"))] == [0, 1]
    assert "cut" in caplog.text


def test_a_broken_image_is_an_image_error(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", [("a.png", b"no"), ("a.cls", b"0"), ("b.cls", b"1"), ("b.txt", b"no image")])
    train = opened(tmp_path, "train")
    for row, words in enumerate(("known format", "no image in its sample")):
        with pytest.raises(ImageError, match=words):
            train.image(row)


# ---- lists ----


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_lists(tmp_path: Path, kind: str) -> None:
    for i in range(4):
        put(tmp_path / "images" / f"{i}, of four.png", encoded(i))
    rows = {"train": [("bee", 1), ("ant", 0), ("bee", 3)], "test": [("bee", 2)], "val": [("ant", 2)]}
    for split, listed in rows.items():
        with (tmp_path / f"{split}.{kind}").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([("Class", "FileName"), *((c, f"images/{i}, of four.png") for c, i in listed)])
    train = opened(tmp_path, "train")
    assert train.classes == ("ant", "bee")
    assert [(label, number) for _, label, number in seen(train)] == [(1, 1), (0, 0), (1, 3)]
    assert opened(tmp_path, "test").labels.tolist() == [1] and opened(tmp_path, "val").labels.tolist() == [0]
    by_file = opened(tmp_path / f"train.{kind}", "test")
    assert by_file.labels.tolist() == [1] and by_file.classes == ("ant", "bee")
    put(tmp_path / "classes.txt", "bee\nant")
    assert opened(tmp_path, "train").labels.tolist() == [0, 1, 0]


def test_lists_of_numbers_without_a_header(tmp_path: Path) -> None:
    put(tmp_path / "x.png", encoded(5))
    put(tmp_path / "mine.csv", f"x.png,1\n{tmp_path / 'x.png'},0\n")
    train = opened(tmp_path / "mine.csv", "train")
    assert train.classes == ("0", "1") and [row[1:] for row in seen(train)] == [(1, 5), (0, 5)]
    assert open_labelled(str(tmp_path / "mine.csv"), "test") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,caption\nx.png,a cat\n", "no column of labels among path, caption of train.csv"),
        ("label,size\n1,2\n", "no column of images"),
        ("path,label\nx.png\n", "row 1 of train.csv has 1 cells"),
        ("path,label\n", "a header and no row"),
        ("", "is empty"),
        ("path,label\nlost.png,1\n", "names lost.png, which is not there"),
        ("path,label\nx.png,0\nx.png,2\n", r"no image in train of class 1 \(1\); labels count from 0"),
        ("path,label\nx.png,1\nx.png,2\n", r"no image in train of class 0"),
        (
            "path,label\nx.png,0\nx.png,1700000000\n",
            "label 1700000000 of x.png: 2 images have no 1,700,000,001 classes",
        ),
        (f"path,label\nx.png,{10**30}\nx.png,0\n", "more than 64 bits"),
        ("path,label\nx.png,-1\nx.png,-1\n", "no labels"),
        ("path,label\nx.png,0\nx.png,\nx.png,1\n", "1 of 3 images of train have no label"),
        ("path,label\nx.png,ant\nx.png,ant\n", r"one class \('ant'\); two or more"),
    ],
)
def test_wrong_lists(tmp_path: Path, text: str, words: str) -> None:
    put(tmp_path / "x.png", encoded(5))
    put(tmp_path / "train.csv", text)
    with pytest.raises(UsageError, match=words):
        open_labelled(str(tmp_path), "train")


# ---- datasets ----


def table(labels: list[int], names: tuple[str, ...] = CLASSES, start: int = 0) -> hf.Dataset:
    features = hf.Features(
        {"img": hf.Image(), "coarse_label": hf.Value("int64"), "label": hf.ClassLabel(names=list(names))}
    )
    images = [{"bytes": encoded(start + i), "path": None} for i in range(len(labels))]
    return hf.Dataset.from_dict({"img": images, "coarse_label": [0] * len(labels), "label": labels}, features)


def test_saved_datasets(tmp_path: Path) -> None:
    parts = {"train": table([2, 0, 1]), "validation": table([1], start=9), "test": table([-1, -1])}
    hf.DatasetDict(parts).save_to_disk(tmp_path / "d")
    train = opened(tmp_path / "d", "train")
    assert train.classes == CLASSES and [row[1:] for row in seen(train)] == [(2, 0), (0, 1), (1, 2)]
    assert [row[1:] for row in seen(opened(tmp_path / "d", "test"))] == [(1, 9)]  # its test has no labels
    table([0, 1, 2]).select([2, 0, 1]).save_to_disk(tmp_path / "one")
    assert [row[1:] for row in seen(opened(tmp_path / "one", "train"))] == [(2, 2), (0, 0), (1, 1)]
    hf.DatasetDict({"extra": table([0, 1, 2])}).save_to_disk(tmp_path / "odd")
    assert "has the splits extra; train, validation or test expected" in refused(tmp_path / "odd")
    table([-1]).save_to_disk(tmp_path / "none")
    assert "no labels" in refused(tmp_path / "none")


def test_a_folder_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d" / "data").mkdir(parents=True)
    table([1, 0, 2]).to_parquet(tmp_path / "d" / "data" / "train-00000-of-00001.parquet")
    table([2], start=5).to_parquet(tmp_path / "d" / "data" / "test-00000-of-00001.parquet")
    assert [row[1:] for row in seen(opened(tmp_path / "d", "train"))] == [(1, 0), (0, 1), (2, 2)]
    assert [row[1:] for row in seen(opened(tmp_path / "d", "test"))] == [(2, 5)]


def test_labels_that_are_words_or_missing(tmp_path: Path) -> None:
    rows = {"image": [encoded(3), encoded(4)], "class": ["bee", "ant"]}
    hf.Dataset.from_dict(rows).save_to_disk(tmp_path / "words")
    train = opened(tmp_path / "words", "train")
    assert train.classes == ("ant", "bee") and [row[1:] for row in seen(train)] == [(1, 3), (0, 4)]
    hf.Dataset.from_dict({"image": [encoded(3)]}).save_to_disk(tmp_path / "none")
    assert "no column of labels among image" in refused(tmp_path / "none")


def test_a_hub_that_is_not_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    said = refused("nobody/no-photographs")
    assert "no path here, and the hub can't be reached" in said and sum(waits) < 10
    assert not hf.config.HF_HUB_OFFLINE


# ---- wrong use ----


def test_wrong_use_in_one_line(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "no labels there" in refused(tmp_path)
    put(tmp_path / "flat" / "0.png", encoded(1))
    assert "no labels there; expected class folders" in refused(tmp_path / "flat")
    assert "not a data set" in refused(tmp_path / "flat" / "0.png")
    shard(tmp_path / "bare" / "train-0.tar", [("a.png", encoded(1)), ("b.png", encoded(2))])
    assert "no labels in its train split (KEY.cls" in refused(tmp_path / "bare")
    shard(tmp_path / "some" / "train-0.tar", [*samples([0, 1]), ("t.png", encoded(1))])
    assert "1 of 3 images of train have no label, t first" in refused(tmp_path / "some")
    folders(tmp_path / "one", "train", {"ant": 2})
    assert "one class ('ant')" in refused(tmp_path / "one")
    folders(tmp_path / "parts", "train", {"images": 2, "masks": 2})
    assert "train holds images, masks, which are no classes" in refused(tmp_path / "parts")
    folders(tmp_path / "empty", "train", {"ant": 2, "bee": 0, "cow": 1})
    assert "empty/train/bee is a class without an image; give it images" in refused(tmp_path / "empty")
    folders(tmp_path / "none", "train", {"ant": 0, "bee": 0})
    assert "no image in its train split" in refused(tmp_path / "none")
    folders(tmp_path / "more", "train", {"ant": 1, "bee": 1})
    folders(tmp_path / "more", "test", {"ant": 1, "cat": 1})
    assert "test/cat is a class that train lacks" in refused(tmp_path / "more", "test")
    folders(tmp_path / "more", "validation", {"ant": 1})
    folders(tmp_path / "more", "val", {"ant": 1})
    assert "val and validation are both a val split" in refused(tmp_path / "more")
    assert "--dataset none: not registered" in refused(tmp_path / "more", "train", "none")
    shard(tmp_path / "gap" / "train-0.tar", samples([0, 2]))
    assert "no image in train of class 1 (1)" in refused(tmp_path / "gap")
    put(tmp_path / "gap" / "classes.txt", "ant\nbee")
    assert "label 2 of s1 in train: 0 to 1 expected (2 classes)" in refused(tmp_path / "gap")
    assert "no .tar matches" in refused(f"{tmp_path}/gap/x*.tar")


# ---- rows ----


def test_subset_and_limit(tmp_path: Path) -> None:
    folders(tmp_path, "", {"ant": 30, "bee": 3, "cow": 20})
    data = opened(tmp_path, "train")
    some = subset(data, np.array([40, 0, 31]))
    assert seen(some) == [seen(data)[row] for row in (40, 0, 31)] and some.classes == data.classes
    assert seen(subset(some, np.array([2]))) == [seen(data)[31]]
    for count, wanted in ((6, [2, 2, 2]), (3, [1, 1, 1]), (23, [10, 3, 10]), (51, [28, 3, 20])):
        few = limit(data, count, seed=1)
        assert np.bincount(few.labels, minlength=3).tolist() == wanted, count
    ten = np.bincount(limit(data, 10, 0).labels)
    assert ten.sum() == 10 and ten[1] == 3 and sorted(ten[[0, 2]]) == [3, 4]
    assert set(seen(few)) < set(seen(data)) and list(few.keys) == sorted(few.keys, key=list(data.keys).index)
    assert limit(data, 9, 1).keys == limit(data, 9, 1).keys != limit(data, 9, 2).keys
    assert limit(data, 53) is data
    with pytest.raises(UsageError, match="--limit 2: at least 3 expected"):
        limit(data, 2)


def test_threads_and_processes_read_at_once(tmp_path: Path) -> None:
    count = 200
    shard(tmp_path / "shards" / "train-0.tar", samples([i % 2 for i in range(count)]))
    table([i % 3 for i in range(count)]).save_to_disk(tmp_path / "table")
    for source in ("shards", "table"):
        data = opened(tmp_path / source, "train")
        image = pickle.loads(pickle.dumps(data)).image  # goes to a loader's workers
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(image, range(count)))
        assert list(map(number_in, got)) == list(range(count))


def test_listing_reads_headers_only(shared_data: Path) -> None:
    before = bytes_read()
    assert len(opened(shared_data / "cifar10", "train", "CIFAR-10").labels) == 50_000
    assert bytes_read() - before < 5e7, "of 180 MB"


def test_real_cifar10(shared_data: Path) -> None:
    """50,000 and 10,000 images as the paper counts them, 5,000 and 1,000 a class."""
    train, test = (opened(shared_data / "cifar10", split, "CIFAR-10") for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert train.classes[9] == "truck" and train.image(49_999).size == (32, 32)
    tar = shared_data / "cifar10" / "train-000009.tar"
    keys, _, labels = slowly(tar)
    assert list(train.keys[-5000:]) == keys and train.labels[-5000:].tolist() == labels
    assert open_labelled(str(shared_data / "cifar10"), "val") is None


# ---- values that say that there is none, paths, names ----
