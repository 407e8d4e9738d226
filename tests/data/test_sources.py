"""Every kind of source becomes the same kind of shards, and what does not is named with its reason."""

import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, put, run
from PIL import Image

from aimv2.data.shards.format import find_shards, read_samples, safe_key, write_shard
from aimv2.data.shards.index import build_index, count_samples
from aimv2.errors import UsageError


def samples(out: Path, split: str = "train") -> dict[str, dict]:
    """{key: {"image": bytes, "txt": str, "json": dict, "cls": str}} of a split, in order."""
    found = {}
    for tar in sorted(out.glob(f"{split}-*.tar")):
        for key, parts in read_samples(tar):
            image = next(parts[name] for name in ("jpg", "png", "webp") if name in parts)
            found[key] = {
                "image": image,
                "txt": parts["txt"].decode() if "txt" in parts else None,
                "json": json.loads(parts["json"]),
                "cls": parts["cls"].decode() if "cls" in parts else None,
            }
    return found


def captions(out: Path, split: str = "train") -> dict[str, dict]:
    return {key: sample["json"]["captions"] for key, sample in samples(out, split).items()}


def rejected(out: Path) -> list[tuple[str, str]]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return [(row["image"], row["reason"]) for row in map(json.loads, lines)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images 0.jpg to 6.jpg."""
    for number in range(7):
        put(tmp_path / "src" / f"{number}.jpg", picture(number))
    return tmp_path / "src"


# ---- captions files ----


def test_csv_with_several_captions_an_image(photos: Path, tmp_path: Path) -> None:
    put(
        photos / "captions.csv",
        'image,caption\n0.jpg,one\n0.jpg,"two, quoted"\n1.jpg,three, not quoted\n2.jpg, \nabsent.jpg,x\n',
    )
    result = run(photos, tmp_path / "out")
    assert captions(tmp_path / "out") == {
        "0": {"caption": ["one", "two, quoted"]},
        "1": {"caption": ["three, not quoted"]},
    }
    first = samples(tmp_path / "out")["0"]
    assert first["image"] == picture(0) and first["txt"] == "one"
    assert first["json"]["width"] == 24 and first["json"]["height"] == 16
    assert first["json"]["source"] == "0.jpg"
    assert rejected(tmp_path / "out") == [
        ("2.jpg", "no caption"),
        ("absent.jpg", "no such image"),
        *((f"{number}.jpg", "no caption") for number in range(3, 7)),
    ]
    assert {k: result[k] for k in ("train", "val", "rejected", "shards")} == {
        "train": 2,
        "val": 0,
        "rejected": 6,
        "shards": 1,
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "aimv2.json",
        "rejected.jsonl",
        "train-000000.tar",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.tsv", "file_name\ttext\n0.jpg\ta, b\n1.jpg\tc\n"),
        ("c.csv", "\ufefffilename;alt\n0.jpg;a, b\n1.jpg;c\n"),
        ("results.csv", "image_name| comment_number| comment\n0.jpg| 0| a, b\n1.jpg| 0| c\n"),
        ("token.txt", "0.jpg#0\ta, b\n1.jpg#0\tc\n"),
        ("plain.csv", "0.jpg,a, b\n1.jpg,c\n"),
        ("c.jsonl", '{"image": "0.jpg", "caption": "a, b"}\n{"image": "1.jpg", "caption": ["c"]}\n'),
        ("c.json", '[{"file_name": "0.jpg", "text": "a, b"}, {"file_name": "1.jpg", "text": "c"}]'),
        ("c.csv", 'image_id,caption\n0,"a, b"\n1,c\n'),
    ],
)
def test_forms_of_captions_files(photos: Path, tmp_path: Path, name: str, text: str) -> None:
    put(photos / name, text)
    run(photos, tmp_path / "out")
    assert captions(tmp_path / "out") == {"0": {"caption": ["a, b"]}, "1": {"caption": ["c"]}}
    run(photos / name, tmp_path / "by-file")
    assert captions(tmp_path / "by-file") == captions(tmp_path / "out")


def test_caption_columns_are_fields(photos: Path, tmp_path: Path) -> None:
    put(photos / "c.csv", "picture,short,long\n0.jpg,a,b\n")
    with pytest.raises(UsageError, match="captions missing"):
        run(photos, tmp_path / "out")  # no usual name: not taken for a captions file
    with pytest.raises(UsageError, match="--image-column"):
        run(photos, tmp_path / "out", captions="c.csv")
    with pytest.raises(UsageError, match=r"picture, short, long.*--caption-column"):
        run(photos, tmp_path / "out", captions="c.csv", image_column="picture", caption_column="lnog")
    run(photos, tmp_path / "out", image_column="picture", caption_column=["long", "short"])
    assert captions(tmp_path / "out") == {"0": {"long": ["b"], "short": ["a"]}}
    run(photos, tmp_path / "one", image_column="picture", caption_column="short")
    assert captions(tmp_path / "one") == {"0": {"caption": ["a"]}}


def test_jsonl_fields_and_bad_lines(photos: Path, tmp_path: Path) -> None:
    lines = [
        '{"image": "0.jpg", "captions": {"alt": ["a", "b"], "made": "c"}, "licence": "CC0"}',
        "{broken",
        "[]",
        '{"image": null, "captions": "x"}',
        '{"image": "1.jpg"}',
        '{"image": "3.jpg", "captions": "half a pair \\ud83d"}',
    ]
    put(photos / "c.jsonl", "\n".join(lines))
    run(photos, tmp_path / "out")
    assert captions(tmp_path / "out")["0"] == {"alt": ["a", "b"], "made": ["c"]}
    assert samples(tmp_path / "out")["0"]["json"]["licence"] == "CC0"
    assert captions(tmp_path / "out")["3"] == {"caption": ["half a pair ?"]}
    assert rejected(tmp_path / "out")[:4] == [
        ("c.jsonl line 2", "not a JSON object"),
        ("c.jsonl line 3", "not a JSON object"),
        ("c.jsonl line 4", "no image name"),
        ("1.jpg", "no caption"),
    ]


def test_images_are_found_in_folders_by_name(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("images/a.jpg", "part/b.v1.jpg", "x/c.jpg", "y/c.jpg", "x/d.jpg", "y/d.jpg"):
        put(src / name, picture(len(name)))
    put(src / "c.csv", f"image,caption\na.jpg,1\nb.v1.jpg,2\nc.jpg,3\nx/d.jpg,4\ny/d.jpg,5\n{src}/x/c.jpg,6\n")
    run(src, tmp_path / "out")
    keys = list(samples(tmp_path / "out"))
    assert keys[:4] == ["a", "b_v1", "x_d", "y_d"] and len(keys) == 5
    assert rejected(tmp_path / "out")[0][1].startswith("several images of that name: x/c.jpg, y/c.jpg")


def test_linked_image_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.jpg", picture())
    put(tmp_path / "src" / "c.csv", "image,caption\na.jpg,1\n")
    (tmp_path / "src" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "out")["train"] == 1


def test_coco(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for number in range(3):
        put(src / "train2017" / f"{number:012d}.jpg", picture(number))
    record = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 16} for n in range(4)],
        "annotations": [
            {"id": 0, "image_id": 0, "caption": "a\n"},
            {"id": 1, "image_id": 1, "caption": "b"},
            {"id": 2, "image_id": 0, "caption": "c"},
            {"id": 3, "image_id": 3, "caption": "d"},
        ],
    }
    put(src / "annotations" / "captions_train2017.json", json.dumps(record))
    put(src / "annotations" / "instances_train2017.json", json.dumps({"images": [], "annotations": []}))
    run(src, tmp_path / "out")
    assert captions(tmp_path / "out") == {
        "000000000000": {"caption": ["a", "c"]},
        "000000000001": {"caption": ["b"]},
    }
    assert samples(tmp_path / "out")["000000000001"]["json"]["image_id"] == 1
    assert sorted(reason for _, reason in rejected(tmp_path / "out")) == ["no caption", "no such image"]
    put(src / "annotations" / "captions_val2017.json", json.dumps(record))
    with pytest.raises(UsageError, match=r"captions_train2017.json, .*captions_val2017.json.*--captions FILE"):
        run(src, tmp_path / "two")
    assert run(src, tmp_path / "two", captions="annotations/captions_val2017.json")["train"] == 2


def test_flickr8k(shared_data: Path, tmp_path: Path) -> None:
    src = shared_data / "flickr8k-1k"
    with pytest.raises(UsageError, match=r"all-captions-8k\.txt, captions\.txt.*--captions FILE"):
        run(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = sorted(path.name for path in (src / "images").iterdir())
    put(tmp_path / "val.txt", "\n".join(names[-100:]))
    result = run(src, tmp_path / "out", captions="captions.txt", val_list=str(tmp_path / "val.txt"), shard_size=250)
    assert (result["train"], result["val"], result["rejected"], result["shards"]) == (900, 100, 0, 5)
    assert all(len(found["caption"]) == 5 for found in captions(tmp_path / "out").values())
    assert sorted(captions(tmp_path / "out", "val")) == [name.removesuffix(".jpg") for name in names[-100:]]
    index = build_index(find_shards(tmp_path / "out", "train"))
    assert count_samples(index) == 900 and "index" in index.parts


# ---- other folders ----


def test_sidecars(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("a", "b", "in/a", "d", "e"):
        put(src / f"{name}.png", picture(len(name), format="PNG"))
    put(src / "a.txt", "one\n\n two \n")
    put(src / "b.json", '{"captions": {"alt": ["x"]}, "author": "me"}')
    put(src / "in" / "a.json", '["list", "of captions"]')
    put(src / "e.txt", "\n")
    run(src, tmp_path / "out")
    assert captions(tmp_path / "out") == {
        "a": {"caption": ["one\n\n two"]},
        "b": {"alt": ["x"]},
        "in_a": {"caption": ["list", "of captions"]},
    }
    assert samples(tmp_path / "out")["b"]["json"]["author"] == "me"
    assert sorted(rejected(tmp_path / "out")) == [("d.png", "no caption"), ("e.png", "no caption")]


def test_class_folders(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("red_fox/a.jpg", "cat/deep/a.jpg", "cat/a.jpg", "cat/a.png"):
        put(src / name, picture(len(name), format="PNG" if name.endswith("png") else "JPEG"))
    run(src, tmp_path / "out", template="this is {}")
    found = {key: (sample["txt"], sample["cls"]) for key, sample in samples(tmp_path / "out").items()}
    assert found == {
        "cat_a": ("this is cat", "0"),
        "cat_a-2": ("this is cat", "0"),
        "cat_deep_a": ("this is cat", "0"),
        "red_fox_a": ("this is red fox", "1"),
    }
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\nred_fox\n"
    (src / "red_fox").rename(src / "val")
    (src / "cat").rename(src / "train")
    with pytest.raises(UsageError, match=r"splits \(train, val\)"):
        run(src, tmp_path / "two")


def test_odd_images_are_stored_usable_and_broken_ones_rejected(tmp_path: Path) -> None:
    src = tmp_path / "src"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    contents = {
        "a.gif": gif.getvalue(),
        "b.jpg": picture(1)[:-200],
        "c.bmp": picture(2, format="BMP"),
        "d.png": b"<html>",
        "e.jpg": picture(3, (400, 100)),
        "f.webp": picture(4, format="WEBP"),
        "g.jpg": picture(5, (3000, 1000)),
    }
    for name, content in contents.items():
        put(src / name, content)
        put(src / f"{name[0]}.txt", name)
    run(src, tmp_path / "out", max_side=200, max_pixels=2_000_000)
    found = samples(tmp_path / "out")
    assert list(found) == ["a", "c", "e", "f"] and found["f"]["image"] == contents["f.webp"]
    assert (found["e"]["json"]["width"], found["e"]["json"]["height"]) == (200, 50)
    assert Image.open(io.BytesIO(found["e"]["image"])).size == (200, 50)
    reasons = dict(rejected(tmp_path / "out"))
    assert "truncated" in reasons["b.jpg"] and "not an image" in reasons["d.png"]
    assert "pixels" in reasons["g.jpg"]


# ---- tables, hub, tars ----


def table(count: int, path: bool = False) -> pa.Table:
    cells = [{"bytes": picture(n), "path": f"{n}.jpg" if path else None} for n in range(count)]
    texts = [[f"caption {n}", "again"] if n != 2 else [] for n in range(count)]
    return pa.table({"image": cells, "text": texts, "label": list(range(count)), "other": ["?"] * count})


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_tables(tmp_path: Path, kind: str) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for part in ("a", "b"):
        if kind == "parquet":
            pq.write_table(table(5, True), src / f"{part}.parquet", row_group_size=2)
        elif kind == "arrow":
            with pa.ipc.new_stream(str(src / f"{part}.arrow"), table(5).schema) as stream:
                stream.write_table(table(5), max_chunksize=2)
        else:
            with pa.ipc.new_file(str(src / f"{part}.arrow"), table(5).schema) as stream:
                stream.write_table(table(5), max_chunksize=2)
    result = run(src, tmp_path / "out", shard_size=3, val_fraction=0.3)
    found = {**samples(tmp_path / "out"), **samples(tmp_path / "out", "val")}
    assert sorted(found) == sorted(f"{part}-0000000{row}" for part in "ab" for row in (0, 1, 3, 4))
    assert result["train"] + result["val"] == 8 and result["rejected"] == 2 and 0 < result["val"] < 8
    for key, sample in found.items():
        row = int(key[-1])
        assert sample["image"] == picture(row) and sample["cls"] == str(row)
        assert sample["json"]["captions"] == {"caption": [f"caption {row}", "again"]}
    by_file = run(next(src.iterdir()), tmp_path / "one")
    assert by_file["train"] == 4


def test_table_with_image_paths_and_splits(tmp_path: Path) -> None:
    src = tmp_path / "src"
    put(src / "0.jpg", picture(0))
    rows = pa.table({"path": ["0.jpg", "1.jpg", None], "caption": ["a", "b", "c"]})
    pq.write_table(rows, src / "train-00000-of-00001.parquet")
    run(src, tmp_path / "out")
    assert list(captions(tmp_path / "out").values()) == [{"caption": ["a"]}]
    assert [reason for _, reason in rejected(tmp_path / "out")][1] == "no image"
    pq.write_table(rows, src / "test-00000-of-00001.parquet")
    with pytest.raises(UsageError, match=r"test, train.*--split"):
        run(src, tmp_path / "two")
    assert run(src, tmp_path / "two", split="test")["train"] == 1
    with pytest.raises(UsageError, match=r"splits test, train"):
        run(src, tmp_path / "three", split="dev")


def test_table_without_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"no image column .*among a, caption; give --image-column"):
        run(tmp_path / "t.parquet", tmp_path / "out")
    put(tmp_path / "bad.parquet", b"no table")
    with pytest.raises(UsageError, match="not a Parquet or Arrow file"):
        run(tmp_path / "bad.parquet", tmp_path / "out")


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": picture(n), "path": None} for n in range(4)], "caption": ["a", "b", "", "d"]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "hub")
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.load_from_disk(tmp_path / "hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["test", "train"])
    monkeypatch.chdir(tmp_path)
    assert run("owner/pictures", tmp_path / "out", shard_size=2, workers=2)["train"] == 3
    assert asked == [("owner/pictures", "train")]
    assert list(samples(tmp_path / "out")) == ["train-00000000", "train-00000001", "train-00000003"]
    assert samples(tmp_path / "out")["train-00000003"]["image"] == picture(3)


def test_rows_that_name_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of others names files of its own cache, and none that lie elsewhere on the machine."""
    inside, outside = put(tmp_path / "cache" / "a.jpg", picture(1)), put(tmp_path / "private" / "b.jpg", picture(2))
    rows = {"image": [{"bytes": None, "path": str(path)} for path in (inside, outside)], "caption": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict(rows, features))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
    monkeypatch.chdir(put(tmp_path / "empty" / "x", "").parent)
    assert run("owner/pictures", tmp_path / "out")["rejected"] == 1
    assert "--image-root" in rejected(tmp_path / "out")[0][1]
    assert next(iter(samples(tmp_path / "out").values()))["image"] == picture(1)
    assert run("owner/pictures", tmp_path / "all", image_root=str(tmp_path))["train"] == 2


@pytest.mark.parametrize(
    "name", ["/etc/0.jpg", "../0.jpg", "images/../../0.jpg", "~/0.jpg", "file:///0.jpg", "HTTP://x.org/0.jpg"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_captions_files_name_files_of_their_folder_only(photos: Path, tmp_path: Path, name: str, kind: str) -> None:
    put(photos / "images" / "x.jpg", picture())
    row = json.dumps({"image": name, "caption": "x"})
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    put(photos / f"c.{kind}", {"csv": f"image,caption\n{name},x\n", "jsonl": row, "json": json.dumps(coco)}[kind])
    with pytest.raises(UsageError) as caught:
        run(photos, tmp_path / "out")
    assert caught.value.option == ("" if "://" in name else "--image-root") and name in str(caught.value)
    with pytest.raises(UsageError) as caught:
        run(photos, tmp_path / "out", image_root=str(tmp_path / "gone"))
    assert (caught.value.option, caught.value.code) == ("--image-root", "not-found")


def test_hub_data_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", absent)
    with pytest.raises(UsageError, match=r"someone/my_photos: no path here, and the hub") as caught:
        run("someone/my_photos", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_tars_are_sharded_anew(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for part in range(2):  # equal keys in both
        members = [
            (
                f"{n:03d}",
                {"JPG": picture(n + 10 * part), "json": json.dumps({"caption": f"{part}{n}"}).encode()},
            )
            for n in range(3)
        ]
        members += [("none", {"txt": b"no picture"}), ("mute", {"jpg": picture()})]
        write_shard(src / f"{part:05d}.tar", [*members, ("label", {"jpg": picture(), "cls": b"7"})])
    (src / "00000_stats.json").write_text("{}")
    run(src, tmp_path / "out", shard_size=4)
    found = samples(tmp_path / "out")
    assert list(found) == ["000", "001", "002", "label", "000-2", "001-2", "002-2", "label-2"]
    assert found["001-2"]["txt"] == "11" and found["001-2"]["image"] == picture(11)
    assert found["label"]["cls"] == "7" and found["label"]["txt"] is None
    assert (
        sorted(reason for _, reason in rejected(tmp_path / "out"))
        == ["no caption"] * 2 + ["no image in its sample"] * 2
    )
    assert run(f"{src}/{{00000..00000}}.tar", tmp_path / "one")["train"] == 4
    (src / "00000.tar").rename(src / "train-0.tar")
    (src / "00001.tar").rename(src / "val-0.tar")
    with pytest.raises(UsageError, match="splits train, val"):
        run(src, tmp_path / "two")


def test_cut_tar_is_reported(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(f"{n}", {"jpg": picture(n), "txt": b"x"}) for n in range(3)])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2 + 100])
    run(tmp_path / "a.tar", tmp_path / "out")
    assert rejected(tmp_path / "out")[0][0] == "a.tar" and samples(tmp_path / "out")


def test_keys_are_safe_and_stable() -> None:
    assert safe_key("a/b.c.d/x y.z.JPG") == "a_b_c_d_x_y_z"
    assert safe_key("__meta__.png") == "meta__" and safe_key("...") == "image"
    assert safe_key("日本.jpg") == "日本" and safe_key("no.extension") == "no_extension"
    long = [safe_key(f"{'ä' * 200}{end}.jpg") for end in "ab"]
    assert long[0] != long[1] and all(len(key.encode()) <= 80 for key in long)
