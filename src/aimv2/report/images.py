"""Image helpers: PNG and data URI encoding, colour map, resizing, overlays. Colours are uint8 RGB."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Picture = NDArray[np.uint8]  # [H, W, 3]

# nine evenly spaced colours of viridis (CC0), dark to light; perceptually uniform, also in grey and to most colour-blind readers
VIRIDIS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
    (173, 220, 48), (253, 231, 37),
)  # fmt: skip


def from_tensor(image: Tensor) -> Picture:
    """uint8 [3, H, W] on any device -> [H, W, 3], a copy."""
    return image.permute(1, 2, 0).cpu().numpy().copy()


def to_png(picture: Picture) -> bytes:
    """Encode uint8 [H, W, 3] as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as data URI: ``data:image/png;base64,...``."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def colour(values: NDArray[np.floating], low: float | None = None, high: float | None = None) -> Picture:
    """Map numbers to viridis.

    Args:
        values: [h, w].
        low, high: ends of the colour scale; None: minimum and maximum. Values outside are clipped.

    Returns:
        uint8 [h, w, 3]; all darkest if the range is empty.
    """
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    scaled = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    table = np.asarray(VIRIDIS, np.float64)
    places = scaled * (len(table) - 1)
    stops = np.arange(len(table))
    bands = [np.interp(places, stops, table[:, band]) for band in range(3)]
    return np.rint(np.stack(bands, -1)).astype(np.uint8)


def enlarge(picture: Picture, height: int, width: int | None = None) -> Picture:
    """Nearest-neighbour resize to ``height`` x ``width``; ``width`` None: square."""
    width = height if width is None else width
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return picture[rows][:, columns]


def fit(picture: Picture, side: int) -> Picture:
    """Resize so that the longer side has ``side`` pixels: nearest neighbour up, Lanczos down."""
    from PIL import Image

    longest = max(picture.shape[:2])
    height, width = (max(1, round(part * side / longest)) for part in picture.shape[:2])
    if longest <= side:
        return enlarge(picture, height, width)
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.LANCZOS))


def to_uri(picture: Picture, side: int = 256, quality: int = 88) -> str:
    """A picture as data URI: small ones losslessly (PNG), larger ones as JPEG of at most ``side`` pixels per side."""
    from PIL import Image

    longest = max(picture.shape[:2])
    if longest <= 96:
        return data_uri(to_png(picture))
    file = io.BytesIO()
    Image.fromarray(fit(picture, min(side, longest))).save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def blend(picture: Picture, over: Picture, alpha: float = 0.6) -> Picture:
    """Alpha-blend ``over``, enlarged to the picture's size, onto the picture."""
    top = enlarge(over, picture.shape[0], picture.shape[1]).astype(np.float64)
    return np.rint((1 - alpha) * picture + alpha * top).astype(np.uint8)


def mask_after(picture: Picture, prefix: int, patch: int, alpha: float = 1.0) -> Picture:
    """Cover all patches after a prefix (in raster order) with a grey chequerboard.

    Args:
        picture: [H, W, 3].
        prefix: patches left visible.
        patch: p, pixels per side.
        alpha: opacity of the chequerboard.
    """
    row, column = np.arange(picture.shape[0])[:, None], np.arange(picture.shape[1])[None]
    place = row // patch * (picture.shape[1] // patch) + column // patch
    square = max(1, patch // 2)
    chequer = np.where((row // square + column // square) % 2, 150.0, 172.0)[..., None]
    hidden = (1 - alpha) * picture + alpha * chequer
    return np.where((place < prefix)[..., None], picture, np.rint(hidden)).astype(np.uint8)


def frame_patch(picture: Picture, patch: tuple[int, int], side: int, tint: Sequence[int] = (255, 60, 60)) -> Picture:
    """Draw a frame around the patch at (row, column) of a grid of patches of ``side`` pixels."""
    out = picture.copy()
    top, left, width = patch[0] * side, patch[1] * side, max(1, side // 12)
    block = out[top : top + side, left : left + side]
    inside = block[width:-width, width:-width].copy()
    block[:] = tint
    block[width:-width, width:-width] = inside
    return out
