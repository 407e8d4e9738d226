"""Class folders and the names of their classes: joined as numbers or as names, never by chance, alike in import and evaluation."""

import json
import unicodedata
from pathlib import Path

import pytest
from brought import picture, put, run

from aimv2.config.schema import Config, Source
from aimv2.data.images.class_names import by_number, class_folders, class_order, same_class
from aimv2.data.images.opening import open_labelled
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.errors import UsageError
from aimv2.tasks.classify import count_classes

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
NAMES = tuple(f"name{number}" for number in range(12))


def tree(root: Path, folders: list[str], names: list[str] | tuple[str, ...] = ()) -> Path:
    """A picture in each folder."""
    for number, folder in enumerate(folders):
        put(root / folder / "x.png", picture(number))
    if names:
        put(root / "classnames.txt", "\n".join(names))
    return root


def imported(root: Path, out: Path, **options: object) -> dict[str, tuple[str, str]]:
    """{class folder: (label, caption)} of an import."""
    run(root, out, **options)
    samples = [parts for tar in sorted(out.glob("*.tar")) for _, parts in read_samples(tar)]
    return {
        json.loads(parts["json"])["source"].split("/")[0]: (parts["cls"].decode(), parts["txt"].decode())
        for parts in samples
    }


def test_folders_that_are_numbers_are_ordered_and_named_as_numbers(tmp_path: Path) -> None:
    folders = [str(number) for number in range(12)]
    root = tree(tmp_path / "src", folders, NAMES)
    data = open_labelled(str(root), "train")
    assert data is not None and data.classes == NAMES
    assert [(key.split("/")[0], label) for key, label in zip(data.keys, data.labels)] == [(f, int(f)) for f in folders]
    assert imported(root, tmp_path / "out", template="{}") == {f: (f, NAMES[int(f)]) for f in folders}
    assert tuple((tmp_path / "out" / "classes.txt").read_text().split()) == NAMES
    bare = open_labelled(str(tree(tmp_path / "bare", ["10", "9", "08"])), "train")
    assert bare is not None and bare.classes == ("8", "9", "10")


@pytest.mark.parametrize(
    ("folders", "names", "wanted"),
    [
        (["a", "b"], ("x", "y"), [("a", "x"), ("b", "y")]),
        (["1", "2"], ("x", "y"), [("1", "x"), ("2", "y")]),
        (["0", "2"], ("x", "y", "z"), [("0", "x"), ("1", "y"), ("2", "z")]),  # folder n is line n
        ([NFD, "Bee"], ("bee", NFC), [("Bee", "bee"), (NFD, NFC)]),
        ([NFD, "b"], None, [("b", "b"), (NFD, NFC)]),
        (["0", "1"], ("1", "0"), [("1", "1"), ("0", "0")]),
        (["big_dog", "tabby_cat"], ("tabby cat", "Big-Dog"), [("tabby_cat", "tabby cat"), ("big_dog", "Big-Dog")]),
        (["n01440764", "n01443537"], ("n01443537 cod", "n01440764 ray"), [("n01443537", "cod"), ("n01440764", "ray")]),
        (["0", "1", "3"], ("3 bird", "0 ant", "1 car"), [("0", "ant"), ("1", "car"), ("3", "bird")]),
        (["1", "5"], ("1 cent", "5 cent"), [("1", "1 cent"), ("5", "5 cent")]),  # not twice cent
        (["fox", "wolf"], ("grey wolf", "red fox"), [("wolf", "grey wolf"), ("fox", "red fox")]),
        (["c10", "c2"], ("c2: x", "c10: y"), [("c2", "x"), ("c10", "y")]),
        (["dog", "hotdog"], ("a dog", "a hot dog"), [("dog", "a dog"), ("hotdog", "a hot dog")]),
    ],
)
def test_names_are_joined_with_folders(folders: list[str], names: tuple[str, ...] | None, wanted: list) -> None:
    assert class_folders(folders, names, "here") == wanted


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["ant", "bee", "cow"], ("ant", "bee", "dog")),  # by position cow would be a dog
        (["ant", "bee", "cow"], ("ant", "bee")),
        (["1", "2"], ("x", "y", "z")),  # from 0 or from 1?
        (["0", "5"], ("x", "y", "z")),
        (["0", "1", "3"], ("x", "y", "z")),
        (["1", "2", "10"], ("x", "y", "z")),
        (["0", "1", "2"], ("2", "x", "y")),
        (["apple", "bee", "cat", "dog"], ("cat", "dog photo", "an apple", "a bee!")),
        (["ant", "bee", "cow"], ("x", "ant", "y")),
        ([f"class_{number}" for number in range(12)], tuple("abcdefghijkl")),  # class_10 before class_2?
        ([*map(str, range(11)), "more"], tuple("abcdefghijkl")),
        (["1", "01"], None),
        ([NFC, NFD], None),
    ],
)
def test_names_that_do_not_fit_are_refused(folders: list[str], names: tuple[str, ...] | None) -> None:
    with pytest.raises(UsageError):
        class_folders(folders, names, "here")


def test_names_that_begin_with_their_numbers_are_in_that_order(tmp_path: Path) -> None:
    root = tree(tmp_path / "src", ["0", "1", "2"], ("2 bird", "0 ant", "1 car"))
    data = open_labelled(str(root), "train")
    assert data is not None and data.classes == ("ant", "car", "bird") and data.labels.tolist() == [0, 1, 2]
    assert by_number(("1 cent", "0 cent")) == ("1 cent", "0 cent") and by_number(("2: b", "1,a")) == ("a", "b")


def test_folders_that_differ_by_case_only_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class_folders(["Cat", "cat"], None, "here")
    assert "the classes 'Cat' and 'cat' differ by case only" in caplog.text


def test_classes_of_another_split_are_found_by_number_and_in_any_case() -> None:
    assert same_class(["7", "10"], ["010", "7"], "val") == {"10": "010", "7": "7"}
    assert same_class(["Bee", NFD], [NFC, "bee"], "val") == {NFD: NFC, "Bee": "bee"}
    with pytest.raises(UsageError, match="val/cow is a class that train lacks"):
        same_class(["bee"], ["cow"], "val")
    with pytest.raises(UsageError, match="may be of any of the classes"):
        same_class(["bee", "Bee"], ["BEE"], "val")
    assert class_order(["b", "10", "9"], "") == ["10", "9", "b"]


def test_a_split_that_is_imported_by_itself_has_the_labels_of_training(tmp_path: Path) -> None:
    tree(tmp_path / "src" / "train", ["ant", "bee", "cow"])
    tree(tmp_path / "src" / "val", ["bee", "cow"])
    put(tmp_path / "src" / "classes.txt", "An ant\nA bee\nA cow\n")
    assert imported(tmp_path / "src" / "val", tmp_path / "out", template="{}.") == {
        "bee": ("1", "A bee."),
        "cow": ("2", "A cow."),
    }


def test_an_empty_class_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path / "src", ["ant", "cow"])
    (tmp_path / "src" / "bee").mkdir()
    (tmp_path / "src" / "@eaDir").mkdir()
    with pytest.raises(UsageError, match="bee is a class without an image; give it images, or remove"):
        open_labelled(str(tmp_path / "src"), "train")
    assert {label for label, _ in imported(tmp_path / "src", tmp_path / "out").values()} == {"0", "1"}
    assert "bee has no image" in caplog.text and "eaDir" not in caplog.text


def labelled_shards(folder: Path, labels: list[str], names: str = "") -> str:
    folder.mkdir()
    write_shard(folder / "train-0.tar", ((str(i), {"png": b"", "cls": one.encode()}) for i, one in enumerate(labels)))
    if names:
        put(folder / "classes.txt", names)
    return str(folder)


def test_classes_of_shards_are_counted_by_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    config.data.train = named = labelled_shards(tmp_path / "named", ["0", "1", "nan"], "a\nb\nc\n")
    assert count_classes(config) == 3
    assert "no sample of 1 of 3 classes, 2 first" in caplog.text and "1 of 3 samples have no label" in caplog.text
    config.data.train = labelled_shards(tmp_path / "bare", ["0", "4"])
    assert count_classes(config) == 5
    config.data.train = labelled_shards(tmp_path / "beyond", ["0", "2"], "a\nb\n")
    with pytest.raises(UsageError, match=r"label 2 in .*beyond, whose classes\.txt has 2 names"):
        count_classes(config)
    config.data.train = [Source(path=named, name="one"), Source(path=str(tmp_path / "beyond"), name="other")]
    with pytest.raises(UsageError, match="have other classes"):
        count_classes(config)
