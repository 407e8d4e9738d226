"""The command ``detect score``: boxes, masks and phrases held against the truth, as a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2.data.images.boxes import BOX_FAULTS
from aimv2.data.passed import passed_lines
from aimv2.errors import UsageError
from aimv2.evals.detection.precision import PER_IMAGE, average_precision
from aimv2.evals.detection.predictions import DetectionPredictions, read_predictions
from aimv2.evals.detection.referring import precision_at_1
from aimv2.evals.detection.truth import DetectionTruth, read_truth
from aimv2.evals.harness import Evaluation
from aimv2.features.fingerprint import file_hash
from aimv2.tables import TextTable, percent

if TYPE_CHECKING:
    from aimv2.commands.detect_score import DetectScoreOptions

WORDS = {
    "ap": "AP", "ap50": "AP, IoU 0.5", "ap75": "AP, IoU 0.75", "ap_small": "AP, small", "ap_medium": "AP, medium",
    "ap_large": "AP, large", "ar": "AR, 100 detections", "ap_rare": "AP, rare", "ap_common": "AP, common",
    "ap_frequent": "AP, frequent", "p_at_1": "phrases, P@1",
}  # fmt: skip


def evaluate_predictions(options: DetectScoreOptions) -> dict[str, Any]:
    """Predictions of a JSON file.

    Raises:
        UsageError: see :func:`aimv2.evals.detection.predictions.read_predictions`.
    """
    assert options.predictions is not None and options.data is not None
    with Evaluation("detect score", options.out) as evaluation:
        if not (file := Path(options.predictions).expanduser()).is_file():
            raise UsageError(f"--predictions {options.predictions}: no such file", code="not-found")
        truth = read_truth(options.data, options.split)
        predictions = read_predictions(options.predictions, truth)
        digest = file_hash(file)
        about = {"name": options.name or file.stem, "kind": "predictions", "predictions_sha256": digest}
        return detection_result(evaluation, truth, predictions, about, options)


def detection_result(
    evaluation: Evaluation,
    truth: DetectionTruth,
    predictions: DetectionPredictions,
    about: dict[str, Any],
    options: DetectScoreOptions,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of predictions, written where ``--out`` is given.

    Args:
        evaluation: its clock and folder.
        truth, predictions: with the same ids.
        about: the model, as a result says it.
        options: of the command.
        more: of the protocol.
    """
    figures = detection_figures(truth, predictions)
    evaluation.open_folder()
    protocol = {
        "name": "detection", "metric": ("lvis" if truth.federated else "coco") if "box" in figures or "mask" in figures else None,
        "detections": f"{PER_IMAGE} of a picture" if truth.federated else "100 of a class in a picture",
        "area": "of the annotated picture, pixels", "phrases": "IoU 0.5 or more of the best box with any box of the phrase",
        **(more or {}),
    }  # fmt: skip
    data = {
        "name": truth.name, "dataset": options.dataset, "source": options.data, "split": options.split, "test_images": len(truth.images),
        "objects": len(truth.annotations), "classes": len(truth.categories), "phrases": len(truth.phrases),
        "left_out": truth.faults.result(),
    }  # fmt: skip
    return evaluation.result(protocol, about, data, figures, None)


def detection_figures(truth: DetectionTruth, predictions: DetectionPredictions) -> dict[str, Any]:
    """``box`` and ``mask`` (average precision), ``phrases`` (P@1): what both sides have.

    Raises:
        UsageError: nothing that both have.
    """
    figures: dict[str, Any] = {}
    boxes = all("bbox" in one for one in predictions.objects)
    if truth.annotations and (predictions.objects or not (truth.phrases and predictions.phrases)):
        if boxes:
            figures["box"] = average_precision(truth, predictions.objects, "bbox", truth.federated)
        if predictions.has_masks and truth.has_masks:
            figures["mask"] = average_precision(truth, predictions.objects, "segm", truth.federated)
    if truth.phrases and (predictions.phrases or not predictions.objects):
        figures["phrases"] = precision_at_1(truth, predictions.phrases)
    if not figures:
        kinds = "objects" if predictions.objects else "phrases"
        raise UsageError(
            f"--predictions: predictions of {kinds}, and {truth.name} has none to score them against",
            option="--predictions",
            code="mismatch",
        )
    seen = {one["image_id"] for one in (*predictions.objects, *predictions.phrases)}
    counts = {
        "objects": len(predictions.objects),
        "phrases": len(predictions.phrases),
        "without_area": predictions.without_area,
    }
    counts |= {"masks_not_scored": len(predictions.objects)} if predictions.has_masks and "mask" not in figures else {}
    return figures | {"predictions": {**counts, "images_without": len(truth.images) - len(seen)}}


def render_detection(result: dict[str, Any]) -> str:
    """Tables as text, 80 columns."""
    data, figures = result["data"], result["figures"]
    lines = [f"{result['model']['name']}: {data['name']}, {data['test_images']:,} images, {data['objects']:,} objects, "
             f"{data['phrases']:,} phrases"]  # fmt: skip
    heads = [kind for kind in ("box", "mask") if kind in figures]
    table = TextTable(["", *heads], right=heads)
    for key, words in WORDS.items():
        if any(key in figures[kind] for kind in heads):
            table.rows.append(
                [words, *(percent(figures[kind][key]) if key in figures[kind] else "-" for kind in heads)]
            )
    lines += (
        [f"average precision as {str(result['protocol']['metric']).upper()} has it", table.to_text()] if heads else []
    )
    if found := figures.get("phrases"):
        low, high = found["p_at_1_interval"]
        lines.append(
            f"{WORDS['p_at_1']}: {percent(found['p_at_1'])} (95% {100 * low:.1f} to {100 * high:.1f}) of {found['phrases']:,},"
            f" {found['answered']:,} of them with a box"
        )
    counts = figures["predictions"]
    if counts.get("masks_not_scored"):
        lines.append("masks not scored: objects of the data have no segmentation")
    if counts["images_without"]:
        lines.append(f"images without a prediction: {counts['images_without']:,} of {data['test_images']:,}")
    if counts["without_area"]:
        lines.append(f"predicted boxes without area, which never match: {counts['without_area']:,}")
    left = {BOX_FAULTS.get(code, code): about for code, about in data["left_out"].items()}
    return "\n".join([*lines, *passed_lines(left, "in the data")])
