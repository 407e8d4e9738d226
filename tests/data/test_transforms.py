"""Crops lie in the image, native sizes in the model's range, and what comes out is what the model takes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2 import create_model, image_transform
from aimv2.data.stream.transforms import centre_crop_box, crop_resize, native_size, random_crop_box, to_pixels
from aimv2.errors import UsageError

SIDES = st.integers(1, 900)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@given(SIDES, SIDES, st.floats(0.05, 1), st.integers(0, 2**32))
def test_random_crops(width: int, height: int, scale: float, seed: int) -> None:
    left, top, right, bottom = random_crop_box(np.random.default_rng(seed), width, height, scale, (0.75, 1.3333))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert w <= 1.3333 * h + 1.2 and h <= w / 0.75 + 1.2  # whole pixels: off by the rounding of both sides
    if isinstance(left, int):  # drawn, not the fallback
        assert (w + 0.5) * (h + 0.5) >= scale * width * height


def test_crop_statistics() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(rng, 1000, 1000, 0.4, (0.75, 1.3333)) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = w * h / 1e6
    assert area.min() > 0.399 and area.max() > 0.95  # large and long crops do not fit and are drawn again
    logs = np.log(w / h)
    assert abs(logs.mean()) < 0.02 and logs.min() < -0.27 and logs.max() > 0.27
    assert (boxes[:, :2].min(0) < 10).all() and (boxes[:, 2:].max(0) > 990).all()


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000)])
def test_an_image_too_long_to_crop_gives_its_middle(width: int, height: int) -> None:
    left, top, right, bottom = random_crop_box(np.random.default_rng(0), width, height, 0.9, (0.75, 1.3333))
    assert (left + right, top + bottom) == (pytest.approx(width), pytest.approx(height))
    ratio = (right - left) / (bottom - top)
    assert ratio == pytest.approx(1.3333 if width > height else 0.75)


def test_a_crop_is_a_function_of_its_seed() -> None:
    draws = [random_crop_box(np.random.default_rng(seed), 300, 200, 0.4, (0.75, 1.3333)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_centre_crop() -> None:
    assert centre_crop_box(6, 4) == (1, 0, 5, 4) and centre_crop_box(4, 7) == (0, 1.5, 4, 5.5)
    image = picture(6, 4)
    wanted = np.asarray(image)[:, 1:5]
    assert np.array_equal(np.asarray(crop_resize(image, centre_crop_box(6, 4), (4, 4))), wanted)


def test_what_is_far_outside_the_box_does_not_matter() -> None:
    """The bicubic filter reaches two output pixels over the box's edge, never further."""
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 256, (80, 100, 3), dtype=np.uint8) for _ in range(2))
    two[14:66, 24:76] = one[14:66, 24:76]
    outs = [np.asarray(crop_resize(Image.fromarray(v), (30, 20, 70, 60), (14, 14))) for v in (one, two)]
    assert np.array_equal(*outs)
    two[30:50, 40:60] = 0
    assert not np.array_equal(np.asarray(crop_resize(Image.fromarray(two), (30, 20, 70, 60), (14, 14))), outs[0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 1000))
def test_any_crop_of_any_image_resizes(width: int, height: int, seed: int) -> None:
    box = random_crop_box(np.random.default_rng(seed), width, height, 0.4, (0.75, 1.3333))
    assert crop_resize(picture(width, height), box, (28, 28)).size == (28, 28)


def test_to_pixels() -> None:
    image = picture(5, 3)
    out = to_pixels(image)
    assert out.shape == (3, 3, 5) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert tuple(out[:, 2, 4]) == image.getpixel((4, 2))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_native_size(width: int, height: int) -> None:
    w, h = native_size(width, height, 14, 112, 4096)
    assert w % 14 == 0 == h % 14
    columns, rows = w // 14, h // 14
    assert 112 <= columns * rows <= 4096
    if max(width / height, height / width) <= 4:  # each side near the exact one (longer shapes have few patches across)
        area = min(max(width * height / 196, 112), 4096)
        exact = math.sqrt(area * width / height), math.sqrt(area * height / width)
        assert abs(columns - exact[0]) <= 2.5 and abs(rows - exact[1]) <= 2.5


def test_native_size_leaves_a_fitting_image_alone() -> None:
    assert native_size(14 * 20, 14 * 11, 14, 112, 4096) == (280, 154)
    assert native_size(224, 224, 14, 112, 4096) == (224, 224)


FIXED, NATIVE = "aimv2-large-patch14-224", "aimv2-large-patch14-native"


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "wanted"),
    [(FIXED, (300, 200), (224, 224)), (NATIVE, (300, 200), (196, 294)), ("aimv2-tiny-patch8-32", (7, 9), (32, 32))],
)
def test_image_transform(name: str, size: tuple[int, int], wanted: tuple[int, int], train: bool) -> None:
    out = image_transform(name, train=train, seed=0)(picture(*size))
    assert out.dtype == torch.uint8 and out.shape == (3, *wanted) and out.is_contiguous()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_image_transform_takes_any_mode(mode: str) -> None:
    image = picture(40, 30)
    image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    assert image_transform("aimv2-tiny-patch8-32")(image).shape == (3, 32, 32)


def test_evaluation_is_deterministic_and_training_follows_its_seed() -> None:
    image = picture(90, 70)
    plain = image_transform("aimv2-tiny-patch8-32")
    assert torch.equal(plain(image), plain(image))
    views = [[image_transform("aimv2-tiny-patch8-32", True, seed)(image) for _ in range(2)] for seed in (1, 1, 2)]
    assert torch.equal(views[0][0], views[1][0]) and not torch.equal(views[0][0], views[2][0])
    transform = image_transform("aimv2-tiny-patch8-32", True, 1)
    assert not torch.equal(transform(image), transform(image))


def test_half_the_training_views_are_mirrored() -> None:
    ramp = np.repeat(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))[:, :, None], 3, 2)
    transform = image_transform("aimv2-tiny-patch8-32", True, 0)
    views = [transform(Image.fromarray(ramp)).float() for _ in range(200)]
    mirrored = sum(bool(view[0, :, 0].mean() > view[0, :, -1].mean()) for view in views)
    assert 70 < mirrored < 130
    steady = image_transform("aimv2-tiny-patch8-32")(Image.fromarray(ramp)).float()
    assert steady[0, :, 0].mean() < steady[0, :, -1].mean()


def test_a_model_gives_its_own_transform() -> None:
    options: dict[str, Any] = {"width": 8, "heads": 1, "hidden": 8, "depth": 1, "image_size": 64}
    encoder = create_model("aimv2-tiny-patch8-32", **options)
    whole = create_model("aimv2-tiny-patch8-32", decoder=True, decoder_depth=1, decoder_vocab_size=4, **options)
    for model in (encoder, whole):
        assert image_transform(model)(picture(90, 70)).shape == (3, 64, 64)
    assert encoder(image_transform(encoder)(picture(90, 70))[None]).shape == (1, 64, 8)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"aimv2-large-patch14-225.*did you mean 'aimv2-large-patch14-22"):
        image_transform("aimv2-large-patch14-225")
    with pytest.raises(UsageError, match="int"):
        image_transform(3)


@pytest.mark.parametrize("patches", [7, 11, 16, 64])
@pytest.mark.parametrize("ratio", [0.2, 0.9, 1.0, 3.5])
def test_native_size_of_a_range_of_one(patches: int, ratio: float) -> None:
    w, h = native_size(round(300 * ratio), 300, 14, patches, patches)
    assert w * h == 14 * 14 * patches and w % 14 == 0
