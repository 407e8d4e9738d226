"""The index of shards: where it lies, that nothing of another's reaches energon through it, and what it takes from beside a tar."""

import contextlib
import json
import logging
import os
import struct
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shard_tars import energon_samples, listing, names, samples, tar_of

from aimv2.data.shards.format import find_shards, read_samples, scan_shard, write_manifest, write_shard
from aimv2.data.shards.index import build_index, count_samples
from aimv2.errors import UsageError
from runs import assert_refused, options, scenes

CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


def test_index_of_foreign_tars_leaves_their_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign = tmp_path / "foreign"
    for part in ("a", "b"):  # equal tar names and equal keys, as img2dataset writes them in parts
        (foreign / part).mkdir(parents=True)
        write_shard(foreign / part / "00000.tar", samples("000", "001", caption=part))
        (foreign / part / "00000.tar").chmod(0o444)
        (foreign / part).chmod(0o555)
    before = listing(foreign)
    index = build_index(sorted(foreign.glob("*/*.tar")))
    assert index.is_relative_to(tmp_path / "cache" / "aimv2" / "index")
    assert count_samples(index) == 4
    found = energon_samples(index, 4)
    assert sorted((s["__key__"], s["txt"].decode()) for s in found) == [
        ("000", "a 000"),
        ("000", "b 000"),
        ("001", "a 001"),
        ("001", "b 001"),
    ]
    assert listing(foreign) == before
    assert not list(index.glob("**/*.sqlite"))


def test_index_matches_energons_own(tmp_path: Path) -> None:
    from megatron.energon.flavors import BaseWebdatasetFactory

    tar = write_shard(tmp_path / "a.tar", samples("a", "b", "c")) and tmp_path / "a.tar"
    ours = (build_index([tar], tmp_path / "index") / "a.tar.idx").read_bytes()
    BaseWebdatasetFactory.prepare_dataset(tmp_path, ["a.tar"], split_parts_ratio=[("train", 1.0)], workers=1)
    assert ours == (tmp_path / "a.tar.idx").read_bytes()
    assert struct.unpack("<4Q", ours)[0] == 0


def test_index_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    out.mkdir()
    write_shard(out / "train-000000.tar", samples("a"))
    write_manifest(out, {"train": 1})
    before = listing(out)
    index = build_index(find_shards(out, "train"))
    assert index.parent == tmp_path / "cache" / "aimv2" / "index" and listing(out) == before
    assert build_index(find_shards(out, "train")) == index
    assert names(find_shards(out, "train")) == ["train-000000.tar"]
    os.utime(out / "train-000000.tar", ns=(1, 1))
    assert build_index(find_shards(out, "train")) != index
    given = build_index(find_shards(out, "train"), tmp_path / "given")
    assert given.parent == tmp_path / "given"
    (tmp_path / "cache2").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    with pytest.raises(UsageError, match=r"data\.index_dir"):
        build_index(find_shards(out, "train"))


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What makes energon run code, wherever a class may be named: here it leaves a file ``marker``."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted_code.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w')\ndef make(): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield {"__module__": "planted_code", "__function__": "make"}
    sys.modules.pop("planted_code", None)


@pytest.mark.parametrize("where", ["class", "subflavors"])
def test_energon_runs_what_its_yaml_names(tmp_path: Path, evil: dict[str, str], where: str) -> None:
    """Why nothing of another's may reach it: else the tests below would show nothing."""
    from megatron.energon import WorkerConfig, load_dataset

    write_shard(tmp_path / "a.tar", samples("a"))
    index = build_index([tmp_path / "a.tar"], tmp_path / "index")
    named = evil if where == "class" else {**CRUDE, "subflavors": {"a": evil}}
    (index / ".nv-meta" / "dataset.yaml").write_text(json.dumps(named))
    with contextlib.suppress(Exception):  # whatever it makes of what it was given
        load_dataset(str(index)).get_datasets(
            training=True, split_part="train", worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), decoder=None,
            max_samples_per_sequence=100,
        )  # fmt: skip
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "where", ["class", "subflavors", "info", "split", "link", "link to the metadata", "folder", "more files"]
)
def test_a_planted_index_runs_nothing(tmp_path: Path, evil: dict[str, str], where: str) -> None:
    """Even where ``data.index_dir`` names the folder that others can write to, as old versions did by default."""
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "train-000000.tar", samples("a", "b"))
    write_manifest(data, {"train": 2})
    home, marker = data / ".aimv2-index", tmp_path / "marker"
    index = build_index(find_shards(data, "train"), home)
    meta = index / ".nv-meta"
    (data / ".nv-meta").mkdir()
    for name in ("dataset.yaml", "split.yaml", ".info.json"):  # where energon itself would look
        (data / ".nv-meta" / name).write_text(json.dumps(evil))
    if where == "class":
        (meta / "dataset.yaml").write_text(json.dumps(evil))
    elif where == "subflavors":
        (meta / "dataset.yaml").write_text(json.dumps({**CRUDE, "subflavors": {"a": evil}}))
    elif where == "info":
        (meta / ".info.json").write_text(json.dumps({"shard_counts": evil}))
    elif where == "split":
        (meta / "split.yaml").write_text(json.dumps({"split_parts": evil, "exclude": [evil]}))
    elif where == "link":
        (tmp_path / "evil.yaml").write_text(json.dumps(evil))
        (meta / "dataset.yaml").unlink()
        (meta / "dataset.yaml").symlink_to(tmp_path / "evil.yaml")
    elif where == "link to the metadata":
        meta.rename(tmp_path / "meta")
        (tmp_path / "meta" / "dataset.yaml").write_text(json.dumps(evil))
        meta.symlink_to(tmp_path / "meta")
    elif where == "folder":
        index.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / ".nv-meta" / "dataset.yaml").write_text(json.dumps(evil))
        index.symlink_to(tmp_path / "elsewhere")
    else:
        for name in (".info.yaml", "split.json", "dataset.json"):
            (meta / name).write_text(json.dumps(evil))
    before = listing(tmp_path / "meta") if where == "link to the metadata" else []
    found = energon_samples(build_index(find_shards(data, "train"), home), 2)
    assert sorted(sample["__key__"] for sample in found) == ["a", "b"]
    assert not marker.exists()
    assert {path.name for path in meta.iterdir()} == {
        "dataset.yaml",
        "split.yaml",
        ".info.json",
    } and not meta.is_symlink()
    assert not before or listing(tmp_path / "meta") == before, "a file behind a link was written"


def test_links_of_an_index_are_ours(tmp_path: Path) -> None:
    """A link in the index that points elsewhere would train on other images."""
    write_shard(tmp_path / "a.tar", samples("a"))
    write_shard(tmp_path / "b.tar", samples("b"))
    index = build_index([tmp_path / "a.tar"], tmp_path / "index")
    (index / "a.tar").unlink()
    (index / "a.tar").symlink_to(tmp_path / "b.tar")
    again = build_index([tmp_path / "a.tar"], tmp_path / "index")
    assert [sample["__key__"] for sample in energon_samples(again, 1)] == ["a"]


@pytest.mark.parametrize("lost", ["a.tar", "a.tar.idx", "tars.json"])
def test_a_damaged_index_is_made_again(tmp_path: Path, lost: str) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", samples(name))
    shards = [tmp_path / "a.tar", tmp_path / "b.tar"]
    index = build_index(shards, tmp_path / "index")
    (index / lost).unlink()
    assert build_index(shards, tmp_path / "index") == index
    assert count_samples(index) == 2 and len(energon_samples(index, 2)) == 2
    assert len(list((tmp_path / "index").iterdir())) == 1


def write_index(tar: Path) -> bytes:
    """``TAR.idx`` beside a tar, as energon's own preparation leaves it."""
    offsets = scan_shard(tar).offsets
    content = struct.pack(f"<{len(offsets)}Q", *offsets)
    tar.with_name(f"{tar.name}.idx").write_bytes(content)
    return content


def test_a_right_index_beside_a_tar_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads the headers again; nor where an earlier start has."""
    write_shard(tmp_path / "a.tar", samples("a", "sub/" + "x" * 120, "b"))
    write_index(tmp_path / "a.tar")
    write_shard(tmp_path / "b.tar", samples("c"))
    build_index([tmp_path / "b.tar"], tmp_path / "index")
    monkeypatch.setattr("aimv2.data.shards.index.scan_shard", None)
    index = build_index([tmp_path / "a.tar"], tmp_path / "index")
    assert count_samples(index) == 3 == len(energon_samples(index, 3))
    assert count_samples(build_index([tmp_path / "b.tar"], tmp_path / "index")) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        "link",
        "odd bytes",
        "not from 0",
        "falling",
        "twice",
        "no 512",
        "past the end",
        "no header",
        "too few",
        "inside a sample",
        "behind the end",
        "older",
        "pipe",
    ],
)
def test_a_wrong_index_beside_a_tar_is_left_alone(tmp_path: Path, wrong: str) -> None:
    tar, idx = tmp_path / "a.tar", tmp_path / "a.tar.idx"
    write_shard(tar, samples("a", "b", "c"))
    right = write_index(tar)
    offsets = list(struct.unpack("<4Q", right))
    changed = {
        "not from 0": offsets[1:],
        "falling": [offsets[0], offsets[2], offsets[1], offsets[3]],
        "twice": [offsets[0], offsets[1], offsets[1], offsets[3]],
        "no 512": [offsets[0], offsets[1] + 8, *offsets[2:]],
        "past the end": [*offsets[:3], 1 << 40],
        "no header": [offsets[0], offsets[1] + 512, *offsets[2:]],
        "inside a sample": [*offsets[:2], offsets[2] - 1024, *offsets[2:]],
        "behind the end": [*offsets[:3], offsets[3] + 512],
        "too few": offsets[:3],
    }
    if wrong in changed:
        idx.write_bytes(struct.pack(f"<{len(changed[wrong])}Q", *changed[wrong]))
    elif wrong == "odd bytes":
        idx.write_bytes(right + b"1")
    elif wrong == "older":
        write_shard(tmp_path / "b.tar", samples("x", "y"))
        os.replace(tmp_path / "b.tar", tar)
        os.utime(idx, ns=(1, 1))
    else:
        idx.rename(tmp_path / "other")
        if wrong == "link":
            (tmp_path / "other").write_bytes(struct.pack("<2Q", 0, offsets[3]))
            idx.symlink_to(tmp_path / "other")
        else:
            os.mkfifo(idx)
    index = build_index([tar], tmp_path / "index")
    wanted = ["x", "y"] if wrong == "older" else ["a", "b", "c"]
    assert sorted(sample["__key__"] for sample in energon_samples(index, len(wanted))) == wanted
    assert count_samples(index) == len(wanted)


@pytest.mark.parametrize("long", ["", "x" * 120])
def test_an_index_beside_an_unsorted_tar_hides_no_halves(tmp_path: Path, long: str) -> None:
    parts = [(f"{key}{long}.{kind}", b"1") for kind in ("jpg", "txt") for key in "ab"]
    tar = tar_of(tmp_path / "a.tar", parts)
    with tarfile.open(tar) as archive:
        offsets = [member.offset for member in archive]
    end = offsets[-1] + 1024 + (1024 if long else 0)
    (tmp_path / "a.tar.idx").write_bytes(struct.pack("<5Q", *offsets, end))
    with pytest.raises(UsageError, match="unsorted"):
        build_index([tar], tmp_path / "index")


def test_empty_tars_are_left_out(tmp_path: Path) -> None:
    empty = tar_of(tmp_path / "empty.tar", [])
    (tmp_path / "nothing.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="empty data set"):
        build_index([empty, tmp_path / "nothing.tar"], tmp_path / "index")
    with pytest.raises(UsageError, match="empty data set"):
        build_index([], tmp_path / "index")
    write_shard(tmp_path / "full.tar", samples("a"))
    index = build_index([empty, tmp_path / "full.tar"], tmp_path / "index")
    assert count_samples(index) == 1 and len(energon_samples(index, 1)) == 1
    assert not list((tmp_path / "index").glob(".*")), "an attempt was left behind"


@pytest.mark.parametrize("cut", ["body", "header", "garbage"])
def test_cut_tar_gives_its_whole_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: str) -> None:
    tar = tmp_path / "a.tar"
    write_shard(tar, samples("a", "b", "c"))
    data = tar.read_bytes()
    last = scan_shard(tar).offsets[2]
    end = {"body": last + 600, "header": last + 100, "garbage": last}[cut]
    tar.write_bytes(data[:end] + (b"garbage " * 64 if cut == "garbage" else b""))
    whole = 1 if cut != "body" else 2  # what precedes a broken header may lack members: not counted as whole
    with caplog.at_level(logging.WARNING):
        assert len(list(read_samples(tar))) == whole
        index = build_index([tar], tmp_path / "index")
    assert count_samples(index) == whole and len(energon_samples(index, whole)) == whole
    assert sum("a.tar" in record.message for record in caplog.records) == 2


def test_compressed_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UsageError, match="gunzip"):
        build_index([tmp_path / "a.tar"], tmp_path / "index")


def test_many_build_the_same_index_at_once(tmp_path: Path) -> None:
    for number in range(8):
        write_shard(tmp_path / f"{number}.tar", samples("a", "b"))
    shards = find_shards(tmp_path, "train")
    with ThreadPoolExecutor(6) as pool:
        built = set(pool.map(lambda _: build_index(shards, tmp_path / "index"), range(12)))
    assert len(built) == 1 and count_samples(built.pop()) == 16
    assert len(list((tmp_path / "index").iterdir())) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_that_leaves_a_sample_out_ends_in_one_line(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a full reading would see it beforehand; energon does when it reads two samples as one."""
    data = scenes(tmp_path / "scenes", 60)
    (tar,) = data.glob("train-*.tar")
    offsets = list(scan_shard(tar).offsets)
    del offsets[1:-1:2]
    tar.with_name(f"{tar.name}.idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    words = options(data, tmp_path / "run", data__workers=workers, data__index_dir=tmp_path / "index")
    assert_refused(capsys, words, "does not match its index", ".tar.idx", str(tmp_path / "index"))
