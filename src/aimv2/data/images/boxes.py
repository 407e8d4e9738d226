"""Boxes, classes and phrases of a sample, as KEY.json holds them, and why one of them is bad.

Legend: N boxes of a picture; a box in KEY.json is COCO's [x, y, width, height], here it is xyxy: left, top, right, bottom, in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.io import parse_json, read_file

# what makes a box, a phrase or a sample bad, by the code that it is counted under
BOX_FAULTS = {
    "not-regions": "samples without `objects` and `phrases`",
    "other-size": "samples whose boxes belong to a picture of other proportions",
    "not-a-box": "boxes that are not four finite numbers",
    "degenerate": "boxes without area",
    "outside": "boxes that leave the picture, cut at its edge",
    "far-outside": "boxes outside the picture",
    "no-class": "objects without a class",
    "unclear-crowd": "objects whose `crowd` (COCO's `iscrowd`) is neither 0 nor 1, taken as single objects",
    "duplicate": "boxes that repeat another of their class",
    "no-phrase": "phrases without text or without a box",
    "broken-mask": "segmentations that are no polygons and no RLE of their picture, left out; the objects keep their boxes",
}
UNUSABLE = frozenset(
    ("not-regions", "other-size")
)  # faults of the whole sample: it must not be used, not even as an empty one
EDGE = 1.0  # pixels that a box may leave the picture by, as rounding does, without a fault
LARGEST = 1e9  # pixels
MANIFEST = "aimv2.json"  # holds the data set's ``classes``, next to the shards
WRONG_FORM = 0.1  # fraction of boxes that leave their pictures from which they are taken to be in another form
SLACK = 0.05  # of a picture's side, by which boxes may leave it before they count there
PROPORTION = 0.02  # by which height / width of two sizes of one picture may differ


def _no_boxes() -> np.ndarray:
    return np.zeros((0, 4), np.float32)


@dataclass
class Regions:
    """What is known of the regions of a picture; rows of ``boxes``, ``classes``, ``crowd``, ``segmentations`` and ``objects`` agree.

    Attributes:
        size: (width, height) of the picture, pixels.
        boxes: float32 [N, 4], xyxy in pixels, inside the picture, each with an area.
        classes: name of each box's class.
        crowd: bool [N]; True: the box holds many objects of its class, which are not listed one by one.
        phrases: each phrase with the boxes that it means, float32 [K, 4], K at least 1.
        negative: classes that were checked to be absent (LVIS).
        not_exhaustive: classes of which not every object is listed (LVIS).
        segmentations: of each box, COCO polygons in pixels of this picture, COCO's RLE (of its own size), or None.
        objects: of each box, the object of KEY.json.
    """

    size: tuple[int, int]
    boxes: np.ndarray = field(default_factory=_no_boxes)
    classes: list[str] = field(default_factory=list)
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    phrases: list[tuple[str, np.ndarray]] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)
    not_exhaustive: list[str] = field(default_factory=list)
    segmentations: list[Any] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)


def holds_regions(about: Mapping[str, Any]) -> bool:
    """Whether a KEY.json has boxes, good or bad; an empty list of objects is a picture without any."""
    return isinstance(about.get("objects"), list) or isinstance(about.get("phrases"), list)


def class_of(thing: Mapping[str, Any]) -> str:
    """The class of an object of KEY.json, "" where it has none; of a scene's object its colour and shape."""
    name = thing.get("class")
    if name is None and isinstance(thing.get("shape"), str) and isinstance(thing.get("colour"), str):
        name = f"{thing['colour']} {thing['shape']}"
    return name.strip() if isinstance(name, str) else ""


def crowd_of(value: Any) -> bool | None:
    """Whether an object is a crowd by its flag, 0 or 1 as a number, as text or as true and false; None of anything else."""
    if value is None:
        return False
    if isinstance(value, str | int | float):
        return {"0": False, "1": True, 0: False, 1: True}.get(value)
    return None


def scale_between(of: Sequence[float], to: Sequence[float]) -> tuple[float, float] | None:
    """(across, down) by which a box of a picture of size ``of`` is scaled to size ``to`` (width, height); None: other proportions.

    Sides that differ by a pixel only are the same picture.
    """
    if not isinstance(of, list | tuple) or len(of) != 2:
        return None
    if any(not _is_number(side) or side <= 0 for side in of):
        return None
    across, down = to[0] / of[0], to[1] / of[1]
    rounded = 1.0 / min(*of, *to)  # a side is a whole number of pixels
    return (across, down) if abs(across / down - 1) <= max(PROPORTION, 2 * rounded) else None


def regions_of(about: Mapping[str, Any], size: tuple[int, int]) -> tuple[Regions, list[str]]:
    """The regions of a sample, in pixels of its picture, without what is bad.

    Args:
        about: KEY.json: ``objects`` ({"box": [x, y, w, h], "class", "crowd", "segmentation"}, or a scene's "shape" and "colour"),
            ``phrases`` ({"phrase", "box" or "boxes"}), ``negative``, ``not_exhaustive``, and ``size`` [width, height] of the
            picture that the boxes belong to, where it is another than the sample's.
        size: (width, height) of the sample's picture.

    Returns:
        The regions, and a code of :data:`BOX_FAULTS` for every fault. Boxes that leave the picture are cut, duplicates are
        kept, other bad boxes are left out. With a code of :data:`UNUSABLE` there is nothing, and the sample can't be used.
    """
    found = Regions(size)
    if not holds_regions(about):
        return found, ["not-regions"]
    of = about.get("size") or size
    scale = scale_between(of, size)
    if scale is None:
        return found, ["other-size"]
    faults: list[str] = []
    boxes, crowd = [], []
    met = set[tuple[Any, ...]]()
    for thing in listed(about, "objects"):
        box = _box(thing.get("box") if isinstance(thing, Mapping) else None, scale, size, faults)
        if box is None:
            continue
        if not (name := class_of(thing)):
            faults.append("no-class")
            continue
        if (many := crowd_of(thing.get("crowd"))) is None:
            faults.append("unclear-crowd")
            many = False
        if (same := (name, many, *(round(side, 2) for side in box))) in met:
            faults.append("duplicate")
        met.add(same)
        boxes.append(box)
        crowd.append(many)
        found.classes.append(name)
        found.segmentations.append(_segmentation(thing.get("segmentation"), scale, of, faults))
        found.objects.append(dict(thing))
    found.boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    found.crowd = np.asarray(crowd, bool)
    found.phrases = [phrase for one in listed(about, "phrases") if (phrase := _phrase(one, scale, size, faults))]
    found.negative, found.not_exhaustive = (
        [name for name in listed(about, key) if isinstance(name, str)] for key in ("negative", "not_exhaustive")
    )
    return found, faults


def listed(about: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key of KEY.json; anything else is none."""
    value = about.get(key)
    return [*value] if isinstance(value, list | tuple) else []


def fault_of_box(box: Any, size: Sequence[float]) -> str:
    """Code of the fault of a COCO box in a picture of ``size`` (width, height), "" where there is none."""
    faults: list[str] = []
    _box(box, (1.0, 1.0), size, faults)
    return faults[0] if faults else ""


def _box(value: Any, scale: tuple[float, float], size: Sequence[float], faults: list[str]) -> list[float] | None:
    """A COCO box as xyxy, scaled and cut at the picture's edge; None and a fault where that leaves nothing."""
    numbers = list(value) if isinstance(value, list | tuple | np.ndarray) else []
    if len(numbers) != 4 or not all(_is_number(number) for number in numbers):
        faults.append("not-a-box")
        return None
    left, top, width, height = (float(number) for number in numbers)
    if width <= 0 or height <= 0:
        faults.append("degenerate")
        return None
    left, right, top, bottom = left * scale[0], (left + width) * scale[0], top * scale[1], (top + height) * scale[1]
    cut = [max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))]
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        faults.append("far-outside")
        return None
    if min(left, top) < -EDGE or right > size[0] + EDGE or bottom > size[1] + EDGE:
        faults.append("outside")
    return cut


def _is_number(value: Any) -> bool:
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return known and -LARGEST < value < LARGEST  # no infinity, no NaN, no whole number that no float holds


def _phrase(
    one: Any, scale: tuple[float, float], size: tuple[int, int], faults: list[str]
) -> tuple[str, np.ndarray] | None:
    given = one if isinstance(one, Mapping) else {}
    text = given.get("phrase")
    several = given["boxes"] if isinstance(given.get("boxes"), list) else [given["box"]] if "box" in given else []
    boxes = [box for value in several if (box := _box(value, scale, size, faults))]
    if not isinstance(text, str) or not text.strip() or not several:
        faults.append("no-phrase")
        return None
    return (text.strip(), np.asarray(boxes, np.float32)) if boxes else None


def _segmentation(given: Any, scale: tuple[float, float], of: Sequence[float], faults: list[str]) -> Any:
    """Polygons in pixels of the picture; RLE as it is, of the annotated picture's size ``of``; None where there is none, and a fault
    where it is broken, in any of its parts."""
    if not given:
        return None
    if isinstance(given, Mapping):
        if _fills(given, of):
            return dict(given)
    elif isinstance(given, list) and all(map(_is_polygon, given)):
        return [[value * scale[at % 2] for at, value in enumerate(part)] for part in given]
    faults.append("broken-mask")
    return None


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and not len(part) % 2 and all(map(_is_number, part))


def _fills(code: Mapping[str, Any], of: Sequence[float]) -> bool:
    """Whether RLE is that of a picture of size ``of`` (width, height), and its runs cover it."""
    runs = code.get("counts")
    if isinstance(runs, str | bytes):
        runs = runs_of(runs)
    if code.get("size") != [of[1], of[0]] or not isinstance(runs, list):
        return False
    return all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == of[0] * of[1]


def runs_of(text: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed text: six bits a letter, five of a number's, the last with its sign; from the third run on the
    difference to the run two before."""
    runs: list[int] = []
    value = shift = 0
    for letter in text.encode("utf-8", "replace") if isinstance(text, str) else text:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


# ---- of a data set ----


def stated_classes(tars: Sequence[Path]) -> dict[str, Any]:
    """What aimv2.json next to shards says of the classes.

    That is ``classes`` (names in order of their ids), ``class_ids``, ``frequency``, and of scenes ``held_out`` and ``only_held_out``.

    {} where it says nothing, or shards of several folders say different things.
    """
    found = []
    for folder in dict.fromkeys(tar.parent for tar in tars):
        try:
            about = parse_json(read_file(folder / MANIFEST))
        except (OSError, ValueError):
            about = {}
        names = about.get("classes") if isinstance(about, dict) else None
        is_list = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        keys = ("classes", "class_ids", "frequency", "held_out", "only_held_out")
        found.append({key: about[key] for key in keys if about.get(key)} if is_list else {})
    return found[0] if found and all(one == found[0] for one in found) else {}


def boxes_in(about: Mapping[str, Any]) -> list[Any]:
    """The boxes of four numbers of a KEY.json, of its objects, else of its phrases, as they are given."""
    things = [one for one in listed(about, "objects") or listed(about, "phrases") if isinstance(one, Mapping)]
    several = [one["boxes"] if isinstance(one.get("boxes"), list) else [one.get("box")] for one in things]
    boxes = [box for part in several for box in part]
    return [box for box in boxes if isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))]


def doubt_of_form(boxes: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]]) -> str:
    """Why boxes do not seem to be COCO's [x, y, width, height] in pixels; "" where they do.

    Args:
        boxes: as they are given, of numbers.
        sizes: (width, height) of the picture of each.
    """
    if not len(boxes):
        return ""
    given, of = np.asarray(boxes, np.float64), np.asarray(sizes, np.float64)
    beyond = (given[:, :2] + given[:, 2:] > (1 + SLACK) * of + EDGE).any(1)
    corners = (given[:, 2:] > given[:, :2]).all() and (given[:, 2:] <= (1 + SLACK) * of + EDGE).all()
    if beyond.mean() > WRONG_FORM:
        form = "; they look like [left, top, right, bottom]" if corners else ""
        return f"{beyond.mean():.0%} of {len(given):,} boxes leave their pictures{form}"
    if (of > 8).all() and (np.abs(given) <= 1.5).all(1).mean() > 1 - WRONG_FORM:
        return f"{len(given):,} boxes are within 0 to 1: fractions of the picture's sides, not pixels"
    return ""
