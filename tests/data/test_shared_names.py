"""Several names that mean one file: only the one that is exactly its own gets it, in every list."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, put, run

from aimv2.data.images.captioned import open_captioned
from aimv2.data.images.decode import ImageError
from aimv2.data.images.names import NameFinder
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.pictures import pictures
from aimv2.data.images.readers import ImageFiles
from aimv2.data.shards.format import read_samples
from aimv2.errors import UsageError


def captions(out: Path) -> dict[str, list[str]]:
    return {
        key: json.loads(parts["json"])["captions"]["caption"]
        for tar in sorted(out.glob("*.tar"))
        for key, parts in read_samples(tar)
    }


def refused(out: Path) -> list[str]:
    return [json.loads(line)["image"] for line in (out / "rejected.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("rows", "kept", "lost"),
    [
        ("a.png,png\na.jpg,jpg\nB.jpg,b\n", {"a": ["jpg"], "B": ["b"]}, ["a.png"]),
        ("A.jpg,upper\na.jpg,lower\nb.jpg,b\n", {"a": ["lower"], "b": ["b"]}, ["A.jpg"]),
        ("A.jpg,upper\na.png,png\nb.jpg,b\n", {"b": ["b"]}, ["A.jpg", "a.png", "a.jpg"]),
    ],
)
def test_a_captions_file_gives_an_image_to_its_own_name_only(tmp_path: Path, rows: str, kept: dict, lost: list) -> None:
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / "src" / name, picture(1))
    put(tmp_path / "src/caps.csv", f"image,caption\n{rows}")
    run(tmp_path / "src", tmp_path / "out")
    assert captions(tmp_path / "out") == kept
    assert [name for name in refused(tmp_path / "out") if name != "b.jpg"] == lost


def test_captions_of_missing_images_go_to_no_other_folders_image(tmp_path: Path) -> None:
    for name in ("catA/001.jpg", "catA/002.jpg", "images/003.jpg"):
        put(tmp_path / "src" / name, picture(1))
    rows = "catA/001.jpg,A1\ncatB/001.jpg,B1\ncatZ/002.jpg,Z2\n002.jpg,A2\nset/images/003.jpg,three\n"
    put(tmp_path / "src/caps.csv", f"image,caption\n{rows}")
    run(tmp_path / "src", tmp_path / "out")
    kept = {"catA_001": ["A1"], "002": ["A2"], "set_images_003": ["three"]}
    assert captions(tmp_path / "out") == kept
    assert refused(tmp_path / "out") == ["catB/001.jpg", "catZ/002.jpg"]
    finder = NameFinder(["x/y/a.jpg", "z/a.jpg"])
    assert finder.find("y/A.png", anywhere=True) == finder.find("w/x/y/a", anywhere=True) == ["x/y/a.jpg"]
    assert finder.find("xy/a.jpg", anywhere=True) == [] and len(finder.find("a.jpg", anywhere=True)) == 2


def test_a_sidecar_of_two_images_is_that_of_its_own_name(tmp_path: Path) -> None:
    for name in ("A.jpg", "a.jpg", "B.jpg", "c.jpg", "c.png"):
        put(tmp_path / "src" / name, picture(1))
    for name in ("A", "b", "c"):
        put(tmp_path / f"src/{name}.txt", f"cap {name}")
    run(tmp_path / "src", tmp_path / "out")
    assert captions(tmp_path / "out") == {"A": ["cap A"], "B": ["cap b"], "c": ["cap c"], "c-2": ["cap c"]}
    assert refused(tmp_path / "out") == ["a.jpg"]


def test_a_list_gives_an_image_to_its_own_name_only(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        put(tmp_path / name, picture(1))
    put(tmp_path / "list.txt", "a.png\na.jpg\nB.JPG\nC.jpg\nc\n")
    names = ["a.png", "a.jpg", "B.JPG", "C.jpg", "c"]
    images, listed = ImageFiles(tmp_path, names), dict(pictures(str(tmp_path / "list.txt")))
    for row, name in enumerate(names):
        if name in ("a.jpg", "B.JPG"):
            assert images(row).size and listed[name]()
        else:
            with pytest.raises(ImageError, match="another name means"):
                images(row)
            with pytest.raises(ImageError, match="another name means"):
                listed[name]()


# ---- names that no file can have, and paths of tables ----


def test_names_too_long_or_with_a_zero_byte_are_no_such_file(tmp_path: Path) -> None:
    names = ["a.jpg", f"{'x' * 300}.jpg", "y\0z.jpg"]
    put(tmp_path / "csv/a.jpg", picture(1))
    put(tmp_path / "csv/caps.csv", "image,caption\n" + "".join(f"{name},c\n" for name in names))
    run(tmp_path / "csv", tmp_path / "out")
    assert list(captions(tmp_path / "out")) == ["a"] and len(refused(tmp_path / "out")) == 2
    put(tmp_path / "table/a.jpg", picture(1))
    pq.write_table(pa.table({"image": names, "caption": list("abc")}), tmp_path / "table/t.parquet")
    run(tmp_path / "table", tmp_path / "out2")
    assert len(captions(tmp_path / "out2")) == 1 and len(refused(tmp_path / "out2")) == 2
    images = ImageFiles(tmp_path / "csv", names)
    assert images(0).size == (24, 16) and images.contents(np.arange(3))
    for row in (1, 2):
        with pytest.raises(ImageError):
            images(row)
    put(tmp_path / "csv/train.csv", f"path,label\na.jpg,0\n{names[1]},1\n")
    assert open_labelled(str(tmp_path / "csv/train.csv"), "train") is not None


def rows_of(tmp_path: Path, cells: list) -> None:
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "train.parquet")


@pytest.mark.parametrize("form", [str, lambda name: {"bytes": None, "path": name}, lambda name: [name]])
def test_the_images_of_a_table_are_marked_where_it_lies(tmp_path: Path, form: type) -> None:
    for name in ("i/0.jpg", "i/1.jpg"):
        put(tmp_path / name, picture(1))
    rows_of(tmp_path, [form("i/0.jpg"), form("i/1.jpg")])
    data = open_labelled(str(tmp_path), "train")
    assert data is not None
    before = data.image.contents(np.arange(2))
    assert data.image.contents(np.arange(2)) == before
    put(tmp_path / "i/0.jpg", b"another")
    assert data.image.contents(np.arange(2)) != before


def test_base64_of_small_images_is_no_path(tmp_path: Path) -> None:
    import base64

    buffer = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(buffer, "BMP")
    rows_of(tmp_path, [base64.b64encode(buffer.getvalue()).decode(), base64.b64encode(picture(2)).decode()])
    data = open_labelled(str(tmp_path), "train")
    assert data is not None and data.image(0).size == (16, 16) and data.image(1).size == (24, 16)
    assert data.image.contents(np.arange(2))


def test_rows_of_a_hub_data_set_name_files_of_its_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("home/datasets/a.jpg", "work/b.jpg"):
        put(tmp_path / name, picture(1))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "home/datasets"))
    monkeypatch.chdir(tmp_path / "work")
    inner, outer = str(tmp_path / "home/datasets/a.jpg"), str(tmp_path / "work/b.jpg")

    def load(name: str, split: str | None = None) -> object:
        rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]})
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    cells = [inner, "b.jpg"]
    data = open_labelled("someone/images", "train")
    assert data is not None and data.image(0).size == (24, 16)
    with pytest.raises(ImageError, match="cannot be read"):
        data.image(1)  # of the working folder
    cells = [inner, outer]
    with pytest.raises(UsageError) as caught:
        open_labelled("someone/images", "train")
    assert caught.value.option == "--image-root"
    data = open_labelled("someone/images", "train", image_root=str(tmp_path / "work"))
    assert data is not None and data.image(0).size == data.image(1).size


def test_captions_that_lead_out_name_their_file_and_what_can_be_done(tmp_path: Path) -> None:
    put(tmp_path / "src/a.jpg", picture(1))
    put(tmp_path / "other/b.jpg", picture(1))
    put(tmp_path / "src/caps.csv", f"image,caption\na.jpg,a\n{tmp_path}/other/b.jpg,b\n")
    with pytest.raises(UsageError, match=r"^--data .*in caps\.csv.*import it first") as caught:
        open_captioned(str(tmp_path / "src"))
    assert caught.value.option == "--data"


@pytest.mark.parametrize("form", [str, lambda name: {"bytes": None, "path": name}])
def test_a_table_that_leads_out_is_refused_as_a_captions_file_is(tmp_path: Path, form: type) -> None:
    put(tmp_path / "other/b.jpg", picture(1))
    cells = [form(str(tmp_path / "other/b.jpg"))] * 2
    table = tmp_path / "src/train.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"image": cells, "caption": ["a", "b"], "label": [0, 1]}), table)
    for source in (table.parent, table):
        with pytest.raises(UsageError) as caught:
            run(source, tmp_path / "out")
        assert caught.value.option == "--image-root" and not list((tmp_path / "out").glob("*.tar"))
    with pytest.raises(UsageError) as caught:
        open_labelled(str(table.parent), "train")
    assert caught.value.option == "--image-root"
    assert run(table, tmp_path / "out", image_root=str(tmp_path / "other"))["rejected"] == 0
