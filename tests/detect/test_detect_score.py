"""`detect score`: scenes and COCO JSON, wrong predictions refused, P@1, and the paper's figures next to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimv2 import api
from aimv2.data.scene_objects import make_layout
from aimv2.data.scenes import write_scenes
from aimv2.data.shards.format import json_of, read_samples, write_shard
from aimv2.errors import UsageError
from aimv2.evals.compare import compare_results
from aimv2.evals.compare_detection import PRINTED, paper_cells_of_detection
from aimv2.evals.detection.referring import box_iou, precision_at_1
from aimv2.evals.detection.score import render_detection
from aimv2.evals.detection.truth import DetectionTruth, read_truth

pytest.importorskip("faster_coco_eval")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes") / "scenes"
    write_scenes(folder, 2, val_count=16, size=64, layout=make_layout(64, 4, distractors=0.5), progress=False)
    return folder


@pytest.fixture(scope="module")
def found(scenes: Path) -> list[dict[str, Any]]:
    """Perfect predictions of the validation split, of objects and phrases."""
    rows = []
    for key, parts in read_samples(scenes / "val-000000.tar"):
        about = json_of(parts)
        for thing in about["objects"]:
            name = f"{thing['colour']} {thing['shape']}"
            rows.append({"image_id": key, "category_id": name, "bbox": thing["box"], "score": 0.9})
        rows += [{"image_id": key, "phrase": p["phrase"], "bbox": p["box"], "score": 0.5} for p in about["phrases"]]
    return rows


def score(rows: Any, data: Path, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "found.json").write_text(json.dumps(rows))
    return api.detect_score(data=str(data), predictions=str(folder / "found.json"), **options)


def test_perfect_predictions_of_scenes(scenes: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    result = score(found, scenes, tmp_path)
    figures = result["figures"]
    assert figures["box"]["ap"] == pytest.approx(1.0) and figures["phrases"]["p_at_1"] == 1.0
    assert result["data"]["classes"] == 48 and result["data"]["test_images"] == 16
    assert result["protocol"]["metric"] == "coco" and "mask" not in figures
    assert figures["predictions"]["images_without"] == 0 and result["data"]["left_out"] == {}


def test_masks_need_masks_on_both_sides(scenes: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{**row, "segmentation": [[1, 1, 5, 1, 5, 5]]} for row in found if "phrase" not in row]
    result = score(rows, scenes, tmp_path)
    assert "mask" not in result["figures"] and result["figures"]["predictions"]["masks_not_scored"] == len(rows)
    assert "masks not scored" in render_detection(result)


def test_a_wrong_class_and_a_missing_phrase_cost(scenes: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    objects = [row for row in found if "phrase" not in row]
    phrases = [row for row in found if "phrase" in row]
    other = [{**row, "category_id": "red ring" if row["category_id"] != "red ring" else "red cross"} for row in objects]
    assert score(other, scenes, tmp_path)["figures"]["box"]["ap"] < 0.3
    figures = score(phrases[1:], scenes, tmp_path)["figures"]
    assert figures["phrases"]["p_at_1"] == pytest.approx(1 - 1 / len(phrases)) and "box" not in figures
    assert score([], scenes, tmp_path)["figures"]["box"]["ap"] == 0.0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"image_id": "elsewhere"}, "mismatch"),
        ({"category_id": "dog"}, "mismatch"),
        ({"category_id": 1}, "mismatch"),  # scenes name their classes and state no ids
        ({"score": float("nan")}, "non-finite"),
        ({"bbox": [1, 2, 3]}, "mismatch"),
        ({"bbox": [1, 2, 3, float("inf")]}, "mismatch"),
        ({"segmentation": [[1, 1, 5, 1, 5, 5]]}, "mismatch"),  # of one object only
        ({"label": 1, "category_id": None}, "mismatch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_predictions_that_do_not_fit_are_refused(
    change: dict[str, Any], code: str, scenes: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refusal:
        score([found[0] | change, *found[1:]], scenes, tmp_path)
    assert (refusal.value.code, refusal.value.option) == (code, "--predictions")


def test_phrases_of_other_words_are_refused(scenes: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    phrases = [row for row in found if "phrase" in row]
    with pytest.raises(UsageError) as refusal:
        score([phrases[0] | {"phrase": "The Ring"}, *phrases[1:]], scenes, tmp_path)
    assert (refusal.value.code, refusal.value.option) == ("mismatch", "--predictions")


def test_names_that_mean_several_are_no_names(tmp_path: Path) -> None:
    box = {"category_id": 1, "bbox": [1, 1, 9, 9], "area": 81}
    record = {
        "images": [
            {"id": n, "width": 40, "height": 30, "file_name": name}
            for n, name in enumerate(("a.jpg", "a.jpg", "b.jpg"))
        ],
        "categories": [{"id": 1, "name": "ring"}, {"id": 2, "name": "ring"}, {"id": 3, "name": "cross"}],
        "annotations": [{**box, "id": n, "image_id": n} for n in range(3)],
    }
    (tmp_path / "t.json").write_text(json.dumps(record))
    truth = read_truth(str(tmp_path / "t.json"))
    assert truth.images_by_name == {0: 1, 1: 2, 2: 3, "b.jpg": 3}
    assert truth.categories_by_name == {1: 1, 2: 2, 3: 3, "cross": 3}
    for one in record["annotations"]:
        one["bbox"] = [20, 15, 38, 28]  # corners
    (tmp_path / "t.json").write_text(json.dumps(record))
    with pytest.raises(UsageError) as refusal:
        read_truth(str(tmp_path / "t.json"))
    assert (refusal.value.code, refusal.value.option) == ("mismatch", "--data")


def as_corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


@pytest.mark.parametrize("form", [as_corners, lambda box: [side / 64 for side in box]], ids=["xyxy", "fractions"])
def test_boxes_of_another_form_are_noticed(
    form: Any, scenes: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refusal:
        score([{**row, "bbox": form(row["bbox"])} for row in found], scenes, tmp_path)
    assert (refusal.value.code, refusal.value.option) == ("mismatch", "--predictions")


@pytest.mark.parametrize("given", [{"data": "x"}, {"predictions": "x"}])
def test_both_sides_are_needed(given: dict[str, str]) -> None:
    with pytest.raises(UsageError) as refusal:
        api.detect_score(**given)
    assert refusal.value.code == "missing" and refusal.value.option.removeprefix("--") not in given


@pytest.mark.parametrize("content", ["{", "3", '{"a": 1}'])
def test_a_file_that_holds_no_list(content: str, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(UsageError) as refusal:
        api.detect_score(data=str(scenes), predictions=str(tmp_path / "found.json"))
    assert refusal.value.option == "--predictions"


def test_data_without_boxes(tmp_path: Path) -> None:
    write_shard(tmp_path / "val-000000.tar", [("a", {"json": b"{}", "txt": b"a"})])
    with pytest.raises(UsageError) as refusal:
        read_truth(str(tmp_path))
    assert (refusal.value.code, refusal.value.option) == ("missing", "--data")


@pytest.mark.parametrize(
    "change",
    [
        {"annotations": [{"image_id": 1, "category_id": 1, "bbox": ["a", 1, 2, 3]}]},
        {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, float("nan"), 3]}]},
        {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 3], "area": "6"}]},
        {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]},
        {"categories": [3]},
        {"categories": [{"id": None, "name": "b"}, {"id": 1, "name": "a"}]},
    ],
    ids=str,
)
def test_a_coco_json_of_another_form(change: dict[str, Any], tmp_path: Path) -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 3]}
    record = {"images": [{"id": 1, "width": 9, "height": 9}], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "t.json").write_text(json.dumps({**record, "annotations": [box], **change}))
    with pytest.raises(UsageError) as refusal:
        read_truth(str(tmp_path / "t.json"))
    assert (refusal.value.code, refusal.value.option) == ("mismatch", "--data")


def test_a_coco_json_without_categories(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(UsageError) as refusal:
        read_truth(str(tmp_path / "t.json"))
    assert (refusal.value.code, refusal.value.option) == ("missing", "--data")


# ---- phrases ----


def test_iou_of_boxes() -> None:
    others = np.array([[0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 5, 5], [0, 0, 10, 20], [3, 3, 0, 4]])
    assert box_iou([0, 0, 10, 10], others).tolist() == pytest.approx([1, 1 / 3, 0, 0.5, 0])


def test_p_at_1_takes_the_best_box_and_any_of_several() -> None:
    several = np.array([[0, 0, 10, 10], [50, 50, 10, 10]])
    truth = DetectionTruth("t", phrases=[(1, "a", several[:1]), (1, "both", several), (2, "a", several[:1])])
    rows = [
        {"image_id": 1, "phrase": "a", "bbox": [30, 30, 5, 5], "score": 0.9},  # the best, and wrong
        {"image_id": 1, "phrase": "a", "bbox": [0, 0, 10, 10], "score": 0.8},
        {"image_id": 1, "phrase": "both", "bbox": [50, 50, 10, 20], "score": 0.1},  # IoU 0.5 is enough
    ]
    figures = precision_at_1(truth, rows)
    assert (figures["p_at_1"], figures["answered"], figures["several_boxes"]) == (pytest.approx(1 / 3), 2, 1)


# ---- compare ----


def test_compare_shows_the_papers_tables(scenes: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("coco2017", "refcoco+"):
        score(found, scenes, tmp_path, dataset=name, name="mine", out=str(tmp_path / name))
    compared = compare_results([str(tmp_path / "coco2017")])
    table = {(cell["model"], cell["metric"]): (cell["value"], cell["source"]) for cell in compared["table"]}
    assert table["AIMv2", "box AP, %"] == (60.2, "AIMV2, Tables 4, D1")
    assert table["AIMv2, window 32", "box AP, %"] == (60.3, "AIMV2, Table D2")
    assert table["AIMv2, Mask R-CNN", "mask AP small, %"] == (26.7, "AIMV2, section D.2")
    assert table["mine", "box AP, %"][0] == pytest.approx(100.0)
    assert "16 images, COCO 2017 val has 5,000" in " ".join(compared["text"].split())
    referring = compare_results([str(tmp_path / "refcoco+")])["table"]
    assert {cell["value"] for cell in referring if cell["model"].startswith("AIMv2")} == {86.3, 85.8}


def test_the_papers_figures_are_complete() -> None:
    assert [len(paper_cells_of_detection(name)) for name in PRINTED] == [5 * 4 + 7 + 5 * 8, 5 * 4 + 7, 12, 12, 12]
