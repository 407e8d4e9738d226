"""Image transforms to uint8 pixels: the crops of AIMV2, Table A1, and the public ``image_transform``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from aimv2.errors import UsageError, nearest
from aimv2.interop.hub import RELEASED, shape_of
from aimv2.models.sizes import MODELS, EncoderConfig

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]


def random_crop_box(rng: np.random.Generator, width: int, height: int, scale: float, ratio: tuple[float, float]) -> Box:
    """Random resized crop: area fraction uniform in [scale, 1], aspect ratio log-uniform in ``ratio``.

    Ten attempts; if none fits, the largest centred crop whose ratio is within range.

    Returns:
        (left, top, right, bottom) in pixels.
    """
    low, high = (math.log(r) for r in ratio)
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    widest, highest = min(width, height * ratio[1]), min(height, width / ratio[0])
    x, y = (width - widest) / 2, (height - highest) / 2
    return x, y, x + widest, y + highest


def centre_crop_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resized_crop_box(width: int, height: int, size: int) -> Box:
    """The box that resizing the shorter side to ``size`` and centre-cropping keeps, in whole pixels of the resized image (as the
    preprocessor files of the released models)."""
    longer = int(size * max(width, height) / min(width, height))
    start, scale = (longer - size) // 2, max(width, height) / longer
    if width >= height:
        return start * scale, 0, (start + size) * scale, height
    return 0, start * scale, width, (start + size) * scale


def crop_resize(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The ``box`` of the image at ``size`` (width, height), bicubic, antialiased."""
    if box == (0, 0, *size) and image.size == size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def to_pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> uint8 [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def native_size(width: int, height: int, patch: int, low: int, high: int) -> tuple[int, int]:
    """The nearest size in whole patches with about the same aspect ratio and ``low`` to ``high`` patches.

    Returns:
        (width, height) in pixels.
    """
    w, h = width / patch, height / patch
    factor = math.sqrt(min(max(w * h, low), high) / (w * h))
    w, h = max(1, round(w * factor)), max(1, round(h * factor))
    while w * h > high:
        w, h = (w - 1, h) if w >= h else (w, h - 1)
    while w * h < low:
        w, h = (w + 1, h) if w >= h else (w, h + 1)
    if w * h > high:  # the range is too narrow to be hit by steps of one: search all grids within it
        grids = [(x, y) for y in range(1, high + 1) for x in range(-(-low // y), high // y + 1)]
        w, h = min(grids, key=lambda grid: abs(math.log(grid[0] * height / (grid[1] * width))))
    return w * patch, h * patch


def image_transform(model: object, train: bool = False, seed: int | None = None) -> Callable[[Image.Image], Tensor]:
    """The transform that a model was trained with: PIL image -> uint8 [3, H, W] (the model normalises inside).

    Args:
        model: a name of the sizes table, a VisionEncoder, or an AIMv2.
        train: random crop and flip (AIMV2, Table A1) instead of resize and centre crop.
        seed: random seed for the crops; None: from the operating system.

    Returns:
        a function. For native models it scales into the model's range of patches and keeps the aspect ratio.
    """
    config = _encoder_config(model)
    rng = np.random.default_rng(seed)

    def apply(image: Image.Image) -> Tensor:
        import torch

        from aimv2.data.images.decode import to_rgb

        image = to_rgb(image)
        width, height = image.size
        if config.image_size is None:
            target = native_size(width, height, config.patch_size, config.min_patches, config.max_patches)
            image = crop_resize(image, (0, 0, width, height), target)
        else:
            size = config.image_size
            box = (
                random_crop_box(rng, *image.size, 0.4, (0.75, 1.3333)) if train else resized_crop_box(*image.size, size)
            )
            image = crop_resize(image, box, (size, size))
        if train and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(to_pixels(image))

    return apply


def _encoder_config(model: object) -> EncoderConfig:
    if isinstance(model, str):
        if model not in MODELS and model not in RELEASED:
            raise UsageError(f"no model '{model}'{nearest(model, [*MODELS, *RELEASED])}")
        return shape_of(model) if model in RELEASED else MODELS[model][0]
    config = getattr(getattr(model, "encoder", model), "config", None)
    if not isinstance(config, EncoderConfig):
        raise UsageError(f"a model or a name of the sizes table expected, got {type(model).__name__}")
    return config
