"""Referring expressions: whether the best box of a phrase is the object that it means (P@1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aimv2.evals.detection.truth import DetectionTruth
from aimv2.evals.scores import wilson

IOU = 0.5


def box_iou(one: Sequence[float] | np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of a box with each of several: xywh [4] and [K, 4] -> [K]; 0 for a box without area."""
    box, others = np.asarray(one, np.float64), np.asarray(others, np.float64).reshape(-1, 4)
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    both = np.clip(high - low, 0, None).prod(1)
    union = max(box[2], 0) * max(box[3], 0) + others[:, 2:].prod(1) - both
    return np.where(union > 0, both / np.where(union > 0, union, 1), 0.0)


def precision_at_1(truth: DetectionTruth, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fraction of the phrases whose best-scored box has IoU 0.5 or more with a box of the phrase.

    A phrase without a prediction counts as wrong. Of a phrase that means several boxes, any of them is right.

    Args:
        truth: phrases.
        predictions: of phrases, with the truth's ids.

    Returns:
        ``p_at_1`` 0..1, its 95% interval, ``phrases``, ``answered``, ``several_boxes`` (phrases that mean several).
    """
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for one in predictions:
        place = one["image_id"], one["phrase"].strip()
        if place not in best or one["score"] > best[place]["score"]:
            best[place] = one
    right = answered = 0
    for image, phrase, boxes in truth.phrases:
        found = best.get((image, phrase))
        answered += found is not None
        right += found is not None and bool((box_iou(found["bbox"], boxes) >= IOU).any())
    number = len(truth.phrases)
    return {
        "p_at_1": right / number, "p_at_1_interval": list(wilson(right, number)), "phrases": number, "answered": answered,
        "several_boxes": sum(len(boxes) > 1 for *_, boxes in truth.phrases),
    }  # fmt: skip
