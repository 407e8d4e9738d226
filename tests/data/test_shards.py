"""Shards are found, read as energon reads them, indexed from outside, and written the same twice."""

import json
import tarfile
from pathlib import Path

import pytest
from shard_tars import energon_samples, jpeg, names, samples, tar_of

from aimv2.data.shards.format import (
    captions_of,
    find_shards,
    image_of,
    read_sample,
    read_samples,
    scan_shard,
    write_manifest,
    write_shard,
)
from aimv2.data.shards.index import build_index
from aimv2.errors import UsageError

# ---- find ----


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    for name in ("train-000001", "train-000000", "test-000000", "other"):
        write_shard(tmp_path / f"{name}.tar", samples("a"))
    return tmp_path


def test_splits_by_name(split_folder: Path) -> None:
    assert names(find_shards(split_folder, "train")) == ["train-000000.tar", "train-000001.tar"]
    for split in ("val", "test", "probe-test"):
        assert names(find_shards(split_folder, split)) == ["test-000000.tar"]
    write_shard(split_folder / "val-000000.tar", samples("a"))
    assert names(find_shards(split_folder, "val")) == ["val-000000.tar"]
    assert names(find_shards(split_folder, "test")) == ["test-000000.tar"]
    (split_folder / "test-000000.tar").unlink()
    assert names(find_shards(split_folder, "probe-test")) == ["val-000000.tar"]


def test_unnamed_tars_are_all_training_data(tmp_path: Path) -> None:
    for name in ("00001", "00000"):
        write_shard(tmp_path / f"{name}.tar", samples("a"))
    assert names(find_shards(str(tmp_path), "train")) == ["00000.tar", "00001.tar"]
    assert find_shards(tmp_path, "val") == [] and find_shards(tmp_path, "test") == []


def test_patterns_are_exactly_those_tars(split_folder: Path) -> None:
    for split in ("train", "val"):
        assert names(find_shards(f"{split_folder}/train-{{000000..000001}}.tar", split)) == [
            "train-000000.tar",
            "train-000001.tar",
        ]
        assert names(find_shards(f"{split_folder}/*-000000.tar", split)) == [
            "test-000000.tar",
            "train-000000.tar",
        ]
        assert names(find_shards(split_folder / "other.tar", split)) == ["other.tar"]
    assert names(find_shards(f"{split_folder}/**/other.tar", "train")) == ["other.tar"]


@pytest.mark.parametrize(
    ("make", "source", "words"),
    [
        ([], "absent", ["data.val", "absent", "does not exist"]),
        ([], "absent-{0..3}.tar", ["data.val", "absent-0.tar", "does not exist"]),
        ([], "*.tar", ["no .tar matches"]),
        (["notes.md"], "", ["no .tar in"]),
        (["images/a.jpg", "captions.csv"], "", ["aimv2 data import"]),
        (["a.jpg"], "a.jpg", ["not a tar", "aimv2 data import"]),
        (["inner/00000.tar"], "", ["/**/*.tar"]),
    ],
)
def test_wrong_sources(tmp_path: Path, make: list[str], source: str, words: list[str]) -> None:
    for name in make:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError) as caught:
        find_shards(tmp_path / source if source else tmp_path, "val", option="data.val")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- read ----


def test_grouping_is_energons(tmp_path: Path) -> None:
    tar = tar_of(
        tmp_path / "a.tar",
        [
            ("dir.v1/x.jpg", jpeg()),
            ("dir.v1/x.seg.PNG", b"png"),
            ("__meta__/info.json", b"{}"),
            ("dir.v1/x.txt", b"x"),
            ("no-extension", b"?"),
            ("dir.v1/y.JPG", jpeg()),
            ("dir.v1/x.jpg", jpeg(9)),
        ],
    )
    found = list(read_samples(tar))
    assert [key for key, _ in found] == ["dir.v1/x", "dir.v1/y", "dir.v1/x"]
    assert sorted(found[0][1]) == ["jpg", "seg.png", "txt"] and list(found[1][1]) == ["jpg"]
    scan = scan_shard(tar)
    assert scan.keys == ["dir.v1/x", "dir.v1/y", "dir.v1/x"]
    for number, (_, parts) in enumerate(found):
        assert read_sample(tar, scan.offsets[number], scan.offsets[number + 1]) == parts
    energon = energon_samples(build_index([tar], tmp_path / "index"), 3)
    assert [sample["__key__"] for sample in energon] == scan.keys
    assert energon[2]["jpg"] == jpeg(9) and energon[0]["seg.PNG"] == b"png"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_start_at_their_extended_header(tmp_path: Path, format: int) -> None:
    long = [f"{letter * 150}" for letter in "ab"]
    tar = tar_of(tmp_path / "a.tar", [(f"{key}.jpg", jpeg()) for key in long], format)
    assert scan_shard(tar).keys == long
    found = energon_samples(build_index([tar], tmp_path / "index"), 2)
    assert [sample["__key__"] for sample in found] == long


def test_captions_of_a_sample() -> None:
    ours = {"txt": b"one", "json": json.dumps({"captions": {"alt": ["one", "two "], "empty": [""]}}).encode()}
    assert captions_of(ours) == {"alt": ["one", "two"]}
    assert captions_of({"txt": b" one\n", "json": b'{"caption": "other"}'}) == {"caption": ["one"]}
    assert captions_of({"json": b'{"caption": "of img2dataset", "url": "x"}'}) == {"caption": ["of img2dataset"]}
    assert captions_of({"json": b'{"captions": ["a", "b"]}'}) == {"caption": ["a", "b"]}
    assert captions_of({"json": b"[broken", "txt": b""}) == {} == captions_of({"jpg": b"x"})
    assert image_of({"txt": b"", "webp": b"w"}) == ("webp", b"w") and image_of({"txt": b""}) is None


# ---- write ----


def test_written_shards_are_the_same_bytes(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.tar", samples("a", "b")) == 2
    assert write_shard(tmp_path / "b.tar", samples("a", "b")) == 2
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [member.name for member in tar] == ["a.jpg", "a.txt", "b.jpg", "b.txt"]
        assert {(m.uid, m.gid, m.mtime, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    def failing():
        yield from samples("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"train": 3}, source="x")
    assert json.loads((tmp_path / "aimv2.json").read_text()) == {
        "format": "aimv2 shards 1",
        "counts": {"train": 3},
        "source": "x",
    }
