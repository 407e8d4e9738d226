"""What a label and a name may be: no value is no class, numbers are numbers, names are found in any form, lists stay in their folder."""

from pathlib import Path

import datasets as hf
import numpy as np
import pytest
from test_labelled import encoded, folders, number_in, opened, put, refused, samples, seen, shard

from aimv2.data.images.opening import open_labelled
from aimv2.data.images.tables import RowLayout
from aimv2.data.shards.format import find_shards
from aimv2.errors import UsageError
from aimv2.pipeline.state import matches


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "-1", ""])
def test_no_value_is_no_class(tmp_path: Path, word: str) -> None:
    put(tmp_path / "x.png", encoded(5))
    for labels in (("cat", "dog"), ("0", "1"), ("0.0", "1.0")):
        put(tmp_path / "train.csv", f"path,label\nx.png,{labels[0]}\nx.png,{labels[1]}\nx.png,{word}\n")
        assert "1 of 3 images of train have no label" in refused(tmp_path)
    put(tmp_path / "train.csv", f"path,label\nx.png,cat\nx.png,{word or 'nan'}\n")
    put(tmp_path / "classes.txt", f"cat\n{word or 'nan'}\n")  # then it is one
    assert opened(tmp_path, "train").labels.tolist() == [0, 1]


def test_numbers_that_pandas_wrote_are_numbers(tmp_path: Path) -> None:
    shard(
        tmp_path / "tars" / "train-0.tar",
        [("a.png", encoded(1)), ("a.cls", b"1.0\n"), ("b.png", encoded(2)), ("b.cls", b"0.0")],
    )
    assert opened(tmp_path / "tars", "train").labels.tolist() == [1, 0]
    row = {"image": encoded(1), "text": "a cat", "label": 2.0}
    layout = RowLayout("image", {"text": "caption"}, "label")
    assert layout.sample(row, tmp_path).label == "2"
    assert layout.sample({**row, "label": float("nan")}, tmp_path).label is None
    put(tmp_path / "x.png", encoded(5))
    put(tmp_path / "train.csv", "path,label\n" + "".join(f"x.png,{n}.0\n" for n in range(11)))
    assert opened(tmp_path, "train").labels.tolist() == list(range(11))
    put(tmp_path / "train.csv", "path,label\nx.png,1.5\nx.png,.5\nx.png,1\n")
    assert "label 1.5: one label an image expected, a whole number or a name" in refused(tmp_path)
    table = hf.Dataset.from_dict(
        {"image": [{"bytes": encoded(1), "path": None}] * 3, "label": [1.0, 0.0, float("nan")]}
    )
    table.save_to_disk(tmp_path / "saved")
    assert "1 of 3 images of train have no label" in refused(tmp_path / "saved")
    table.select([0, 1]).save_to_disk(tmp_path / "good")
    assert opened(tmp_path / "good", "train").labels.tolist() == [1, 0]
    half = hf.Dataset.from_dict({"image": [{"bytes": encoded(1), "path": None}] * 2, "label": [[0, 1], [1]]})
    half.save_to_disk(tmp_path / "several")
    assert "one label an image expected" in refused(tmp_path / "several")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("cat|dog|cat dog", "the class 'cat dog' is 2 other classes in one"),
        ("Cat|dog|cat", "the classes 'Cat' and 'cat' differ by case only"),
        ("apple pie|pie|tart", ""),
    ],
)
def test_classes_that_look_like_several_are_said(
    tmp_path: Path, labels: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "x.png", encoded(5))
    put(tmp_path / "train.csv", "path,label\n" + "".join(f"x.png,{label}\n" for label in labels.split("|")))
    assert len(opened(tmp_path, "train").classes) == 3
    assert (said in caplog.text) if said else not caplog.text
    put(tmp_path / "train.csv", "path,label\nx.png,0\nx.png,1\nx.png,0 1\n")
    assert "'0 1': several labels of one image" in refused(tmp_path)


def test_lists_and_files_are_joined_in_any_case_and_normal_form(tmp_path: Path) -> None:
    put(tmp_path / "pics" / "Cafe\u0301.PNG", encoded(5))
    put(tmp_path / "pics" / "Fee\u0301.PNG", encoded(6))
    put(tmp_path / "train.csv", "path,label\nPics/caf\u00e9.png,Ant\npics/fe\u00e9.jpg,be\u0301e\n")
    put(tmp_path / "test.csv", "path,label\npics/CAF\u00c9.png,B\u00c9E\n")
    train = opened(tmp_path, "train")
    assert [number_in(train.image(row)) for row in (0, 1)] == [5, 6] and train.classes == ("Ant", "b\u00e9e")
    assert opened(tmp_path, "test").labels.tolist() == [1]
    before = train.image.contents(np.arange(1))  # type: ignore[attr-defined]
    put(tmp_path / "pics" / "Cafe\u0301.PNG", encoded(5) + b"longer")
    assert train.image.contents(np.arange(1)) != before  # type: ignore[attr-defined]


def test_lists_lead_out_of_their_folder_with_image_root_only(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", encoded(7))
    (tmp_path / "lists" / "linked").mkdir(parents=True)
    (tmp_path / "lists" / "linked" / "b.png").symlink_to(tmp_path / "images" / "a.png")
    for path in ("../images/a.png", str(tmp_path / "images" / "a.png")):
        put(tmp_path / "lists" / "train.csv", f"path,label\n{path},0\nlinked/b.png,1\n")
        with pytest.raises(UsageError, match="give --image-root DIR") as caught:
            open_labelled(str(tmp_path / "lists"), "train")
        assert caught.value.option == "--image-root"
        data = open_labelled(str(tmp_path / "lists"), "train", image_root=str(tmp_path / "images"))
        assert data is not None and [number_in(data.image(row)) for row in (0, 1)] == [7, 7]
    put(tmp_path / "lists" / "train.csv", "path,label\na.png,0\nlinked/b.png,1\n")
    data = open_labelled(str(tmp_path / "lists"), "train", image_root=str(tmp_path / "images"))
    assert data is not None and number_in(data.image(0)) == 7
    with pytest.raises(UsageError, match=r"--image-root .*no such folder"):
        open_labelled(str(tmp_path / "lists"), "train", image_root=str(tmp_path / "no"))


def test_a_path_with_marks_of_patterns_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets, braces and asterisks in names of folders that are there; patterns below them are patterns."""
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "odd[1] {a,b} *x"
    shard(root / "train-000000.tar", samples([0, 1]))
    shard(root / "test-000000.tar", samples([1, 0]))
    tars = [root / "test-000000.tar", root / "train-000000.tar"]
    for source in (root, tars[1], f"{root}/train-*.tar", f"{root}/{{train,test}}-000000.tar", f"{root}/t?[a-r]*"):
        assert opened(source, "train").labels.tolist() == [0, 1]
    assert find_shards(f"{root}/{{train,test}}-00000[0-3].tar", "train") == matches(f"{root}/*.tar") == tars
    assert matches(str(root)) == [root]
    table = hf.Dataset.from_dict({"image": [{"bytes": encoded(1), "path": None}] * 2, "label": [0, 1]})
    for split in ("train", "validation"):
        (root / "table").mkdir(exist_ok=True)
        table.to_parquet(str(root / "table" / f"{split}-00000-of-00001.parquet"))
    assert seen(opened(root / "table", "train")) == [("train-00000000", 0, 1), ("train-00000001", 1, 1)]
    assert len(opened(root / "table", "test").labels) == 2
    put(root / "list" / "train.csv", "path,label\nx[1].png,0\nx[1].png,1\n")
    put(root / "list" / "x[1].png", encoded(3))
    assert seen(opened(root / "list" / "train.csv", "train"))[0] == ("x[1].png", 0, 3)
    folders(root / "classes", "train", {"a*": 1, "b[3]": 1})
    assert opened(root / "classes", "train").classes == ("a*", "b[3]")


def test_paths_in_a_table_start_at_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    put(tmp_path / "images" / "a.png", encoded(9))
    put(tmp_path / "table" / "inner" / "b.png", encoded(4))
    paths = ["inner/B.PNG", str(tmp_path / "images" / "a.png")]
    hf.Dataset.from_dict({"image": paths, "label": [0, 1]}).save_to_disk(tmp_path / "table")
    with pytest.raises(UsageError, match="give --image-root DIR"):
        opened(tmp_path / "table", "train")
    allowed = open_labelled(str(tmp_path / "table"), "train", image_root=str(tmp_path / "images"))
    assert allowed is not None and [number_in(allowed.image(row)) for row in (0, 1)] == [4, 9]
