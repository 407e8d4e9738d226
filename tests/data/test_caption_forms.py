"""Captions in the forms that people have: each is read as its maker meant it, or one line says why not."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, put, run

from aimv2.cli import main
from aimv2.data.images.captioned import open_captioned, read_captioned
from aimv2.data.images.maps import masks, open_pairs
from aimv2.data.images.opening import open_labelled
from aimv2.data.images.pictures import pictures
from aimv2.data.shards.format import captions_of, read_samples
from aimv2.data.text import encoding
from aimv2.data.text.captions import read_captions
from aimv2.errors import UsageError


def found(out: Path, split: str = "train") -> dict[str, dict[str, list[str]]]:
    """{key: captions by field} of the shards of an import."""
    return {key: captions_of(parts) for tar in sorted(out.glob(f"{split}-*.tar")) for key, parts in read_samples(tar)}


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {row["image"]: row["reason"] for row in map(json.loads, lines)}


def photos(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        put(folder / name, picture(number))
    return folder


TAKEOUT = json.dumps({"title": "a.jpg", "description": "un café", "creationTime": {"timestamp": "1"}})
ANSWERS = [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": "un café"}]
LONG = [*ANSWERS, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "no caption"}]
ROW = {"image": "a.jpg", "caption": "un café"}
KARPATHY = {"images": [{"filename": "a.jpg", "sentences": [{"raw": "un café", "tokens": ["un"]}], "split": "train"}]}
FORMS = {  # name: content; each says "un café" of a.jpg
    "cp1252.csv": "image,caption\na.jpg,un café\n".encode("cp1252"),
    "utf16.csv": "image,caption\na.jpg,un café\n".encode("utf-16"),
    "bare16.csv": "image,caption\na.jpg,un café\n".encode("utf-16-le"),
    "big16.tsv": "image\tcaption\na.jpg\tun café\n".encode("utf-16-be"),
    "marked.csv": "image,caption\na.jpg,un café\n".encode("utf-8-sig"),
    "bare-marked.csv": "a.jpg,un café\n".encode("utf-8-sig"),
    "cp1252.jsonl": json.dumps(ROW, ensure_ascii=False).encode("cp1252"),
    "utf16.jsonl": json.dumps(ROW, ensure_ascii=False).encode("utf-16"),
    "utf16.json": json.dumps([ROW], ensure_ascii=False).encode("utf-16"),
    "prompt.csv": "file_name,prompt\na.jpg,un café\n",
    "prompt.json": json.dumps([{"file_name": "a.jpg", "prompt": "un café"}]),
    "llava.json": json.dumps([{"id": "1", "image": "a.jpg", "conversations": LONG}]),
    "llava.jsonl": json.dumps({"id": "1", "image": ["a.jpg"], "conversations": ANSWERS}),
    "dataset_flickr8k.json": json.dumps(KARPATHY),
    "a.caption": "un café\n",
    "a.jpg.txt": "un café".encode("cp1252"),
    "a.txt": "un café".encode("utf-16"),
    "a.json": json.dumps(ROW, ensure_ascii=False).encode("cp1252"),
    "a.jpg.caption": "un café",
    "a.jpg.json": TAKEOUT,
    "a.jpg.supplemental-metadata.json": TAKEOUT,
    "a.jpg.supplemental-me.json": TAKEOUT,
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path: Path, name: str) -> None:
    src = photos(tmp_path / "src", "a.jpg")
    put(src / name, FORMS[name])
    run(src, tmp_path / "out")
    assert found(tmp_path / "out") == {"a": {"caption": ["un café"]}}
    entries, _ = open_captioned(str(src))  # what is scored against reads the same
    assert [read_captioned(entry)[1] for entry in entries] == [("un café",)]


def test_numbered_files_of_takeout(tmp_path: Path) -> None:
    src = photos(tmp_path / "src", "a.jpg", "a(1).jpg", "b.jpg", "b(2).jpg")
    names = ("a.jpg.json", "a.jpg(1).json", "b.jpg.supplemental-metadata.json", "b.jpg.supplemental-meta(2).json")
    for name in names:
        put(src / name, json.dumps({"title": "photo", "description": name}))
    run(src, tmp_path / "out")
    assert found(tmp_path / "out") == {key: {"caption": [name]} for key, name in zip(("a", "a_1_", "b", "b_2_"), names)}


def test_splits_that_a_captions_file_states(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Karpathy's val is val, restval is training, and what is held out as test is not trained on unless it is asked for."""
    names = {"a": "train", "b": "restval", "c": "val", "d": "test"}
    src = photos(tmp_path / "src", *(f"val2014/{name}.jpg" for name in names))
    images = [
        {
            **{"filepath": "val2014", "filename": f"{name}.jpg", "split": split, "cocoid": 1},
            "sentences": [{"raw": f"A {name}.", "tokens": []}, {"raw": "Two.", "tokens": []}],
        }
        for name, split in names.items()
    ]
    put(src / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    result = run(src, tmp_path / "out")
    assert (result["train"], result["val"], result["rejected"]) == (2, 1, 1)
    assert found(tmp_path / "out") == {f"val2014_{n}": {"caption": [f"A {n}.", "Two."]} for n in "ab"}
    assert list(found(tmp_path / "out", "val")) == ["val2014_c"]
    assert "test split; --split test" in rejected(tmp_path / "out")["val2014/d.jpg"]
    result = run(src, tmp_path / "test", split="test")
    assert (result["train"], result["val"], result["rejected"]) == (1, 0, 0)
    assert run(src, tmp_path / "drawn", val_fraction=0.01)["train"] == 3  # the option decides, and a line says so
    assert "--val-fraction decides" in caplog.text
    entries, split = open_captioned(str(src))
    assert split == "test" and [entry.image for entry in entries] == ["val2014/d.jpg"]
    with pytest.raises(UsageError, match="has the splits test, train, val") as error:
        run(src, tmp_path / "no", split="other")
    assert (error.value.option, error.value.code) == ("--split", "unknown")
    put(src / "rows.csv", "image,caption,split\na.jpg,x,train\nc.jpg,y,valid\nd.jpg,z,test\n")  # so do rows of a table
    assert run(src, tmp_path / "rows", captions="rows.csv")["val"] == 1
    assert found(tmp_path / "rows") == {"a": {"caption": ["x"]}}


def test_words_for_splits(tmp_path: Path) -> None:
    """In a captions file, a Parquet file, a labelled list: one table of words; what is none of them is refused."""
    src = photos(tmp_path / "src", *(f"{name}.jpg" for name in "abcdef"))
    words = dict(zip("abcdef", ("train", "dev", "restval", "test", "", "train")))
    rows = [{"image": f"{name}.jpg", "caption": f"A {name}.", "split": word} for name, word in words.items()]
    rows.append({**rows[-1], "split": "test"})  # the same image once more
    table = put(src / "rows.csv", "image,caption,split\n" + "".join(f"{','.join(row.values())}\n" for row in rows))
    result = run(src, tmp_path / "out")
    assert (result["train"], result["val"]) == (3, 1) and list(found(tmp_path / "out", "val")) == ["b"]
    assert rejected(tmp_path / "out")["f.jpg"] == "stated as train and as test"
    run(src, tmp_path / "rest", split="restval")
    assert list(found(tmp_path / "rest")) == ["c"]
    parquet = tmp_path / "rows/rows.parquet"
    parquet.parent.mkdir()
    cells = [{**row, "image": (src / row["image"]).read_bytes()} for row in rows[:-1]]
    pq.write_table(pa.Table.from_pylist(cells), parquet)
    result = run(parquet.parent, tmp_path / "table")
    assert (result["train"], result["val"], result["rejected"]) == (4, 1, 1) and not result["passed_over"]
    assert run(parquet, tmp_path / "held", split="test")["train"] == 1
    for given, other in ((parquet, "other"), (table, "other")):
        with pytest.raises(UsageError, match="has the splits test, train, val") as error:
            run(given, tmp_path / "no", split=other)
        assert (error.value.option, error.value.code) == ("--split", "unknown")
    for word in ("held-out", "2"):
        put(src / "rows.csv", f"image,caption,split\na.jpg,x,train\nb.jpg,y,{word}\n")
        with pytest.raises(UsageError, match=f"split '{word}'; train, val or test expected"):
            run(src, tmp_path / "no")


def test_splits_that_lists_and_tables_of_labels_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    src = photos(tmp_path / "src", *(f"{name}.jpg" for name in "abcd"))
    rows = [
        {"image": f"{name}.jpg", "label": row % 2, "split": split}
        for row, (name, split) in enumerate(zip("abcd", ("train", "train", "test", "dev")))
    ]
    put(src / "rows.csv", "image,label,split\n" + "".join(f"{','.join(map(str, row.values()))}\n" for row in rows))
    tables = tmp_path / "tables"
    tables.mkdir()
    pq.write_table(
        pa.Table.from_pylist([{**row, "image": {"bytes": (src / row["image"]).read_bytes()}} for row in rows]),
        tables / "train.parquet",
    )
    for source in (src / "rows.csv", tables):
        labels = {split: open_labelled(str(source), split).labels.tolist() for split in ("train", "val", "test")}
        assert labels == {"train": [0, 1], "val": [1], "test": [0]}
        assert open_labelled(str(source), "val").image(0) is not None
    encoding.say_once.cache_clear()
    put(photos(tmp_path / "sidecars", "a.jpg") / "a.json", '{"caption": "x", "split": "test"}')
    assert run(tmp_path / "sidecars", tmp_path / "out")["train"] == 1 and "state the split 'test'" in caplog.text
    put(src / "train.csv", (src / "rows.csv").read_text())
    with pytest.raises(UsageError, match="has rows of the split test"):
        open_labelled(str(src), "train")


def test_every_row_is_read_by_its_own_keys(tmp_path: Path) -> None:
    src = photos(tmp_path / "src", *(f"{name}.jpg" for name in "abcdef"))
    rows = [
        {"image": "a.jpg"},
        {"image": "b.jpg", "caption": "one", "by": "me"},
        {"file_name": "c.jpg", "text": "two"},
        {"image": "d.jpg", "caption": None, "text": "three"},
        {"image": "e.jpg", "prompt": "four"},
        {"id": 1, "caption": "of nothing"},
        {"image": "f.jpg", "caption": "five", "text": "six"},
    ]
    put(src / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    run(src, tmp_path / "out")
    assert found(tmp_path / "out") == {
        **{key: {"caption": [text]} for key, text in zip("bcde", ("one", "two", "three", "four"))},
        "f": {"caption": ["five"], "text": ["six"]},
    }
    assert rejected(tmp_path / "out") == {"a.jpg": "no caption", "rows.jsonl line 6": "no image name"}


def test_a_quotation_mark_swallows_no_row(tmp_path: Path) -> None:
    """Between tabs and bars nothing is quoted, but for whole cells; between commas an open mark is refused."""
    src = photos(tmp_path / "src", "a.jpg", "b.jpg", "c.jpg")
    for name, mark in (("rows.tsv", "\t"), ("rows.csv", "| ")):
        cells = [
            ("image", "caption"),
            ("a.jpg", '"Stop" it says'),
            ("b.jpg", '"an open one'),
            ("c.jpg", '"a ""whole"" cell"'),
        ]
        put(src / name, "".join(f"{mark.join(row)}\n" for row in cells))
        run(src / name, tmp_path / name)
        texts = [captions["caption"][0] for captions in found(tmp_path / name).values()]
        assert texts == ['"Stop" it says', '"an open one', 'a "whole" cell']
        assert [text for text in read_captions(src / "rows.tsv")] == texts
    put(src / "comma.csv", 'image,caption\na.jpg,"an open one\nb.jpg,two\nc.jpg,three\n')
    with pytest.raises(UsageError, match=r"comma\.csv line \d.*quotation mark") as error:
        run(src / "comma.csv", tmp_path / "comma")
    assert error.value.code == "unreadable"
    put(src / "comma.csv", 'image,caption\na.jpg,"two\nlines, quoted"\n')  # as it should be
    run(src / "comma.csv", tmp_path / "lines")
    assert found(tmp_path / "lines") == {"a": {"caption": ["two\nlines, quoted"]}}


SPOILT = {  # rows of a table that cannot be told apart: refused
    "numbers.csv": 'image,caption\n1,"a dog\n2,a cat\n3,x\n',
    "closed.csv": 'image,caption\n1,"a dog\n2,a cat\n3,"x"\n',
    "balanced.csv": 'image,caption\n1,"a dog\n2,a cat"\n3,x\n',
    "first.csv": 'caption,image\nok,1.jpg\n"a dog,2.jpg\na cat,3.jpg\n',
    "escaped.csv": 'image,caption\n1.jpg,"he said \\"hi\\", then left"\n',
    "twice.csv": "image,caption,Caption\n1.jpg,one,two\n",
    "bare.tsv": "1.jpg\ta dog\t0.9\n",
}


@pytest.mark.parametrize("name", SPOILT)
def test_cells_that_are_not_clear_are_refused(tmp_path: Path, name: str) -> None:
    src = photos(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    with pytest.raises(UsageError, match=r"quotation mark|several columns|no header") as error:
        run(put(src / name, SPOILT[name]), tmp_path / "out")
    assert error.value.code in ("unreadable", "conflict", "missing")


def test_surplus_cells(tmp_path: Path) -> None:
    """They belong to the last cell if that is the caption; else the row is rejected, and the file is one of captions all the same."""
    src = photos(tmp_path / "src", "a.jpg", "b.jpg")
    put(src / "rows.csv", "image,caption,url\na.jpg,a dog, running,http\nb.jpg,b,u,\n")
    assert run(src, tmp_path / "out")["train"] == 1 and found(tmp_path / "out") == {"b": {"caption": ["b"]}}
    assert "4 cells, 3 expected" in rejected(tmp_path / "out")["rows.csv line 2"]
    put(src / "rows.csv", "image|caption\na.jpg|two | bars, one\nb.jpg|  lead\n")
    run(src, tmp_path / "bars")
    assert [texts["caption"] for texts in found(tmp_path / "bars").values()] == [["two | bars, one"], ["lead"]]


PARAGRAPHS = "A dog on a beach.\n\nIt runs\nafter a ball."


@pytest.mark.parametrize("form", ["sidecar", "tar", "csv", "jsonl"])
def test_paragraphs_are_one_caption(tmp_path: Path, form: str) -> None:
    src = photos(tmp_path / "src", "a.jpg")
    put(src / "a.txt", PARAGRAPHS + "\n")
    if form in ("csv", "jsonl"):
        (src / "a.txt").unlink()
        row = json.dumps({"image": "a.jpg", "caption": PARAGRAPHS})
        put(src / f"c.{form}", row if form == "jsonl" else f'image,caption\na.jpg,"{PARAGRAPHS}"\n')
    if form == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for path in src.iterdir():
                tar.add(path, path.name)
    run(tmp_path / "a.tar" if form == "tar" else src, tmp_path / "out")
    assert found(tmp_path / "out") == {"a": {"caption": [PARAGRAPHS]}}


def test_a_named_key_that_no_caption_has(tmp_path: Path) -> None:
    src = photos(tmp_path, "a.jpg")
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    for key, record in (("caption", coco), ("raw", KARPATHY)):
        with pytest.raises(UsageError, match="`zz`") as error:
            run(put(src / "rows.json", json.dumps(record)), tmp_path / "out", caption_column=f"{key},zz")
        assert (error.value.option, error.value.code) == ("--caption-column", "missing")


BROKEN = (
    {"images": [{"filename": "a.jpg", "sentences": ["no row"]}]},
    {"images": ["a.jpg"], "annotations": [{"image_id": 1, "caption": "x"}]},
    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": ["x"]},
    {"images": 1, "annotations": {}},
)


@pytest.mark.parametrize("record", BROKEN)
def test_json_of_another_make_is_one_line(tmp_path: Path, record: dict) -> None:
    src = photos(tmp_path / "src", "a.jpg")
    put(src / "captions.json", json.dumps(record))
    with pytest.raises(UsageError, match=r"captions\.json") as error:
        run(src, tmp_path / "out")
    assert "\n" not in str(error.value) and "--captions FILE" in str(error.value)


# ---- encodings ----


def sources(tmp_path: Path) -> dict[str, Path]:
    """The same two captions of one image, as every kind of source holds them: ``short``, and ``long`` beside it."""
    row = {"image": "a.jpg", "short": "a cat", "long": "a cat on a mat"}
    made = {}
    for kind in ("csv", "tsv", "json", "jsonl", "coco"):
        src = photos(tmp_path / kind, "a.jpg")
        mark = "\t" if kind == "tsv" else ","
        coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, **row, "caption": "x"}]}
        text = {"json": json.dumps([row]), "jsonl": json.dumps(row), "coco": json.dumps(coco)}.get(kind)
        made[kind] = put(
            src / f"c.{kind if kind != 'coco' else 'json'}", text or f"{mark.join(row)}\n{mark.join(row.values())}\n"
        )
    made["sidecar"] = photos(tmp_path / "sidecar", "a.jpg")
    put(made["sidecar"] / "a.json", json.dumps(row | {"caption": "x"}))
    made["parquet"] = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"image": picture()}]), made["parquet"])
    made["tar"] = tmp_path / "s.tar"
    with tarfile.open(made["tar"], "w") as tar:
        for path in sorted(made["sidecar"].iterdir(), reverse=True):
            tar.add(path, path.name)
    return made


def test_a_caption_column_works_as_typed_on_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, source in sources(tmp_path).items():
        for number, typed in enumerate(("short", "short,long", "[short, long]", "lost")):
            words = [
                "data",
                "import",
                str(source),
                str(out := tmp_path / f"out-{kind}-{number}"),
                "--caption-column",
                typed,
            ]
            if typed == "lost":
                assert main([*words, "--workers", "1"]) == 2
                assert "lost" in capsys.readouterr().err
                continue
            assert main([*words, "--workers", "1"]) in (None, 0)
            both = {"long": ["a cat on a mat"], "short": ["a cat"]}
            assert list(found(out).values()) == [both if "," in typed else {"caption": ["a cat"]}], (kind, typed)


UNREAD = {  # option: a source that has no use for it
    "captions": ("csv", "parquet", "tar"),
    "image_column": ("sidecar", "tar", "classes"),
    "caption_column": ("classes",),
    "split": ("csv", "sidecar", "parquet", "tar", "classes"),
    "template": ("csv", "sidecar", "parquet", "tar"),
}


def test_an_option_that_a_source_does_not_read_is_refused(tmp_path: Path) -> None:
    made = {**sources(tmp_path), "classes": photos(tmp_path / "classes", "cat/a.jpg", "dog/b.jpg")}
    known = {"csv": {"image_column": "image", "caption_column": "short"}, "parquet": {"caption_column": "short"}}
    for option, kinds in UNREAD.items():
        for kind in kinds:
            given = {**known.get(kind, {}), option: "this {}"}
            with pytest.raises(UsageError) as error:
                run(made[kind], tmp_path / "out", **given)
            assert (error.value.option, error.value.code) == (f"--{option.replace('_', '-')}", "conflict"), (
                kind,
                option,
            )
            assert not (tmp_path / "out").exists()


def test_a_root_of_images_is_for_lists(tmp_path: Path) -> None:
    """``--image-root`` of ``embed``, ``explore``, ``knn`` and the others: refused where no path could lead there."""
    classes = photos(tmp_path / "classes", "cat/a.jpg", "dog/b.jpg")
    for read in (
        lambda: list(pictures(str(classes), image_root=tmp_path)),
        lambda: open_labelled(str(classes), "train", image_root=str(tmp_path)),
        lambda: run(classes, tmp_path / "out", image_root=str(tmp_path)),
    ):
        with pytest.raises(UsageError) as error:
            read()
        assert (error.value.option, error.value.code) == ("--image-root", "conflict")


def test_tables_and_maps_are_looked_for_as_images_are(tmp_path: Path) -> None:
    """What macOS and a NAS leave in folders is none of them, wherever files are looked for."""
    src = tmp_path / "src"
    rows = pa.Table.from_pylist([{"image": picture(), "caption": "a cat"}])
    for name in ("a.PARQUET", ".cache/b.parquet", "@eaDir/c.parquet", "__MACOSX/d.parquet"):
        pq.write_table(rows, put(src / name, b""))
    assert run(src, tmp_path / "out")["train"] == 1
    scenes = photos(tmp_path / "scenes", "images/train/x.jpg", "images/val/x.jpg")
    for split in ("train", "val"):
        put(scenes / f"masks/{split}/x.png", picture(format="PNG"))
        put(scenes / f"masks/{split}/._x.png", b"no picture")
        put(scenes / f"masks/{split}/@eaDir/x.png", b"no picture")
    found, _, _ = open_pairs(str(scenes), masks())
    assert [pair.map.relative_to(scenes).as_posix() for pair in found] == ["masks/train/x.png"]
