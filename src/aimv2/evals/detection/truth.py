"""What detections are scored against: boxes and phrases of shards, or of a COCO JSON, in one form.

Legend: N objects, P phrases, K boxes of a phrase. Boxes are COCO's [x, y, width, height] in pixels of the annotated picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aimv2.data.images.boxes import (
    BOX_FAULTS,
    UNUSABLE,
    Regions,
    doubt_of_form,
    regions_of,
    scale_between,
    stated_classes,
)
from aimv2.data.images.decode import ImageError, image_size
from aimv2.data.passed import PassedOver
from aimv2.data.shards.format import find_shards, image_of, json_of, read_samples
from aimv2.data.text.encoding import open_text
from aimv2.errors import UsageError, first_line
from aimv2.io import parse_json
from aimv2.progress import tracked

FREQUENCIES = ("r", "c", "f")  # LVIS: classes of under 10, under 100, and of more training images


@dataclass
class DetectionTruth:
    """Ground truth, as COCO's records, with ids of its own: whole numbers from 1, since evaluators take 0 for nothing.

    Attributes:
        name: of the data set.
        images: {"id", "width", "height", of LVIS "neg_category_ids" and "not_exhaustive_category_ids"}.
        categories: {"id", "name", of LVIS "frequency"}.
        annotations: {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation" where there is one}.
        phrases: (image id, phrase, boxes float64 [K, 4] xywh).
        images_by_name: id of an image by what predictions may call it: its key, its file name, its id in the source.
        categories_by_name: id of a category by its id in the source, where it states ids, and by its name.
        federated: of LVIS's form, in which a picture's classes are checked only in part.
        faults: counts of what was left out, by code of :data:`aimv2.data.images.boxes.BOX_FAULTS`.
    """

    name: str
    images: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    phrases: list[tuple[int, str, np.ndarray]] = field(default_factory=list)
    images_by_name: dict[str | int, int] = field(default_factory=dict)
    categories_by_name: dict[str | int, int] = field(default_factory=dict)
    federated: bool = False
    faults: PassedOver = field(default_factory=PassedOver)

    @property
    def has_masks(self) -> bool:
        """Whether every object has a segmentation."""
        return bool(self.annotations) and all(one.get("segmentation") for one in self.annotations)


def read_truth(source: str, split: Literal["train", "val", "test"] = "val", option: str = "--data") -> DetectionTruth:
    """The boxes and phrases of shards or of a COCO JSON.

    Args:
        source: folder, glob, brace pattern or tar of shards; or a .json file.
        split: of a folder of shards.
        option: that an error names.

    Raises:
        UsageError: nothing there, or nothing to score against.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".json" and path.is_file():
        truth = _of_json(path, option)
    else:
        tars = find_shards(source, split, option=option)
        if not tars:
            raise UsageError(f"{option} {source}: no {split}-*.tar in it; --split train is what it has", code="missing")
        truth = _of_shards(tars, Path(source).name, source, option)
    sizes = {one["id"]: (one["width"], one["height"]) for one in truth.images}
    boxes = [(one["bbox"], sizes[one["image_id"]]) for one in truth.annotations]
    if doubt := doubt_of_form([box for box, _ in boxes], [size for _, size in boxes]):
        raise UsageError(
            f"{option} {source}: {doubt}; [x, y, width, height] in pixels expected", option=option, code="mismatch"
        )
    return truth


def _add_names(known: dict[str | int, int], names: list[tuple[str | int, int]]) -> None:
    """Adds further names of images or categories; what is known stays, and what would mean several is left out."""
    meant: dict[str | int, set[int]] = {}
    for name, number in names:
        meant.setdefault(name, set()).add(number)
    known |= {name: next(iter(numbers)) for name, numbers in meant.items() if len(numbers) == 1 and name not in known}


def _add_categories(truth: DetectionTruth, names: list[str], ids: list[Any], frequency: list[str] | None) -> None:
    """Categories in the order given; ``ids`` of the source, [] where it states none: then only names are taken."""
    for number, name in enumerate(names, 1):
        more = {"frequency": frequency[number - 1]} if frequency else {}
        truth.categories.append({"id": number, "name": name, **more})
    truth.categories_by_name.update({given: number for number, given in enumerate(ids, 1)})
    _add_names(truth.categories_by_name, [(name, number) for number, name in enumerate(names, 1)])


# ---- shards ----


def _of_shards(tars: list[Path], name: str, source: str, option: str) -> DetectionTruth:
    truth, found, further = DetectionTruth(name), list[tuple[int, Regions]](), list[tuple[str | int, int]]()
    for key, parts in tracked((pair for tar in tars for pair in read_samples(tar)), f"reading {name}, samples", None):
        about, image = json_of(parts), image_of(parts)
        try:
            size = image_size(image[1]) if image else None
        except ImageError:
            size = None
        if size is None:
            truth.faults.add("unreadable", key)
            continue
        annotated = about.get("size") or size
        if scale_between(annotated, size) is None:
            truth.faults.add("other-size", key)
            continue
        # scores are those of the annotated picture: small, medium and large are areas there
        regions, faults = regions_of({**about, "size": None}, (int(annotated[0]), int(annotated[1])))
        for fault in faults:
            truth.faults.add(fault, key)
        if UNUSABLE & set(faults):
            continue
        number = len(truth.images) + 1
        truth.images.append({"id": number, "width": regions.size[0], "height": regions.size[1]})
        if truth.images_by_name.setdefault(key, number) != number:
            raise UsageError(
                f"{option} {source}: the key {key} occurs twice; keys of scored samples must differ",
                option=option,
                code="conflict",
            )
        further += [(about[word], number) for word in ("image_id", "source") if isinstance(about.get(word), str | int)]
        found.append((number, regions))
    if not found:
        why = "; ".join(
            f"{about['number']:,} {BOX_FAULTS.get(code, code)}" for code, about in truth.faults.result().items()
        )
        raise UsageError(
            f"{option} {source}: no sample with boxes{'; ' * bool(why)}{why}", option=option, code="missing"
        )
    _add_names(truth.images_by_name, further)
    stated = stated_classes(tars)
    present = {word for _, one in found for word in (*one.classes, *one.negative, *one.not_exhaustive)}
    names: list[str] = stated.get("classes") or sorted(present)
    if strange := sorted(present - set(names)):
        raise UsageError(
            f"{option} {source}: objects of the class '{strange[0]}', which `classes` of aimv2.json lacks",
            option=option,
            code="mismatch",
        )
    _add_categories(truth, names, stated.get("class_ids") or [], stated.get("frequency"))
    truth.federated = any(one.negative for _, one in found) or "frequency" in stated
    for number, regions in found:
        _add_regions(truth, number, regions)
    return truth


def _add_regions(truth: DetectionTruth, image: int, regions: Regions) -> None:
    for row, thing in enumerate(regions.objects):
        box = [float(side) for side in thing["box"]]  # as it is annotated, not cut at the edge: as pycocotools has it
        area = thing.get("area")
        one = {
            "id": len(truth.annotations) + 1, "image_id": image, "bbox": box,
            "category_id": truth.categories_by_name[regions.classes[row]], "iscrowd": int(regions.crowd[row]),
            "area": float(area) if isinstance(area, int | float) and area > 0 else box[2] * box[3],
        }  # fmt: skip
        if regions.segmentations[row]:
            one["segmentation"] = regions.segmentations[row]
        truth.annotations.append(one)
    about = truth.images[image - 1]
    for key, names in (("neg_category_ids", regions.negative), ("not_exhaustive_category_ids", regions.not_exhaustive)):
        about[key] = [truth.categories_by_name[name] for name in names]
    for phrase, boxes in regions.phrases:
        corners = np.asarray(boxes, np.float64)
        truth.phrases.append((image, phrase, np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)))


# ---- COCO JSON ----


def load_coco(path: Path, option: str) -> dict[str, Any]:
    """A COCO JSON of instances.

    Raises:
        UsageError: no JSON, or without images, annotations or categories.
    """
    try:
        with open_text(path) as file:
            record = parse_json(file.read())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option} {path}: can't be read as JSON: {first_line(error)}", option=option, code="unreadable"
        ) from None
    lists = [
        key
        for key in ("images", "annotations", "categories")
        if isinstance(record, dict) and isinstance(record.get(key), list)
    ]
    if missing := [key for key in ("images", "annotations", "categories") if key not in lists]:
        raise UsageError(
            f"{option} {path}: no list `{missing[0]}`; COCO's JSON of instances has images, annotations and categories",
            option=option,
            code="missing",
        )
    return record


def _of_json(path: Path, option: str) -> DetectionTruth:
    """As pycocotools reads it: every annotation counts, whatever its box."""
    record, truth = load_coco(path, option), DetectionTruth(path.stem)
    try:
        cats = sorted(record["categories"], key=lambda one: one["id"])
        known = all(one.get("frequency") in FREQUENCIES for one in cats)
        frequency = [str(one["frequency"]) for one in cats] if known else None
        _add_categories(truth, [str(one["name"]) for one in cats], [one["id"] for one in cats], frequency)
        for number, one in enumerate(record["images"], 1):
            about = {"id": number, "width": one["width"], "height": one["height"]}
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                about[key] = [truth.categories_by_name[given] for given in one.get(key) or ()]
            truth.federated = truth.federated or "neg_category_ids" in one
            truth.images.append(about)
            if truth.images_by_name.setdefault(one["id"], number) != number:
                raise UsageError(
                    f"{option} {path}: the image id {one['id']} occurs twice", option=option, code="conflict"
                )
        for one in record["annotations"]:
            numbers = [*one["bbox"], one["area"] if one.get("area") is not None else 0]
            if len(numbers) != 5 or not all(isinstance(side, int | float) and math.isfinite(side) for side in numbers):
                raise ValueError(f"bbox {one['bbox']}, area {one.get('area')}")
            width, height = one["bbox"][2:]
            kept = {key: one[key] for key in ("segmentation",) if one.get(key)}
            truth.annotations.append({
                "id": len(truth.annotations) + 1, "image_id": truth.images_by_name[one["image_id"]], "bbox": list(one["bbox"]),
                "category_id": truth.categories_by_name[one["category_id"]], "iscrowd": int(one.get("iscrowd", 0)),
                "area": one["area"] if one.get("area") is not None else width * height, **kept,
            })  # fmt: skip
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{option} {path}: a record lacks or misnames {first_line(error)}; COCO's ids and boxes of four numbers expected",
            option=option,
            code="mismatch",
        ) from None
    files = [
        (one["file_name"], number)
        for number, one in enumerate(record["images"], 1)
        if isinstance(one.get("file_name"), str)
    ]
    _add_names(truth.images_by_name, files)
    if not truth.annotations:
        raise UsageError(f"{option} {path}: no annotations", option=option, code="missing")
    return truth
