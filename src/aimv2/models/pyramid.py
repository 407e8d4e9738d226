"""The encoder under a detector: attention in windows and the simple feature pyramid (ViTDet, arXiv 2203.16527).

Legend: B images, h x w patch grid, I = h * w, D width, C channels of the pyramid, s window side in patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.errors import UsageError

NORM_EPS = 1e-6  # LayerNorms of the pyramid, as ViTDet has them


class Windows(NamedTuple):
    """Patches of an h x w grid in the order of windows of s x s, for attention within each window.

    Windows at the right and lower edge are smaller where s does not divide the grid: equal to windows that are padded and masked,
    without the padding. Group g of equal windows has ``groups[g] = (n, L)``, n windows of L patches. Attention over all patches does
    not depend on their order, so blocks with global attention read the same order.
    """

    order: Tensor  # int64 [I]: the row-major patch at each place
    groups: tuple[tuple[int, int], ...]

    def attend(self, attention: Any, qkv: Tensor) -> Tensor:
        """Attention within each window, of patches in this order: [B, I, 3 * D] -> [B, I, D]."""
        out = []
        for part, (count, length) in zip(qkv.split([n * size for n, size in self.groups], 1), self.groups):
            rows = part.reshape(-1, length, part.shape[2])  # [B * n, L, 3 * D]
            out.append(attention.attend(rows, None).reshape(-1, count * length, part.shape[2] // 3))
        return torch.cat(out, 1)


def windows(height: int, width: int, side: int, device: torch.device | str | None = None) -> Windows:
    """The windows of a grid, row-major, those of equal shape together.

    Args:
        height, width: patch grid.
        side: of a window, in patches; at most the longer side of the grid.

    Raises:
        UsageError: a window larger than the map.
    """
    check_window(side, (height, width))
    places = torch.arange(height * width, device=device).view(height, width)
    order, groups = [], []
    for rows in _whole_and_rest(height, side):
        for columns in _whole_and_rest(width, side):
            part = places[rows, columns]
            if part.numel():
                tall, wide = (min(side, edge) for edge in part.shape)
                part = part.reshape(part.shape[0] // tall, tall, part.shape[1] // wide, wide)
                order.append(part.transpose(1, 2).flatten())
                groups.append((order[-1].numel() // (tall * wide), tall * wide))
    return Windows(torch.cat(order), tuple(groups))


def _whole_and_rest(length: int, side: int) -> tuple[slice, slice]:
    whole = length - length % side
    return slice(0, whole), slice(whole, length)


def check_window(side: int, grid: Sequence[int]) -> None:
    """Raise UsageError for a window larger than the map of patches (one that covers it is global attention)."""
    if side > max(grid):
        raise UsageError(
            f"window {side}: larger than the map of {grid[0]} x {grid[1]} patches; give a window of at most {max(grid)}, 0 for "
            "attention over the whole map, or larger images",
            option="window",
            code="mismatch",
        )


def spread(blocks: int | Sequence[int], depth: int) -> list[int]:
    """Indices of the blocks with global attention: a number of them evenly spread, the last among them (ViTDet, section 3), or as given.

    Raises:
        UsageError: more than there are blocks, or an index that no block has.
    """
    if not isinstance(blocks, int):
        if blocks and not 0 <= min(blocks) <= max(blocks) < depth:
            raise UsageError(
                f"global_blocks {[*blocks]}: indices of blocks, 0 to {depth - 1}, expected", option="global_blocks"
            )
        return [*blocks]
    if not 0 <= blocks <= depth:
        raise UsageError(
            f"global_blocks {blocks}: 0 to {depth}, the number of blocks, expected", option="global_blocks"
        )
    return [(index + 1) * depth // blocks - 1 for index in range(blocks)]


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    grid: tuple[int, int],
    wanted: Sequence[int],
    window: int = 0,
    global_blocks: Sequence[int] = (),
    call: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """Blocks of an encoder, in windows except for some.

    Args:
        blocks: of a VisionEncoder.
        x: [B, I, D], embedded patches, row-major.
        grid: (h, w).
        wanted: indices of the blocks whose outputs are returned.
        window: side of a window in patches; 0: attention over the whole map in every block.
        global_blocks: indices of the blocks with attention over the whole map.
        call: ``call(block, x, mask)``, such as activation checkpointing.

    Returns:
        [B, I, D] of each wanted block, row-major.
    """
    layout = windows(*grid, window, x.device) if window else None
    if layout is not None:
        x, back = x[:, layout.order], layout.order.argsort()
    kept = {}
    for index, block in enumerate(blocks):
        mask = None if index in global_blocks else layout
        x = block(x, mask) if call is None else call(block, x, mask)
        if index in wanted:
            kept[index] = x if layout is None else x[:, back]
    return [kept[index] for index in wanted]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _level(width: int, channels: int, scale: float) -> nn.Sequential:
    """One level of the pyramid: [B, D, h, w] -> [B, C, h * scale, w * scale]."""
    layers: list[nn.Module] = []
    if scale == 4:
        layers += [nn.ConvTranspose2d(width, width // 2, 2, 2), ChannelNorm(width // 2, NORM_EPS), nn.GELU()]
        width //= 2
    if scale >= 2:
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width //= 2
    if scale < 1:
        layers.append(nn.MaxPool2d(round(1 / scale)))
    layers += [nn.Conv2d(width, channels, 1, bias=False), ChannelNorm(channels, NORM_EPS)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels, NORM_EPS)]
    return nn.Sequential(*layers)


class SimplePyramid(nn.ModuleDict):
    """Maps of several strides from the last map of a plain encoder (ViTDet, section 3): one level a name and scale.

    Args:
        width: D.
        channels: C.
        scales: cells per patch and side of each level, 4 to 0.25; the stride in pixels is the patch size over it.
    """

    def __init__(self, width: int, channels: int, scales: dict[str, float]) -> None:
        super().__init__({name: _level(width, channels, scale) for name, scale in scales.items()})
        self.whole = max(
            [1, *(round(1 / scale) for scale in scales.values())]
        )  # patches per cell of the coarsest level

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, D, h, w] -> [B, C, h', w'] of each level; a grid that its coarsest level does not divide is padded at right and bottom."""
        right, bottom = -x.shape[3] % self.whole, -x.shape[2] % self.whole
        if right or bottom:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        return [level(x) for level in self.values()]


@torch.no_grad()
def init_pyramid(pyramid: SimplePyramid) -> None:
    """Overwrite every parameter: normal of ``1 / sqrt(inputs)`` for kernels, LayerNorms as identity."""
    for module in pyramid.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            inputs = module.in_channels * (1 if isinstance(module, nn.ConvTranspose2d) else module.kernel_size[0] ** 2)
            nn.init.normal_(module.weight, std=inputs**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
