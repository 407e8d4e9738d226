"""Image transforms to uint8 pixels: the crops of AIMV2, Table A1, and the public ``image_transform``."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from aimv2.data.images.decode import upright_rgb
from aimv2.errors import UsageError, nearest
from aimv2.models.sizes import MODELS, EncoderConfig

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]
Rounding = Callable[[float], int]
LONGEST = 100  # times the size: longer sides of a resized image are not made
VIEW = "shorter side resized, then cropped at whole pixels"  # for fingerprints: change it with resized_crop


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


def resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) with the shorter side at ``shorter`` pixels and the longer one rounded down, as the released transforms."""
    longer = int(shorter * max(width, height) / min(width, height))
    return (longer, shorter) if width >= height else (shorter, longer)


def resized_crop_box(
    width: int, height: int, size: int, shorter: int | None = None, rounding: Rounding = math.floor
) -> Box:
    """The part of an image that :func:`resized_crop` keeps, in its own pixels."""
    sides = resized_size(width, height, shorter or size)
    left, top = (rounding((side - size) / 2) for side in sides)
    across, down = width / sides[0], height / sides[1]
    return left * across, top * down, (left + size) * across, (top + size) * down


def resized_crop(
    image: Image.Image, size: int, shorter: int | None = None, rounding: Rounding = math.floor
) -> Image.Image:
    """Resize the shorter side (bicubic, antialiased), then crop the centred square: every pixel as in the released transforms.

    Args:
        image: RGB.
        size: pixels a side of the result.
        shorter: pixels of the shorter side, at least ``size``; None: ``size``.
        rounding: of the crop's offset where it falls on half a pixel: down in the image processors of the released models,
            to even in the released evaluation code.
    """
    sides = resized_size(*image.size, shorter or size)
    if max(sides) > LONGEST * size:  # a strip: resized whole it could fill the memory
        return crop_resize(image, resized_crop_box(*image.size, size, shorter, rounding), (size, size))
    left, top = (rounding((side - size) / 2) for side in sides)
    whole = image if image.size == sides else image.resize(sides, Image.Resampling.BICUBIC)
    return whole if sides == (size, size) else whole.crop((left, top, left + size, top + size))


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


class ImageTransform:
    """The transform that a model was trained with; see :func:`image_transform`. It can be pickled."""

    def __init__(self, config: EncoderConfig, train: bool = False, seed: int | None = None) -> None:
        self.config, self.train, self.seed = config, train, seed
        self._rng = None if seed is None else np.random.default_rng(seed)

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode, not yet turned as its EXIF orientation says -> uint8 [3, H, W].

        Raises:
            UsageError: not a PIL image.
            ImageError: an image file that can't be decoded.
        """
        import torch

        if not isinstance(image, Image.Image):
            raise UsageError(f"image_transform(model)(image): a PIL image expected, got {_given(image)}")
        image, config = upright_rgb(image), self.config
        rng = self._rng
        if self.train and rng is None:  # DataLoader seeds torch's generator for each worker and epoch
            rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        if config.image_size is None:
            target = native_size(*image.size, config.patch_size, config.min_patches, config.max_patches)
            image = crop_resize(image, (0, 0, *image.size), target)
        elif rng is not None and self.train:
            box = random_crop_box(rng, *image.size, 0.4, (0.75, 1.3333))
            image = crop_resize(image, box, (config.image_size, config.image_size))
        else:
            image = resized_crop(image, config.image_size)
        if rng is not None and self.train and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(to_pixels(image))

    def __repr__(self) -> str:
        c = self.config
        size = (
            f"{c.min_patches} to {c.max_patches} patches of"
            if c.image_size is None
            else f"{c.image_size} px, patches of"
        )
        drawn = f", train=True, seed={self.seed}" if self.train else ""
        return f"{type(self).__name__}({c.name!r}: {size} {c.patch_size} px{drawn})"


def image_transform(model: object, train: bool = False, seed: int | None = None) -> ImageTransform:
    """The transform that a model was trained with: PIL image -> uint8 [3, H, W] (the model normalises inside).

    Without ``train`` its pixels are those of the released models' image processors and of the commands: upright by EXIF
    orientation, RGB (alpha on white), shorter side resized, centred square.

    Args:
        model: a name of the sizes table, a VisionEncoder, or an AIMv2.
        train: random crop and flip (AIMV2, Table A1) instead of resize and centre crop.
        seed: random seed for the crops, which are then the same in every worker of a DataLoader; None: from torch's generator,
            which DataLoader seeds for each worker and epoch (``torch.manual_seed`` repeats them).

    Returns:
        a callable. For native models it scales into the model's range of patches and keeps the aspect ratio.

    Raises:
        UsageError: not a model or the name of one.
    """
    return ImageTransform(_encoder_config(model), train, seed)


def _given(image: object) -> str:
    """What was given in place of a PIL image, and how to make one of it."""
    kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
    if isinstance(image, str | bytes | PathLike):
        return f"{kind}: open it first, PIL.Image.open({'io.BytesIO(data)' if isinstance(image, bytes) else 'path'})"
    if hasattr(image, "__array__"):
        array = "array" if isinstance(image, np.ndarray) else "tensor.permute(1, 2, 0).numpy()"
        return f"{kind} {list(getattr(image, 'shape', ()))}: PIL.Image.fromarray({array}) of uint8 [H, W, 3]"
    return f"{kind}: PIL.Image.open(path)"


def _encoder_config(model: object) -> EncoderConfig:
    if isinstance(model, str):
        from aimv2.interop.hub import RELEASED, shape_of

        if model not in MODELS and model not in RELEASED:
            raise UsageError(f"no model '{model}'{nearest(model, [*MODELS, *RELEASED])}")
        return shape_of(model) if model in RELEASED else MODELS[model][0]
    from aimv2.models.layers import unwrapped

    found = (getattr(getattr(one, "encoder", one), "config", None) for one in (model, unwrapped(model)))
    config = next((one for one in found if isinstance(one, EncoderConfig)), None)
    if config is None:
        raise UsageError(
            f"image_transform(model): a model or a name of the sizes table expected, got {type(model).__name__}; images go into "
            "what it returns, image_transform(model)(image)"
        )
    return config
