"""Images whose values or axes are not what their type says are refused in one line or warned about, in inference only."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aimv2.batch import make_batch
from aimv2.interop.arrays import ArrayEncoder
from aimv2.models.create import create_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.likelihood import read_images, tokenize
from aimv2.models.lit import LiT
from aimv2.models.masks import prefix_mask
from aimv2.models.sizes import EncoderConfig, warn_unit_range
from aimv2.objectives.pretrain import normalized_patches


def tiny(**options: Any) -> VisionEncoder:
    config = EncoderConfig("tiny", 16, 1, 2, 16, 4, 8, **options)
    torch.manual_seed(0)
    encoder = VisionEncoder(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


PIXELS = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HUNDREDS, UNIT = PIXELS.float(), PIXELS.float() / 255


@pytest.fixture(autouse=True)
def warnings_of_a_new_process() -> Iterator[None]:
    warn_unit_range.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    warn_unit_range.cache_clear()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_float_images_in_bytes_are_refused(kind: torch.dtype) -> None:
    encoder = tiny()
    for refused in (encoder, encoder.encode, encoder.normalize):
        with pytest.raises(ValueError, match=r"normalised.*255.*uint8"):
            refused(HUNDREDS.to(kind))
    with pytest.raises(ValueError, match="normalised"):
        encoder([HUNDREDS[0].to(kind)])
    assert encoder.normalize(encoder.normalize(PIXELS).to(kind)).dtype == kind


def test_images_in_0_to_1_warn_once() -> None:
    encoder = tiny()
    with pytest.warns(UserWarning, match=r"0\.\.1.*255"):
        encoder(UNIT)
    assert encoder(UNIT).shape == (2, 4, 16)  # a second warning would be an error here


def test_bytes_that_are_all_0_or_1_warn_too() -> None:
    """Pixels in 0..1 cast to uint8."""
    with pytest.warns(UserWarning, match=r"0\.\.1"):
        tiny()(UNIT.round().to(torch.uint8))


def test_constant_images_and_a_model_of_unit_pixels_are_left_alone() -> None:
    """A warning would be an error here; the values come through as they are."""
    encoder = tiny()
    for constant in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)):
        assert torch.equal(encoder.normalize(constant), constant)
    assert torch.allclose(encoder.normalize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), -encoder.mean / encoder.std)
    assert torch.equal(tiny(mean=(0.0,) * 3, std=(1.0,) * 3).normalize(UNIT), UNIT)
    trained_on_bytes = tiny(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert torch.equal(trained_on_bytes.normalize(HUNDREDS), HUNDREDS)
    assert encoder(torch.full((1, 3, 8, 8), float("nan"))).isnan().all()


def test_training_compilation_export_and_tracing_look_at_no_value() -> None:
    encoder = tiny()
    assert encoder.train()(HUNDREDS).shape == encoder(UNIT).shape
    encoder.eval()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    assert compiled(HUNDREDS).shape == (2, 4, 16)
    torch.export.export(encoder, (UNIT,))
    torch.jit.trace(encoder, HUNDREDS, check_trace=False)
    assert torch.func.vmap(encoder)(HUNDREDS[:, None]).shape == (2, 1, 4, 16)
    assert encoder.to("meta")(HUNDREDS.to("meta")).shape == (2, 4, 16)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (PIXELS.permute(0, 2, 3, 1), r"images\.permute\(0, 3, 1, 2\)"),
        (PIXELS[0].permute(1, 2, 0), r"images\.permute\(2, 0, 1\)\[None\]"),
        (PIXELS[0], r"images\[None\]"),
        (PIXELS[:, :1], "got"),
        (PIXELS > 3, "bool"),
        (PIXELS.long(), "int64"),
    ],
)
def test_axes_and_types_are_named(images: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny()(images)
    if images.dtype == torch.uint8 and images.ndim == 4:
        with pytest.raises(ValueError, match="must be"):
            tiny()(list(images))


@pytest.mark.parametrize("prefix", [[1.0, 2.0], [True, True], [1], [[1], [2]]])
def test_a_prefix_of_another_type_or_shape_is_refused(prefix: list[Any]) -> None:
    """Each passed as lengths before, by broadcasting or by comparing."""
    with pytest.raises(ValueError, match=r"prefix_len must be int64 \[2\]"):
        tiny()(PIXELS, torch.tensor(prefix))


def test_array_encoders_have_the_same_rule() -> None:
    config = tiny().config
    arrays = ArrayEncoder(np, config, {})
    arrays.apply = lambda params, images: images
    with pytest.raises(ValueError, match="normalised"):
        arrays(HUNDREDS.numpy())
    with pytest.warns(UserWarning, match=r"0\.\.1"):
        arrays(UNIT.numpy())
    assert arrays(PIXELS.numpy()).max() < 3


def test_one_text_is_no_list_of_letters() -> None:
    with pytest.raises(ValueError, match=r"\['a cat'\]"):
        tokenize(None, "a cat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['a cat'\]"):
        LiT.encode_text(None, "a cat")  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [PIXELS, PIXELS.long(), UNIT.permute(0, 2, 3, 1), UNIT[0]])
def test_pixel_targets_are_of_normalised_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"normalize.*got"):
        normalized_patches(images, 4)


@pytest.mark.parametrize("values", [[0.0, 1.0], [True, False], torch.tensor([1.5, 2.0])])
def test_labels_and_prefixes_are_whole_numbers(values: Any) -> None:
    with pytest.raises(ValueError, match="labels: whole numbers"):
        make_batch(PIXELS, [[1], [2]], None, 4, labels=values)
    with pytest.raises(ValueError, match="prefix_len: whole numbers"):
        make_batch(PIXELS, [[1], [2]], values, 4)
    with pytest.raises(ValueError, match="prefix_len: int64"):
        prefix_mask(torch.as_tensor(values), 4)
    assert make_batch(PIXELS, [[1], [2]], [1, 2], 4, labels=np.array([0, 1])).labels.tolist() == [0, 1]


@pytest.mark.parametrize("images", [[PIXELS[0]], PIXELS.numpy(), None])
def test_captions_want_one_tensor(images: Any) -> None:
    model: Any = create_model(
        "aimv2-tiny-patch8-32", decoder=True, decoder_depth=1, width=8, heads=1, hidden=8, depth=1
    )
    model.tokenizer = type("Tokenizer", (), {"eos_id": 0})()
    for call in (model.caption, lambda images: read_images(model, images)):
        with pytest.raises(TypeError, match=f"expected, got .*{type(images).__name__}.*image_transform"):
            call(images)


class Held(Tensor):
    """A subclass as other libraries have them for images."""


def test_subclasses_are_looked_at_too() -> None:
    for images in (torch.nn.Parameter(HUNDREDS), HUNDREDS.as_subclass(Held)):
        with pytest.raises(ValueError, match="normalised"):
            tiny()(images)


def test_a_prefix_in_a_list_is_named() -> None:
    with pytest.raises(ValueError, match=r"prefix_len must be int64 \[2\].*\[1, 2\]"):
        tiny()(PIXELS, prefix_len=[1, 2])


def test_layers_and_batches_of_another_kind_say_what_they_want() -> None:
    for layers in (-1, ["last"]):
        with pytest.raises(TypeError, match=r"layers: a list of whole numbers, such as \[-1\]"):
            tiny().encode(PIXELS, layers=layers)
    with pytest.raises(TypeError, match=r"\.encoder\(images\)"):
        create_model("aimv2-tiny-patch8-32", decoder=True)(PIXELS)
