"""Average precision: COCO's equals pycocotools on random detections; LVIS's is right on federated cases made by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimv2.errors import UsageError
from aimv2.evals.detection.precision import average_precision
from aimv2.evals.detection.predictions import matched_predictions
from aimv2.evals.detection.truth import DetectionTruth, read_truth

pycocotools = pytest.importorskip("pycocotools")
pytest.importorskip("faster_coco_eval")
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", None, None, "ar")  # rows of COCO's summary


def octagon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    turns = np.arange(8) * np.pi / 4
    points = np.stack([x + w / 2 * (1 + np.cos(turns)), y + h / 2 * (1 + np.sin(turns))], 1)
    return [points.round(2).ravel().tolist()]


def random_set(seed: int, first_id: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of 12 images and 4 classes (one without an object, one image empty, some crowds), and detections with ties."""
    rng = np.random.default_rng(seed)
    images = [{"id": 7 * n + 3, "width": 400, "height": 300, "file_name": f"{n}.jpg"} for n in range(12)]
    categories = [{"id": number, "name": name} for number, name in ((1, "a"), (3, "b"), (9, "c"), (44, "none"))]
    annotations, found = [], []
    for image in images[1:]:
        for _ in range(int(rng.integers(1, 7))):
            w, h = rng.uniform(6, 160, 2).round(2).tolist()
            x, y = round(rng.uniform(0, 400 - w), 2), round(rng.uniform(0, 300 - h), 2)
            category, crowd = int(rng.choice([1, 3, 9])), int(rng.random() < 0.15)
            one = {"image_id": image["id"], "category_id": category, "bbox": [x, y, w, h], "iscrowd": crowd}
            mask: Any = octagon(x, y, w, h)
            if crowd:
                area = np.zeros((300, 400), np.uint8)
                area[int(y) : int(y + h), int(x) : int(x + w)] = 1
                mask = {"size": [300, 400], "counts": run_lengths(area)}
            annotations.append({**one, "id": first_id + len(annotations), "area": 0.7 * w * h, "segmentation": mask})
            for _ in range(int(rng.integers(0, 4))):
                box = (np.array([x, y, w, h]) + rng.normal(0, 0.07, 4) * [w, h, w, h]).clip(1).round(2).tolist()
                kind = category if rng.random() < 0.8 else 3
                score = float(rng.integers(0, 12) / 12)
                found.append({"image_id": image["id"], "category_id": kind, "bbox": box, "score": score,
                              "segmentation": octagon(*box)})  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}, found


def run_lengths(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *counts] if flat[0] else counts


def reference(truth: dict[str, Any], found: list[dict[str, Any]], kind: str) -> np.ndarray:
    """The summary of pycocotools; masks without their boxes, as the public detectors score them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        given = COCO()
        given.dataset = copy.deepcopy(truth)
        given.createIndex()
        rows = [{k: v for k, v in one.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for one in found]
        for row in rows if kind == "segm" else ():
            row["segmentation"] = given.annToRLE({"image_id": row["image_id"], "segmentation": row["segmentation"]})
        judge = COCOeval(given, given.loadRes(rows), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats


def of(record: dict[str, Any], folder: Path) -> DetectionTruth:
    (folder / "truth.json").write_text(json.dumps(record))
    return read_truth(str(folder / "truth.json"))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_coco_average_precision_equals_pycocotools(kind: Any, seed: int, tmp_path: Path) -> None:
    record, found = random_set(seed)
    truth = of(record, tmp_path)
    figures = average_precision(truth, matched_predictions(found, truth).objects, kind)
    for name, value in zip(NAMES, reference(record, found, kind)):
        if name and value >= 0:
            assert figures[name] == pytest.approx(value, abs=1e-9), name
    assert 0.05 < figures["ap"] < 0.95 and set(figures["per_class"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [300, 400], "counts": "zz~~garbage"},
        {"size": [300, 400], "counts": [5, 5]},
        {"size": [400, 300], "counts": [120000]},
        "x",
        [[1, 2]],
    ],
    ids=str,
)
def test_masks_that_are_none_are_refused(mask: Any, tmp_path: Path) -> None:
    record, found = random_set(7)
    for option in ("--predictions", "--data"):
        truth = of(record, tmp_path)
        with pytest.raises(UsageError) as refusal:
            rows = matched_predictions([found[0] | {"segmentation": mask}, *found[1:]], truth).objects
            if option == "--data":
                rows, truth.annotations[0]["segmentation"] = matched_predictions(found, truth).objects, mask
            average_precision(truth, rows, "segm")
        assert (refusal.value.code, refusal.value.option) == ("mismatch", option)


def test_classes_scored_in_parts_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, found = random_set(6)
    truth = of(record, tmp_path)
    whole = average_precision(truth, matched_predictions(found, truth).objects)
    monkeypatch.setattr("aimv2.evals.detection.precision.CHUNK", 1)
    assert average_precision(truth, matched_predictions(found, truth).objects) == whole


def test_an_annotation_of_id_0_counts_as_any_other(tmp_path: Path) -> None:
    zero, found = random_set(5, first_id=0)
    truths = [of(zero, tmp_path), of(random_set(5)[0], tmp_path)]
    both = [average_precision(one, matched_predictions(found, one).objects)["ap"] for one in truths]
    assert both[0] == both[1]


# ---- LVIS ----

BOX, AWAY = [10, 10, 20, 20], [60, 60, 20, 20]


def federated(images: list[dict[str, Any]], objects: list[tuple[int, int]], frequency: str = "rcf") -> dict[str, Any]:
    """Images with ids from 1, an object at BOX for each (image, class), classes 1, 2, 3 of the frequencies."""
    return {
        "images": [{"id": n, "width": 100, "height": 100, "neg_category_ids": [], "not_exhaustive_category_ids": []} | one
                   for n, one in enumerate(images, 1)],
        "categories": [{"id": n, "name": "abc"[n - 1], "frequency": letter} for n, letter in enumerate(frequency, 1)],
        "annotations": [{"id": n, "image_id": image, "category_id": kind, "bbox": BOX, "area": 400}
                        for n, (image, kind) in enumerate(objects, 1)],
    }  # fmt: skip


def lvis(record: dict[str, Any], found: list[tuple[int, int, list[int], float]], folder: Path) -> dict[str, Any]:
    truth = of(record, folder)
    assert truth.federated
    rows = [{"image_id": image, "category_id": kind, "bbox": box, "score": score} for image, kind, box, score in found]
    return average_precision(truth, matched_predictions(rows, truth).objects, "bbox", lvis=True)


@pytest.mark.parametrize(
    ("about", "ap"),
    [
        ({}, 1.0),  # nobody looked for the class in image 2: what is found there is neither right nor wrong
        ({"neg_category_ids": [1]}, 0.5),  # it was looked for and is absent: a false positive before the right one
    ],
)
def test_lvis_negatives(about: dict[str, Any], ap: float, tmp_path: Path) -> None:
    record = federated([{}, about], [(1, 1)])
    assert lvis(record, [(1, 1, BOX, 0.5), (2, 1, BOX, 0.9)], tmp_path)["ap"] == pytest.approx(ap)


@pytest.mark.parametrize(("listed", "ap"), [([], 0.5), ([1], 1.0)])
def test_lvis_classes_that_are_not_listed_exhaustively(listed: list[int], ap: float, tmp_path: Path) -> None:
    record = federated([{"not_exhaustive_category_ids": listed}], [(1, 1)])
    assert lvis(record, [(1, 1, BOX, 0.5), (1, 1, AWAY, 0.9)], tmp_path)["ap"] == pytest.approx(ap)


@pytest.mark.parametrize("other", [2, 3])  # of a class that is in the picture, and of one that nobody looked for
@pytest.mark.parametrize(("before", "ap"), [(299, 1.0), (300, None)])
def test_lvis_takes_300_detections_of_a_picture_over_all_classes(
    before: int, ap: float | None, other: int, tmp_path: Path
) -> None:
    record = federated([{}], [(1, 1), (1, 2)])
    found = [(1, other, AWAY, 0.9)] * before + [(1, 1, BOX, 0.5)]
    assert lvis(record, found, tmp_path)["per_class"]["a"] == pytest.approx(ap or 0.0)


def test_lvis_frequencies_and_classes_without_objects(tmp_path: Path) -> None:
    record = federated([{"neg_category_ids": [4]}, {"neg_category_ids": [2]}], [(1, 1), (1, 2), (1, 3)])
    record["categories"].append({"id": 4, "name": "d", "frequency": "r"})  # no object: no part of any mean
    found = [(1, 1, BOX, 0.9), (2, 2, BOX, 0.9), (1, 2, BOX, 0.5), (1, 3, AWAY, 0.9), (1, 4, BOX, 0.9)]
    figures = lvis(record, found, tmp_path)
    means = [figures[name] for name in ("ap_rare", "ap_common", "ap_frequent", "ap")]
    assert means == pytest.approx([1.0, 0.5, 0.0, 0.5]) and set(figures["per_class"]) == {"a", "b", "c"}


def test_lvis_needs_frequencies(tmp_path: Path) -> None:
    record = federated([{}], [(1, 1)])
    del record["categories"][1]["frequency"]
    with pytest.raises(UsageError) as refusal:
        lvis(record, [(1, 1, BOX, 0.5)], tmp_path)
    assert (refusal.value.code, refusal.value.option) == ("missing", "--data")
