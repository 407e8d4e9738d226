"""A data set's facts and faults are counted, and fit one screen."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from shard_tars import tar_of

from aimv2.data.passed import HEIF_NEEDS, OTHERS
from aimv2.data.shards.check import check_data, render_check
from aimv2.data.shards.format import write_shard
from aimv2.errors import UsageError


def picture(number: int, size: tuple[int, int] = (40, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number * 40 % 256, number, 90)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    several = {"captions": {"alt": ["one two three"], "made": ["a", " ".join(["word"] * 100)]}}
    train = [
        ("a", {"png": picture(1), "txt": b"one two"}),
        ("b", {"png": picture(2, (20, 60)), "json": json.dumps(several).encode(), "cls": b"1"}),
        ("same", {"png": picture(1), "txt": b"again"}),
        ("mute", {"png": picture(3)}),
        ("tiny", {"png": picture(4, (100, 8)), "txt": b"thin"}),
        ("broken", {"png": picture(5)[:-30], "txt": b"cut"}),
        ("none", {"txt": b"no image"}),
    ]
    write_shard(tmp_path / "train-000000.tar", train)
    write_shard(tmp_path / "val-000000.tar", [("a", {"png": picture(1), "txt": b"third time"})])
    return tmp_path


def test_counts(shards: Path) -> None:
    result = check_data(shards, workers=2)
    assert result["samples"] == 8 and result["shards"] == 2 and result["labels"] == 1
    assert result["splits"] == {
        "train": {"samples": 7, "shards": 1},
        "val": {"samples": 1, "shards": 1},
    }
    assert result["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert result["images"]["width"] == {"min": 20, "p5": 25, "median": 40, "p95": 85, "max": 100}
    assert result["images"]["height"]["max"] == 60 and result["images"]["aspect"]["max"] == 12.5
    assert result["captions"]["per_image"]["max"] == 3 and result["captions"]["unit"] == "words"
    assert result["captions"]["length"]["max"] == 100 and result["captions"]["over_77"] == 1 / 9
    assert result["captions"]["missing"] == {"number": 1, "examples": ["train-000000.tar/mute"]}
    assert result["duplicates"] == {
        "number": 2,
        "examples": [["train-000000.tar/a", "train-000000.tar/same", "val-000000.tar/a"]],
    }
    assert result["unreadable"]["number"] == 2
    assert "truncated" in result["unreadable"]["examples"][0] and "no image" in result["unreadable"]["examples"][1]
    assert result["tiny"] == {"number": 1, "examples": ["train-000000.tar/tiny (100 x 8)"]}
    assert json.loads(json.dumps(result)) == result


def test_split_tokenizer_and_limits(shards: Path) -> None:
    result = check_data(shards, split="val", tokenizer=len, min_side=32)
    assert result["samples"] == 1 and result["captions"]["length"]["max"] == len("third time")
    assert result["captions"]["unit"] == "tokens" and result["tiny"]["number"] == 1
    assert check_data(shards / "train-000000.tar")["splits"] == {"all": {"samples": 7, "shards": 1}}
    with pytest.raises(UsageError, match="only train, val"):
        check_data(shards, split="test")


def test_cut_tar(shards: Path) -> None:
    tar = shards / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    result = check_data(shards)
    assert result["cut"]["number"] == 1 and "train-000000.tar" in result["cut"]["examples"][0]


def test_what_is_passed_over_is_said(shards: Path) -> None:
    (shards / "test-1.tar").symlink_to("/gone/test-1.tar")
    apart = [("a.png", picture(1)), ("b.png", picture(2)), ("a.txt", b"a"), ("b.txt", b"b")]
    tar_of(shards / "test-2.tar", apart)
    tar_of(shards / "val-000000.tar", [("._a.png", b"fork"), ("a.png", picture(1)), ("a.txt", b"x"), ("a.npy", b"")])
    for name in ("._train-000000.tar", "a.heif", "notes.parquet", "classes.txt"):
        (shards / name).write_bytes(b"")
    result = check_data(shards)
    assert result["samples"] == 8 and result["cut"]["number"] == 2
    assert result["cut"]["examples"][0] == "test-1.tar: cannot be read: a dead link to /gone/test-1.tar"
    assert "test-2.tar: unsorted" in result["cut"]["examples"][1]
    found = {kind: about["examples"] for kind, about in result["passed_over"].items()}
    assert found.pop(HEIF_NEEDS, ["a.heif"]) == ["a.heif"]
    assert {**found, OTHERS: found[OTHERS][-1:]} == {
        "macOS resource forks (._*)": ["._a.png", "._train-000000.tar"],
        "members of other kinds": ["a.npy"],
        OTHERS: ["notes.parquet"],
    }
    out = io.StringIO()
    Console(file=out, width=100).print(render_check(result))
    assert "passed over: members of other kinds: 1 (a.npy)" in out.getvalue()
    with pytest.raises(UsageError, match=r"test-2\.tar: unsorted .*sort it"):
        check_data(shards / "test-2.tar")


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        check_data(tmp_path / "absent")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="aimv2 data import"):
        check_data(tmp_path)
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(UsageError, match="empty data set"):
        check_data(tmp_path)


def test_one_screen(shards: Path) -> None:
    result = check_data(shards)
    for number in ("unreadable", "tiny", "duplicates", "cut"):
        result[number] = {"number": 1_234_567, "examples": ["x" * 300] * 5}
    result["samples"], result["source"] = 1_234_567_890, "/very" * 40
    out = io.StringIO()
    Console(file=out, width=80).print(render_check(result))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    assert "unreadable images" in out.getvalue() and "width, pixels" in out.getvalue()


def test_cifar(shared_data: Path) -> None:
    result = check_data(f"{shared_data}/cifar10/test-000000.tar")
    assert result["samples"] == 5000 and result["labels"] == 5000 and result["unreadable"]["number"] == 0
    assert result["images"]["width"]["min"] == result["images"]["width"]["max"] == 32
