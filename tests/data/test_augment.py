"""The probe's training views: every operation does what its name says, all are drawn, and a view depends on its seed alone."""

import numpy as np
import pytest
from PIL import Image

from aimv2.data.stream.augment import OPERATION_TABLE, augment, jitter, rand_augment

TABLE = dict(OPERATION_TABLE)


def picture(size: int = 32) -> Image.Image:
    """A smooth colour gradient with a bright square."""
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    pixels = np.stack([4 * x + 40, 3 * y + 60, (x + y) + 80], -1).astype(np.uint8)
    pixels[8:14, 8:14] = (230, 200, 180)
    return Image.fromarray(pixels)


def change(name: str, level: float, seed: int = 0) -> float:
    """Mean absolute difference that an operation makes, 0..255."""
    image = picture()
    after = TABLE[name](image, level, np.random.default_rng(seed))
    assert after.size == image.size and after.mode == "RGB"
    return float(np.abs(np.asarray(after).astype(float) - np.asarray(image)).mean())


@pytest.mark.parametrize("name", TABLE)
def test_every_operation_changes_the_image(name: str) -> None:
    assert change(name, 0.9) > 0.5


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"auto contrast", "equalize", "invert"}))
def test_strength_grows_with_the_level(name: str) -> None:
    assert change(name, 0.95) > change(name, 0.1)


def test_known_values() -> None:
    image = Image.new("RGB", (4, 4), (200, 100, 30))
    rng = np.random.default_rng(0)
    assert TABLE["invert"](image, 0.9, rng).getpixel((0, 0)) == (55, 155, 225)
    assert TABLE["posterize"](image, 0.5, rng).getpixel((0, 0)) == (192, 64, 0)  # two bits stay
    assert TABLE["solarize"](image, 0.5, rng).getpixel((0, 0)) == (55, 100, 30)  # above 128 inverted
    assert TABLE["solarize add"](image, 0.5, rng).getpixel((0, 0)) == (200, 155, 85)  # below 128: 55 more


def test_a_view_is_a_function_of_its_seed() -> None:
    image = picture(40)
    views = [np.asarray(augment(image, 24, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert views[0].shape == (24, 24, 3)
    assert np.array_equal(views[0], views[1]) and not np.array_equal(views[0], views[2])


def test_half_of_the_operations_are_done_and_all_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def noted(at: int):  # type: ignore[no-untyped-def]
        return lambda image, level, rng: done.append(at) or image

    monkeypatch.setattr("aimv2.data.stream.augment.OPERATION_TABLE", [(name, noted(i)) for i, name in enumerate(TABLE)])
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rand_augment(picture(4), rng)
    assert 1900 < len(done) < 2100  # two an image, each with probability 0.5
    assert set(done) == set(range(len(TABLE)))


def test_jitter_keeps_the_mean_within_its_range() -> None:
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    means = [np.asarray(jitter(image, np.random.default_rng(seed))).mean() for seed in range(200)]
    assert 69 <= min(means) < 80 and 120 < max(means) <= 131  # gray: brightness alone changes it
