"""Augmentation of the attentive probe (AIMV2, Table A2): random crop, flip, colour jitter, RandAugment, all in Pillow.

RandAugment is timm's ``rand-m9-mstd0.5-inc1``: two operations per image, each applied with probability 0.5, at a magnitude drawn
from N(9, 0.5) and clipped to 0..10, with the variants of the operations whose strength grows with the magnitude.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from aimv2.data.stream.transforms import crop_resize, random_crop_box

SCALE, RATIO = (0.08, 1.0), (0.75, 1.3333)  # AIMV2, Table A2
JITTER = 0.3
MAGNITUDE, DEVIATION, OPERATIONS, CHANCE = 9.0, 0.5, 2, 0.5
FILL = (124, 116, 104)  # ImageNet's mean colour

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def augment(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A training view of an RGB image: ``size`` x ``size``."""
    box = random_crop_box(rng, *image.size, SCALE[0], RATIO)
    image = crop_resize(image, box, (size, size))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return rand_augment(jitter(image, rng), rng)


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scale brightness, contrast and saturation by factors from U(0.7, 1.3), in random order."""
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for at in rng.permutation(len(kinds)):
        image = kinds[at](image).enhance(float(rng.uniform(1 - JITTER, 1 + JITTER)))
    return image


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply two operations, drawn with replacement."""
    for at in rng.integers(0, len(OPERATION_TABLE), OPERATIONS):
        if rng.random() > CHANCE:
            continue
        level = float(np.clip(rng.normal(MAGNITUDE, DEVIATION), 0, 10)) / 10
        image = OPERATION_TABLE[int(at)][1](image, level, rng)
    return image


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _filter(rng: np.random.Generator) -> Image.Resampling:
    return Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC


def _affine(image: Image.Image, matrix: tuple[float, ...], rng: np.random.Generator) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=_filter(rng), fillcolor=FILL)


def _rotate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return image.rotate(_signed(30 * level, rng), resample=_filter(rng), fillcolor=FILL)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def run(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        return kind(image).enhance(max(0.1, 1 + _signed(0.9 * level, rng)))

    return run


def _shear_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, _signed(0.3 * level, rng), 0, 0, 1, 0), rng)


def _shear_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, _signed(0.3 * level, rng), 1, 0), rng)


def _move_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, _signed(0.45 * level, rng) * image.width, 0, 1, 0), rng)


def _move_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _signed(0.45 * level, rng) * image.height), rng)


def _posterize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    bits = 4 - int(4 * level)
    return ImageOps.posterize(image, bits) if bits else image.point(lambda _: 0)


def _solarize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    more = min(128, int(110 * level))
    return image.point([min(255, value + more) if value < 128 else value for value in range(256)] * 3)


OPERATION_TABLE: tuple[tuple[str, Operation], ...] = (
    ("auto contrast", lambda image, level, rng: ImageOps.autocontrast(image)),
    ("equalize", lambda image, level, rng: ImageOps.equalize(image)),
    ("invert", lambda image, level, rng: ImageOps.invert(image)),
    ("rotate", _rotate),
    ("posterize", _posterize),
    ("solarize", _solarize),
    ("solarize add", _solarize_add),
    ("colour", _enhance(ImageEnhance.Color)),
    ("contrast", _enhance(ImageEnhance.Contrast)),
    ("brightness", _enhance(ImageEnhance.Brightness)),
    ("sharpness", _enhance(ImageEnhance.Sharpness)),
    ("shear x", _shear_x),
    ("shear y", _shear_y),
    ("move x", _move_x),
    ("move y", _move_y),
)
