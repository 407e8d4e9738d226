"""Stored features of a teacher, next to an image: KEY.teacher, a few views each with its crop, in 8 bits a value.

An ``.npz`` without pickles: ``boxes`` float32 [K, 4] (left, top, right, bottom as fractions of width and height), ``flips``
uint8 [K], ``features`` int8 [K, I, E], ``scales`` float16 [K, I]. A value is ``features * scales``.

Legend: K views, I patches, E width of the teacher.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np

from aimv2.data.images.decode import ImageError
from aimv2.data.stream.transforms import Box

EXTENSION = "teacher"
LEVELS = 127
LEAST_SCALE = 6.2e-5  # the smallest number that float16 holds in full precision


@dataclass(frozen=True)
class StoredView:
    """One stored view.

    Attributes:
        box: left, top, right, bottom as fractions of the image.
        flip: whether the crop was mirrored.
        features: int8 [I, E].
        scales: float16 [I].
    """

    box: tuple[float, float, float, float]
    flip: bool
    features: np.ndarray
    scales: np.ndarray

    def place(self, width: int, height: int) -> Box:
        """The crop in pixels of an image of this size."""
        left, top, right, bottom = (round(share * side, 3) for share, side in zip(self.box, (width, height) * 2))
        return max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))


def quantise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [.., E] -> int8 [.., E] and float16 [..]: the largest value of each patch becomes 127."""
    scales = np.maximum(np.abs(features).max(-1) / LEVELS, LEAST_SCALE).astype(np.float16)
    levels = np.rint(features / scales[..., None].astype(np.float32))
    return np.clip(levels, -LEVELS, LEVELS).astype(np.int8), scales


def write_views(boxes: np.ndarray, flips: np.ndarray, features: np.ndarray) -> bytes:
    """The content of KEY.teacher.

    Args:
        boxes: [K, 4], see above; flips: [K]; features: float [K, I, E].
    """
    levels, scales = quantise(features)
    out = io.BytesIO()
    np.savez(out, boxes=boxes.astype(np.float32), flips=flips.astype(np.uint8), features=levels, scales=scales)
    return out.getvalue()


def draw_view(rng: np.random.Generator, parts: dict[str, bytes], patches: int, width: int) -> StoredView:
    """One of a sample's stored views, each as likely.

    Args:
        rng: of the visit.
        parts: of the sample.
        patches, width: I and E that are expected.

    Raises:
        ImageError: no views there, or others than expected.
    """
    if EXTENSION not in parts:
        raise ImageError("no features of a teacher in the sample")
    try:
        with np.load(io.BytesIO(parts[EXTENSION]), allow_pickle=False) as stored:
            boxes, flips, features, scales = (stored[name] for name in ("boxes", "flips", "features", "scales"))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ImageError(f"broken features of a teacher ({error})") from None
    if features.dtype != np.int8 or features.shape[1:] != (patches, width):
        raise ImageError(f"features of a teacher {list(features.shape[1:])}, expected {[patches, width]}")
    at = int(rng.integers(len(boxes)))
    left, top, right, bottom = boxes[at].tolist()
    return StoredView((left, top, right, bottom), bool(flips[at]), features[at], scales[at])
