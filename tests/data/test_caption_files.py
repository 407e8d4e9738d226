"""Captions are not made up: a tree of class folders is one, or a line says why it is not and which option settles it."""

import json
from pathlib import Path

import pytest
from brought import picture, put, run

from aimv2.errors import UsageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images 0.jpg to 6.jpg."""
    for number in range(7):
        put(tmp_path / "src" / f"{number}.jpg", picture(number))
    return tmp_path / "src"


CP1251 = "image,caption\na.jpg,кошка на столе\n".encode("cp1251")
LLAVA = json.dumps([{"id": 1, "image": "a.jpg", "conversations": [{"from": "human", "value": "a cat"}]}])
CSV = SIDECAR = "NAME.txt, NAME.caption or NAME.json next to an image of that name"
JSON = "neither COCO captions nor a list of rows"
ROWS = '{"image": "a.jpg"}\n{"image": "b.jpg", "words": "a cat"}\n'
NOT_TAKEN = {  # name: (content, what is said); ``a.jpg`` stands for an image's name
    "captions.csv": (CP1251, "is not UTF-8"),
    "rows.csv": ("file_name,words\na.jpg,a cat\n", "no caption column among file_name, words; give --caption-column"),
    "links.tsv": ("url\tprompt\nhttps://example.org/x/a.jpg?w=1\ta cat\n", "no image column"),
    "upper.csv": ("file,words\nA.JPG,a cat\n", "no caption column"),
    "stems.csv": ("id,words\na,one cat\nb,two dogs\nc,a fox\n", "no image column"),
    "llava.json": (LLAVA, JSON),
    "escaped.json": (
        json.dumps([{"image": "x/a.jpg", "conversations": [{"value": "a cat"}]}]).replace("/", "\\/"),
        JSON,
    ),
    "list.jsonl": (ROWS, "no caption column"),
    "images/a_caption.txt": ("a cat", SIDECAR),
    "images/caption.txt": ("a cat", SIDECAR),
    "metadata.json": ('{"images": "a cat"}', "--captions FILE"),
    "prompts.json": ('{"cat": "a cat"}', JSON),
    "texts/a.txt": ("a cat", SIDECAR),
    "annotations/a.xml": ("<description>a cat</description>", SIDECAR),
    "captions.xlsx": (b"PK\3\4", CSV),
    "rows.csv.gz": (b"\x1f\x8b", CSV),
    "rows.pkl": (b"\x80\4", CSV),
    "captions.yaml": ("a.jpg: a cat\n", CSV),
    "notes.md": ("| a | a cat |\n| b | a dog |\n| c | a fox |\n", CSV),
}
NAMES = {"plain": "abc", "spaces": ["photo (1)", "photo (2)", "Photo, three"], "other letters": ["Übung", "été", "雪"]}


@pytest.mark.parametrize("folders", [("images",), ("first", "second")], ids=["one folder", "two folders"])
@pytest.mark.parametrize("name", NOT_TAKEN)
def test_captions_are_not_made_up_where_a_file_may_hold_them(
    tmp_path: Path, name: str, folders: tuple[str, ...]
) -> None:
    """A class-folder tree is taken only where nothing else could be the captions; ``--class-folders`` settles it."""
    src, (content, why) = tmp_path / "src", NOT_TAKEN[name]
    for number, image in enumerate("abc"):
        put(src / folders[number % len(folders)] / f"{image}.jpg", picture(number))
    name = name.replace("images/", f"{folders[0]}/")
    put(src / name, content)
    with pytest.raises(UsageError) as refused:
        run(src, tmp_path / "out")
    said = str(refused.value)
    assert why in said and "--captions FILE" in said and "\n" not in said
    assert not (tmp_path / "out").exists()
    if "may hold them" in said:
        assert name in said and ("--class-folders" in said) == (len(folders) > 1)
    result = run(src, tmp_path / "out", class_folders=True)
    assert result["train"] == 3 and (tmp_path / "out" / "classes.txt").read_text().split() == list(folders)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("form", ["cp1250", "words", "llava", "jsonl", "bare"])
def test_captions_of_images_of_any_name_are_not_made_up(tmp_path: Path, names: list[str], form: str) -> None:
    """Spaces, brackets, commas, other letters: as cameras, Windows and people name files."""
    src = tmp_path / "src"
    for number, image in enumerate(names):
        put(src / ("one", "two")[number % 2] / f"{image}.jpg", picture(number))
    quoted = [f'"{name}.jpg"' for name in names]
    content: bytes | str = {
        "cp1250": "image,caption\n" + "".join(f"{name},zażółć gęślą jaźń\n" for name in quoted),
        "words": "file_name,words\n" + "".join(f"{name},a cat\n" for name in quoted),
        "llava": json.dumps([{"image": f"{name}.jpg", "conversations": [{"value": "a cat"}]} for name in names]),
        "jsonl": "".join(json.dumps({"image": f"{name}.jpg", "words": "a cat"}) + "\n" for name in names),
        "bare": "id;words\n" + "".join(f"{name};one cat\n" for name in names),
    }[form]
    if form == "cp1250":
        content = str(content).encode("cp1250", "ignore")
    put(src / ("rows.json" if form == "llava" else "rows.jsonl" if form == "jsonl" else "rows.csv"), content)
    with pytest.raises(UsageError, match=r"rows\.\w+ may hold them"):
        run(src, tmp_path / "out")


def test_one_folder_is_no_class(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for number in range(3):
        put(src / "images" / f"{number}.jpg", picture(number))
    with pytest.raises(UsageError, match=r"\(images\): one folder is no class.*--captions FILE, --class-folders"):
        run(src, tmp_path / "out")
    put(src / "masks" / "0.png", picture(1, format="PNG"))
    with pytest.raises(UsageError, match=r"\(images, masks\): their names are no classes"):
        run(src, tmp_path / "out")
    put(src / "loose.jpg", picture(4))
    with pytest.raises(UsageError, match=r"loose\.jpg is in no class folder"):
        run(src, tmp_path / "out", class_folders=True)
    with pytest.raises(UsageError, match="--class-folders: got --captions"):
        run(src, tmp_path / "out", class_folders=True, captions="x.csv")


def test_files_that_hold_no_captions_leave_class_folders_as_they_are(tmp_path: Path) -> None:
    src = tmp_path / "src"
    images = ("n01/n01_1.jpg", "n01/n01_2.jpg", "n02/n02_1.jpg", "n02/7.jpg", "n02/a.jpg")
    for number, name in enumerate(images):
        put(src / name, picture(number))
    put(
        src / "README.md",
        "Two classes, 7 pictures of a cat.\n\n![one of them](n01/n01_1.jpg) See https://example.org\n",
    )
    put(src / "words.txt", "n01\ttench\nn02\tgoldfish, 7\n")
    put(src / "LICENSE", "Permission is granted to a person, 7 days a week")
    put(src / "SHA256SUMS", "".join(f"{'0a1b2c3d' * 8}  {name}\n" for name in images))
    put(src / "train.txt", "".join(f"train/{name}\n" for name in images))
    put(src / "labels.csv", "file,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in images))
    put(src / "numbers.csv", "file,label\n" + "".join(f"{name},{number}\n" for number, name in enumerate(images)))
    put(src / "n01" / "Thumbs.db", b"\0\1\2 n01_1.jpg")
    put(src / ".hidden.csv", "image,caption\nn01_1.jpg,x\n")
    assert run(src, tmp_path / "out")["train"] == 5


def test_a_captions_file_beside_one_that_can_not_be_read_is_not_chosen_in_silence(photos: Path, tmp_path: Path) -> None:
    put(photos / "train.csv", "image,caption\n0.jpg,кошка на столе\n1.jpg,x\n".encode("cp1251"))
    put(photos / "val.csv", "image,caption\n2.jpg,y\n")
    with pytest.raises(UsageError, match=r"val\.csv, and train\.csv, which is not UTF-8"):
        run(photos, tmp_path / "out")
    assert run(photos, tmp_path / "out", captions="val.csv")["train"] == 1
    (photos / "train.csv").unlink()
    put(photos / "README.txt", "Photographié à Orléans, déjà 7 fois".encode("cp1252"))  # it names no image
    put(photos / "one.txt", "x" * 200_000)  # more than csv takes for a field
    assert run(photos, tmp_path / "more")["train"] == 1


def test_sidecars_that_are_no_text_are_rejected_by_name(tmp_path: Path) -> None:
    """Accents of another encoding would be written as question marks into every caption."""
    src = tmp_path / "src"
    for number in range(4):
        put(src / f"{number}.jpg", picture(number))
    put(src / "0.txt", "a café")
    put(src / "1.txt", "кошка".encode("cp1251"))
    put(src / "2.json", '["кошка"]'.encode("cp1251"))
    put(src / "3.json", "a café")
    assert run(src, tmp_path / "out")["train"] == 1
    said = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line.partition(", and")[0] for line in said] == [
        "1.txt is not UTF-8",
        "2.json is not UTF-8",
        "3.json is no JSON",
    ]


def test_captions_of_one_letter_or_sign_are_not_made_up(tmp_path: Path) -> None:
    src = tmp_path / "src"
    names = [f"{kind}/{number}.jpg" for kind in ("cat", "dog") for number in range(2)]
    for number, name in enumerate(names):
        put(src / name, picture(number))
    for sign in ("x", "猫", "🐶"):
        put(src / "cat/caps.csv", "".join(f"{name.rpartition('/')[2]},{sign}\n" for name in names))
        with pytest.raises(UsageError, match=r"caps\.csv"):
            run(src, tmp_path / "out")
