"""Maps, PCA colours, similarity and attention of an encoder, against what they must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aimv2.errors import UsageError
from aimv2.models.create import create_model
from aimv2.models.encoder import VisionEncoder
from aimv2.report.features import attention_maps, attention_weights, main_directions, patch_maps, pca_rgb, similarity

SHAPE = {"width": 32, "depth": 3, "heads": 2, "hidden": 64}


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    return create_model("aimv2-tiny-patch8-32", **SHAPE).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_maps_are_the_encoders_features_by_layer(encoder: VisionEncoder, images: torch.Tensor) -> None:
    maps = patch_maps(encoder, images)
    assert list(maps) == ["0", "1", "last"]
    assert all(one.shape == (2, 4, 4, 32) and one.dtype == np.float32 for one in maps.values())
    with torch.no_grad():
        last, first = encoder(images), encoder.encode(images, layers=[0])[0]
    np.testing.assert_allclose(maps["last"].reshape(2, 16, 32), last.numpy(), atol=1e-5)
    np.testing.assert_allclose(maps["0"].reshape(2, 16, 32), first.numpy(), atol=1e-5)
    assert list(patch_maps(encoder, images, [-1, 0])) == ["last", "0"]
    with pytest.raises(UsageError, match="layers -3 to 2"):
        patch_maps(encoder, images, [3])


def test_pca_finds_known_directions_and_is_the_same_each_time() -> None:
    noise = np.random.default_rng(0)
    factors = noise.uniform(-1, 1, (20, 30, 3)) * [9, 3, 1]
    basis = np.linalg.qr(noise.normal(size=(12, 12)))[0][:3]
    basis *= np.sign(basis[np.arange(3), np.abs(basis).argmax(1)])[:, None]
    whole = (factors @ basis + 5).astype(np.float32)
    first, second = pca_rgb([whole[:8], whole[8:]])
    assert (first.shape, second.shape, first.dtype) == ((8, 30, 3), (12, 30, 3), np.uint8)
    colours = np.concatenate([first, second]).reshape(-1, 3).astype(float)
    for band in range(3):  # brightness of a colour is the factor itself, with its sign
        assert np.corrcoef(colours[:, band], factors[..., band].ravel())[0, 1] > 0.98
    assert colours.min() == 0 and colours.max() == 255
    assert 0.01 < (colours[:, 0] == 255).mean() < 0.04  # scaled by percentiles: one outlier does not darken the rest
    again = pca_rgb([whole[:8], whole[8:]])
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])


@pytest.mark.parametrize(("rows", "width"), [(40, 7), (40, 200), (2, 5), (9, 2)])
def test_main_directions_are_those_of_a_singular_value_decomposition(rows: int, width: int) -> None:
    x = np.random.default_rng(rows).normal(size=(rows, width)) * np.linspace(3, 1, width)
    x -= x.mean(0)
    values, found = main_directions(x)
    _, singular, directions = np.linalg.svd(x, full_matrices=False)
    count = min(3, rows, width)
    np.testing.assert_allclose(values, singular[:count] ** 2, atol=1e-9)
    for number in range(min(count, rows - 1)):  # rows without their mean span one direction fewer
        assert abs(found[:, number] @ directions[number]) == pytest.approx(1)


def test_pca_of_nothing_to_see_is_grey() -> None:
    assert set(pca_rgb([np.ones((2, 2, 5), np.float32)])[0].ravel()) == {128}
    line = np.stack([np.arange(6.0), 2 * np.arange(6.0)], -1).reshape(2, 3, 2).astype(np.float32)
    colours = pca_rgb([line])[0]
    assert len(set(colours[..., 0].ravel())) > 2 and set(colours[..., 1:].ravel()) == {128}


def test_similarity_by_hand() -> None:
    here = np.array([[[1, 0], [0, 2]]], np.float32)
    other = np.array([[[3, 3], [-1, 0]], [[0, 0], [0, 1]]], np.float32)
    own, found = similarity(here, (0, 0), [here, other])
    np.testing.assert_allclose(own, [[1, 0]], atol=1e-7)
    np.testing.assert_allclose(found, [[0.5**0.5, -1], [0, 0]], atol=1e-7)
    assert found.dtype == np.float32
    with pytest.raises(UsageError, match="patch 1,0 lies outside the grid of 1 rows and 2 columns"):
        similarity(here, (1, 0), [other])
    with pytest.raises(UsageError, match="2 and 3"):
        similarity(here, (0, 0), [np.zeros((1, 1, 3), np.float32)])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_is_that_of_the_block(encoder: VisionEncoder, images: torch.Tensor, layer: int) -> None:
    block, seen = encoder.blocks[layer], {}
    hooks = [
        block.register_forward_pre_hook(lambda _, given: seen.update(x=given[0])),
        block.attn.proj.register_forward_hook(lambda _, given, out: seen.update(out=out)),  # type: ignore[union-attr]
    ]
    with torch.no_grad():
        encoder(images[:1])
        weights = attention_weights(encoder, images[0], layer)
        for hook in hooks:
            hook.remove()
        value = block.attn.split(block.attn.qkv(block.norm1(seen["x"])))[2]  # type: ignore[union-attr, operator]
        mixed = (weights[None] @ value).transpose(1, 2).flatten(2)
        assert torch.allclose(block.attn.proj(mixed), seen["out"], atol=1e-5)  # type: ignore[union-attr, operator]
    one = attention_maps(encoder, images[0], layer, (1, 2))
    assert one.shape == (2, 4, 4) and one.dtype == np.float32
    np.testing.assert_allclose(one.reshape(2, 16), weights[:, 6].numpy(), atol=1e-6)
    np.testing.assert_allclose(one.sum((1, 2)), 1, atol=1e-5)
    mean = attention_maps(encoder, images[0], layer - 3, None)
    np.testing.assert_allclose(mean.reshape(2, 16), weights.mean(1).numpy(), atol=1e-6)


def test_patches_and_layers_that_there_are_not(encoder: VisionEncoder, images: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="patch 0,4"):
        attention_maps(encoder, images[0], 0, (0, 4))
    with pytest.raises(UsageError, match="layer 3"):
        attention_maps(encoder, images[0], 3, None)
    with pytest.raises(ValueError, match="32 x 32 px"):
        attention_maps(encoder, images[0, :, :16], 0, None)
