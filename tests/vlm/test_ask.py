"""``aimv2 caption VLM IMAGES --ask QUESTION``: one question on each image."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from aimv2 import api
from aimv2.cli import main
from aimv2.errors import UsageError, visible
from aimv2.vlm.answer import answers, question
from aimv2.vlm.model import open_vlm
from tiny_llm import encoder, language_model, picture

TEXT = "What is this?"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``eyes``, ``llm``, ``vlm`` and three photos, one of them broken."""
    root = tmp_path_factory.mktemp("ask")
    encoder(root / "eyes")
    language_model(root / "llm")
    api.vlm_build(root / "eyes", root / "llm", root / "vlm")
    (root / "photos").mkdir()
    for number in range(3):
        picture(40, 20 + 9 * number).save(root / "photos" / f"{number}.png")
    (root / "photos" / "broken.jpg").write_bytes(b"no image")
    return root


def test_answers_are_those_of_the_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "caption",
        str(home / "vlm"),
        str(home / "photos"),
        "--ask",
        TEXT,
        "--max-tokens",
        "6",
        "--batch-size",
        "2",
    ]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    files = [home / "photos" / f"{number}.png" for number in range(3)]
    model, processor = open_vlm(home / "vlm")
    wanted = answers(model, processor, [question(TEXT, file.read_bytes()) for file in files], 6)
    assert result["answers"] == [{"image": str(file), "answer": text} for file, text in zip(files, wanted)]
    assert (result["question"], len(result["rejected"])) == (TEXT, 1)
    assert main(words) == 0
    shown = capsys.readouterr()
    for file, text in zip(files, wanted):
        assert f"{file} " in shown.out and visible(text) in shown.out
    assert "broken.jpg" in shown.err


def test_answers_are_scored_as_captions(home: Path, tmp_path: Path) -> None:
    """Against references that are its own answers everything matches."""
    photos = tmp_path / "images"
    photos.mkdir()
    for number in range(3):
        picture(40, 20 + 9 * number).save(photos / f"{number}.png")
    given: dict[str, Any] = {"ask": TEXT, "max_tokens": 6, "batch_size": 2}
    own = api.caption(str(home / "vlm"), [str(photos)], **given)["answers"]
    with open(tmp_path / "captions.txt", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((Path(one["image"]).name, one["answer"]) for one in own)])
    out = tmp_path / "out"
    result = api.caption(str(home / "vlm"), [], data=str(tmp_path), score=True, out=str(out), **given)
    assert result["figures"]["exact_match"] == 1 and result["data"]["test_images"] == 3
    assert (result["model"]["kind"], result["protocol"]["prompt"]) == ("vlm", TEXT)
    assert (out / "result.json").is_file()
    with pytest.raises(UsageError) as refused:
        api.caption(str(home / "vlm"), [], data=str(tmp_path), score=True, baselines="random", **given)
    assert refused.value.code == "conflict"


@pytest.mark.parametrize(
    ("model", "code", "option", "more"),
    [
        ("eyes", "mismatch", "MODEL", {}),
        ("llm", "mismatch", "MODEL", {}),
        ("vlm", "conflict", "--beams", {"beams": 2}),
        ("vlm", "invalid", "--ask", {"ask": " "}),
        ("vlm", "invalid", "--ask", {"ask": "<image><image>"}),
        ("vlm", "invalid", "--max-tokens", {"max_tokens": 0}),
        ("vlm", "limit", None, {"ask": "What? " * 99}),
    ],
)
def test_wrong_use(model: str, code: str, option: str | None, more: dict[str, Any], home: Path) -> None:
    with pytest.raises(UsageError) as caught:
        api.caption(home / model, [str(home / "photos")], **{"ask": TEXT, **more})
    assert caught.value.code == code and option in (caught.value.option, None), caught.value


def test_a_vlm_without_a_question(home: Path) -> None:
    with pytest.raises(UsageError, match="--ask"):
        api.caption(home / "vlm", [str(home / "photos")])
