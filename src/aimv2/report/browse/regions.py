"""A page of boxes: the first pictures of a run's sources, with classes and phrases drawn on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aimv2.data.images.boxes import BOX_FAULTS, UNUSABLE, holds_regions, regions_of
from aimv2.data.images.decode import ImageError, image_size
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import Parts, captions_of, image_of, json_of, why_no_image
from aimv2.errors import UsageError
from aimv2.report.browse.page import COLOURS
from aimv2.report.browse.talks import Sources, first_samples, save_page, small


@dataclass(frozen=True)
class DrawnBox:
    """A box in percent of the picture's sides: left, top, width, height; ``colour`` is the number of its class or phrase."""

    words: str
    place: tuple[float, float, float, float]
    colour: int
    crowd: bool = False


@dataclass(frozen=True)
class BoxedCard:
    """A picture on the page, uint8 [H, W, 3], with its objects and its phrases."""

    key: str
    source: int
    image: NDArray[np.uint8]
    objects: list[DrawnBox]
    phrases: list[DrawnBox]
    negative: list[str]


def region_sources(opened: tuple[str, Sources, Parts] | None) -> Sources | None:
    """The sources of a run on boxes, of :func:`aimv2.report.browse.talks.run_sources`; None for other runs."""
    if opened is None:
        return None
    objective, found, first = opened
    return found if objective == "detect" or (holds_regions(json_of(first)) and not captions_of(first)) else None


def write_boxes(sources: Sources, count: int, out: Path) -> dict[str, Any]:
    """Write a page of the first pictures of each source, ``count`` in all, and return its figures.

    Raises:
        UsageError: no picture with boxes, or a page that can't be written.
    """
    bad, cards, colours = PassedOver(), list[BoxedCard](), dict[str, int]()
    for number, key, parts in first_samples(sources, count):
        if (image := image_of(parts)) is None:
            bad.add("images that can't be read", f"{key}: {why_no_image(parts)}")
            continue
        try:
            regions, faults = regions_of(json_of(parts), image_size(image[1]))
            pixels = small(image[1])
        except ImageError as error:
            bad.add("images that can't be read", f"{key}: {error}")
            continue
        for code in faults:
            bad.add(BOX_FAULTS[code], key)
        if UNUSABLE & set(faults):
            continue
        scale = 100 / np.array([*regions.size, *regions.size])
        objects = [
            _drawn(box * scale, name, colours.setdefault(name, len(colours)), bool(many))
            for box, name, many in zip(regions.boxes, regions.classes, regions.crowd, strict=True)
        ]
        phrases = [
            _drawn(box * scale, phrase, at) for at, (phrase, boxes) in enumerate(regions.phrases) for box in boxes
        ]
        cards.append(BoxedCard(key, number, pixels, objects, phrases, regions.negative))
    if not cards:
        why = "; ".join(passed_lines(bad.result(), "left out"))
        raise UsageError(f"data.train: no boxes among its first {count} samples; {why}", code="missing")
    page = save_page("boxes.html", {"cards": cards, "bad": passed_lines(bad.result(), "boxes")}, sources, out)
    return {
        **page,
        "samples": len(cards),
        "objects": sum(len(card.objects) for card in cards),
        "phrases": sum(len({one.colour for one in card.phrases}) for card in cards),
        "classes": len(colours),
        "bad": bad.result(),
    }


def _drawn(box: NDArray[np.floating[Any]], words: str, colour: int, crowd: bool = False) -> DrawnBox:
    """A box of percents, left, top, right, bottom, ready for the page."""
    left, top, right, bottom = (round(float(side), 2) for side in box)
    return DrawnBox(words, (left, top, round(right - left, 2), round(bottom - top, 2)), colour % COLOURS, crowd)
