"""Draw a section's pictures as one PNG, for documents: one row per strip, with captions and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from aimv2.report.blocks import Section, Strip, Tinted
from aimv2.report.images import Picture, fit

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

GAP = 6  # pixels between pictures
LINE = 15  # line height in pixels
FONT_SIZE = 11
INK, PALE = (40, 40, 40), (120, 120, 120)
TINT = (255, 150, 130)  # background of a token at full strength
WIDEST = 6  # minimum width of a sheet with tokens, in pictures


def draw_sheet(section: Section, side: int = 128) -> Picture | None:
    """Draw all strips of a section, one per row; tokens go to the right of a single picture, else below the row.

    Args:
        section: section of a report.
        side: longer side of each picture in pixels.

    Returns:
        uint8 [H, W, 3] on white; None: the section has no picture.
    """
    from PIL import Image, ImageDraw

    strips = [block for block in section.blocks if isinstance(block, Strip) and block.shots]
    if not strips:
        return None
    font = load_font()
    places = max(len(strip.shots) for strip in strips)
    if any(strip.tokens for strip in strips):
        places = max(places, WIDEST)
    width = places * (side + GAP) + GAP
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows, heights = [], []
    for strip in strips:
        left = GAP if len(strip.shots) > 1 else 2 * GAP + side
        tokens = token_lines(strip.tokens, ruler, font, left, width - GAP)
        pictures = strip_height(strip, side)
        words = len(tokens) * 2 * LINE + GAP
        start = pictures if len(strip.shots) > 1 else 0
        rows.append((tokens, start))
        heights.append(max(pictures, start + words if tokens else 0))
    canvas = Image.new("RGB", (width, sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    top = GAP
    for strip, (tokens, start), height in zip(strips, rows, heights):
        for place, shot in enumerate(strip.shots):
            left = GAP + place * (side + GAP)
            canvas.paste(Image.fromarray(np.ascontiguousarray(fit(shot.picture, side))), (left, top))
            if shot.under:
                below = top + tallest(strip, side)
                pen.text((left, below), shorten(shot.under, pen, font, side), fill=PALE, font=font)
        for number, line in enumerate(tokens):
            write_tokens(line, pen, font, top + start + number * 2 * LINE)
        top += height
    return np.asarray(canvas)


def load_font() -> FreeTypeFont:
    """Matplotlib's own font: Latin, Greek, Cyrillic, and more."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def tallest(strip: Strip, side: int) -> int:
    """Height in pixels of the tallest picture of a row."""
    return max(round(shot.picture.shape[0] * side / max(shot.picture.shape[:2])) for shot in strip.shots)


def strip_height(strip: Strip, side: int) -> int:
    """Height in pixels of a row of pictures with captions and gap."""
    return tallest(strip, side) + GAP + (LINE if any(shot.under for shot in strip.shots) else 0)


def token_lines(
    tokens: Sequence[Tinted], ruler: ImageDraw, font: FreeTypeFont, start: int, end: int
) -> list[list[tuple[Tinted, int, int]]]:
    """Wrap tokens into lines between two x coordinates: each with its left edge and width."""
    lines: list[list[tuple[Tinted, int, int]]] = []
    left = end  # so that the first token begins a line
    for token in tokens:
        wide = round(max(ruler.textlength(shown(token.text), font=font), ruler.textlength(token.figure, font=font))) + 6
        if left + wide > end:
            lines.append([])
            left = start
        lines[-1].append((token, left, wide))
        left += wide + 2
    return lines


def write_tokens(line: Sequence[tuple[Tinted, int, int]], pen: ImageDraw, font: FreeTypeFont, top: int) -> None:
    """Draw a line of tokens, each on its background, with its figure below."""
    for token, left, wide in line:
        strength = min(max(token.share, 0), 1)
        tint = tuple(round(255 + (part - 255) * strength) for part in TINT)
        pen.rectangle((left, top, left + wide, top + LINE - 1), fill=tint)
        pen.text((left + 3, top), shown(token.text), fill=INK, font=font)
        pen.text((left + 3, top + LINE - 1), token.figure, fill=PALE, font=font)


def shown(text: str) -> str:
    """A token's text on one line."""
    return " ".join(text.split()) or text.replace("\n", "\\n")


def shorten(text: str, pen: ImageDraw, font: FreeTypeFont, width: int) -> str:
    """Truncate a text to ``width`` pixels."""
    text = shown(text)
    if pen.textlength(text, font=font) <= width:
        return text
    while len(text) > 1 and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"
