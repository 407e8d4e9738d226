"""Crops lie in the image, native sizes in the model's range, and what comes out is what the model takes."""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from aimv2 import VisionEncoder, create_model, image_transform, save_pretrained
from aimv2.data.images.decode import decode_image
from aimv2.data.stream.transforms import (
    centre_crop_box,
    crop_resize,
    native_size,
    random_crop_box,
    resized_crop,
    to_pixels,
)
from aimv2.errors import UsageError
from aimv2.evals.scorer import TransformersPair
from aimv2.features.embed import view_of
from aimv2.features.frozen import of_encoder
from aimv2.features.store import FeatureStore

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
        assert abs(columns - exact[0]) <= 3 and abs(rows - exact[1]) <= 3


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


# ---- as the released code and the commands have it ----


PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k-1k" / "images"
ODD = [(200, 133), (147, 200), (301, 227), (227, 341), (641, 479), (333, 999), (7, 5), (250, 250), (225, 224)]


def odd_sizes() -> list[Image.Image]:
    """Upright and lying photographs (noise where there are none) at odd sizes: offsets on half pixels, above and below the input."""
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))[: len(ODD)]
    images = [Image.open(file).convert("RGB") for file in files] or [
        picture(200, 150, seed) for seed in range(len(ODD))
    ]
    return [image.resize(size) for image, size in zip(images, ODD)] + images[:3]


def released_processor(size: int) -> Any:
    """The image processor that the preprocessor files of the released models name, in Pillow."""
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    square = {"height": size, "width": size}
    return processor(size={"shortest_edge": size}, crop_size=square, do_rescale=False, do_normalize=False)


@pytest.mark.parametrize("name", ["aimv2-large-patch14-224", "aimv2-large-patch14-336", "aimv2-tiny-patch8-32"])
def test_pixels_are_exactly_the_released_processors(name: str) -> None:
    transform = image_transform(name)
    processor = released_processor(int(name.rpartition("-")[2]))
    for image in odd_sizes():
        wanted = np.asarray(processor(image)["pixel_values"][0])
        assert np.array_equal(transform(image).numpy(), wanted), image.size


def released_view(image: Image.Image, size: int) -> np.ndarray:
    """torchvision's Resize(ceil(size / 0.875), BICUBIC) and CenterCrop(size), by Pillow and NumPy."""
    shorter = math.ceil(size / 0.875)
    w, h = image.size
    w, h = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    whole = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
    top, left = round((h - size) / 2.0), round((w - size) / 2.0)
    return whole[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize("size", [224, 32])
def test_the_evaluation_view_is_exactly_the_released_codes(size: int) -> None:
    encoder = create_model("aimv2-tiny-patch8-32", width=8, heads=1, hidden=8, depth=1, image_size=size)
    frozen = of_encoder("tiny", encoder)
    assert any(min(image.size) <= size for image in odd_sizes()) and any(min(i.size) > size for i in odd_sizes())
    for image in odd_sizes():
        larger = min(image.size) > size
        wanted = released_view(image, size) if larger else released_processor(size)(image)["pixel_values"][0]
        assert np.array_equal(frozen.see(image), wanted), image.size


def test_the_written_view_is_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    view = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    for image in odd_sizes():
        assert np.array_equal(released_view(image, 224), np.asarray(view(image)).transpose(2, 0, 1))


def test_a_strip_is_not_resized_whole() -> None:
    assert resized_crop(Image.new("RGB", (200_000, 1), (9, 9, 9)), 32).size == (32, 32)


def turned(image: Image.Image, orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, form, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_orientation_is_read_as_the_commands_read_it(form: str, orientation: int) -> None:
    stored = turned(picture(90, 60), orientation, form)
    transform, upright = image_transform("aimv2-tiny-patch8-32"), decode_image(stored)
    assert upright.size == ((60, 90) if orientation >= 5 else (90, 60))
    wanted = transform(upright)
    assert torch.equal(transform(Image.open(io.BytesIO(stored))), wanted)
    assert torch.equal(transform(Image.open(io.BytesIO(stored)).convert("RGB")), wanted)
    assert torch.equal(transform(ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))), wanted)


@pytest.mark.parametrize(
    ("mode", "form"), [("P", "PNG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("LA", "PNG"), ("P", "GIF")]
)
def test_modes_are_converted_as_the_commands_do(mode: str, form: str) -> None:
    image, out = picture(90, 60), io.BytesIO()
    options: dict[str, Any] = {"transparency": 3} if mode == "P" else {}
    if form == "GIF":
        options |= {"save_all": True, "append_images": [picture(90, 60, 1).convert("P")]}
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (60, 90)).astype(np.uint16))
    (deep if mode == "I;16" else image.convert(mode)).save(out, form, **options)
    transform = image_transform("aimv2-tiny-patch8-32")
    assert torch.equal(transform(Image.open(io.BytesIO(out.getvalue()))), transform(decode_image(out.getvalue())))


def test_a_pair_of_transformers_sees_photographs_upright() -> None:
    pair = TransformersPair.__new__(TransformersPair)
    pair.processor, pair.side = None, 32
    stored = turned(picture(90, 60), 6)
    assert torch.equal(pair.see(Image.open(io.BytesIO(stored))), pair.see(decode_image(stored)))
    pair.processor = released_processor(32)
    assert torch.equal(pair.see(Image.open(io.BytesIO(stored))), pair.see(decode_image(stored)))


class Views(torch.utils.data.Dataset[Tensor]):
    """Eight training views of one image."""

    def __init__(self, seed: int | None = None) -> None:
        self.image, self.transform = picture(60, 50), image_transform("aimv2-tiny-patch8-32", True, seed)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, _: int) -> Tensor:
        return self.transform(self.image)


def test_every_worker_and_epoch_draws_its_own_crops() -> None:
    loader = torch.utils.data.DataLoader(Views(), batch_size=None, num_workers=2)
    torch.manual_seed(0)
    views = [*loader, *loader]
    assert len({view.numpy().tobytes() for view in views}) == 16
    torch.manual_seed(0)
    assert all(torch.equal(one, two) for one, two in zip([*loader], views))


@pytest.mark.parametrize(("train", "seed"), [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize("name", [FIXED, NATIVE])
def test_a_transform_is_pickled_and_says_what_it_does(name: str, train: bool, seed: int | None) -> None:
    transform = image_transform(name, train, seed)
    again, image = pickle.loads(pickle.dumps(transform)), picture(40, 30)
    torch.manual_seed(5)
    first = transform(image)
    torch.manual_seed(5)
    assert torch.equal(first, again(image))
    assert name in repr(transform) and repr(again) == repr(transform)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photo.jpg", "PIL.Image.open"),
        (Path("photo.jpg"), "PIL.Image.open"),
        (b"bytes", "BytesIO"),
        (np.zeros((4, 5, 3), np.uint8), "fromarray"),
        (torch.zeros(3, 4, 5), "permute"),
        (None, "PIL"),
    ],
)
def test_what_is_no_pil_image_is_named(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        image_transform(FIXED)(given)
    assert "\n" not in str(caught.value) and type(given).__name__ in str(caught.value)
    if not isinstance(given, str):
        with pytest.raises(UsageError, match="image_transform"):
            image_transform(given)


def test_features_of_another_view_are_not_mixed(tmp_path: Path) -> None:
    """A cache of the version that cropped at half pixels has another view."""
    encoder = create_model("aimv2-tiny-patch8-32", width=8, heads=1, hidden=8, depth=1)
    assert isinstance(encoder, VisionEncoder)
    for view, earlier in (
        (of_encoder("tiny", encoder).view(), {"image_size": 32, "crop": 0.875, "flip": False}),
        (view_of(encoder), {"image_size": 32, "crop": "resized centre"}),
    ):
        folder = tmp_path / str(len(view))
        FeatureStore(folder, {"fingerprint": 2, "view": earlier}, "--cache")
        with pytest.raises(UsageError, match="view") as caught:
            FeatureStore(folder, {"fingerprint": 2, "view": view}, "--cache")
        assert caught.value.code == "mismatch"


def test_the_processor_that_convert_writes_gives_the_same_pixels(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = create_model("aimv2-tiny-patch8-32", width=8, heads=1, hidden=8, depth=1)
    save_pretrained(encoder, tmp_path / "out", to="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    for image in odd_sizes():
        wanted = np.asarray(processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0])
        assert np.array_equal(image_transform(encoder)(image).numpy(), wanted), image.size
