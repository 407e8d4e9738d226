"""``aimv2 detect score``: average precision of boxes and masks, and P@1 of phrases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from aimv2.config.types import PathText, PositiveInt
from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 detect score runs/detector --data boxes --out results/detector
aimv2 detect score --predictions found.json --data instances_val2017.json
aimv2 detect score --predictions found.json --data boxes --dataset refcoco"""
FIRST = "predictions data split dataset name out batch_size device"


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
        out: folder for result.json, and of a detector for what it found, predictions.json
        model: RUN or RUN@STEP of aimv2 detect train, or its model folder, in place of predictions
        batch_size: pictures, or phrases, per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
    """

    predictions: PathText | None = None
    data: PathText | None = None
    split: Literal["train", "val", "test"] = "val"
    dataset: Literal["coco2017", "lvis", "refcoco", "refcoco+", "refcocog"] | None = None
    name: str | None = None
    out: PathText | None = None
    model: PathText | list[PathText] | None = None
    batch_size: PositiveInt = 16
    device: str | None = None

    def __post_init__(self) -> None:
        models = self.models()
        if models and (self.predictions is not None or len(models) > 1):
            given = "--predictions" if self.predictions is not None else models[1]
            raise UsageError(
                f"MODEL {models[0]} and {given}: one detector, or one file of predictions, is expected",
                option="MODEL",
                code="conflict",
            )
        needed: dict[str, tuple[Any, str]] = {
            "--predictions": (self.predictions or models, "a JSON file of detections; or MODEL, a detector")
        }
        needed["--data"] = (self.data, "shards with boxes, or a COCO JSON")
        for option, (value, what) in needed.items():
            if not value:
                raise UsageError(f"{option}: needed, {what}", option=option, code="missing")

    def models(self) -> list[str]:
        """The detectors that were given, one at most."""
        return [self.model] if isinstance(self.model, str) else self.model or []


def run(options: DetectScoreOptions) -> dict[str, Any]:
    if options.models():
        from aimv2.evals.detection.model_score import evaluate_detector

        return evaluate_detector(options)
    from aimv2.evals.detection.score import evaluate_predictions

    return evaluate_predictions(options)


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.evals.detection.score import render_detection

    console.print(render_detection(result), markup=False, highlight=False)
