"""Held-out pictures scored during training: average precision and precision at 1, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from aimv2.data.stream.regions import HeldRegions
from aimv2.data.text.phrases import Prompts
from aimv2.detect.find import find_objects, find_phrases
from aimv2.detect.model import Detector
from aimv2.distributed import World, gather_rows
from aimv2.evals.detection.precision import average_precision
from aimv2.evals.detection.referring import IOU, box_iou
from aimv2.evals.detection.truth import DetectionTruth

BATCH = 16
PER_PICTURE = 100  # detections, as COCO counts them


@dataclass
class HeldTruth:
    """Held-out pictures, of all ranks and in one order, and the class names."""

    pictures: list[HeldRegions]
    names: list[str]

    def phrases(self) -> list[tuple[int, int]]:
        """(picture, phrase) of all phrases."""
        return [(at, number) for at, one in enumerate(self.pictures) for number in range(len(one.regions.phrases))]

    def as_truth(self) -> DetectionTruth:
        """What boxes are scored against; ids are numbers from 1."""
        truth = DetectionTruth("held out")
        numbers = {name: number for number, name in enumerate(self.names, 1)}
        truth.categories = [{"id": number, "name": name} for name, number in numbers.items()]
        for image, one in enumerate(self.pictures, 1):
            regions = one.regions
            truth.images.append({"id": image, "width": regions.size[0], "height": regions.size[1]})
            for row, box in enumerate(xywh(regions.boxes.astype(np.float64)).tolist()):
                if (number := numbers.get(regions.classes[row])) is not None:
                    about = {"id": len(truth.annotations) + 1, "image_id": image, "category_id": number, "bbox": box}
                    truth.annotations.append({**about, "area": box[2] * box[3], "iscrowd": int(regions.crowd[row])})
        return truth


def xywh(boxes: np.ndarray) -> np.ndarray:
    """Corners [n, 4] as COCO's left, top, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def turns(pictures: list[int], world: World) -> list[list[tuple[int, bool]]]:
    """This rank's batches of things: (number of the thing, whether it counts).

    Every rank runs as many, since a sharded model gathers its weights in each; what is left of them repeats the first picture.

    Args:
        pictures: of each thing the number of its picture, whose pixels the rank ``number % ranks`` has.
        world: the ranks.
    """
    own = [at for at, picture in enumerate(pictures) if picture % world.size == world.rank]
    counts = [sum(picture % world.size == rank for picture in pictures) for rank in range(world.size)]
    batches = [[(at, True) for at in own[start : start + BATCH]] for start in range(0, len(own), BATCH)]
    return batches + [[(0, False)]] * (-(-max(counts) // BATCH) - len(batches))


def score_held(model: Detector, prompts: Prompts | None, truth: HeldTruth, world: World) -> dict[str, float]:
    """See :meth:`aimv2.tasks.detect.Detect.validate`; equal on every rank."""
    figures: dict[str, float] = {}
    if truth.names and any(len(one.regions.boxes) for one in truth.pictures):
        figures |= objects_found(model, prompts, truth, world)
    if prompts is not None and truth.phrases():
        figures |= phrases_found(model, prompts, truth, world)
    return figures


def objects_found(model: Detector, prompts: Prompts | None, truth: HeldTruth, world: World) -> dict[str, float]:
    """``val_ap`` and ``val_ap50`` of boxes."""
    rows = [np.zeros((0, 7))]
    for batch in turns([*range(len(truth.pictures))], world):
        pixels = torch.stack([pixels_of(truth.pictures[at]) for at, _ in batch])
        for (at, counts), found in zip(batch, find_objects(model, prompts, pixels, truth.names)):
            if counts:
                one, part = truth.pictures[at], slice(PER_PICTURE)
                boxes = xywh(one.place.back(found.boxes[part].double().numpy(), one.regions.size))
                labels, scores = found.labels[part].double().numpy(), found.scores[part].double().numpy()
                rows.append(np.column_stack([np.full(len(boxes), float(at)), labels, boxes, scores]))
    table = torch.from_numpy(np.concatenate(rows)).to(world.device)
    records = [
        {"image_id": int(at) + 1, "category_id": int(label) + 1, "bbox": box, "score": score}
        for at, label, *box, score in gather_rows(table, world).tolist()
    ]
    figures = average_precision(truth.as_truth(), records) if records else {}
    return {f"val_{name}": figures.get(name, 0.0) for name in ("ap", "ap50")}


def phrases_found(model: Detector, prompts: Prompts, truth: HeldTruth, world: World) -> dict[str, float]:
    """``val_p_at_1``: the fraction of phrases whose best box has an IoU of 0.5 or more with a box of the phrase."""
    pairs, sums = truth.phrases(), torch.zeros(2, dtype=torch.float64)
    for batch in turns([at for at, _ in pairs], world):
        places = [pairs[turn] for turn, _ in batch]
        pixels = torch.stack(
            [pixels_of(truth.pictures[at if counts else 0]) for (at, _), (_, counts) in zip(places, batch)]
        )
        words = [truth.pictures[at].regions.phrases[number][0] for at, number in places]
        boxes, _ = find_phrases(model, prompts, pixels, words)
        for (at, number), (_, counts), box in zip(places, batch, boxes.double().numpy()):
            if counts:
                one = truth.pictures[at]
                (back,), means = xywh(one.place.back(box[None], one.regions.size)), one.regions.phrases[number][1]
                sums += torch.tensor([float((box_iou(back, xywh(means)) >= IOU).any()), 1.0])
    right, count = world.sum(sums.to(world.device)).tolist()
    return {"val_p_at_1": right / max(count, 1)}


def pixels_of(one: HeldRegions) -> torch.Tensor:
    assert one.pixels is not None, "a picture of another rank"
    return torch.from_numpy(one.pixels)
