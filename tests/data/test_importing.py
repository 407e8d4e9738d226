"""Imports split, resume and end as they should: the same plan gives the same bytes, whoever writes them."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from brought import picture, put, run
from PIL import Image

from aimv2.data.images.entries import FileReader, SourceEntry, TarReader
from aimv2.data.shards import importing
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.data.shards.importing import import_data
from aimv2.errors import UsageError


def samples(out: Path, split: str = "train") -> dict[str, dict]:
    """{key: {"image": bytes, "txt": str, "json": dict, "cls": str}} of a split, in order."""
    found = {}
    for tar in sorted(out.glob(f"{split}-*.tar")):
        for key, parts in read_samples(tar):
            image = next(parts[name] for name in ("jpg", "png", "webp") if name in parts)
            found[key] = {
                "image": image,
                "txt": parts["txt"].decode() if "txt" in parts else None,
                "json": json.loads(parts["json"]),
                "cls": parts["cls"].decode() if "cls" in parts else None,
            }
    return found


def rejected(out: Path) -> list[tuple[str, str]]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return [(row["image"], row["reason"]) for row in map(json.loads, lines)]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images 0.jpg to 6.jpg."""
    for number in range(7):
        put(tmp_path / "src" / f"{number}.jpg", picture(number))
    return tmp_path / "src"


# ---- splits, keys ----


def captioned(src: Path, count: int) -> Path:
    for number in range(count):
        put(src / f"{number:03d}.jpg", picture(number))
    lines = [f"{number:03d}.jpg,caption {number}" for number in range(count)]
    put(src / "captions.csv", "\n".join(["image,caption", *lines]))
    return src


def test_val_fraction_depends_on_the_key_alone(tmp_path: Path) -> None:
    src = captioned(tmp_path / "src", 60)
    run(src, tmp_path / "a", val_fraction=0.25, shard_size=10)
    val = set(samples(tmp_path / "a", "val"))
    assert 6 <= len(val) <= 24 and not val & set(samples(tmp_path / "a"))
    assert len(val | set(samples(tmp_path / "a"))) == 60
    (src / "000.jpg").unlink()
    run(src, tmp_path / "b", val_fraction=0.25, shard_size=7)
    assert set(samples(tmp_path / "b", "val")) == val - {"000"}


def test_val_list_by_key_or_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    src = captioned(tmp_path / "src", 5)
    listed = put(tmp_path / "val.txt", "001\n003.jpg\nabsent\n\n")
    run(src, tmp_path / "out", val_list=str(listed))
    assert list(samples(tmp_path / "out", "val")) == ["001", "003"]
    assert "1 of 3 names match no image" in caplog.text


def test_output_inside_the_source(tmp_path: Path) -> None:
    src = captioned(tmp_path / "src", 3)
    put(src / "x.jpg", picture())
    assert run(src, src / "out")["rejected"] == 1
    assert run(src, src / "out2", captions="captions.csv")["train"] == 3


# ---- resume ----


def test_interrupted_import_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = captioned(tmp_path / "src", 23)
    put(src / "005.jpg", b"broken")
    options = {"shard_size": 4, "val_fraction": 0.2}
    run(src, tmp_path / "whole", **options)

    real, calls = importing.store_image, []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(importing, "store_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(src, tmp_path / "out", **options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 0 < len(kept) < 6 and not (tmp_path / "out" / "aimv2.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp*"))
    whole = tree(tmp_path / "whole")
    assert all(path.read_bytes() == whole[path.name] for path in kept)

    with pytest.raises(UsageError, match=r"other options \(shard_size 4 -> 5\)"):
        run(src, tmp_path / "out", **{**options, "shard_size": 5})
    result = run(src, tmp_path / "out", **options)
    assert result["train"] + result["val"] == 22 and result["rejected"] == 1
    assert tree(tmp_path / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "done shards were written again"

    with pytest.raises(UsageError, match="finished import"):
        run(src, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == whole


def test_an_import_that_an_older_version_began_is_resumed() -> None:
    """The digest of a shard's entries is the one that earlier versions wrote into OUT/.import."""
    entries = [
        SourceEntry("a", "x/a.jpg", ("/src/x/a.jpg",), {"caption": ["a cat"]}, "3", {"class": "cat"}, FileReader()),
        SourceEntry("b", "t.tar/b", ("/src/t.tar", 512, 2048), {}, None, {}, TarReader()),
    ]
    digest = importing.ShardJob("train-000000", entries).digest()
    assert digest == "9bbd2951ba98b03438149bbdba8b7daa761c4875d56797de805724410f3f9b3f"


def test_a_changed_source_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = captioned(tmp_path / "src", 6)
    monkeypatch.setattr(importing, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(src, tmp_path / "out", shard_size=2)
    monkeypatch.undo()
    lines = (src / "captions.csv").read_text()
    put(src / "captions.csv", lines.replace("caption 3", "another"))
    with pytest.raises(UsageError, match="has changed since"):
        run(src, tmp_path / "out", shard_size=2)


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    src = captioned(tmp_path / "src", 23)
    put(src / "005.jpg", b"broken")
    run(src, tmp_path / "one", shard_size=5, workers=1)
    run(src, tmp_path / "two", shard_size=5, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def _import_in_a_child(src: str, out: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.setsid()  # a terminal's Ctrl-C goes to the whole group: parent and workers
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import_data(src, out, shard_size=20, workers=2, progress=False)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ended_from_outside_it_leaves_whole_shards(tmp_path: Path, how: signal.Signals) -> None:
    src = captioned(tmp_path / "src", 400)
    big = picture(1, (1500, 1500))
    for number in range(20, 400):
        put(src / f"{number:03d}.jpg", big)
    out = tmp_path / "out"
    child = multiprocessing.get_context("spawn").Process(target=_import_in_a_child, args=(str(src), str(out)))
    child.start()
    deadline = time.monotonic() + 30
    while not list(out.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.pid is not None
    if how == signal.SIGINT:
        os.killpg(child.pid, how)
    else:
        os.kill(child.pid, how)  # its workers must end by themselves
    child.join(20)
    assert child.exitcode not in (None, 0)
    with pytest.raises(ProcessLookupError):
        for _ in range(500):
            os.killpg(child.pid, 0)
            time.sleep(0.02)
    done = list(out.glob("*.tar"))
    assert done and not (out / "aimv2.json").exists()
    assert how == signal.SIGKILL or not list(out.glob(".*.tmp*"))
    assert all(len(list(read_samples(tar))) == 20 for tar in done)
    assert import_data(str(src), out, shard_size=20, workers=2, progress=False)["train"] == 400
    assert not list(out.glob(".*"))


# ---- wrong use ----


def test_wrong_use_is_one_clear_line(photos: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    notes = put(tmp_path / "notes.md", "hello").parent
    others = tmp_path / "others"
    others.mkdir()
    write_shard(others / "a.tar", [("a", {"jpg": picture()})])
    put(tmp_path / "header" / "captions.csv", "image,caption\n")
    put(tmp_path / "header" / "a.jpg", picture())
    put(tmp_path / "imageless" / "captions.csv", "image,caption\na.jpg,x\n")
    file = put(tmp_path / "file", "x")
    put(tmp_path / "c.csv", "image,caption\na.jpg,кошка\n".encode("cp1251"))
    out = tmp_path / "out"
    cases = [
        (tmp_path / "absent", out, {}, "does not exist"),
        (tmp_path / "absent-{0..3}.tar", out, {}, "does not exist"),
        (empty, out, {}, "no image"),
        (notes / "notes.md", out, {}, "expected a folder"),
        (photos, out, {}, "captions missing"),
        (photos, out, {"captions": "absent.csv"}, "--captions absent.csv"),
        (tmp_path / "header", out, {"captions": "captions.csv"}, "empty data set"),
        (tmp_path / "imageless", out, {}, "no image"),
        (tmp_path / "c.csv", out, {}, "not UTF-8"),
        (photos, file / "out", {}, "not writable"),
        (photos, others, {}, "other shards"),
        (photos, photos, {}, "SOURCE itself"),
        (photos, out, {"val_fraction": 1.5}, "--val-fraction"),
        (photos, out, {"val_fraction": 0.1, "val_list": "x"}, "exclude each other"),
        (photos, out, {"val_list": "absent"}, "--val-list absent"),
        (photos, out, {"template": "a photo"}, "--template"),
        (photos, out, {"max_side": 0}, "--max-side"),
        (photos, out, {"shard_size": 0}, "--shard-size"),
    ]
    for source, into, options, words in cases:
        with pytest.raises(UsageError) as caught:
            run(source, into, **options)
        assert words in str(caught.value) and "\n" not in str(caught.value), (source, caught.value)
    assert not list(others.glob("train-*"))


def test_nothing_but_rejects(photos: Path, tmp_path: Path) -> None:
    put(photos / "c.csv", "image,caption\nx.jpg,a\n")
    with pytest.raises(UsageError, match=r"empty data set: 0 samples, 8 rejected; the first: x\.jpg: no such"):
        run(photos, tmp_path / "out")
    assert len(rejected(tmp_path / "out")) == 8
    put(photos / "c.csv", "image,caption\n0.jpg,a\n")
    assert run(photos, tmp_path / "out")["train"] == 1


def test_images_without_captions(tmp_path: Path) -> None:
    """A folder of images alone: refused by default, by a line that names the option; with it every image is taken."""
    folder = tmp_path / "photos"
    for number in range(4):
        (folder / f"day{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (60 * number, 0, 0)).save(folder / f"day{number % 2}" / f"{number}.jpg")
    (folder / "notes.csv").write_text("what,when\nholiday,june\n")
    with pytest.raises(UsageError, match="captions missing") as refused:
        import_data(str(folder / "day0"), tmp_path / "none", progress=False)
    assert "--no-captions" in str(refused.value)
    result = import_data(str(folder), tmp_path / "out", no_captions=True, val_fraction=0.3, progress=False)
    assert result["train"] + result["val"] == 4 and result["rejected"] == 0
    parts = [sample for tar in sorted((tmp_path / "out").glob("*.tar")) for _, sample in read_samples(tar)]
    assert len(parts) == 4 and all("jpg" in sample and "txt" not in sample for sample in parts)
    assert all(json.loads(sample["json"])["captions"] == {} for sample in parts)
    with pytest.raises(UsageError) as tars:
        import_data(str(tmp_path / "out" / "*.tar"), tmp_path / "again", no_captions=True, progress=False)
    assert tars.value.option == "--no-captions" and tars.value.code == "conflict"


def test_the_first_reject_is_said_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "src" / "a.jpg", picture(1))
    put(tmp_path / "src" / "a.txt", "words")
    put(tmp_path / "src" / "b.jpg", b"broken")
    put(tmp_path / "src" / "b.txt", "words")
    assert run(tmp_path / "src", tmp_path / "out")["rejected"] == 1
    (said,) = [record.getMessage() for record in caplog.records if "rejected" in record.getMessage()]
    assert said.startswith("1 rejected, the first b.jpg: ") and str(tmp_path / "out" / "rejected.jsonl") in said
