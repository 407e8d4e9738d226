"""``aimv2 detect score``: average precision of boxes and masks, and P@1 of phrases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 detect score --predictions found.json --data instances_val2017.json
aimv2 detect score --predictions found.json --data boxes --dataset refcoco"""
FIRST = "predictions data split dataset name out"


@dataclass(kw_only=True)
class DetectScoreOptions:
    """Score detections: COCO's average precision of boxes and masks, LVIS's on federated annotations, P@1 of phrases.

    Args:
        predictions: JSON list in COCO's result form: image_id, category_id, bbox (x, y, width, height), score, and segmentation for
            masks; of phrases image_id, phrase, bbox, score. image_id may be a key or file name, category_id a class name
        data: shards with boxes, or a COCO or LVIS JSON of instances
        split: of a folder of shards: train, val or test
        dataset: coco2017, lvis, refcoco, refcoco+ or refcocog: the column of the paper's tables for aimv2 compare; null: by the data's name
        name: of what made the predictions, in the result; null: the file's name
        out: folder for result.json
    """

    predictions: str | None = None
    data: str | None = None
    split: Literal["train", "val", "test"] = "val"
    dataset: Literal["coco2017", "lvis", "refcoco", "refcoco+", "refcocog"] | None = None
    name: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        needed = {"--predictions": (self.predictions, "a JSON file of detections")}
        needed["--data"] = (self.data, "shards with boxes, or a COCO JSON")
        for option, (value, what) in needed.items():
            if value is None:
                raise UsageError(f"{option}: needed, {what}", option=option, code="missing")


def run(options: DetectScoreOptions) -> dict[str, Any]:
    from aimv2.evals.detection.score import evaluate_predictions

    return evaluate_predictions(options)


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.evals.detection.score import render_detection

    console.print(render_detection(result), markup=False, highlight=False)
