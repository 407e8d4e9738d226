"""Images of different sizes in one call: packed rows equal one image at a time, in values and gradients."""

import pytest
import torch
from torch import nn

from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig

SIZES = [(4, 4), (3, 7), (9, 2), (1, 5), (16, 20)]  # patches; the last is beyond what products serve


def native() -> VisionEncoder:
    config = EncoderConfig("native", 32, 3, 2, 48, 4, None, min_patches=4, max_patches=400)
    model = build(config, None, seed=0)
    assert isinstance(model, VisionEncoder)
    return model.eval()


def test_a_list_equals_one_at_a_time() -> None:
    model = native()
    torch.manual_seed(0)
    images = [torch.randn(3, 4 * rows, 4 * columns) for rows, columns in SIZES]
    together, inner = model(images, layers=[0, -1])
    pulls = [torch.randn_like(x) for x in together]
    sum((x * pull).sum() for x, pull in zip(together, pulls)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for place, image in enumerate(images):
        alone, kept = model(image[None], layers=[0, -1])
        torch.testing.assert_close(together[place], alone[0], rtol=1e-5, atol=1e-5)
        for layer in range(2):
            torch.testing.assert_close(inner[layer][place], kept[layer][0], rtol=1e-5, atol=1e-5)
        (alone[0] * pulls[place]).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


def test_uint8_lists_are_normalised() -> None:
    model = native()
    images = [
        torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8),
        torch.randint(0, 256, (3, 8, 24), dtype=torch.uint8),
    ]
    for got, image in zip(model(images), images):
        torch.testing.assert_close(got, model(image[None])[0], rtol=1e-5, atol=1e-5)


def test_forms_of_encode() -> None:
    model = native()
    image = torch.randn(2, 3, 12, 28)
    features = model(image)
    assert torch.equal(model.encode(image), features)
    assert torch.equal(model.encode(image, pool="mean"), features.mean(1))
    picture = model.encode(image, as_map=True)
    assert picture.shape == (2, 32, 3, 7) and torch.equal(picture[1, :, 2, 5], features[1, 2 * 7 + 5])
    last, first = model.encode(image, layers=[-1, 0], as_map=True)
    assert torch.equal(last, picture) and not torch.equal(first, picture)
    images = [torch.randn(3, 12, 28), torch.randn(3, 16, 16)]
    maps = model.encode(images, as_map=True)
    assert [tuple(m.shape) for m in maps] == [(32, 3, 7), (32, 4, 4)]
    assert [tuple(m.shape) for m in model.encode(images, layers=[0, 1], pool="mean")[1]] == [(32,), (32,)]
    for wrong, said in (
        ({"pool": "max"}, "'mean' or 'attention' expected"),
        ({"pool": "mean", "as_map": True}, "choose one"),
        ({"pool": "attention"}, "no pooling head"),
    ):
        with pytest.raises(ValueError, match=said):
            model.encode(image, **wrong)
    with pytest.raises(ValueError, match="at least one is expected"):
        model([])


def test_a_document_sees_itself_alone() -> None:
    model = native()
    images = [torch.randn(3, 16, 16), torch.randn(3, 8, 24)]
    before = model(images)
    images[1] = images[1] + 1
    after = model(images)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert isinstance(model.patch_embed, nn.Module)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel runs on CUDA alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_for_lists_equals_one_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as kernels

    config = EncoderConfig("native", 128, 2, 2, 96, 4, None, min_patches=4, max_patches=400)
    model = build(config, None, seed=0).eval().cuda().to(dtype)
    torch.manual_seed(0)
    images = [torch.randn(3, 4 * rows, 4 * columns, device="cuda", dtype=dtype) for rows, columns in SIZES]
    calls, real = [], kernels.varlen_attn

    def counted(*args: object, **options: object) -> object:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(kernels, "varlen_attn", counted)
    together = model(images)
    assert len(calls) == config.depth  # the kernel served it
    pulls = [torch.randn_like(x) for x in together]
    sum((x * pull).sum() for x, pull in zip(together, pulls)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for got, image, pull in zip(together, images, pulls):
        alone = model(image[None])[0]
        assert (got - alone).abs().max() <= 2e-2 * alone.abs().max()
        (alone * pull).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 5e-2 * parameter.grad.abs().max(), name
