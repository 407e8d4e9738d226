"""Shards are found, read as energon reads them, indexed from outside, and written the same twice."""

import bz2
import gzip
import json
import lzma
import subprocess
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import pytest
from shard_tars import energon_samples, jpeg, names, samples, tar_of, tar_of_links

from aimv2.config.schema import DataConfig
from aimv2.data.images.entries import tar_entries
from aimv2.data.passed import HEIF_READ
from aimv2.data.shards.format import (
    captions_of,
    find_shards,
    image_of,
    json_of,
    label_of,
    read_sample,
    read_samples,
    scan_shard,
    why_no_image,
    write_manifest,
    write_shard,
)
from aimv2.data.shards.index import build_index
from aimv2.data.shards.listing import list_shard
from aimv2.data.shards.tars import open_tar
from aimv2.data.stream.samples import training_shards
from aimv2.errors import UsageError
from aimv2.features.teach import copy_splits
from aimv2.io import open_file

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


def test_extensions_of_several_parts(tmp_path: Path) -> None:
    """``s.input.jpg`` is the image of sample ``s``, and several texts are fields."""
    parts = {"input.jpg": b"i", "short.txt": b"a", "long.txt": b"b", "label.cls": b" 3\n", "meta.json": b'{"id": 7}'}
    assert image_of(parts) == ("jpg", b"i") and label_of(parts) == 3 and json_of(parts) == {"id": 7}
    assert captions_of(parts) == {"short": ["a"], "long": ["b"]}
    assert captions_of({"caption.txt": b"a"}) == {"caption": ["a"]}
    assert image_of({"jpg": b"j", "seg.png": b"s"}) == ("jpg", b"j")
    two = {"left.jpg": b"l", "right.jpg": b"r"}
    assert image_of(two) is None and "several images in its sample (left.jpg, right.jpg)" in why_no_image(two)
    assert "RAW" in why_no_image({"cr2": b"", "txt": b""}) and why_no_image({}) == "no image in its sample"
    tar = tar_of(tmp_path / "a.tar", [("a.input.jpg", jpeg()), ("a.label.cls", b"5")])
    assert list_shard(tar)[2].tolist() == [5]


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_compressed_tars(tmp_path: Path, ending: str) -> None:
    plain = tar_of(tmp_path / "plain.tar", [("a.jpg", jpeg(1)), ("a.cls", b"4"), ("b.jpg", jpeg(2)), ("b.cls", b"5")])
    pack = {"tar.bz2": bz2.compress, "tar.xz": lzma.compress}.get(ending, gzip.compress)
    packed = tmp_path / "in" / f"train-0.{ending}"
    packed.parent.mkdir()
    packed.write_bytes(pack(plain.read_bytes()))
    assert list(read_samples(packed)) == list(read_samples(plain)) and scan_shard(packed) == scan_shard(plain)
    assert read_sample(packed, *scan_shard(packed).offsets[1:3]) == {"jpg": jpeg(2), "cls": b"5"}
    assert list_shard(packed)[2].tolist() == [4, 5]
    assert find_shards(packed.parent, "train") == find_shards(f"{packed.parent}/*", "train") == [packed]
    with pytest.raises(UsageError, match="gunzip") as caught:
        build_index([packed], tmp_path / "index")
    assert caught.value.code == "unsupported"
    packed.write_bytes(packed.read_bytes()[:-12])
    assert scan_shard(packed).cut or ending != "tar.gz"
    packed.write_bytes(b"no archive")
    assert scan_shard(packed).cut


def test_links_in_tars(tmp_path: Path) -> None:
    """A link stands for the file of the tar that it leads to; one that leads elsewhere is named and never followed."""
    (tmp_path / "secret.jpg").write_bytes(jpeg(200))
    links = {
        "in/b.jpg": (tarfile.LNKTYPE, "in/a.jpg"),
        "in/b.txt": (tarfile.SYMTYPE, "a.txt"),
        "in/b.cls": (tarfile.LNKTYPE, "in/a.cls"),
        "in/c.jpg": (tarfile.SYMTYPE, "../secret.jpg"),
        "in/d.jpg": (tarfile.SYMTYPE, str(tmp_path / "secret.jpg")),
        "in/e.jpg": (tarfile.SYMTYPE, "e.jpg"),
        "in/f.jpg": (tarfile.CHRTYPE, ""),
    }
    tar = tar_of_links(tmp_path / "a.tar", links, [("in/a.jpg", jpeg(7)), ("in/a.txt", b"seven"), ("in/a.cls", b"1")])
    same = {"jpg": jpeg(7), "txt": b"seven", "cls": b"1"}
    assert list(read_samples(tar)) == [("in/a", same), ("in/b", same)]
    scan = scan_shard(tar)
    assert read_sample(tar, *scan.offsets[1:3]) == same and list_shard(tar)[2].tolist() == [1, 1]
    assert {kind: about["number"] for kind, about in scan.passed.result().items()} == {
        "dead links, or links out of the tar": 3,
        "devices and pipes": 1,
    }
    with pytest.raises(UsageError, match=r"3 members are links \(in/b\.jpg\).*data import"):
        build_index([tar], tmp_path / "index")


def test_names_that_lead_out_are_names_only(tmp_path: Path) -> None:
    members = [("/etc/x.jpg", jpeg(1)), ("/etc/x.txt", b"x"), ("../../y.jpg", jpeg(2)), ("../../y.txt", b"y")]
    tar = tar_of(tmp_path / "a.tar", members)
    _, entries = tar_entries(tar)
    assert [entry.key for entry in entries] == ["etc_x", "y"] and len(list(tmp_path.iterdir())) == 1


def test_an_unsorted_tar_is_named(tmp_path: Path) -> None:
    apart = [("a.jpg", jpeg()), ("b.jpg", jpeg()), ("a.txt", b"a"), ("b.txt", b"b")]
    scan = scan_shard(tar_of(tmp_path / "a.tar", apart))
    assert scan.keys == [] and not len(scan.offsets)
    assert scan.cut.startswith("unsorted (the members of 2 samples lie apart); sort it: mkdir t && tar -xf a.tar")
    subprocess.run(scan.cut.partition("sort it: ")[2], shell=True, cwd=tmp_path, check=True)
    assert [key for key, _ in read_samples(tmp_path / "sorted.tar")] == ["./a", "./b"], "the command does what it says"
    assert not scan_shard(tmp_path / "sorted.tar").cut
    assert scan_shard(tar_of(tmp_path / "a.tar", [*apart[::2], apart[1], apart[3], *apart[::2]])).keys == [
        "a",
        "b",
        "a",
    ]
    for many in (list_shard, lambda tar: build_index([tar], tmp_path / "index")):
        with pytest.raises(UsageError, match="sort it") if many is not list_shard else nullcontext():
            many(tar_of(tmp_path / "a.tar", apart))


def test_members_that_nothing_reads_are_counted(tmp_path: Path) -> None:
    members = [
        *(("._a.jpg", b"fork"), ("a.jpg", jpeg()), ("a.txt", b"a"), ("a.npy", b"1"), (".DS_Store", b"")),
        *(("__meta__/x.json", b"{}"), ("README", b""), ("b.jpg", jpeg()), ("b.JPG", jpeg()), ("c.heic", b"")),
    ]
    scan = scan_shard(tar_of(tmp_path / "a.tar", members))
    found = {kind.partition(",")[0].partition(" (")[0]: about for kind, about in scan.passed.result().items()}
    assert found.pop("HEIC images", None) or HEIF_READ
    assert {kind: about["examples"] for kind, about in found.items()} == {
        "macOS resource forks": ["._a.jpg"],
        "hidden files and folders": [".DS_Store"],
        "members of other kinds": ["a.npy"],
        "members that come twice in a sample: the last counts": ["b.JPG"],
        "members without an extension": ["README"],
        "metadata": ["__meta__/x.json"],
    }


def test_dead_links_among_shards_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "train-0.tar", samples("a"))
    (tmp_path / "train-1.tar").symlink_to(tmp_path / "gone.tar")
    (tmp_path / "._train-0.tar").write_bytes(b"fork")
    found = find_shards(tmp_path, "train")
    assert names(found) == ["train-0.tar", "train-1.tar"]
    with pytest.raises(UsageError, match=r"a dead link to .*gone\.tar") as caught:
        build_index(found, tmp_path / "index")
    assert caught.value.code == "unreadable"
    assert list(read_samples(found[1])) == [] and "a dead link" in caplog.text
    for read in (
        lambda: training_shards(DataConfig(train=str(tmp_path))),
        lambda: copy_splits(str(tmp_path), tmp_path / "x"),
    ):
        (tmp_path / "val-1.tar").unlink(missing_ok=True)
        (tmp_path / "val-1.tar").symlink_to(tmp_path / "gone.tar")
        with pytest.raises(UsageError, match="a dead link") as caught:
            read()
        assert caught.value.option in ("DATA", "data.train")


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


def test_a_plain_tar_is_opened_once_for_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "train-0.tar", [("a", {"jpg": b"x", "txt": b"words"})])
    opened: list[str] = []

    def counted(path: Path) -> IO[bytes]:
        opened.append(path.name)
        return open_file(path)

    monkeypatch.setattr("aimv2.data.shards.tars.open_file", counted)
    open_tar(tmp_path / "train-0.tar").close()
    assert opened == ["train-0.tar"]
