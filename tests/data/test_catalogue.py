"""One rule for every command: what a source is, which files are its images, which column holds what."""

import json
from pathlib import Path

import datasets as hf
import numpy as np
import pytest
from brought import picture, put, run

from aimv2 import io
from aimv2.data.images.captioned import open_captioned, read_captioned
from aimv2.data.images.catalogue import COLUMNS, Columns, find_column, kind_of, walk
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.pictures import pictures
from aimv2.data.images.sources import SourceOptions, open_source
from aimv2.data.shards.format import read_samples
from aimv2.data.text.captions import read_captions
from aimv2.errors import UsageError

FEATURES = {"image": hf.Image(), "text": hf.Value("string")}
COUNT = 6


def labels_of_import(source: Path, out: Path) -> list[str | None]:
    """KEY.cls of every imported sample."""
    run(source, out)
    samples = [parts for tar in sorted(out.glob("*.tar")) for _, parts in read_samples(tar)]
    return [parts["cls"].decode() if "cls" in parts else None for parts in samples]


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"cls": hf.Value("int64"), "class": hf.Value("int64")}, "class"),
        ({"category": hf.Value("int64"), "target": hf.Value("int64"), "cls": hf.Value("int64")}, "target"),
        ({"labels": hf.Value("int64"), "label": hf.Value("int64")}, "label"),
        ({"coarse_label": hf.ClassLabel(3), "fine_label": hf.ClassLabel(3)}, "fine_label"),
        ({"species": hf.ClassLabel(3), "other": hf.Value("int64")}, "species"),
        ({"label": hf.Value("int64"), "species": hf.ClassLabel(3)}, "species"),
    ],
)
def test_import_and_evaluation_read_the_same_label_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict, wanted: str
) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    values = {name: rng.permutation([0, 1, 2, 0, 1, 2]).tolist() for name in columns}
    cells = [{"bytes": picture(number), "path": None} for number in range(COUNT)]
    table = hf.Dataset.from_dict(
        {"image": cells, "text": ["a cat"] * COUNT, **values}, hf.Features({**FEATURES, **columns})
    )
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert labels_of_import(tmp_path / "parquet", tmp_path / "a") == list(map(str, values[wanted]))
    assert labels_of_import(tmp_path / "saved", tmp_path / "b") == list(map(str, values[wanted]))
    for name in ("parquet", "saved"):
        data = open_labelled(str(tmp_path / name), "train")
        assert data is not None and data.labels.tolist() == values[wanted]


def test_columns_are_found_by_type_then_by_name() -> None:
    assert find_column(["Label ", "cls"], "label") == "Label "
    assert find_column(["id", "cls"], "label") == "cls"
    assert find_column(["a", "b"], "label", {"a": "ClassLabel", "b": "ClassLabel"}) is None
    assert find_column(["photo", "path"], "image", {"photo": "Image"}) == "photo"
    assert Columns().find(["photo", "Text"], "x", {"photo": "Image"}) == ("photo", {"Text": "caption"})
    for columns, names in (
        (Columns(), ["text"]),
        (Columns("lost"), ["image", "text"]),
        (Columns(), ["image"]),
        (Columns(captions=("lost",)), ["image", "text"]),
    ):
        with pytest.raises(UsageError) as error:
            columns.find(names, "x")
        assert error.value.code == "missing"
        assert error.value.option == ("--image-column" if "image column" in str(error.value) else "--caption-column")


@pytest.mark.parametrize("column", COLUMNS["caption"])
def test_import_and_tokenizers_read_the_same_caption_columns(tmp_path: Path, column: str) -> None:
    put(tmp_path / "src" / "0.jpg", picture())
    put(tmp_path / "src" / "c.csv", f"image;{column}\n0.jpg;a, b\n")
    run(tmp_path / "src", tmp_path / "out")
    ((_, parts),) = read_samples(tmp_path / "out" / "train-000000.tar")
    assert json.loads(parts["json"])["captions"] == {"caption": ["a, b"]}
    assert list(read_captions(tmp_path / "src" / "c.csv")) == ["a, b"]


def test_every_command_finds_the_same_images(tmp_path: Path) -> None:
    """Hidden names, a Mac's archive folder and ways back are left out, links to other folders are followed."""
    src = tmp_path / "src"
    for number, name in enumerate(
        ("b/1.jpg", "b/2.PNG", "a.jpg", "B/3.jpg", ".d/4.jpg", "b/._1.jpg", "__MACOSX/5.jpg")
    ):
        put(src / name, picture(number))
    put(tmp_path / "elsewhere" / "6.jpg", picture(6))
    (src / "linked").symlink_to(tmp_path / "elsewhere")
    (src / "b" / "back").symlink_to(src)
    (src / "b" / "loop").symlink_to(src / "b" / "loop")
    put(src / "c.csv", "image,caption\n" + "".join(f"{n}.jpg,x\n" for n in range(7)))
    names = ["B/3.jpg", "a.jpg", "b/1.jpg", "b/2.PNG", "linked/6.jpg"]
    assert sorted(walk(src)) == [name for name, _ in pictures(str(src))] == names
    assert run(src, tmp_path / "out")["train"] == 4  # 2.jpg is 2.PNG, by its stem
    assert list(walk(src, "linked/")) == ["linked/6.jpg"]


def test_kinds_of_sources(tmp_path: Path) -> None:
    put(tmp_path / "odd[1].csv", "image,label\n")
    kinds = {
        "": "folder",
        "odd[1].csv": "file",
        "x-{0..3}.tar": "tars",
        "*.tar": "tars",
        "x*": "tars",
        "none": "missing",
    }
    assert {name: kind_of(f"{tmp_path}/{name}")[0] for name in kinds} == kinds
    assert kind_of("nobody/photographs")[0] == "hub" and kind_of("src/photographs/x")[0] == "missing"


def test_listing_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        put(tmp_path / "classes" / "train" / ("ant", "bee")[number % 2] / f"{number}.jpg", picture(number))
        put(tmp_path / "sidecars" / f"{number}.jpg", picture(number))
        put(tmp_path / "sidecars" / f"{number}.txt", "a cat")
    run(tmp_path / "sidecars", tmp_path / "tars")
    opened = list[str]()

    def read_file(path: Path, *most: int) -> bytes:
        opened.append(path.name)
        return io.read_file(path, *most)

    for module in ("entries", "decode"):
        monkeypatch.setattr(f"aimv2.data.images.{module}.read_file", read_file)
    monkeypatch.setattr("aimv2.data.images.entries.read_sample", lambda tar, *span: opened.append(tar.name))
    options = SourceOptions()
    for name in ("classes/train", "sidecars", "tars"):
        assert (
            len(list(pictures(str(tmp_path / name))))
            == len(list(open_source(str(tmp_path / name), options).items))
            == 4
        )
    assert open_labelled(str(tmp_path / "classes"), "train") is not None
    entries = [*open_captioned(str(tmp_path / "sidecars"))[0], *open_captioned(str(tmp_path / "tars"))[0]]
    assert len(entries) == 8 and not opened
    read_captioned(entries[0])
    assert opened[0] == "0.jpg"
