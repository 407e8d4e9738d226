"""Average precision of boxes and masks: COCO's, equal to pycocotools, and LVIS's, by faster-coco-eval.

LVIS is federated: of a picture only some classes are checked. A detection counts where its class is in the picture or was checked to be
absent; an unmatched one of a class that is not listed exhaustively is neither right nor wrong; a picture's 300 best of all classes count.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from aimv2.errors import UsageError, need
from aimv2.evals.detection.truth import FREQUENCIES, DetectionTruth

Kind = Literal["bbox", "segm"]
CHUNK = 128  # classes that are scored at a time: the evaluator keeps a list for each picture and class, 24 million in LVIS val
PER_IMAGE = 300  # detections of a picture that count in LVIS, over all classes
# of a result -> (IoU, area) of COCO's summary; AP is the mean over IoU 0.50 to 0.95
AP_FIGURES = {
    "ap": (None, "all"), "ap50": (0.5, "all"), "ap75": (0.75, "all"), "ap_small": (None, "small"), "ap_medium": (None, "medium"),
    "ap_large": (None, "large"),
}  # fmt: skip


def average_precision(
    truth: DetectionTruth, predictions: Sequence[dict[str, Any]], kind: Kind = "bbox", lvis: bool = False
) -> dict[str, Any]:
    """Average precision, 0..1; a figure of which there is no object is left out.

    Args:
        truth: images, categories and annotations.
        predictions: with the truth's ids, see :class:`aimv2.evals.detection.predictions.DetectionPredictions`.
        kind: of boxes or of masks.
        lvis: LVIS's, on federated annotations; else COCO's, with 100 detections of a class in a picture.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large``; of COCO ``ar`` (100 detections), of LVIS ``ap_rare``,
        ``ap_common``, ``ap_frequent``; ``per_class`` {name: ap}.

    Raises:
        UsageError: the package is missing, a class without its frequency, no masks.
    """
    need("faster_coco_eval", "detect", "average precision")
    from faster_coco_eval import COCO, COCOeval_faster

    sizes = {one["id"]: (one["width"], one["height"]) for one in truth.images}
    if kind == "segm" and not truth.has_masks:
        raise UsageError(
            "--data: objects without a segmentation; masks can't be scored", option="--data", code="missing"
        )
    if lvis and any(one.get("frequency") not in FREQUENCIES for one in truth.categories):
        raise UsageError(
            "--data: LVIS's score needs `frequency` (r, c or f) of every class; COCO's score takes classes without it",
            option="--data",
            code="missing",
        )
    objects = copy.deepcopy(truth.annotations)
    for one in objects if kind == "segm" else ():
        one["segmentation"] = run_lengths(one["segmentation"], sizes[one["image_id"]], "--data")
    given = COCO({"images": truth.images, "categories": truth.categories, "annotations": objects})
    rows = [_record(one, kind, sizes) for one in (best_of_images(predictions) if lvis else predictions)]
    found = given.loadRes(rows)
    precisions, recalls, ids = list[np.ndarray](), list[np.ndarray](), [one["id"] for one in truth.categories]
    for start in range(0, len(ids), CHUNK):  # classes do not depend on one another
        judge = COCOeval_faster(given, found, kind, lvis_style=lvis, rle_iou_max_workers=1)
        judge.params.catIds = ids[start : start + CHUNK]
        if lvis:
            judge.params.maxDets = [PER_IMAGE]
        judge.evaluate()
        judge.accumulate()
        precisions.append(
            judge.eval["precision"]
        )  # [T, R, K, A, M]: IoUs, recalls, classes, areas, numbers of detections
        recalls.append(judge.eval["recall"])  # [T, K, A, M]
    precision, recall = np.concatenate(precisions, 2), np.concatenate(recalls, 1)
    areas, last = list(judge.params.areaRngLbl), len(judge.params.maxDets) - 1
    figures = {}
    for name, (iou, area) in AP_FIGURES.items():
        part = precision[:, :, :, areas.index(area), last]
        part = part if iou is None else part[np.isclose(judge.params.iouThrs, iou)]
        figures[name] = _mean(part)
    classes = precision[:, :, :, 0, last]
    if lvis:
        for name, letter in zip(("ap_rare", "ap_common", "ap_frequent"), FREQUENCIES, strict=True):
            rows_of = [row for row, one in enumerate(truth.categories) if one["frequency"] == letter]
            figures[name] = _mean(classes[:, :, rows_of])
    else:
        figures["ar"] = _mean(recall[:, :, 0, last])
    per_class = {one["name"]: _mean(classes[:, :, row]) for row, one in enumerate(truth.categories)}
    result: dict[str, Any] = {name: value for name, value in figures.items() if value is not None}
    return result | {"per_class": {name: value for name, value in per_class.items() if value is not None}}


def best_of_images(predictions: Sequence[dict[str, Any]], most: int = PER_IMAGE) -> list[dict[str, Any]]:
    """The ``most`` best of each picture over all its classes; of equal scores the first ones."""
    by_image = defaultdict[int, list[dict[str, Any]]](list)
    for one in predictions:
        by_image[one["image_id"]].append(one)
    return [one for rows in by_image.values() for one in sorted(rows, key=lambda one: -one["score"])[:most]]


def _record(one: dict[str, Any], kind: Kind, sizes: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """A prediction as the evaluator takes it: of masks without its box, whose area would else stand for the mask's."""
    if kind == "bbox":
        return {key: one[key] for key in ("image_id", "category_id", "bbox", "score")}
    mask = run_lengths(one["segmentation"], sizes[one["image_id"]], "--predictions")
    return {"image_id": one["image_id"], "category_id": one["category_id"], "segmentation": mask, "score": one["score"]}


def run_lengths(mask: Any, size: tuple[int, int], option: str) -> dict[str, Any]:
    """A segmentation (COCO's polygons or RLE) as compressed RLE of a picture of ``size`` (width, height).

    Raises:
        UsageError: it is neither, or of another size; ``option`` is named.
    """
    from faster_coco_eval.core.mask import area, segmToRle

    width, height = size
    counts = mask.get("counts") if isinstance(mask, dict) else None
    if isinstance(mask, dict) and list(mask.get("size") or ()) != [height, width]:
        why = f"of size {mask.get('size')} for a picture of height and width {[height, width]}"
    elif isinstance(counts, list) and sum(counts) != width * height:
        why = f"whose counts cover {sum(counts):,} of {width * height:,} pixels"
    else:
        try:
            assert isinstance(mask, dict) or (isinstance(mask, list) and all(len(part) >= 6 for part in mask))
            found = segmToRle(mask, width, height)
            assert area([found])[0] <= width * height  # reads the runs
            return found
        except Exception:  # of the C++ module: any type, also of its own
            why = "that is neither polygons nor RLE"
    raise UsageError(f"{option}: a segmentation {why}", option=option, code="mismatch")


def _mean(values: np.ndarray) -> float | None:
    """Mean without the -1 of what has no object; None where that is all."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else None
