"""Patchify and position embeddings, as pure functions.

Legend: B images, p patch side, h x w grid, I = h * w patches in row-major order, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, I, C * p * p], row-major patches, channel first inside a patch (the order of a convolution)."""
    batch, channels, height, width = images.shape
    h, w = height // patch, width // patch
    x = images[:, :, : h * patch, : w * patch].reshape(batch, channels, h, patch, w, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, channels * patch * patch)


def pixel_patches(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, I, p * p * C], row-major patches, channel last inside a patch (the pixel targets' order)."""
    batch, channels, height, width = images.shape
    h, w = height // patch, width // patch
    x = images[:, :, : h * patch, : w * patch].reshape(batch, channels, h, patch, w, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`pixel_patches`: [B, h * w, p * p * C] -> [B, C, h * p, w * p]."""
    batch, _, values = patches.shape
    x = patches.reshape(batch, height, width, patch, patch, values // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * patch, width * patch)


def sincos_positions(height: int, width: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """2-D sine-cosine positions of an h x w grid (native models).

    The first half of the values encodes the column, the last half the row; each half is all sines, then all cosines
    of ``position / 10000 ** (k / (dim / 4))``.

    Returns:
        float32 [h * w, dim].
    """
    return sincos_at(grid_places(height, width, device), dim)


def grid_places(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Row and column of each patch of an h x w grid: int64 [h * w, 2]."""
    axes = (torch.arange(side, device=device) for side in (height, width))
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=1)


def sincos_at(places: Tensor, dim: int) -> Tensor:
    """:func:`sincos_positions` of given patches.

    Args:
        places: int64 [..., 2], row and column.
        dim: D, divisible by 4.

    Returns:
        float32 [..., dim].
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32, device=places.device) / (dim // 4))
    row, column = (axis[..., None].float() * frequency for axis in places.unbind(-1))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate learned positions of a square grid to another grid (bicubic, antialiased).

    Args:
        positions: [1, I, D], I a square.
        grid: (h, w).

    Returns:
        [1, h * w, D] of the same dtype.
    """
    side = int(positions.shape[1] ** 0.5)
    if side * side != positions.shape[1]:
        raise ValueError(f"positions of a square grid expected, got {positions.shape[1]}")
    if (side, side) == tuple(grid):
        return positions
    x = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return x.flatten(2).transpose(1, 2).to(positions.dtype)
