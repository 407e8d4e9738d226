"""Boxes that people bring, and what `data import --boxes` makes of them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, put, run

from aimv2.data.images.box_rows import LISTED_TWICE, SAME_ID, SEVERAL_IDS
from aimv2.data.images.boxes import BOX_FAULTS, regions_of
from aimv2.data.shards.format import image_of, json_of, read_samples
from aimv2.errors import UsageError
from aimv2.evals.detection.truth import read_truth

SIZE = [40, 30]
POLYGON = [[4, 4, 14, 4, 14, 12]]
RLE = {"size": [30, 40], "counts": [600, 30, 570]}


def coco(**changes: Any) -> dict[str, Any]:
    """Three images (one without objects, one that is stored half as large), two classes with a gap between their ids, one crowd."""
    images = [{"id": 10 * n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in (1, 2, 3)]
    return {
        "images": images,
        "categories": [{"id": 7, "name": "ring"}, {"id": 2, "name": "traffic light"}],
        "annotations": [
            {"id": 0, "image_id": 10, "category_id": 7, "bbox": [4, 4, 10, 8], "area": 60, "segmentation": POLYGON, "iscrowd": 0},
            {"id": 1, "image_id": 10, "category_id": 2, "bbox": [0, 0, 39.5, 30.5], "area": 30, "segmentation": RLE, "iscrowd": 1},
            {"id": 2, "image_id": 30, "category_id": 7, "bbox": [20, 10, 10, 10], "area": 100},
        ],
    } | changes  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in (1, 2):
        put(tmp_path / "images" / f"{number}.jpg", picture(number, (40, 30)))
    put(tmp_path / "images" / "3.jpg", picture(3, (20, 15)))
    return tmp_path / "images"


def brought(record: Any, images: Path, name: str = "instances.json", **options: Any) -> tuple[dict[str, Any], Path]:
    """(result, OUT) of an import of annotations that lie elsewhere than their images."""
    out = images.parent / "out"
    content = record if isinstance(record, str) else json.dumps(record)
    source = put(images.parent / "notes" / name, content)
    return run(source, out, **{"boxes": True, "image_root": str(images), **options}), out


def samples(out: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    return {key: json_of(parts) for tar in sorted(out.glob(f"{split}-*.tar")) for key, parts in read_samples(tar)}


def refused(record: Any, images: Path, **options: Any) -> tuple[str, str]:
    with pytest.raises(UsageError) as refusal:
        brought(record, images, **options)
    assert "\n" not in str(refusal.value) and not list(images.parent.glob("out/*.tar"))
    return refusal.value.option, refusal.value.code


def test_coco_keeps_boxes_masks_crowds_and_empty_images(images: Path) -> None:
    result, out = brought(coco(), images)
    assert (result["train"], result["rejected"], result["bad"]) == (3, 0, {})
    found = samples(out)
    assert found["2"]["objects"] == []
    regions, faults = regions_of(found["1"], (40, 30))
    assert faults == [] and regions.classes == ["ring", "traffic light"] and regions.crowd.tolist() == [False, True]
    assert regions.boxes.tolist() == [[4, 4, 14, 12], [0, 0, 39.5, 30]]
    assert regions.segmentations == [POLYGON, RLE]
    manifest = json.loads((out / "aimv2.json").read_text())
    assert manifest["classes"] == ["traffic light", "ring"] and manifest["class_ids"] == [2, 7]
    # 3.jpg is half as large as annotated: said, and its boxes are scaled
    assert [about["number"] for kind, about in result["passed_over"].items() if "scaled" in kind] == [1]
    assert regions_of(found["3"], (20, 15))[0].boxes.tolist() == [[10, 5, 15, 10]]


def test_shards_score_as_the_json_does(images: Path) -> None:
    _, out = brought(coco(), images)
    shards, given = read_truth(str(out), "train"), read_truth(str(images.parent / "notes" / "instances.json"))
    plain = [
        [{key: one[key] for key in ("bbox", "area", "iscrowd")} for one in truth.annotations]
        for truth in (shards, given)
    ]
    assert plain[0] == plain[1] and not shards.has_masks
    assert shards.categories_by_name[7] == given.categories_by_name[7] == given.categories_by_name["ring"]
    assert shards.images_by_name[30] == given.images_by_name["3.jpg"] == shards.images_by_name["3"]


def test_a_smaller_copy_keeps_its_boxes(images: Path) -> None:
    _, out = brought(coco(), images, max_side=20)
    (parts,) = [parts for tar in out.glob("*.tar") for key, parts in read_samples(tar) if key == "1"]
    assert image_of(parts) and json_of(parts)["width"] == 20
    assert regions_of(json_of(parts), (20, 15))[0].boxes[0].tolist() == [2, 2, 7, 6]


def test_faults_are_counted_and_pictures_of_other_proportions_rejected(images: Path) -> None:
    put(images / "2.jpg", picture(2, (30, 40)))  # turned
    record = coco()
    good = record["annotations"][2]
    good["segmentation"] = {"size": [40, 30], "counts": [1200]}  # height and width in the wrong order
    for number, box in enumerate(([1, 1, 0, 4], [1, 1, 5, 5], [1, 1, 5, 5], [30, 20, 16, 8])):
        record["annotations"].append(good | {"id": 9 + number, "bbox": box})
    record["annotations"] += [good | {"id": 100 + n, "image_id": 10, "bbox": [n, 1, 5, 5]} for n in range(30)]
    record["images"].append({"id": 4, "file_name": "absent.jpg", "width": 40, "height": 30})
    result, out = brought(record, images)
    assert {code: about["number"] for code, about in result["bad"].items()} == {"image-missing": 1, "other-size": 1}
    counted = {kind: about["number"] for kind, about in result["passed_over"].items()}
    assert {"boxes without area": 1, "boxes that repeat another of their class": 1}.items() <= counted.items()
    assert any("leave the picture" in kind for kind in counted)
    assert counted[BOX_FAULTS["broken-mask"]] == 34
    assert set(samples(out)) == {"1", "3"}


def test_nothing_left_says_how_many_of_each_kind(images: Path) -> None:
    record = coco()
    put(images / "1.jpg", picture(1, (30, 40)))
    put(images / "2.jpg", picture(2, (30, 40)))
    (images / "3.jpg").unlink()
    with pytest.raises(UsageError) as refusal:
        brought(record, images)
    for words in (f"2 {BOX_FAULTS['other-size']}", "1 image-missing", "3 rejected"):
        assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"categories": []}, ("SOURCE", "missing")),
        ({"categories": [{"id": 7}, {"id": 2, "name": "a"}]}, ("SOURCE", "missing")),
        ({"categories": [{"id": 7, "name": "a"}]}, ("SOURCE", "missing")),  # class 2 has no name
        ({"categories": [{"id": 7, "name": "a"}, {"id": 2, "name": "a"}]}, ("SOURCE", "conflict")),
        (
            {"categories": [{"id": n, "name": name} for n, name in ((7, "a"), (2, "b"), (7, "c"))]},
            ("SOURCE", "conflict"),
        ),
        ({"images": []}, ("SOURCE", "mismatch")),
        ({"images": [{"id": n, "file_name": f"{n}.png"} for n in (10, 20, 30)]}, ("--image-root", "not-found")),
        ({"annotations": [{"image_id": 10, "category_id": 7}]}, ("SOURCE", "mismatch")),
    ],
)
def test_json_that_cannot_be_used(change: dict[str, Any], wrong: tuple[str, str], images: Path) -> None:
    assert refused(coco(**change), images) == wrong


def test_corners_and_fractions_in_the_place_of_boxes_are_noticed(images: Path) -> None:
    record = coco()
    boxes = np.random.default_rng(0).uniform(0, 20, (40, 2)).repeat(2, 0).reshape(40, 4)[:, [0, 2, 1, 3]]
    for change in (lambda b: [b[0], b[1], b[0] + 18, b[1] + 9], lambda b: [b[0] / 40, b[1] / 30, 0.4, 0.3]):
        row = record["annotations"][2]
        wrong = [row | {"bbox": change(box)} for box in boxes.tolist()]
        assert refused(coco(annotations=wrong), images) == ("SOURCE", "mismatch")


def test_a_file_is_one_picture_only(images: Path) -> None:
    record = coco()
    for image, name in zip(record["images"], ("a/1.jpg", "b/1.jpg", "c/2.jpg")):
        image["file_name"] = name  # none of the folders is there
    result, out = brought(record, images)
    assert result["bad"] == {"image-missing": {"number": 1, "examples": ["b/1.jpg"]}} and len(samples(out)) == 2


def test_annotations_without_a_box_or_a_clear_crowd_are_counted(images: Path) -> None:
    record = coco()
    first, second, third = record["annotations"]
    del third["bbox"]
    first["iscrowd"], second["iscrowd"] = "0", "yes"
    result, out = brought(record, images)
    counted = {kind: about["number"] for kind, about in result["passed_over"].items() if "scaled" not in kind}
    assert counted == {BOX_FAULTS["not-a-box"]: 1, BOX_FAULTS["unclear-crowd"]: 1}
    assert regions_of(samples(out)["1"], (40, 30))[0].crowd.tolist() == [False, False]


def test_images_that_repeat_an_id_or_a_name_are_counted(images: Path) -> None:
    record = coco()
    one, two, three = record["images"]
    record["images"] += [two, one | {"id": 11}, three | {"file_name": "2.jpg"}]
    record["annotations"].append(record["annotations"][0] | {"id": 9, "image_id": 11, "bbox": [1, 1, 5, 5]})
    result, out = brought(record, images)
    counted = {kind: about["number"] for kind, about in result["passed_over"].items()}
    assert counted == {SAME_ID: 2, LISTED_TWICE: 1, SEVERAL_IDS: 1}
    found = samples(out)
    assert {key: len(about["objects"]) for key, about in found.items()} == {"1": 3, "2": 0}


def test_images_of_one_id_only_are_refused(images: Path) -> None:
    record = coco()
    for image in record["images"]:
        image["id"] = 10
    assert refused(record, images) == ("SOURCE", "conflict")


def test_options_without_a_use_are_refused(images: Path) -> None:
    assert refused(coco(), images, no_captions=True) == ("--no-captions", "conflict")
    assert refused(coco(), images, conversations=True) == ("--conversations", "conflict")
    assert refused("{", images)[1] == "unreadable"
    with pytest.raises(UsageError, match="--boxes true"):
        brought(coco(), images, boxes=False)


def test_lvis_keeps_what_was_looked_for(images: Path) -> None:
    record = coco()
    for image in record["images"]:
        name = image.pop("file_name")
        image |= {"coco_url": f"http://images.cocodataset.org/train2017/{name}"}
        image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [7]}
    for one in record["categories"]:
        one["frequency"] = "r"
    _, out = brought(record, images)
    about = list(samples(out).values())[-1]
    assert (about["negative"], about["not_exhaustive"]) == (["traffic light"], ["ring"])
    truth = read_truth(str(out), "train")
    assert truth.federated and [one["frequency"] for one in truth.categories] == ["r", "r"]


def refs() -> list[dict[str, Any]]:
    rows = [
        (10, 0, "train", "the ring"),
        (10, 1, "train", "all of it"),
        (30, 2, "val", "a ring"),
        (20, 2, "testA", "x"),
    ]
    return [
        {"ref_id": n, "image_id": image, "ann_id": ann, "split": split, "category_id": 7,
         "sentences": [{"sent": text, "raw": text.title(), "tokens": text.split(), "sent_id": n}]}
        for n, (image, ann, split, text) in enumerate(rows)
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2])
def test_refcoco_of_a_pickle_and_instances(protocol: int, images: Path, tmp_path: Path) -> None:
    put(tmp_path / "refcoco" / "instances.json", json.dumps(coco()))
    put(tmp_path / "refcoco" / "refs(unc).p", pickle.dumps(refs(), protocol))
    result = run(tmp_path / "refcoco", tmp_path / "out", boxes=True, image_root=str(images))
    assert (result["train"], result["val"]) == (1, 1)
    (about,) = samples(tmp_path / "out").values()
    assert [(one["phrase"], one["box"]) for one in about["phrases"]] == [
        ("the ring", [4, 4, 10, 8]), ("all of it", [0, 0, 39.5, 30.5])
    ]  # fmt: skip
    run(tmp_path / "refcoco" / "refs(unc).p", tmp_path / "a", boxes=True, image_root=str(images), split="testA")
    assert [one["phrases"][0]["phrase"] for one in samples(tmp_path / "a").values()] == ["x"]
    with pytest.raises(UsageError) as refusal:
        run(tmp_path / "refcoco", tmp_path / "b", boxes=True, image_root=str(images), split="testC")
    assert refusal.value.option == "--split"


def test_one_picture_in_two_splits_becomes_two_samples(images: Path, tmp_path: Path) -> None:
    rows = [one | {"split": split, "image_id": 10, "ann_id": 0} for one, split in zip(refs(), ("train", "val"))]
    put(tmp_path / "r" / "instances.json", json.dumps(coco()))
    put(tmp_path / "r" / "refs(google).p", pickle.dumps(rows, 2))
    run(tmp_path / "r", tmp_path / "out", boxes=True, image_root=str(images))
    found = {
        split: [one["phrases"][0]["phrase"] for one in samples(tmp_path / "out", split).values()]
        for split in ("train", "val")
    }
    assert found == {"train": ["the ring"], "val": ["all of it"]}


def test_references_of_parquet(images: Path, tmp_path: Path) -> None:
    info = [json.dumps(one) for one in coco()["images"]]
    rows = {
        "sentences": [[{"sent": "the ring", "raw": "The ring"}], [{"sent": "x", "raw": "x"}]], "split": ["train", "testB"],
        "raw_image_info": info[:2], "raw_anns": [json.dumps({"bbox": [4, 4, 10, 8]})] * 2, "bbox": [[4.0, 4.0, 14.0, 12.0]] * 2,
    }  # fmt: skip
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "table" / "train.parquet")
    result = run(tmp_path / "table", tmp_path / "out", boxes=True, image_root=str(images))
    (about,) = samples(tmp_path / "out").values()
    assert about["phrases"] == [{"phrase": "the ring", "box": [4, 4, 10, 8]}]
    assert [one["examples"] for one in result["passed_over"].values()] == [["testB"]]
    pq.write_table(pa.table({"bbox": rows["bbox"]}), tmp_path / "table" / "train.parquet")
    with pytest.raises(UsageError) as refusal:
        run(tmp_path / "table", tmp_path / "other", boxes=True, image_root=str(images))
    assert refusal.value.code == "missing"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("a.json", {"1": {"width": 40, "height": 30, "objects": {"5": 3}}}),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg", "caption": "a"}], "annotations": [
            {"image_id": 1, "bbox": [1, 1, 2, 2], "tokens_positive": [3]}]}),
        ("a.json", [1, 2]),
        ("a.jsonl", {"filename": "1.jpg"}),
        ("a.jsonl", {"filename": "1.jpg", "detection": {"instances": [3]}}),
        ("a.jsonl", {"filename": "1.jpg", "grounding": {"regions": [{"bbox": 3, "phrase": "x"}]}}),
        ("a.jsonl", "text"),
        ("a.txt", {}),
    ],
)  # fmt: skip
def test_records_of_another_form_are_one_line(name: str, record: Any, images: Path) -> None:
    assert refused(json.dumps(record), images, name=name) == ("SOURCE", "mismatch")


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("planted"),)


def test_a_pickle_that_names_anything_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "r" / "instances.json", json.dumps(coco()))
    for content in (pickle.dumps([Planted()]), pickle.dumps(refs())[:-20], b"no pickle"):
        put(tmp_path / "r" / "refs(unc).p", content)
        with pytest.raises(UsageError) as refusal:
            run(tmp_path / "r", tmp_path / "out", boxes=True, image_root=str(images))
        assert refusal.value.code == "unreadable" and not Path("planted").exists()


def test_phrases_of_mdetr(images: Path) -> None:
    captions = ["a ring and a cross", "two rings"]
    shown = [{"id": n, "file_name": "COCO_train2014_1.jpg", "width": 40, "height": 30, "caption": text}
             for n, text in enumerate(captions)]  # fmt: skip
    rows = [
        (0, [0, 6], [4, 4, 10, 8]),
        (0, [11, 18], [20, 10, 5, 5]),
        (1, [0, 9], [4, 4, 10, 8]),
        (1, [0, 9], [20, 4, 8, 8]),
    ]
    notes = [{"id": n, "image_id": image, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0, "tokens_positive": [span]}
             for n, (image, span, box) in enumerate(rows)]  # fmt: skip
    _, out = brought({"images": shown, "annotations": notes, "categories": []}, images)
    (about,) = samples(out).values()
    assert [(one["phrase"], len(one["boxes"])) for one in about["phrases"]] == [
        ("a ring", 1),
        ("a cross", 1),
        ("two rings", 2),
    ]
    assert "objects" not in about


def test_the_whole_caption_refers_in_refcoco_of_mdetr(images: Path) -> None:
    shown = [
        {
            "id": 0,
            "file_name": "1.jpg",
            "width": 40,
            "height": 30,
            "caption": "ring on the left",
            "dataset_name": "refcoco+",
        }
    ]
    notes = [{"id": 0, "image_id": 0, "category_id": 7, "bbox": [4, 4, 10, 8], "tokens_positive": [[0, 4]]}]
    _, out = brought({"images": shown, "annotations": notes, "categories": []}, images)
    assert [one["phrase"] for one in samples(out)["1"]["phrases"]] == ["ring on the left"]


def test_odvg_lines(images: Path) -> None:
    rows = [
        {"filename": "1.jpg", "height": 30, "width": 40, "detection": {"instances": [
            {"bbox": [4, 4, 14, 12], "label": 0, "category": "ring"}]}},
        {"filename": "2.jpg", "height": 30, "width": 40, "grounding": {"caption": "a ring", "regions": [
            {"bbox": [[4, 4, 14, 12], [20, 4, 28, 12]], "phrase": "a ring"}, {"bbox": [1, 1, 5, 5], "phrase": "it"}]}},
        {"filename": "3.jpg", "height": 15, "width": 20, "referring": [{"bbox": [4, 4, 14, 12], "phrase": ["one", "two"]}]},
    ]  # fmt: skip
    _, out = brought("\n".join(map(json.dumps, rows)), images, "odvg.jsonl")
    found = samples(out)
    assert found["1"]["objects"] == [{"box": [4, 4, 10, 8], "class": "ring"}]
    assert [len(one["boxes"]) for one in found["2"]["phrases"]] == [2, 1]
    assert found["3"]["phrases"] == [{"phrase": name, "box": [4, 4, 10, 8]} for name in ("one", "two")]


def test_scene_graphs(images: Path) -> None:
    things = {"5": {"name": "ring", "x": 4, "y": 4, "w": 10, "h": 8}}
    record = {"1": {"width": 40, "height": 30, "objects": things}}
    _, out = brought(record, images)
    assert samples(out)["1"]["objects"] == [{"box": [4, 4, 10, 8], "class": "ring"}]


FLICKR = """<annotation><filename>{name}.jpg</filename><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>12</name><name>13</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>15</xmax><ymax>13</ymax></bndbox></object>
<object><name>12</name><bndbox><xmin>21</xmin><ymin>5</ymin><xmax>29</xmax><ymax>13</ymax></bndbox></object>
<object><name>14</name><nobndbox>1</nobndbox></object></annotation>"""


def test_flickr30k_entities(images: Path, tmp_path: Path) -> None:
    home = tmp_path / "entities"
    for name in "12":
        put(home / "Annotations" / f"{name}.xml", FLICKR.format(name=name))
        text = "[/EN#12/people Two men] in [/EN#14/scene the park] with [/EN#13/other/clothing a hat] .\nNothing marked .\n"
        put(home / "Sentences" / f"{name}.txt", text)
    put(home / "train.txt", "1\n")
    put(home / "val.txt", "2\n")
    result = run(home, tmp_path / "out", boxes=True, image_root=str(images))
    assert (result["train"], result["val"]) == (1, 1)
    (about,) = samples(tmp_path / "out", "val").values()
    assert [(one["phrase"], one["boxes"]) for one in about["phrases"]] == [
        ("Two men", [[4, 4, 10, 8], [20, 4, 8, 8]]), ("a hat", [[4, 4, 10, 8]])
    ]  # fmt: skip
    assert about["captions"]["caption"] == ["Two men in the park with a hat .", "Nothing marked ."]


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    home = tmp_path / "yolo"
    for split, number in (("train", 1), ("train", 2), ("val", 3)):
        put(home / split / "images" / f"{number}.jpg", picture(number, (40, 30)))
    put(home / "train" / "labels" / "1.txt", "1 0.5 0.5 0.25 0.4\n0 0.1 0.1 0.3 0.1 0.3 0.4\n")
    put(home / "val" / "labels" / "3.txt", "7 0.5 0.5 0.25 0.4\n")
    put(home / "val" / "images" / "4.jpg", picture(4, (40, 30)))
    put(home / "val" / "labels" / "4.txt", "nan 0.5 0.5 0.25 0.4\n")
    put(home / "data.yaml", "train: ../train/images\nval: val/images\nnames: {0: ring, 1: cross}\n")
    return home


def test_yolo_labels(yolo: Path, tmp_path: Path) -> None:
    result = run(yolo, tmp_path / "out", boxes=True)
    bad = {code: about["number"] for code, about in result["bad"].items()}
    assert (result["train"], bad) == (2, {"no-class": 1, "not-a-box": 1})  # class 7 of two, and no number
    found = {key.rpartition("/")[2]: about for key, about in samples(tmp_path / "out").items()}
    boxes = {key.rpartition("_")[2]: about["objects"] for key, about in found.items()}
    (one,) = [objects for objects in boxes.values() if objects]
    assert [thing["class"] for thing in one] == ["cross", "ring"]
    assert one[0]["box"] == pytest.approx([15, 9, 10, 12]) and one[1]["box"] == pytest.approx([4, 3, 8, 9])
    assert [] in boxes.values()  # no label file: no objects
    bare = [about for kind, about in result["passed_over"].items() if "without a label file, of 4" in kind]
    assert bare == [{"number": 1, "examples": ["train/images/2.jpg"]}]
    assert json.loads((tmp_path / "out" / "aimv2.json").read_text())["classes"] == ["ring", "cross"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data.yaml", "train: train/images\n"),
        ("data.yaml", "train: nowhere\nnames: [a]\n"),
        ("train/labels/1.txt", "1 20 15 10 12\n"),
    ],
)
def test_yolo_that_cannot_be_used(file: str, content: str, yolo: Path, tmp_path: Path) -> None:
    put(yolo / file, content)
    with pytest.raises(UsageError) as refusal:
        run(yolo, tmp_path / "out", boxes=True)
    assert refusal.value.option == "SOURCE"


def test_yolo_names_folders_that_are_not_there(yolo: Path, tmp_path: Path) -> None:
    put(yolo / "data.yaml", "train: train/images\nval: valid/images\nnames: [ring, cross]\n")
    result = run(yolo, tmp_path / "out", boxes=True)
    assert {"number": 1, "examples": ["val: valid/images"]} in result["passed_over"].values()


def test_yolo_without_any_label_file_is_refused(yolo: Path, tmp_path: Path) -> None:
    shutil.rmtree(yolo / "train" / "labels")
    for file in (yolo / "val" / "labels").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="4 of 4 images have no label file") as refusal:
        run(yolo, tmp_path / "out", boxes=True)
    assert (refusal.value.option, refusal.value.code) == ("SOURCE", "missing")
