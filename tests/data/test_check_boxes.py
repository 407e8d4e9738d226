"""`data check` counts boxes and their faults; `data browse` draws them."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from brought import picture

from aimv2 import api
from aimv2.data.shards.check import check_data, render_check
from aimv2.data.shards.format import write_shard

HOSTILE = '<script>alert("x")</script>'


def sample(key: str, **about: Any) -> tuple[str, dict[str, bytes]]:
    return key, {"jpg": picture(1, (40, 30)), "json": json.dumps(about).encode()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    ring, cross = {"box": [4, 4, 10, 8], "class": "ring"}, {"box": [20, 10, 10, 10], "class": HOSTILE, "crowd": True}
    phrases = [
        {"phrase": "the left ring", "box": ring["box"]},
        {"phrase": "both", "boxes": [ring["box"], cross["box"]]},
    ]
    samples = [
        sample("a", objects=[ring, ring, cross], phrases=phrases, negative=["horse"]),
        sample("b", objects=[]),
        sample(
            "c",
            objects=[
                ring | {"box": [4, 4, 0, 8]},
                ring | {"box": [35, 4, 10, 8], "segmentation": [[1, 2, 3]]},
                ring | {"box": [50, 4, 10, 8]},
            ],
        ),
        sample("d", objects=[ring], size=[30, 40]),
    ]
    (tmp_path / "boxes").mkdir()
    write_shard(tmp_path / "boxes" / "train-000000.tar", samples)
    return tmp_path / "boxes"


FAULTS = {"duplicate": 1, "degenerate": 1, "outside": 1, "far-outside": 1, "other-size": 1, "broken-mask": 1}


def test_check_counts_objects_classes_and_faults(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = check_data(shards, workers=1)
    boxes = result["boxes"]
    assert {code: about["number"] for code, about in boxes["faults"].items()} == FAULTS
    assert (boxes["pictures"], boxes["empty"], boxes["objects"], boxes["crowds"], boxes["phrases"]) == (4, 1, 4, 1, 2)
    assert boxes["classes"] == {"ring": 3, HOSTILE: 1}
    assert result["captions"]["missing"]["number"] == 0, "pictures with boxes need no caption"
    from rich.console import Console

    Console(width=80).print(render_check(result))
    out = " ".join(capsys.readouterr().out.split())
    assert "4 objects of 2 classes in 4 images, 1 of them empty" in out and "ring 3" in out


def test_check_of_captions_says_nothing_of_boxes(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", [("a", {"jpg": picture(1, (40, 30)), "txt": b"a ring"})])
    assert check_data(tmp_path, workers=1)["boxes"]["pictures"] == 0


def test_browse_draws_boxes_with_classes_and_phrases(shards: Path, tmp_path: Path) -> None:
    result = api.data_browse(None, {"data.train": str(shards)}, str(tmp_path / "page.html"))
    assert (result["samples"], result["objects"], result["phrases"], result["classes"]) == (3, 4, 2, 2)
    page = (tmp_path / "page.html").read_text()
    assert HOSTILE not in page and HOSTILE in unescape(page)
    assert page.count('class="box') == 4 + 3 and page.count(' crowd"') == 1
    assert "left: 10.0%; top: 13.33%; width: 25.0%; height: 26.67%" in page
    for words in ("the left ring", "both", "absent: horse", "no objects"):
        assert words in page, words
