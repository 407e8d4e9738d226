"""The encoder equals transformers' AIMv2 in values and gradients; the prefix mask holds on the real thing."""

import pytest
import torch
from torch import Tensor, nn

from aimv2.models.create import build, create_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import IMAGENET_MEAN, IMAGENET_STD, DecoderConfig, EncoderConfig

WIDTH, DEPTH, HEADS, HIDDEN, PATCH = 32, 3, 2, 48, 4


def tiny(image_size: int | None) -> VisionEncoder:
    config = EncoderConfig("tiny", WIDTH, DEPTH, HEADS, HIDDEN, PATCH, image_size, min_patches=4, max_patches=64)
    encoder = build(config, None, seed=0)
    assert isinstance(encoder, VisionEncoder)
    torch.manual_seed(1)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return encoder


def reference_names(key: str) -> list[str]:
    """Our parameter -> the parts of transformers' that it is made of, in order."""
    ends = {
        "patch_embed.proj.weight": ["embeddings.patch_embed.weight"],
        "patch_embed.proj.bias": ["embeddings.patch_embed.bias"],
        "patch_embed.norm.weight": ["embeddings.rms_norm.weight"],
        "patch_embed.position": ["embeddings.position_embedding.weight"],
        "norm.weight": ["rms_norm.weight"],
    }
    if key in ends:
        return ends[key]
    _, index, rest = key.split(".", 2)
    parts = {
        "attn.qkv.weight": [f"attention.{part}_proj.weight" for part in "qkv"],
        "attn.proj.weight": ["attention.out_proj.weight"],
        "mlp.gate_up.weight": ["ffn.gate_proj.weight", "ffn.up_proj.weight"],
        "mlp.down.weight": ["ffn.down_proj.weight"],
        "norm1.weight": ["rms_norm1.weight"],
        "norm2.weight": ["rms_norm2.weight"],
    }[rest]
    return [f"encoder.layers.{index}.{part}" for part in parts]


def reference(encoder: VisionEncoder) -> nn.Module:
    """transformers' model with the same weights."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    size = encoder.config.image_size
    config = Aimv2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=size or 16,
        patch_size=PATCH,
        is_native=size is None,
        use_head=False,
    )
    model = Aimv2VisionModel(config).train()
    theirs = dict(model.named_parameters())
    unused = set(theirs)
    with torch.no_grad():
        for key, value in encoder.named_parameters():
            names = reference_names(key)
            unused -= set(names)
            for name, part in zip(names, value.chunk(len(names))):
                theirs[name].copy_(part.reshape(theirs[name].shape))
    assert not unused
    return model


def assert_near(got: Tensor, wanted: Tensor, what: str) -> None:
    """To 1e-5 of the largest value."""
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5, f"{what}: {error:.1e}"


GRIDS = [(16, 4, 4), (None, 4, 4), (None, 3, 7), (None, 9, 2), (None, 1, 5)]


@pytest.mark.parametrize(("image_size", "rows", "columns"), GRIDS)
def test_parity_with_transformers(image_size: int | None, rows: int, columns: int) -> None:
    encoder = tiny(image_size)
    theirs = reference(encoder)
    torch.manual_seed(2)
    images = torch.randn(2, 3, rows * PATCH, columns * PATCH)
    layers = [0, 1, -1]
    out, hidden = encoder(images, layers=layers)
    wanted = theirs(pixel_values=images, output_hidden_states=True)
    assert_near(out, wanted.last_hidden_state, "output")
    for layer, value in zip(layers, hidden):
        assert_near(value, wanted.hidden_states[1:][layer], f"block {layer}")
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    (wanted.last_hidden_state * pull).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for key, parameter in encoder.named_parameters():
        names = reference_names(key)
        for name, part in zip(names, parameter.grad.chunk(len(names))):
            assert_near(part.reshape(gradients[name].shape), gradients[name], f"gradient of {name}")


def test_intermediates_on_request() -> None:
    encoder = tiny(16)
    images = torch.randn(1, 3, 16, 16)
    plain = encoder(images)
    out, (last, first) = encoder(images, layers=[-1, 0])
    assert torch.equal(plain, out) and torch.equal(encoder.norm(last), out) and not torch.equal(first, last)
    assert encoder(images, layers=[])[1] == []
    with pytest.raises(ValueError, match=r"-3 to 2, got \[3\]"):
        encoder(images, layers=[3])


def moved(encoder: VisionEncoder, patch: int, prefix: Tensor | None) -> list[bool]:
    """Which features change when one patch of the second image does."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    other = images.clone()
    row, column = divmod(patch, 4)
    other[1, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1
    difference = (encoder(images, prefix) - encoder(other, prefix)).detach().abs()
    assert difference[0].max() == 0
    return (difference[1].amax(-1) > 1e-5).tolist()


@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_a_patch_behind_the_prefix_is_seen_by_itself_and_later_ones(prefix: int) -> None:
    encoder = tiny(16)
    for patch in range(prefix, 16):
        seen = moved(encoder, patch, torch.tensor([3, prefix]))
        assert seen == [position >= patch for position in range(16)]


@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_a_patch_of_the_prefix_is_seen_by_all(prefix: int) -> None:
    encoder = tiny(16)
    assert all(moved(encoder, 0, torch.tensor([3, prefix])))
    assert all(moved(encoder, prefix - 1, torch.tensor([3, prefix])))


def test_without_a_prefix_all_see_all() -> None:
    assert all(moved(tiny(16), 15, None))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.bool])
def test_integers_that_are_not_uint8_are_refused(dtype: torch.dtype) -> None:
    """They would pass as normalised: features of an image 60 times too bright."""
    images = torch.zeros(2, 3, 16, 16, dtype=dtype)
    encoder = tiny(16)
    for call in (encoder, encoder.encode, lambda x: encoder(list(x))):
        with pytest.raises(ValueError, match=r"images of torch\.\w+: uint8"):
            call(images)
    assert encoder(images.to(torch.uint8)).isfinite().all() and encoder(images.float()).isfinite().all()


def test_pixels_are_normalised_inside() -> None:
    encoder = tiny(16)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    wanted = (pixels.double() / 255 - torch.tensor(IMAGENET_MEAN).double().view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).double().view(3, 1, 1)
    got = encoder.normalize(pixels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(encoder(pixels), encoder(got)) and encoder.normalize(got) is got


@pytest.mark.parametrize(
    ("size", "shape", "words"),
    [
        (16, (3, 16, 16), r"\[B, 3, H, W\]"),
        (16, (1, 1, 16, 16), r"\[B, 3, H, W\]"),
        (16, (1, 3, 12, 12), "16 x 16 px, got 12 x 12"),
        (None, (1, 3, 4, 8), "4 to 64 patches.* = 2 patches"),
        (None, (1, 3, 36, 36), "4 to 64 patches.* = 81 patches"),
    ],
)
def test_wrong_images_are_refused(size: int | None, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(size)(torch.zeros(shape))


def test_native_drops_what_does_not_fill_a_patch() -> None:
    encoder = tiny(None)
    images = torch.randn(1, 3, 18, 23)
    assert torch.equal(encoder(images), encoder(images[:, :, :16, :20]))


def test_the_encoder_of_a_whole_model_is_the_encoder() -> None:
    options = {"image_size": 16, "width": 32, "heads": 2, "hidden": 48, "depth": 2}
    alone = create_model("aimv2-tiny-patch8-32", seed=3, **options)
    assert DecoderConfig().depth == 12  # the paper's, unless a row of the table says otherwise
    whole = create_model("aimv2-tiny-patch8-32", decoder=True, seed=3, decoder_vocab_size=9, **options)
    whole.encoder.load_state_dict(alone.state_dict())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(whole.encoder(images), alone(images))


def test_another_image_size_interpolates_the_positions() -> None:
    encoder, images = tiny(16), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = encoder.patch_embed.position.detach().clone()
    encoder.set_image_size(32)
    assert encoder.config.image_size == encoder.patch_embed.config.image_size == 32
    grid = before.reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder.patch_embed.position.detach(), wanted.flatten(2).transpose(1, 2))
    assert encoder(images).shape == (2, 64, WIDTH)
    with pytest.raises(ValueError, match="multiple of the patch size, 4, got 30"):
        encoder.set_image_size(30)
    with pytest.raises(ValueError, match="is native"):
        tiny(None).set_image_size(32)
