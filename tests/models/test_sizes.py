"""The sizes table equals the paper's counts, and every row of it builds, names itself and runs (without memory)."""

import re

import pytest
import torch
from torch import nn

from aimv2 import list_models
from aimv2.batch import make_batch
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import MODELS, SIZES, model_config

RELEASED = ("base", "large", "huge", "1B", "3B")


def meta_encoder(name: str) -> VisionEncoder:
    with torch.device("meta"):
        return VisionEncoder(MODELS[name][0])


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "millions"), [("large", 309.2), ("huge", 680.9), ("1B", 1235.0), ("3B", 2720.7), ("base", 85.6)]
)
def test_counts_of_table_1(size: str, millions: float) -> None:
    # what is counted is the encoder of 224 px, all of it (AIMV2, Table 1)
    assert round(size_of(meta_encoder(f"aimv2-{size}-patch14-224")) / 1e6, 1) == millions


@pytest.mark.parametrize(("image", "count"), [("native", 308_935_680), ("336", 309_525_504), ("448", 309_984_256)])
def test_counts_of_large_at_other_resolutions(image: str, count: int) -> None:
    assert size_of(meta_encoder(f"aimv2-large-patch14-{image}")) == count


@pytest.mark.parametrize("size", ["large", "huge", "1B", "3B"])
def test_decoder_parts(size: str) -> None:
    with torch.device("meta"):
        model = AIMv2(*MODELS[f"aimv2-{size}-patch14-224"])
    decoder = model.decoder
    assert round(size_of(decoder.trunk) / 1e6, 1) == 154.2
    assert round(size_of(decoder.token_embed) / 1e6, 1) == round(size_of(decoder.text_head) / 1e6, 1) == 32.8
    assert round(size_of(decoder.pixel_head) / 1e6, 1) == 0.6
    assert decoder.text_position.numel() == 79_872 and decoder.bos.numel() == 1_024
    assert size_of(decoder.project) == SIZES[size].width * 1024 + 1024
    parts = (decoder.trunk, decoder.token_embed, decoder.text_head, decoder.pixel_head, decoder.project)
    assert size_of(decoder) == sum(map(size_of, parts)) + 79_872 + 1_024  # untied, and nothing else


def test_table_1_shapes() -> None:
    rows = {name: (s.width, s.depth, s.heads, s.hidden) for name, s in SIZES.items() if name in RELEASED}
    assert rows == {
        "large": (1024, 24, 8, 2816),
        "huge": (1536, 24, 12, 4096),
        "1B": (2048, 24, 16, 5632),
        "3B": (3072, 24, 24, 8192),
        "base": (768, 12, 6, 2048),
    }


@pytest.mark.parametrize("name", list_models())
def test_contract(name: str) -> None:
    """Every registered model: the name says what it is, it builds, and its outputs have the promised shapes."""
    encoder, decoder = MODELS[name]
    found = re.fullmatch(r"aimv2-(\w+)-patch(\d+)-(\d+|native)", name)
    assert found is not None and encoder.name == name
    size, patch, image = found.groups()
    assert encoder.patch_size == int(patch) and encoder.image_size == (None if image == "native" else int(image))
    assert encoder.width // encoder.heads == (128 if size in RELEASED else 64) == decoder.width // decoder.heads
    with torch.device("meta"):
        model = AIMv2(encoder, decoder)
    assert not [key for key, _ in model.encoder.named_parameters() if "blocks" in key and key.endswith("bias")]
    height, width = (encoder.image_size,) * 2 if encoder.image_size else (14 * 10, 14 * 15)
    patches = (height // encoder.patch_size) * (width // encoder.patch_size)
    images = torch.empty(2, 3, height, width, dtype=torch.uint8)
    batch = make_batch(images, [[4, 5, 1], [1]], [patches // 2, 1], patches).to("meta")
    assert model.encoder(batch.images).shape == (2, patches, encoder.width)
    prediction = model(batch)
    assert prediction.pixels.shape == (len(batch.patch_rows), 3 * encoder.patch_size**2)
    assert prediction.text.shape == (len(batch.token_rows), decoder.vocab_size)


def test_create_gives_what_was_asked() -> None:
    encoder = create_model("aimv2-tiny-patch8-32")
    whole = create_model("aimv2-tiny-patch8-32", decoder=True, decoder_depth=1, decoder_vocab_size=50, depth=2)
    assert isinstance(encoder, VisionEncoder) and isinstance(whole, AIMv2)
    assert isinstance(whole.encoder, VisionEncoder) and len(whole.encoder.blocks) == 2
    assert len(whole.decoder.trunk.blocks) == 1 and whole.decoder.token_embed.num_embeddings == 50
    assert whole.training and {p.dtype for p in whole.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("aimv2-larg-patch14-224", {}, ["aimv2-larg-patch14-224", "did you mean 'aimv2-large-patch14-224'"]),
        ("aimv2-tiny-patch8-32", {"widht": 3}, ["widht", "did you mean 'width'"]),
        ("aimv2-tiny-patch8-32", {"image_size": 33}, ["33", "patch_size 8"]),
        ("aimv2-tiny-patch8-32", {"width": 129}, ["129", "heads"]),
        ("aimv2-tiny-patch8-32", {"decoder_heads": 3}, ["model.decoder.width 128", "3 heads"]),
        ("aimv2-tiny-patch8-32", {"decoder_pixels": False, "decoder_text": False}, ["pixel head", "text head"]),
    ],
)
def test_mistakes_are_named(name: str, options: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        create_model(name, **options)
    assert all(word in str(error.value) for word in words)


def test_names_by_pattern_and_what_other_libraries_call_loading() -> None:
    assert list_models("*-448") == [name for name in list_models() if name.endswith("-448")] != []
    assert list_models("aimv2-tiny*") and list_models("*-449*") == []
    with pytest.raises(UsageError, match=r"load_model\('aimv2-large-patch14-224'\)") as error:
        create_model("aimv2-large-patch14-224", pretrained=True)
    assert error.value.option == "pretrained" and error.value.code == "unsupported"
    encoder, images = create_model("aimv2-tiny-patch8-32").eval(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(encoder.forward_features(images), encoder(images))


def test_overrides_leave_the_table_alone() -> None:
    before = dict(MODELS)
    encoder, decoder = model_config("aimv2-tiny-patch8-32", {"depth": 9}, image_size=64)
    assert (encoder.image_size, decoder.depth) == (64, 9) and before == MODELS
