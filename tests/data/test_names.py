"""Names in lists against the files that are there: one normal form, then case, then extension; a tie is refused."""

import os
import unicodedata
from pathlib import Path

import pytest

from aimv2.data.images.decode import ImageError
from aimv2.data.images.names import NameFinder, inside, locate
from aimv2.data.shards.format import clean_captions
from aimv2.errors import UsageError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
FILES = ("a/One.JPG", f"a/{NFD}.jpg", "b/two.v1.png", "b/x.jpg", "b/X.jpg", "c/x.png", "dir.v1/plain")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a/One.JPG", ["a/One.JPG"]),
        (f"a/{NFC}.jpg", [f"a/{NFD}.jpg"]),
        (f"A/{NFC.upper()}.JPG", [f"a/{NFD}.jpg"]),
        (r".\a\one.jpg", ["a/One.JPG"]),
        ("a/one.png", ["a/One.JPG"]),  # converted since
        ("b/two.v1", ["b/two.v1.png"]),
        ("b/two", []),
        ("b/x.jpg", ["b/x.jpg"]),  # exactly that one
        ("B/x.JPG", ["b/x.jpg", "b/X.jpg"]),
        ("b/x", ["b/x.jpg"]),
        ("one", []),
        ("dir.v1/plain", ["dir.v1/plain"]),
    ],
)
def test_a_name_is_found_in_its_normal_form_then_without_case_then_by_stem(name: str, found: list[str]) -> None:
    assert NameFinder(FILES).find(name) == found


def test_a_name_without_folders_is_found_anywhere_if_it_is_one() -> None:
    finder = NameFinder(FILES)
    assert finder.find("one", anywhere=True) == ["a/One.JPG"]
    assert finder.find("x.png", anywhere=True) == ["c/x.png"]
    assert finder.find("x", anywhere=True) == ["b/x.jpg", "c/x.png"]


def test_a_path_in_another_form_is_found_on_disk(tmp_path: Path) -> None:
    (tmp_path / NFD).mkdir()
    for name in ("One.JPG", "x.jpg", "X.jpg"):
        (tmp_path / NFD / name).touch()
    assert locate(tmp_path, f"{NFC}/one.jpg") == locate(tmp_path, f"{NFC.upper()}/ONE") == tmp_path / NFD / "One.JPG"
    assert locate(tmp_path, "no/one.jpg") == tmp_path / "no/one.jpg"
    with pytest.raises(ImageError, match=r"several files of that name: X\.jpg, x\.jpg"):
        locate(tmp_path, f"{NFC}/x.JPG")


def test_paths_that_lead_out_need_image_root(tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    for folder in (here, other):
        folder.mkdir()
        (folder / "a.jpg").touch()
    (here / "link.jpg").symlink_to(other / "a.jpg")
    os.symlink(other, here / "linked")
    for name in ("a.jpg", "link.jpg", "linked/a.jpg", "a..jpg"):
        assert inside(here, name) == name
    assert inside(here, "../here/a.jpg") == inside(here, str(here / "a.jpg")) == str(here / "a.jpg")
    for name in (
        "../other/a.jpg",
        str(other / "a.jpg"),
        "x/../../other/a.jpg",
        r"..\other\a.jpg",
        "~/a.jpg",
        "/etc/passwd",
    ):
        with pytest.raises(UsageError, match="give --image-root DIR") as caught:
            inside(here, name)
        assert caught.value.option == "--image-root"
    assert inside(here, "../other/a.jpg", tmp_path) == inside(here, r"..\other\a.jpg", other) == str(other / "a.jpg")
    with pytest.raises(UsageError):
        inside(here, "/etc/passwd", tmp_path)
    with pytest.raises(UsageError):
        inside(here, f"{tmp_path}/herewith/a.jpg")


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "<NA>", " -1 ", ""])
def test_no_value_is_no_caption(word: str) -> None:
    assert clean_captions([word, "a cat"]) == {"caption": ["a cat"]} and clean_captions({"alt": word}) == {}
    assert clean_captions("none of them") == {"caption": ["none of them"]}
