"""Captioned data of every form are opened in one way, held-out splits first, and read when asked for."""

import json
from pathlib import Path

import pytest
from PIL import Image

from aimv2.data.images.captioned import open_captioned, read_captioned
from aimv2.data.images.decode import ImageError
from aimv2.data.shards.format import write_shard
from aimv2.errors import UsageError


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (40 * number, 30, 30)).save(folder / name)
    return folder


def read(source: Path, captions: str | None = None) -> list[tuple[str, tuple[str, ...]]]:
    return [(item.image, read_captioned(item)[1]) for item in open_captioned(str(source), captions)[0]]


def test_what_is_left_out_of_a_measurement_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0.jpg", "1.jpg", "2.jpg", "a.nef"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("image,caption,license\n0.jpg,a,CC0\n1.jpg,b,CC0\ngone.jpg,c,CC0\n")
    assert len(open_captioned(str(tmp_path))[0]) == 2
    assert "2 of 4 are left out; gone.jpg: no such image" in caplog.text
    assert "RAW images of cameras" in caplog.text and "columns that are not read: 1 (license)" in caplog.text


def test_captions_files(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "0.png", "1.png", "2.png")
    (tmp_path / "captions.txt").write_text('image,caption\n0.png,A dog .\n0.png,"One, two"\n2.png,A cat\n')
    (tmp_path / "others.csv").write_text("image,caption\n1.png,nothing\n")
    for source in (tmp_path, tmp_path / "captions.txt"):
        items, split = open_captioned(str(source))
        assert split == "all" and read(source) == [("0.png", ("A dog .", "One, two")), ("2.png", ("A cat",))]
        assert read_captioned(items[1])[0] == (tmp_path / "images" / "2.png").read_bytes()
    assert read(tmp_path / "others.csv") == read(tmp_path, "others.csv") == [("1.png", ("nothing",))]
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        read_captioned(items[1])


def test_sidecars_are_read_late(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("before")
    items, _ = open_captioned(str(tmp_path))
    (tmp_path / "a.txt").write_text("a dog\na big dog\n")
    (tmp_path / "b.txt").write_text(" ")
    assert [(item.image, read_captioned(item)[1]) for item in items] == [
        ("a.png", ("a dog\na big dog",)),
        ("b.png", ()),
    ]


def test_shards_held_out_splits_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    about = json.dumps({"captions": {"short": ["a dog"], "long": ["a big dog", "a dog there"]}}).encode()
    for name in ("00000", "train-000000", "val-000000", "test-000000"):
        write_shard(tmp_path / f"{name}.tar", [(name, {"png": b"...", "json": about}), ("y", {"txt": b"a cat"})])
    for name in ("test", "val", "train"):
        items, split = open_captioned(str(tmp_path))
        assert split == name and [item.image for item in items] == [f"{name}-000000", "y"]
        assert ("training pairs" in caplog.text) == (name == "train")
        (tmp_path / f"{name}-000000.tar").rename(tmp_path / f"{name}-000000.gone")
    caplog.clear()
    for source in (tmp_path, tmp_path / "00000.tar", tmp_path / "*.tar"):  # no split is named
        items, split = open_captioned(str(source))
        assert split == "all" and len(items) == 2 and not caplog.text
    assert read_captioned(items[0]) == (b"...", ("a dog", "a big dog", "a dog there"))
    with pytest.raises(ImageError, match="no image in its sample"):
        read_captioned(items[1])


def test_wrong_sources(tmp_path: Path) -> None:
    pictures(tmp_path / "classes" / "red", "0.png")
    pictures(tmp_path / "two", "0.png")
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("image,caption\n0.png,a dog\n")
    write_shard(tmp_path / "x.tar", [("x", {"txt": b"a cat"})])
    write_shard(tmp_path / "empty.tar", [])
    for source, captions, said in (
        ("none", None, "no such file or folder"),
        ("none.tar", None, "does not exist"),
        ("classes", None, "class folders without captions"),
        ("classes/red", None, "captions missing"),
        ("two", None, "has several captions files: a.csv, b.csv; shards, a captions file"),
        ("two", "c.csv", "--captions c.csv: no such file"),
        ("x.tar", "c.csv", "holds its captions itself; leave the option out"),
        ("two/a.csv", "b.csv", "holds its captions itself; leave the option out"),
        ("empty.tar", None, "no sample in empty.tar"),
    ):
        with pytest.raises(UsageError) as error:
            open_captioned(str(tmp_path / source), captions)
        assert said in str(error.value) and "\n" not in str(error.value)
