"""Labelled tables are read as the library `datasets` reads them, and without it."""

import io
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aimv2.data.images import table_rows
from aimv2.data.images.labelled import Labelled
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.tables import row_groups
from aimv2.errors import UsageError

CLASSES = ["cow", "ant", "bee"]
FEATURES = hf.Features({"photo": hf.Image(), "text": hf.Value("string"), "kind": hf.ClassLabel(names=CLASSES)})
HEAD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {}\n    path: {}\n  - split: test\n    path: b/**\n---\n# Photos\n"


def encoded(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (number, 0, 0)).save(out, "png")
    return out.getvalue()


def table(count: int, start: int = 0, features: hf.Features = FEATURES) -> hf.Dataset:
    """Images of colours ``start``, ..., with kinds 0, 1, 2, 0, ..."""
    cells = [{"bytes": encoded(start + i), "path": f"{i}.png"} for i in range(count)]
    kinds = [(start + i) % 3 for i in range(count)]
    return hf.Dataset.from_dict({"photo": cells, "text": ["x"] * count, "kind": kinds}, features)


def opened(source: Path, split: str = "train") -> Labelled:
    data = open_labelled(str(source), split)  # type: ignore[arg-type]
    assert data is not None
    return data


def seen(data: Labelled) -> list[tuple[int, int]]:
    return [(int(label), data.image(row).getpixel((2, 2))[0]) for row, label in enumerate(data.labels)]


@pytest.mark.parametrize(
    ("names", "head", "counts"),
    [
        (
            ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001", "train-x"],
            "",
            [2, 1],
        ),
        (["train/b", "train/a", "my test/10", "test.odd/inner/train"], "", [2, 2]),
        (["b-training-1", "training.2", "a_train", "x/dev-a", "eval.1", "trainer"], "", [3, 1, 1]),
        (["some", "any/more", "__aside/other", ".hidden"], "", [2]),
        (["a/one", "a/two", "b/inner/train", "c/test"], HEAD.format("train", "a/*"), [2, 1]),
    ],
)
def test_files_are_those_of_the_library(
    names: list[str], head: str, counts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "photos"
    root.mkdir()
    table(3).to_parquet(root / "one.parquet")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.parquet").hardlink_to(root / "one.parquet")
    (root / "one.parquet").unlink()
    if head:
        (root / "README.md").write_text(head)
    wanted = hf.load_dataset_builder(str(root)).config.data_files
    found = table_rows.parquet_splits(root)
    assert {split: list(map(str, files)) for split, files in found.items()} == dict(wanted)
    assert list(found) == list(wanted) and list(map(len, found.values())) == counts


def test_rows_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "photos"
    (root / "data").mkdir(parents=True)
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        table(3, 5 * number).to_parquet(root / "data" / f"{name}.parquet")
    wanted = hf.load_dataset(str(root))
    for split, name in (("train", "train"), ("test", "validation")):
        data, rows = opened(root, split), wanted[name]
        assert list(data.classes) == rows.features["kind"].names == CLASSES
        assert seen(data) == [(row["kind"], row["photo"].getpixel((2, 2))[0]) for row in rows]


def test_neither_the_library_nor_pandas_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parquet").mkdir()
    parts = {"train": table(5), "test": table(4, 20)}
    for split, rows in parts.items():
        rows.to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    hf.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    for package in ("datasets", "pandas"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("parquet", "saved"):
        for split, start, count in (("train", 0, 5), ("test", 20, 4)):
            data = opened(tmp_path / name, split)
            assert list(data.classes) == CLASSES
            assert seen(data) == [((start + i) % 3, start + i) for i in range(count)]
    (tmp_path / "saved" / "train" / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not a folder of `save_to_disk`: state\.json"):
        opened(tmp_path / "saved")
    with pytest.raises(UsageError) as caught:
        (tmp_path / "parquet" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
        opened(tmp_path / "parquet")
    assert caught.value.code == "unreadable" and caught.value.option == "--data"


@pytest.mark.parametrize("large", [False, True])
def test_any_row_in_any_order(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of row groups that are kept and let go, and of a file with large ones, which is copied."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(2):
        rows = table(60, 60 * number, FEATURES).data.table
        pq.write_table(rows, root / f"train-{number}.parquet", row_group_size=60 if large else 7)
    monkeypatch.setattr(table_rows, "HELD", 3_000)
    monkeypatch.setattr(table_rows, "LARGE", 2_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table_rows, "paths_of", lambda cells: pytest.fail("images are read to find paths"))
    data = opened(root)
    order = list(range(120))
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(image := pickle.loads(pickle.dumps(data)).image, order))
    assert [each.getpixel((2, 2))[0] for each in found] == order
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2 * large
    held = [cells.nbytes for cells in image.cells._held.groups.values()]
    assert len(held) == 2 if large else len(held) > 1 and sum(held) <= 3_000


def test_a_row_group_is_read_in_part(tmp_path: Path) -> None:
    rows = {"image": pa.array([random.Random(i).randbytes(10_000) for i in range(1000)], pa.binary())}
    options = {"write_batch_size": 16, "use_dictionary": False, "data_page_size": 200_000, "compression": "none"}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet", **options)
    size, before = rows["image"].nbytes, pa.total_allocated_bytes()
    for count, read in row_groups(tmp_path / "train.parquet"):
        assert count == 1000
        for batch in read(["image"]):
            assert batch.num_rows <= 128 and pa.total_allocated_bytes() - before < size / 2


def test_rows_that_state_their_split(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(i), "path": None} for i in range(6)]
    rows = {"image": cells, "label": list("ababab"), "split": ["train", "test"] * 3}
    pq.write_table(pa.table(rows), tmp_path / "all.parquet", row_group_size=2)
    with pytest.raises(UsageError, match="one class"):
        opened(tmp_path)
    pq.write_table(pa.table({**rows, "label": list("aabbab")}), tmp_path / "all.parquet", row_group_size=2)
    assert seen(opened(tmp_path)) == [(0, 0), (1, 2), (0, 4)] and seen(opened(tmp_path, "test"))[1] == (1, 3)
    assert opened(tmp_path).image.contents(np.arange(3))  # type: ignore[attr-defined]


def test_what_cannot_be_one_table_is_refused(tmp_path: Path) -> None:
    for name in ("fine", "coarse"):
        (tmp_path / name).mkdir()
        table(3).to_parquet(tmp_path / name / "train-0.parquet")
    config = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{config.format('fine')}{config.format('coarse')}---\n")
    with pytest.raises(UsageError, match="states the configurations fine, coarse; give the folder of one"):
        opened(tmp_path)
    assert len(opened(tmp_path / "fine").labels) == 3
    pq.write_table(pa.table({"image": [encoded(1)]}), tmp_path / "fine" / "train-1.parquet")
    with pytest.raises(UsageError, match=r"train-1\.parquet has not the columns of the first file"):
        opened(tmp_path / "fine")
