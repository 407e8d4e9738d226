"""The command ``detect score RUN``: what a detector finds in the pictures of shards, scored."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.data.images.decode import decode_image
from aimv2.data.shards.format import find_shards, read_samples
from aimv2.data.stream.regions import Place
from aimv2.data.stream.samples import image_bytes
from aimv2.detect.find import Found, OpenDetector, find_objects, find_phrases, open_detector
from aimv2.distributed import default_device, usable_device
from aimv2.errors import UsageError
from aimv2.evals.detection.held import xywh
from aimv2.evals.detection.predictions import DetectionPredictions
from aimv2.evals.detection.score import detection_result
from aimv2.evals.detection.truth import DetectionTruth, read_truth
from aimv2.evals.harness import Evaluation
from aimv2.features.fingerprint import file_hash
from aimv2.interop.model_folder import WEIGHTS, find_model
from aimv2.progress import tracked

if TYPE_CHECKING:
    from aimv2.commands.detect_score import DetectScoreOptions


class Shown(NamedTuple):
    """A picture in the model's square: its id, the size that its boxes are given in, pixels uint8 [3, S, S], and where it lies."""

    number: int
    size: tuple[int, int]
    pixels: Tensor
    place: Place


def evaluate_detector(options: DetectScoreOptions) -> dict[str, Any]:
    """A detector on the boxes and phrases of shards.

    Raises:
        UsageError: no detector, no shards with boxes, classes that a detector with a fixed list lacks.
    """
    assert options.data is not None
    (source,) = options.models()
    with Evaluation("detect score", options.out) as evaluation:
        if Path(options.data).suffix.lower() == ".json":
            raise UsageError(
                f"--data {options.data}: a detector needs the pictures: shards are expected, which `aimv2 data import "
                f"{shlex.quote(options.data)} OUT --boxes true` makes",
                option="--data",
                code="mismatch",
            )
        detector = open_detector(source, usable_device(default_device(options.device)))
        truth = read_truth(options.data, options.split)
        names = class_numbers(detector, truth)
        found = DetectionPredictions()
        shown = pictures(detector, truth, options)
        while part := list(islice(shown, options.batch_size)):
            if names:
                found.objects += objects_of(detector, part, names)
            if detector.prompts is not None:
                found.phrases += phrases_of(detector, part, truth, options.batch_size)
        about = {
            "name": options.name or Path(source).name, "kind": "detector", "head": detector.model.head,
            "weights_sha256": file_hash(find_model(source) / WEIGHTS),
        }  # fmt: skip
        more = {"image_size": detector.side, "decoding": "scores as in the model's card, the 300 best of a picture"}
        result = detection_result(evaluation, truth, found, about, options, more)
        if evaluation.out is not None:
            rows = [*found.objects, *found.phrases]
            (evaluation.out / "predictions.json").write_text(json.dumps(named(rows, truth)), encoding="utf-8")
        return result


def class_numbers(detector: OpenDetector, truth: DetectionTruth) -> dict[str, int]:
    """Ids of the classes to find, by the detector's own names of them.

    Raises:
        UsageError: a detector with a fixed list that lacks all of them, or some.
    """
    numbers = {one["name"]: int(one["id"]) for one in truth.categories}
    if detector.prompts is not None:
        return numbers
    lacking = [name for name in numbers if name not in detector.names]
    if lacking:
        raise UsageError(
            f"--data: {len(lacking)} of {len(numbers)} classes, such as '{lacking[0]}', are none of the {len(detector.names)} that this "
            "detector was trained on; a detector with objective.head=grounding finds any",
            option="--data",
            code="mismatch",
        )
    return numbers


def pictures(detector: OpenDetector, truth: DetectionTruth, options: DetectScoreOptions) -> Iterator[Shown]:
    """The pictures of the truth, in order."""
    assert options.data is not None
    sizes = {one["id"]: (one["width"], one["height"]) for one in truth.images}
    pairs = (pair for tar in find_shards(options.data, options.split, option="--data") for pair in read_samples(tar))
    met = set[int]()
    for key, parts in tracked(pairs, "pictures", None):
        number = truth.images_by_name.get(key)
        if number is None or number in met:
            continue
        met.add(number)
        pixels, place = detector.pixels(decode_image(image_bytes(parts)))
        yield Shown(number, sizes[number], pixels, place)


def objects_of(detector: OpenDetector, shown: list[Shown], names: dict[str, int]) -> list[dict[str, Any]]:
    """Detections of some pictures, as COCO has them."""
    wanted = list(names) if detector.prompts is not None else detector.names
    rows: list[dict[str, Any]] = []
    pixels = torch.stack([one.pixels for one in shown])
    for one, found in zip(shown, find_objects(detector.model, detector.prompts, pixels, wanted)):
        boxes = xywh(one.place.back(found.boxes.double().numpy(), one.size)).tolist()
        for at, (box, label, score) in enumerate(zip(boxes, found.labels.tolist(), found.scores.tolist())):
            if (number := names.get(wanted[label])) is not None:
                row = {"image_id": one.number, "category_id": number, "bbox": box, "score": score}
                rows.append(row | ({} if found.masks is None else {"segmentation": outline(found, at, one)}))
    return rows


def outline(found: Found, at: int, one: Shown) -> dict[str, Any]:
    """A mask in pixels of the annotated picture, as COCO's RLE."""
    from faster_coco_eval.core import mask as coder

    assert found.masks is not None
    side = one.pixels.shape[-1]
    cells = Image.fromarray(255 * found.masks[at].numpy().astype(np.uint8))
    square = cells.resize((side, side), Image.Resampling.BILINEAR).crop((0, 0, one.place.width, one.place.height))
    inside = np.asarray(square.resize(one.size, Image.Resampling.BILINEAR)) >= 128
    code = coder.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def phrases_of(detector: OpenDetector, shown: list[Shown], truth: DetectionTruth, size: int) -> list[dict[str, Any]]:
    """The best box of every phrase of some pictures."""
    assert detector.prompts is not None
    here = {one.number: one for one in shown}
    pairs = [(here[number], phrase) for number, phrase, _ in truth.phrases if number in here]
    rows: list[dict[str, Any]] = []
    for part in (pairs[at : at + size] for at in range(0, len(pairs), size)):
        pixels = torch.stack([one.pixels for one, _ in part])
        boxes, scores = find_phrases(detector.model, detector.prompts, pixels, [phrase for _, phrase in part])
        for (one, phrase), box, score in zip(part, boxes.double().numpy(), scores.tolist()):
            place = xywh(one.place.back(box[None], one.size))[0].tolist()
            rows.append({"image_id": one.number, "phrase": phrase, "bbox": place, "score": score})
    return rows


def named(rows: list[dict[str, Any]], truth: DetectionTruth) -> list[dict[str, Any]]:
    """The same predictions with keys of images and names of classes, which `detect score --predictions` reads."""
    keys: dict[int, Any] = {}
    for name, number in truth.images_by_name.items():
        keys.setdefault(number, name)
    names = {one["id"]: one["name"] for one in truth.categories}
    return [
        {
            **row,
            "image_id": keys[row["image_id"]],
            **({"category_id": names[row["category_id"]]} if "category_id" in row else {}),
        }
        for row in rows
    ]
