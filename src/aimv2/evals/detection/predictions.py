"""Predictions in COCO's result form, held against what they are scored on: whatever would make a wrong score is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aimv2.data.images.boxes import doubt_of_form
from aimv2.data.text.encoding import open_text
from aimv2.errors import UsageError, first_line
from aimv2.evals.detection.truth import DetectionTruth
from aimv2.io import parse_json

FORM = '{"image_id", "category_id", "bbox": [x, y, width, height], "score"} of objects, {"image_id", "phrase", "bbox", "score"} of phrases'


@dataclass
class DetectionPredictions:
    """Predictions with the truth's ids.

    Attributes:
        objects: {"image_id", "category_id", "bbox", "score", "segmentation" where there is one}.
        phrases: {"image_id", "phrase", "bbox", "score"}.
        without_area: boxes whose width or height is not above 0: they never match.
    """

    objects: list[dict[str, Any]] = field(default_factory=list)
    phrases: list[dict[str, Any]] = field(default_factory=list)
    without_area: int = 0

    @property
    def has_masks(self) -> bool:
        """Whether every object has a segmentation."""
        return bool(self.objects) and all(one.get("segmentation") for one in self.objects)


def read_predictions(file: str, truth: DetectionTruth) -> DetectionPredictions:
    """The predictions of a JSON file: a list, or {"predictions": [...]}.

    Raises:
        UsageError: a file that can't be read, another form, images or classes that the truth does not have, boxes of another form.
    """
    option, path = "--predictions", Path(file).expanduser()
    try:
        with open_text(path) as text:
            rows = parse_json(text.read())
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {file}: can't be read as JSON: {first_line(error)}", code="unreadable") from None
    if isinstance(rows, dict):
        rows = rows.get("predictions")
    if not isinstance(rows, list):
        raise UsageError(f"{option} {file}: a JSON list of {FORM} is expected", code="mismatch")
    return matched_predictions(rows, truth, f"{option} {file}")


def matched_predictions(
    rows: Iterable[Any], truth: DetectionTruth, given: str = "--predictions"
) -> DetectionPredictions:
    """Predictions whose images and classes are named as in their source, with the truth's ids.

    Args:
        rows: in COCO's result form; ``category_id`` may be an id or a name, ``image_id`` an id, a key or a file name.
        truth: what they are scored on.
        given: begins an error.

    Raises:
        UsageError: see :func:`read_predictions`.
    """
    found, sizes = DetectionPredictions(), {one["id"]: (one["width"], one["height"]) for one in truth.images}
    for number, row in enumerate(rows, 1):
        place = f"{given}: entry {number:,}"
        one = _checked(row, truth, place)
        (found.phrases if "phrase" in one else found.objects).append(one)
    known = {(image, phrase) for image, phrase, _ in truth.phrases}
    strange = [one for one in found.phrases if (one["image_id"], one["phrase"].strip()) not in known]
    if strange and known:
        raise UsageError(
            f"{given}: {len(strange):,} phrases that their images do not have, such as '{strange[0]['phrase']}'; write them as the data do",
            option="--predictions",
            code="mismatch",
        )
    both = [one for one in (*found.objects, *found.phrases) if one.get("bbox")]
    if doubt := doubt_of_form([one["bbox"] for one in both], [sizes[one["image_id"]] for one in both]):
        raise UsageError(
            f"{given}: {doubt}; [x, y, width, height] in pixels expected", option="--predictions", code="mismatch"
        )
    found.without_area = sum(min(one["bbox"][2:]) <= 0 for one in both)
    masks = sum(bool(one.get("segmentation")) for one in found.objects)
    if masks not in (0, len(found.objects)):
        raise UsageError(
            f"{given}: {masks:,} of {len(found.objects):,} objects have a segmentation; all or none expected",
            code="mismatch",
        )
    return found


def _checked(row: Any, truth: DetectionTruth, place: str) -> dict[str, Any]:
    """A prediction with the truth's ids.

    Raises:
        UsageError: it has another form, or names what is not there.
    """
    phrase = isinstance(row, Mapping) and "phrase" in row
    wanted = {"image_id", "score", "phrase" if phrase else "category_id"}
    if not isinstance(row, Mapping) or not wanted <= row.keys() or not ("bbox" in row or "segmentation" in row):
        raise UsageError(f"{place}: {FORM} expected", code="mismatch")
    image = truth.images_by_name.get(row["image_id"]) if isinstance(row["image_id"], str | int) else None
    if image is None:
        raise UsageError(f"{place}: image {row['image_id']!r} is not in {truth.name}", code="mismatch")
    if not _number(row["score"]):
        raise UsageError(f"{place}: the score {row['score']!r} is no finite number", code="non-finite")
    one: dict[str, Any] = {"image_id": image, "score": float(row["score"])}
    if (box := row.get("bbox")) is not None:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_number, box)):
            raise UsageError(f"{place}: bbox {box!r}: four finite numbers expected", code="mismatch")
        one["bbox"] = [float(side) for side in box]
    if phrase:
        if not isinstance(row["phrase"], str) or "bbox" not in one:
            raise UsageError(f"{place}: a phrase with a bbox expected", code="mismatch")
        return one | {"phrase": row["phrase"]}
    category = truth.categories_by_name.get(row["category_id"]) if isinstance(row["category_id"], str | int) else None
    if category is None:
        raise UsageError(f"{place}: class {row['category_id']!r} is not in {truth.name}", code="mismatch")
    return one | {"category_id": category} | ({"segmentation": row["segmentation"]} if row.get("segmentation") else {})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
