"""The page of conversations: all images, questions and answers as text, and what is bad."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest
from brought import picture

from aimv2 import api
from aimv2.data.shards.format import write_shard
from aimv2.errors import UsageError

HOSTILE = '<script>alert("x")</script> & <b>'


def sample(key: str, *texts: str, images: int = 0, **members: bytes) -> tuple[str, dict[str, bytes]]:
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    own = {f"{at}.jpg" if at else "jpg": picture(at + 1) for at in range(images)}
    return key, {**own, **members, "json": json.dumps({"conversations": turns}).encode()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    samples = [
        sample("two", "<image>\n<image>\nSame?", "no", "Sure?", HOSTILE, images=2),
        sample("plain", "Hello?", "Hello."),
        sample("lost", "<image>", "x"),
        sample("odd", "<image>", "x", jpg=b"no image"),
    ]
    (tmp_path / "talks").mkdir()
    write_shard(tmp_path / "talks" / "train-000000.tar", samples)
    return tmp_path / "talks"


def test_conversations_with_all_their_images(shards: Path, tmp_path: Path) -> None:
    result = api.data_browse(None, {"data.train": str(shards)}, str(tmp_path / "page.html"))
    assert (result["samples"], result["images"], result["text_only"]) == (2, 2, 1)
    assert {kind: about["number"] for kind, about in result["bad"].items()} == {
        "token-without-image": 1,
        "image-unreadable": 1,
    }
    page = (tmp_path / "page.html").read_text()
    assert page.count('src="data:image/') == 2 and page.count('class="mark">image 2<') == 1
    assert HOSTILE not in page and HOSTILE in unescape(page)
    for words in ("Same?", "Sure?", "Hello.", "text only", "lost: 1 <image> for no image"):
        assert words in unescape(page), words


def test_captions_next_to_conversations_are_browsed_where_the_run_reads_them(shards: Path, tmp_path: Path) -> None:
    samples = [sample(f"{n}", "<image>", "x", images=1, txt=b"a caption") for n in range(4)]
    write_shard(shards / "train-000000.tar", samples)
    given = {"data.train": str(shards), "objective.name": "instruct"}
    assert api.data_browse(None, given, str(tmp_path / "page.html"), 3)["images"] == 3
    assert (
        "page.html"
        in api.data_browse(None, {**given, "objective.name": "pretrain"}, str(tmp_path / "page.html"), 3)["page"]
    )
    assert "caption" in (tmp_path / "page.html").read_text()


def test_nothing_but_bad_rows(shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "train-000000.tar", [sample("lost", "<image>", "x")])
    with pytest.raises(UsageError) as caught:
        api.data_browse(None, {"data.train": str(shards)}, str(tmp_path / "page.html"))
    assert (caught.value.code, caught.value.option) == ("missing", "data.train")
