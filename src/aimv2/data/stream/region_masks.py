"""Masks of objects in the square that a picture lies in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aimv2.data.images.boxes import runs_of
from aimv2.data.stream.regions import Place


def masks_of(
    segmentations: Sequence[Any], boxes: np.ndarray, size: tuple[int, int], place: Place, side: int, stride: int
) -> np.ndarray:
    """uint8 [n, side / stride, side / stride], 1 inside the object; of an object without a segmentation its box.

    Args:
        segmentations: COCO polygons in pixels of the picture, RLE of its own size, or None.
        boxes: [n, 4] xyxy in pixels of the square.
        size: (width, height) of the picture.
        place: of the picture in the square.
        side: of the square.
        stride: pixels per cell.
    """
    cells = -(-side // stride)
    masks = np.zeros((len(segmentations), cells, cells), np.uint8)
    for at, given in enumerate(segmentations):
        if isinstance(given, Mapping):
            picture = Image.fromarray(decode_rle(given)).convert("RGB")
            masks[at] = _cells(place.square(picture, side, (0, 0, 0)).convert("L"), cells)
            continue
        canvas = Image.new("L", (side, side))
        draw = ImageDraw.Draw(canvas)
        if given is None:
            left, top, right, bottom = boxes[at].round().tolist()
            draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), 255)
        for polygon in given or ():
            points = np.asarray(polygon, np.float64).reshape(-1, 2)
            points = points * [place.resized[0] / size[0], place.resized[1] / size[1]] - [place.left, place.top]
            if place.flip:
                points[:, 0] = place.width - points[:, 0]
            draw.polygon([tuple(point) for point in (points - 0.5).tolist()], 255)
        pixels = np.asarray(canvas).copy()
        pixels[place.height :] = pixels[:, place.width :] = 0  # of the cut, not of what surrounds it
        masks[at] = _cells(Image.fromarray(pixels), cells)
    return masks


def _cells(square: Image.Image, cells: int) -> np.ndarray:
    """A mask 0 / 255 in pixels as 0 / 1 in cells: what covers at least half of one."""
    return (np.asarray(square.resize((cells, cells), Image.Resampling.BOX)) >= 128).astype(np.uint8)


def decode_rle(given: Mapping[str, Any]) -> np.ndarray:
    """COCO's RLE, its counts as a list or as text: uint8 [height, width], 255 inside."""
    height, width = given["size"]
    counts = given["counts"]
    runs = list(counts) if isinstance(counts, list) else runs_of(counts)
    flat = np.repeat(np.arange(len(runs)) % 2, runs)[: height * width]
    flat = np.pad(flat, (0, height * width - len(flat)))
    return (255 * flat.reshape(width, height).T).astype(np.uint8)
