"""Boxes drawn on a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from aimv2.report.sheet import load_font

TEN = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def draw_boxes(image: Image.Image, boxes: np.ndarray, labels: Sequence[str], kinds: Sequence[int]) -> Image.Image:
    """A copy of an RGB picture with a frame and a label for each box.

    Args:
        image: at least 1 px a side.
        boxes: [n, 4], xyxy in its pixels.
        labels: a line of text each.
        kinds: number of each box's colour.
    """
    canvas, font = image.copy(), load_font()
    pen, line = ImageDraw.Draw(canvas), max(1, round(max(image.size) / 300))
    for (left, top, right, bottom), label, kind in zip(boxes.tolist(), labels, kinds):
        colour = TEN[kind % len(TEN)]
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
        across, down = pen.textbbox((0, 0), label, font=font)[2:]
        x, y = max(0, min(left, image.width - across)), top - down if top >= down else top
        pen.rectangle((x, y, x + across, y + down), fill=colour)
        pen.text((x, y), label, fill="white", font=font)
    return canvas
