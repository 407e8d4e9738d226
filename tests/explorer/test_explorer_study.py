"""What the explorer remembers and how it shares its time: parts of a folder a call, bounded memory, stored vectors of a pair."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import COLOURS, plain_pictures
from PIL import Image

import aimv2
from aimv2 import api
from aimv2.data.stream.transforms import image_transform
from aimv2.explorer import search, study
from aimv2.explorer.album import THUMBNAIL
from aimv2.explorer.answers import Answers
from aimv2.explorer.prepare import prepare
from aimv2.explorer.study import AnswerCache
from aimv2.interop.model_folder import save_model
from aimv2.models.create import create_model
from evals.test_match import pair_at

NAMES = sorted(COLOURS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``encoder``, a ``pair`` whose texts "a red one" lie where plain pictures do, and the ``pictures``."""
    folder = tmp_path_factory.mktemp("study")
    options: dict = {"width": 32, "heads": 2, "hidden": 48, "depth": 2}
    save_model(create_model("aimv2-tiny-patch8-32", seed=0, **options), folder / "encoder")
    pair_at(folder / "pair", {f"a {name} one": colour for name, colour in COLOURS.items()})
    plain_pictures(folder / "pictures")
    return folder


def opened(place: Path, model: str, images: Path | None = None) -> Answers:
    return prepare(str(place / model), str(images or place / "pictures"), None, 0, 1, "cpu")


def found_by(answers: Answers, text: str) -> tuple[list[str], list[float], int]:
    found = answers.find({"model": "0", "text": text})
    return [one["name"] for one in found["ranked"]], [one["score"] for one in found["ranked"]], found["compared"]


def test_memory_lets_go_of_what_was_not_asked_for_longest() -> None:
    memory = AnswerCache(10)
    for key in "abc":
        memory.put(key, key.upper(), 4)
    assert (memory.get("a"), memory.get("b"), memory.used) == (None, "B", 8)
    memory.put("d", "D", 4)
    assert (memory.get("c"), memory.get("b")) == (None, "B")
    memory.put("b", "again", 1)
    assert (memory.get("b"), memory.used) == ("again", 5)
    memory.put("large", "L", 99)  # the newest stays, whatever its size
    assert list(memory.entries) == ["large"]


def test_a_click_never_waits_for_the_whole_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of time, each call reads one part more, and the end is the same."""
    at_once = opened(place, "encoder").study.similar(0, 3, 1, 2, 2)
    monkeypatch.setattr(study, "BUDGET", 0)
    monkeypatch.setattr(study, "AT_ONCE", 2)
    patient = opened(place, "encoder").study
    answers = [patient.similar(0, 3, 1, 2, 2) for _ in range(4)]
    assert [one["compared"] for one in answers] == [2, 3, 4, 5]  # the chosen one is known from the start
    answers += [patient.similar(0, 3, 1, 2, 2)]
    assert patient.similar(0, 3, 0, 2, 2)["compared"] == 6  # another layer: all were kept
    assert {one["of"] for one in answers} == {6}
    for one, wanted in zip(answers[-1]["others"], at_once["others"], strict=True):
        assert one["image"] == wanted["image"]
        np.testing.assert_allclose(one["map"], wanted["map"], atol=1e-5)


def test_of_a_large_folder_as_many_are_compared_as_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HALF", 3 * 16 * 32 * 4 + 5)
    few = opened(place, "encoder").study
    found = few.similar(0, 5, 1, 0, 0)
    assert (found["compared"], found["of"], found["folder"]) == (3, 3, 6) and sorted(
        one["image"] for one in found["others"]
    ) == [0, 1, 2]


def test_search_by_a_pair(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By cosine, the right one first; also where each call reads but one picture more."""
    model = aimv2.load_model(place / "pair")
    see = image_transform(model)
    images = torch.stack([see(Image.open(place / "pictures" / f"{name}.png")) for name in NAMES])
    with torch.no_grad():
        cosine = (model.encode_image(images) @ model.encode_text(["a blue one"]).T)[:, 0]
    answers = opened(place, "pair")
    names, scores, compared = found_by(answers, "a blue one")
    assert names == [f"{NAMES[n]}.png" for n in cosine.argsort(descending=True).tolist()] and names[0] == "blue.png"
    np.testing.assert_allclose(scores, cosine.sort(descending=True).values, atol=2e-4)
    assert compared == 6 and "generates none" in answers.about({})["models"][0]["cannot"]["caption"]
    monkeypatch.setattr(search, "BUDGET", 0)
    monkeypatch.setattr(study, "AT_ONCE", 1)
    slow = opened(place, "pair")
    assert [found_by(slow, "a blue one")[2] for _ in range(7)] == [1, 2, 3, 4, 5, 6, 6]
    assert found_by(slow, "a blue one")[0] == names
    assert found_by(slow, "a red one")[0][0] == "red.png"  # the pictures are not read anew


def test_a_pair_searches_vectors_on_disk(place: Path, tmp_path: Path) -> None:
    """A folder that embed wrote: what it holds is what is found, and no picture is encoded."""
    for form in ("npy", "parquet"):
        out = tmp_path / form
        api.embed(str(place / "pair"), str(place / "pictures"), str(out), "attention", format=form, device="cpu")
        answers = opened(place, "pair", out)
        wanted = found_by(opened(place, "pair"), "a green one")
        names, scores, compared = found_by(answers, "a green one")
        assert (names, compared) == (wanted[0], 6) and "stored" in answers.about({})["models"][0]["stored"]
        np.testing.assert_allclose(scores, wanted[1], atol=1e-3)
        assert len(answers.study.cache.entries) == 0
    rows = np.load(tmp_path / "npy" / "features-00000.npy")
    rows[[NAMES.index("green"), NAMES.index("white")]] = rows[[NAMES.index("white"), NAMES.index("green")]]
    np.save(tmp_path / "npy" / "features-00000.npy", rows)
    assert found_by(opened(place, "pair", tmp_path / "npy"), "a green one")[0][0] == "white.png"
    other = opened(place, "encoder", tmp_path / "npy").about({})["models"][0]
    assert other["stored"].startswith("The folder holds features of another model")


def test_a_model_sees_a_large_photograph_as_the_commands_do(place: Path, tmp_path: Path) -> None:
    """Not the copy that is shrunk for the page."""
    values = np.random.default_rng(0).integers(0, 256, (90, 3000, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "wide.png")
    answers = opened(place, "encoder", tmp_path)
    album = answers.study.album
    uploaded = album.upload((tmp_path / "wide.png").read_bytes(), "wide.png").number
    wanted = image_transform(aimv2.load_model(place / "encoder"))(Image.open(tmp_path / "wide.png"))
    for number in (0, uploaded):
        assert torch.equal(answers.study.pixels(0, number), wanted)
        with Image.open(io.BytesIO(album.thumbnail(number))) as small:
            assert max(small.size) == THUMBNAIL
    album.remove(uploaded)


def test_a_click_decodes_no_more_of_a_folder_than_it_has_time_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-size photographs cost more to decode than to encode; each is decoded once, and its size is then known."""
    answers = opened(place, "encoder")
    album, decoded = answers.study.album, list[int]()
    decode = album._decoded
    monkeypatch.setattr(album, "_decoded", lambda number, *side: decoded.append(number) or decode(number, *side))
    monkeypatch.setattr(study, "BUDGET", 0)
    answers.pixels({"model": "0", "image": "4"})
    answers.similarity({"model": "0", "image": "4", "layer": "1", "row": "0", "column": "0"})
    assert decoded == [4, 0]
