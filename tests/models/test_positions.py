"""Patch order and positions, against slow and obvious ways to get them."""

import math

import pytest
import torch
import torch.nn.functional as F

from aimv2.models.positions import patchify, pixel_patches, resize_positions, sincos_positions, unpatchify


def test_patchify_is_what_a_convolution_reads() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    wanted = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(images, 4) @ weight.flatten(1).T, wanted)


def test_pixel_patches_are_row_major_and_channel_last() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = pixel_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    wanted = [images[1, c, 2 + p, 4 + q].item() for p in range(2) for q in range(2) for c in range(3)]
    assert patches[1, 1 * 3 + 2].tolist() == wanted  # patch of row 1, column 2
    assert torch.equal(unpatchify(patches, 2, 2, 3), images)


def test_what_does_not_fill_a_patch_is_dropped() -> None:
    images = torch.randn(1, 3, 9, 11)
    assert torch.equal(patchify(images, 4), patchify(images[:, :, :8, :8], 4))
    assert torch.equal(pixel_patches(images, 4), pixel_patches(images[:, :, :8, :8], 4))


def test_sincos_by_the_layout() -> None:
    height, width, dim = 2, 3, 16
    table = sincos_positions(height, width, dim)
    assert table.shape == (height * width, dim) and table.dtype == torch.float32
    quarter = dim // 4
    for row in range(height):
        for column in range(width):
            angles = [[at / 10000 ** (k / quarter) for k in range(quarter)] for at in (column, row)]
            wanted = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            torch.testing.assert_close(table[row * width + column], torch.tensor(wanted), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="18"):
        sincos_positions(2, 2, 18)


def test_resized_positions() -> None:
    positions = torch.randn(1, 16, 6)
    assert resize_positions(positions, (4, 4)) is positions
    grown = resize_positions(positions, (6, 8))
    assert grown.shape == (1, 48, 6) and grown.dtype == positions.dtype
    # a table that rises along the columns still does, by the right amount, away from the border
    ramp = torch.arange(8.0).expand(8, 8).reshape(1, 64, 1)
    wide = resize_positions(ramp, (8, 16)).view(8, 16)
    torch.testing.assert_close(wide[:, 4:12], (torch.arange(4, 12) / 2 - 0.25).expand(8, 8), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="15"):
        resize_positions(torch.zeros(1, 15, 2), (4, 4))
