"""What an import leaves out is counted, and labels of every form are read or counted."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, put, run
from shard_tars import tar_of

from aimv2.data.images.catalogue import DIALOGUES
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.pictures import pictures
from aimv2.data.passed import PassedOver
from aimv2.data.shards.check import check_data
from aimv2.data.shards.format import captions_by_field, read_samples
from aimv2.data.shards.index import build_index
from aimv2.errors import UsageError


def labels(out: Path) -> list[str | None]:
    tars = sorted(out.glob("train-*.tar"))
    return [parts["cls"].decode() if "cls" in parts else None for tar in tars for _, parts in read_samples(tar)]


def counted(result: dict) -> dict[str, int]:
    return {kind: about["number"] for kind, about in result["passed_over"].items()}


ODD = "labels that are no whole number from 0"


@pytest.mark.parametrize(
    ("cells", "read", "odd"),
    [
        ([True, False, None], ["1", "0", None], 0),
        (["cat", "2", ""], [None, "2", None], 1),
        ([1.5, 1.0, None], [None, "1", None], 1),
        ([-1, 3, 0], [None, "3", "0"], 1),
    ],
)
def test_labels_of_tables(tmp_path: Path, cells: list, read: list, odd: int) -> None:
    (tmp_path / "src").mkdir()
    rows = {"image": [picture(n) for n in range(3)], "caption": ["one", "two", "three"], "label": cells}
    pq.write_table(pa.table(rows), tmp_path / "src" / "t.parquet")
    result = run(tmp_path / "src", tmp_path / "out")
    assert labels(tmp_path / "out") == read and counted(result).get(ODD, 0) == odd


def test_labels_of_tars(tmp_path: Path) -> None:
    cells = [b"1.0\n", b"cat", b"-1", b"7"]
    members = [
        (f"{n}.{kind}", content)
        for n, cell in enumerate(cells)
        for kind, content in (("cls", cell), ("jpg", picture(n)), ("txt", b"words"))
    ]
    (tmp_path / "src").mkdir()
    tar_of(tmp_path / "src" / "0.tar", members)
    checked = check_data(tmp_path / "src")
    assert checked["labels"] == 2 and counted(checked) == {ODD: 2}
    for shard_size in (1, 4):  # the counts of shards come together
        result = run(tmp_path / "src", tmp_path / f"out{shard_size}", shard_size=shard_size)
        assert labels(tmp_path / f"out{shard_size}") == ["1", None, None, "7"] and counted(result) == {ODD: 2}
    assert result["passed_over"][ODD]["examples"] == ["cat", "-1"]


def test_members_beside_the_one_that_is_read(tmp_path: Path) -> None:
    image = picture(1)
    members = [("a.jpg", image), ("a.png", image), ("a.seg.png", image), ("a.txt", b"a dog"), ("a.short.txt", b"dog")]
    members += [("a.json", b"{}"), ("a.blip.json", b"{}"), ("b.jpg", image), ("b.caption", b"a cat")]
    members += [("c.jpg", image), ("c.x.txt", b"one"), ("c.y.txt", b"two")]
    (tmp_path / "src").mkdir()
    tar_of(tmp_path / "src" / "0.tar", members)
    result = run(tmp_path / "src", tmp_path / "out")
    assert counted(result) == {"members next to another of their kind, which is read": 4}
    texts = {key: parts["txt"].decode() for key, parts in read_samples(tmp_path / "out" / "train-000000.tar")}
    assert texts == {"a": "a dog", "b": "a cat", "c": "one"}


def test_files_beside_tars(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("train-0.tar", "sub/1.tar"):
        tar_of(tmp_path / name, [("a.jpg", picture(1)), ("a.txt", b"words")])
    (tmp_path / "dead.tar").symlink_to("nowhere.tar")
    put(tmp_path / "x.cr2", b"x")
    put(tmp_path / "sub" / "list.csv", "image,caption\n")
    others = {"files of other kinds": 1, "archives that are not read here": 2}
    assert {*others.items()} <= {*counted(check_data(tmp_path)).items()}
    (tmp_path / "dead.tar").unlink()
    passed = PassedOver()
    assert len(list(pictures(str(tmp_path), passed=passed))) == 1
    assert {"files of other kinds", "archives that are not read here"} <= passed.result().keys()


def test_annotations_of_no_image_and_fields_of_equal_keys(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a.jpg", picture(1))
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": n, "caption": "c"} for n in (1, 2, 2)],
    }
    put(tmp_path / "src" / "captions.json", json.dumps(coco))
    assert run(tmp_path / "src", tmp_path / "out")["rejected"] == 1
    found = captions_by_field({"en": {"s": "dog"}, "de": {"s": "Hund"}}, {"en": "en", "de": "de"})
    assert found == {"s": ["dog"], "de_s": ["Hund"]}


def test_pictures_of_other_forms_in_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/0.jpg", "cat/1.psd", "dog/0.jpg"):
        put(tmp_path / name, picture(1))
    data = open_labelled(str(tmp_path), "train")
    assert data is not None and len(data.labels) == 2 and "cat/1.psd" in caplog.text


DIALOGUE = [
    {"role": "user", "content": [{"type": "text", "text": "?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
]


@pytest.mark.parametrize(
    "turns", [DIALOGUE, [{"from": "human", "value": "?"}, *({"from": "gpt", "value": "a dog"},) * 2]]
)
def test_dialogues_and_lists_of_one_image(tmp_path: Path, turns: list) -> None:
    name = "messages" if turns is DIALOGUE else "conversations"
    put(tmp_path / "json" / "a.jpg", picture(1))
    put(tmp_path / "json" / "rows.json", json.dumps([{"images": ["a.jpg"], name: turns}]))
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"images": [[picture(1)]], name: [turns]}), tmp_path / "table" / "t.parquet")
    for form in ("json", "table"):
        result = run(tmp_path / form, tmp_path / f"out {form}")
        ((_, parts),) = read_samples(tmp_path / f"out {form}" / "train-000000.tar")
        assert parts["txt"] == b"a dog"
        more = {"answers after the first of a dialogue": 1} if form == "json" and len(turns) > 2 else {}
        assert counted(result) == {DIALOGUES: 1, **more}
    put(tmp_path / "lines" / "a.jpg", picture(1))
    put(
        tmp_path / "lines" / "rows.jsonl",
        '{"image": ["a.jpg"], "caption": "x"}\n{"image": ["a.jpg", "b.jpg"], "caption": "y"}\n',
    )
    result = run(tmp_path / "lines", tmp_path / "out lines")
    assert (result["train"], result["rejected"]) == (1, 1)


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", ""])
def test_a_compressed_tar_by_another_name(tmp_path: Path, packed: str) -> None:
    name = tmp_path / "src" / ("0.tar" if packed else "0.tar.gz")
    name.parent.mkdir()
    with tarfile.open(name, f"w:{packed}") as tar:  # type: ignore[call-overload]
        for member, content in (("a.jpg", picture(1)), ("a.txt", b"words")):
            about = tarfile.TarInfo(member)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    assert run(tmp_path / "src", tmp_path / "out")["train"] == 1
    if packed:
        with pytest.raises(UsageError) as caught:
            build_index([name], tmp_path / "index")
        assert caught.value.code == "unsupported"


def test_cut_names_of_takeout(tmp_path: Path) -> None:
    long, src = "IMG " + "x" * 41, tmp_path / "src"  # and more than 46 characters in all
    for number, end in enumerate(("_1.jpg", "_2.jpg", "y.jpg")):
        put(src / (long + end), picture(number))
    for name, end in ((f"{long}_.json", "_1.jpg"), (f"{long}y.json", "y.jpg")):
        put(src / name, json.dumps({"title": long + end, "description": end}))
    run(src, tmp_path / "out")
    found = [parts["txt"].decode() for _, parts in read_samples(tmp_path / "out" / "train-000000.tar")]
    assert found == ["_1.jpg", "y.jpg"]


@pytest.mark.parametrize("other", [{"class_folders": True}, {"captions": "c.csv"}])
def test_no_captions_with_another_form(tmp_path: Path, other: dict) -> None:
    put(tmp_path / "src" / "a" / "a.jpg", picture(1))
    with pytest.raises(UsageError) as caught:
        run(tmp_path / "src", tmp_path / "out", no_captions=True, **other)
    assert (caught.value.option, caught.value.code) == ("--no-captions", "conflict")
