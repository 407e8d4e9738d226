"""Texts in the encodings that people have are read, said and never guessed, wherever they stand."""

import io
import logging
import tarfile
from pathlib import Path

import pytest
from brought import picture, put, run
from test_caption_forms import found, photos, rejected

from aimv2.data.images.pictures import pictures
from aimv2.data.text import encoding
from aimv2.data.text.captions import read_captions
from aimv2.errors import UsageError
from aimv2.evals.templates import read_lines

UNKNOWN = {
    "Russian": ("кошка сидит на столе", "cp1251"),
    "Polish": ("zażółć gęślą jaźń", "cp1250"),
    "Czech": ("příliš žluťoučký kůň", "cp1250"),
    "Turkish": ("ağaçların altında, ışık", "cp1254"),
    "Japanese": ("猫がマットの上に座っている", "shift-jis"),
    "Chinese": ("一只猫坐在垫子上", "gbk"),
    "Mac": ("un café à Orléans", "mac-roman"),
    "Slovene": ("rdeč avto", "cp1250"),
    "Polish street": ("dziewczyna na ulicy w mieście", "cp1250"),
    "Hungarian": ("kutya a fűben", "cp1250"),
    "Turkish car": ("kırmızı araba", "cp1254"),
    "Lithuanian": ("žuvis", "cp1257"),
    "Mac Spanish": ("señor", "mac-roman"),
    "Mac word": ("naïve", "mac-roman"),
    "DOS words": ("ô là", "cp850"),
    "Chinese letter": ("的", "gbk"),
    "Japanese letter": ("犬", "shift-jis"),
    "Taiwanese letter": ("狗", "big5"),
    "Russian house": ("дом", "utf-16-le"),
    "DOS": ("un café à la façade", "cp850"),
}
WESTERN = (
    "l’été — «naïve» œuvre",
    "Größe: 40°C",
    "¿Qué? ¡El niño!",
    "smørrebrød på øen",
    "Um cão na praia, com uma criança",
    "Il caffè è sul tavolo della città",
    "Ein Hund – „Größe“ – läuft über die Straße",
    "a man—a woman: the dog runs—quickly… “hello” don’t",
    "the café of a señor in Köln, a piñata and crème brûlée",
    "a “café” in a street of São Paulo, with 5€ for a song by Björk",
)


def test_what_an_encoding_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Windows-1252 and UTF-16 are read, which one line says; what could be several is refused."""
    for text in WESTERN:
        for name in ("cp1252", "utf-16", "utf-8", "utf-8-sig", "utf-16-le", "utf-32"):
            assert encoding.decode_text(text.encode(name), "x.txt") == text
            with encoding.open_text(put(tmp_path / "x.txt", ((text + "\n") * 3).encode(name))) as file:
                assert file.read() == (text + "\n") * 3
    mixed = ("un café " * 9).encode() + ("été " * 9).encode("cp1252")
    for raw in (mixed, b"\x89PNG\r\n\0\0\1", *(text.encode(name) for text, name in UNKNOWN.values())):
        with pytest.raises(encoding.NotText):
            encoding.decode_text(raw, "x.txt")
        with pytest.raises(encoding.NotText):
            encoding.open_text(put(tmp_path / "y.txt", raw))
    encoding.say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    caplog.clear()
    for _ in range(3):
        encoding.decode_text("é".encode("cp1252"), "z.txt")
    assert [record.getMessage() for record in caplog.records] == ["z.txt: read as Windows-1252, not UTF-8"]


def test_pointers_are_no_captions(tmp_path: Path) -> None:
    """What Git LFS leaves in place of a text, a list or a table is called that."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 9\n"
    src = photos(tmp_path / "src", "a.jpg", "b.jpg")
    put(src / "a.txt", pointer)
    put(src / "b.txt", "a cat")
    assert run(src, tmp_path / "out")["train"] == 1 and "Git LFS pointer" in rejected(tmp_path / "out")["a.jpg"]
    for name in ("rows.csv", "rows.jsonl", "rows.json", "rows.parquet"):
        with pytest.raises(UsageError, match="Git LFS pointer") as error:
            run(put(src / "lists" / name, pointer), tmp_path / "no")
        assert error.value.code == "unreadable"


def test_an_encoding_is_found_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 64)
    lines = ["plain words\n"] * 99 + ["un café\n"]
    with encoding.open_text(put(tmp_path / "a.txt", "".join(lines).encode("cp1252"))) as file:
        assert list(file) == lines
    with encoding.open_text(put(tmp_path / "b.txt", "äöü雪".encode() * 99)) as file:  # cut within letters
        assert file.read() == "äöü雪" * 99
    with pytest.raises(encoding.NotText):
        encoding.open_text(put(tmp_path / "c.txt", "".join(["déjà\n", *lines]).encode() + "été\n".encode("cp1252")))
    with pytest.raises(encoding.NotText):  # the other way round
        encoding.open_text(put(tmp_path / "d.txt", "un café\n".encode("cp1252") + "".join([*lines, "déjà\n"]).encode()))


@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "cp1252"])
def test_every_list_is_read_by_one_rule(tmp_path: Path, name: str) -> None:
    """Lists of images, templates and captions: the first line is not lost to a mark, accents are kept."""
    photos(tmp_path, "café.jpg", "b.jpg")
    file = put(tmp_path / "list.txt", "café.jpg\nb.jpg\n".encode(name))
    assert [shown for shown, _ in pictures(str(file))] == ["café.jpg", "b.jpg"]
    assert [len(read()) > 0 for _, read in pictures(str(file))] == [True, True]
    assert read_lines(file, "--classes") == list(read_captions(file)) == ["café.jpg", "b.jpg"]
    put(tmp_path / "list.txt", "кошка.jpg\n".encode("cp1251"))
    for read, option in (
        (lambda: list(pictures(str(file))), "IMAGES"),
        (lambda: list(read_captions(file)), "CAPTIONS"),
    ):
        with pytest.raises(UsageError) as error:
            read()
        assert (error.value.option, error.value.code) == (option, "unreadable")


def test_members_of_tars(tmp_path: Path) -> None:
    members = {
        "a.txt": "un café".encode("cp1252"),
        "b.txt": "un café".encode("utf-16"),
        "c.json": '{"caption": "un café"}'.encode("cp1252"),
        "d.txt": "кошка".encode("cp1251"),
        "e.cls": "7".encode("utf-8-sig"),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            for member, raw in ((f"{name[0]}.jpg", picture()), (name, content)):
                entry = tarfile.TarInfo(member)
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))
    run(tmp_path / "a.tar", tmp_path / "out")
    assert found(tmp_path / "out") == {**{key: {"caption": ["un café"]} for key in "abc"}, "e": {}}
    assert rejected(tmp_path / "out") == {"a.tar/d": f"its .txt {encoding.NOT_TEXT}"}
    assert len([read() for _, read in pictures(str(tmp_path / "a.tar"))]) == 5  # whose captions nobody needs


# ---- options ----


def test_a_word_without_an_end_takes_no_longer_than_its_letters(tmp_path: Path) -> None:
    """A search that began anew at each letter took minutes."""
    (tmp_path / "captions.txt").write_bytes(b"a" * 400_000 + b"\xff\xfe\xfd")
    with pytest.raises(UsageError, match="is not UTF-8"):
        list(read_captions(str(tmp_path / "captions.txt")))
