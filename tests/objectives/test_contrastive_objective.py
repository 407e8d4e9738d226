"""The contrastive losses against plain numpy, their start, the clamp of the scale, and what a batch's padding changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aimv2.batch import Batch, make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.init import init_weights
from aimv2.models.lit import LiTConfig, TextConfig, TunedLiT
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives.contrastive import ContrastiveObjective, sigmoid_loss, softmax_loss

IMAGE = EncoderConfig("tiny", 32, 2, 2, 48, 8, 32, pool_heads=2)
TEXT = TextConfig(24, 2, 2, 32, 40, 12, end=1)


def units(rng: np.random.Generator, count: int, width: int = 8) -> np.ndarray:
    rows = rng.standard_normal((count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def numpy_softmax(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    logits = scale * image @ text.T
    losses = [np.log(np.exp(row).sum()) - row[at] for matrix in (logits, logits.T) for at, row in enumerate(matrix)]
    return float(np.sum(losses)) / 2


def numpy_sigmoid(image: np.ndarray, text: np.ndarray, scale: float, bias: float) -> float:
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1 if i == j else -1
            total += math.log1p(math.exp(-sign * (scale * float(image[i] @ text[j]) + bias)))
    return total


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_softmax_is_clips(scale: float) -> None:
    rng = np.random.default_rng(0)
    arrays = units(rng, 6), units(rng, 6)
    image, text = tensors(*arrays)
    found = softmax_loss(image, text, image, text, torch.tensor([scale]), 0)
    assert found.item() == pytest.approx(numpy_softmax(*arrays, scale), rel=1e-5)
    parts = [
        softmax_loss(image[at : at + 2], text[at : at + 2], image, text, torch.tensor([scale]), at) for at in (0, 2, 4)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (30.0, 5.0)])
def test_sigmoid_is_siglips(scale: float, bias: float) -> None:
    rng = np.random.default_rng(1)
    arrays = units(rng, 6), units(rng, 6)
    image, text = tensors(*arrays)
    given = torch.tensor([scale]), torch.tensor([bias])
    found = sigmoid_loss(image, text, *given, 0)
    assert found.item() == pytest.approx(numpy_sigmoid(*arrays, scale, bias), rel=1e-5)
    parts = [sigmoid_loss(image[at : at + 3], text, *given, at) for at in (0, 3)]
    assert sum(part.item() for part in parts) == pytest.approx(found.item(), rel=1e-5)


def test_sigmoid_of_one_pair_by_hand() -> None:
    one = torch.tensor([[1.0, 0.0]])
    loss = sigmoid_loss(one, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0]), torch.tensor([-10.0]), 0)
    assert loss.item() == pytest.approx(math.log(2) + math.log1p(math.exp(-10)), rel=1e-5)


def model(contrast: str) -> TunedLiT:
    built = TunedLiT(LiTConfig(IMAGE, TEXT, 16, {"softmax": 0.07, "sigmoid": 0.1}[contrast]), contrast == "sigmoid")
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(float("nan"))
    init_weights(built, 0)
    return built


def batch(width: int | None = None) -> Batch:
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw)
    captions = [[2, 5, 6, 1], [2, 7, 1], [2, 8, 9, 10, 11, 12, 1], [2, 1]]
    return make_batch(images, captions, [1] * 4, 16, text_width=width)


def test_first_scale_and_bias() -> None:
    for contrast, scale, bias in (("softmax", 1 / 0.07, None), ("sigmoid", 10.0, -10.0)):
        built = model(contrast)
        assert all(torch.isfinite(value).all() for value in built.parameters())
        found = built(batch())
        assert found.scale.item() == pytest.approx(scale, rel=1e-5)
        assert (found.bias is None) if bias is None else (found.bias.item() == bias)
        torch.testing.assert_close(found.image.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_objective_is_the_loss_of_the_two_towers(contrast: str) -> None:
    built, given = model(contrast), batch()
    terms = ContrastiveObjective(ObjectiveConfig(name="contrastive", contrast=contrast))(built, given)
    (total, count) = terms["contrastive"]
    with torch.no_grad():
        image, text = built.encode_image(given.images), built.encode_text(given.text[:, : TEXT.max_text])
    arrays = image.double().numpy(), text.double().numpy()
    wanted = numpy_softmax(*arrays, 1 / 0.07) if contrast == "softmax" else numpy_sigmoid(*arrays, 10.0, -10.0)
    assert total.item() == pytest.approx(wanted, rel=1e-4) and count.item() == 4
    total.backward()
    learnt = {name for name, value in built.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    frozen = {name for name in dict(built.named_parameters()) if name.startswith("image.") and ".head." not in name}
    assert learnt == set(dict(built.named_parameters())) - frozen
    assert ("bias" in learnt) == (contrast == "sigmoid")


def test_scale_is_clamped_at_a_hundred() -> None:
    built = model("softmax")
    with torch.no_grad():
        built.log_scale.fill_(math.log(250))
    assert built(batch()).scale.item() == pytest.approx(100, rel=1e-5)
    with torch.no_grad():
        built.log_scale.fill_(-3)
    assert built(batch()).scale.item() == pytest.approx(1, rel=1e-5)


def test_padding_of_captions_changes_nothing_and_features_stand_for_images() -> None:
    built = model("softmax").eval()
    with torch.no_grad():
        found, wide = built(batch()), built(batch(96))  # wider than the tower's positions
        cached = batch()
        cached.features = built.image(cached.images).half()
        read = built(cached)
        at_end = built.text(batch().text[:, :12])[torch.arange(4), batch().text_len - 1]
        pooled = built.text.pool(batch().text[:, :12])
    torch.testing.assert_close(wide.text, found.text)
    torch.testing.assert_close(read.image, found.image, atol=2e-3, rtol=0)
    torch.testing.assert_close(pooled, at_end)


def test_half_precision_products_leave_the_loss_in_fp32() -> None:
    built, given = model("softmax"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = built(given)
        (total, _) = ContrastiveObjective(ObjectiveConfig(name="contrastive"))(built, given)["contrastive"]
    assert {value.dtype for value in (found.image, found.text, found.scale, total)} == {torch.float32}
