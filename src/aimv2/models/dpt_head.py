"""A dense prediction head (DPT, Ranftl et al., ICCV 2021): four layers as maps of four scales, fused from the coarsest to the finest.

Legend: B images, I = h * w patches, D width of a layer, F channels of the head, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = 4
CHANNELS = 256  # DPT's, and DINOv2's; a narrower encoder gets as many as it is wide


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions after ReLUs, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, h, w] -> [B, F, h, w]."""
        return x + self.second(F.relu(self.first(F.relu(x))))


class DptHead(nn.Module):
    """Layers' patch features to outputs at four times the patches' resolution.

    Scale k of four (4, 2, 1 and 0.5 times the patch grid) is made of layer ``k * layers // 4``: of four layers each has its own.
    """

    def __init__(self, widths: Sequence[int], outputs: int, channels: int | None = None) -> None:
        """
        Args:
            widths: D of each layer, one to four of them, the shallowest first.
            outputs: C.
            channels: F; None: 256, or the width where that is less.
        """
        super().__init__()
        if not 1 <= len(widths) <= SCALES:
            raise ValueError(f"{len(widths)} layers: 1 to {SCALES} expected")
        self.widths, wide = tuple(widths), channels or min(CHANNELS, min(widths))
        self.layer_of = [scale * len(widths) // SCALES for scale in range(SCALES)]
        self.project = nn.ModuleList(nn.Conv2d(widths[layer], wide, 1) for layer in self.layer_of)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(wide, wide, 4, stride=4),
                nn.ConvTranspose2d(wide, wide, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(wide, wide, 3, stride=2, padding=1),
            ]
        )
        self.skip = nn.ModuleList(ResidualUnit(wide) for _ in range(SCALES - 1))
        self.fuse = nn.ModuleList(ResidualUnit(wide) for _ in range(SCALES))
        self.mix = nn.Conv2d(wide, wide, 3, padding=1)
        self.out = nn.Conv2d(wide, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, I, sum of D], layers side by side, of a square grid -> [B, C, 4h, 4w]."""
        side = math.isqrt(features.shape[1])
        maps = [layer.transpose(1, 2).unflatten(2, (side, side)) for layer in features.split(self.widths, -1)]
        scales = [
            resize(project(maps[layer])) for layer, project, resize in zip(self.layer_of, self.project, self.resize)
        ]
        x = self.fuse[-1](scales[-1])
        for at in range(SCALES - 2, -1, -1):
            finer = scales[at]
            x = F.interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            x = self.fuse[at](x + self.skip[at](finer))
        return self.out(F.relu(self.mix(x)))


def seeded_heads(widths: Sequence[int], outputs: int, count: int, seed: int) -> nn.ModuleList:
    """``count`` heads with the same first weights, those of PyTorch's layers, drawn with ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = DptHead(widths, outputs)
    heads = nn.ModuleList(DptHead(widths, outputs) for _ in range(count))
    for head in heads:
        head.load_state_dict(first.state_dict())
    return heads
