"""Shards are found, read as energon reads them, indexed from outside, and written the same twice."""

import contextlib
import io
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
from PIL import Image

from aimv2.data.shard_index import build_index, count_samples
from aimv2.data.shards import (
    ShardWriter,
    captions_of,
    find_shards,
    image_of,
    read_sample,
    read_samples,
    scan_shard,
    write_manifest,
    write_shard,
)
from aimv2.errors import UsageError


def jpeg(gray: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new("L", (16, 16), gray).save(out, "JPEG")
    return out.getvalue()


def samples(*keys: str, caption: str = "a gray square") -> list[tuple[str, dict[str, bytes]]]:
    return [(key, {"jpg": jpeg(), "txt": f"{caption} {key}".encode()}) for key in keys]


def tar_of(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar as other tools write it: names and order as given, time and owner set."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid = len(content), 1_700_000_000, 1000
            tar.addfile(member, io.BytesIO(content))
    return path


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")])


def energon_samples(index: Path, count: int) -> list[dict]:
    """What energon itself reads through an index, one epoch, no shuffling."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        stateless,
    )

    @stateless
    def cook(sample: dict) -> dict:
        return dict(sample)

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]  # noqa: RUF012

        def batch(self, batch: list) -> list:
            return batch

        def encode_batch(self, batch: list) -> list:
            return batch

    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(index, split_part="train", worker_config=worker, batch_size=1, task_encoder=Encoder())
    found = [sample for batch in get_loader(dataset) for sample in batch]
    assert len(found) == count
    return found


# ---- find ----


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    for name in ("train-000001", "train-000000", "test-000000", "other"):
        write_shard(tmp_path / f"{name}.tar", samples("a"))
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


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


# ---- index ----

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
    monkeypatch.setattr("aimv2.data.shard_index.scan_shard", None)
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
    with pytest.raises(UsageError, match="not a plain tar"):
        build_index([tmp_path / "a.tar"], tmp_path / "index")


def test_many_build_the_same_index_at_once(tmp_path: Path) -> None:
    for number in range(8):
        write_shard(tmp_path / f"{number}.tar", samples("a", "b"))
    shards = find_shards(tmp_path, "train")
    with ThreadPoolExecutor(6) as pool:
        built = set(pool.map(lambda _: build_index(shards, tmp_path / "index"), range(12)))
    assert len(built) == 1 and count_samples(built.pop()) == 16
    assert len(list((tmp_path / "index").iterdir())) == 1


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


def test_shard_writer_fills_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", "val", shard_size=2) as writer:
        for key, parts in samples("a", "b", "c"):
            writer.add(key, parts)
    assert writer.count == 3 and writer.shards == 2
    assert names(find_shards(tmp_path / "out", "val")) == ["val-000000.tar", "val-000001.tar"]
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "half", "train", shard_size=2) as writer:
        for key, parts in samples("a", "b", "c"):
            writer.add(key, parts)
        raise RuntimeError
    assert names(sorted((tmp_path / "half").iterdir())) == ["train-000000.tar"]


def test_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"train": 3}, source="x")
    assert json.loads((tmp_path / "aimv2.json").read_text()) == {
        "format": "aimv2 shards 1",
        "counts": {"train": 3},
        "source": "x",
    }
