"""Adapter of transformers and timm vision models to the encoder interface of the explorer.

Legend: B images, N patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aimv2.errors import UsageError
from aimv2.features.frozen import LAST, Frozen
from aimv2.models.sizes import EncoderConfig

_FEATURES = "Of a transformers or timm model only features are shown"
CANNOT = {
    "attention": f"{_FEATURES}, not its attention.",
    "caption": f"{_FEATURES}; it generates no captions.",
    "paint": f"{_FEATURES}; it predicts no patches.",
    "search": f"{_FEATURES}, without text search; use `aimv2 retrieve` for pairs such as CLIP.",
}


class ForeignEncoder(nn.Module):
    """Patch features by block index, as of a :class:`aimv2.VisionEncoder`.

    Args:
        frozen: a model of kind transformers or timm. If its blocks are not accessible, or have other grids than the last
            features, it counts as one block.

    Raises:
        UsageError: features without a square grid.
    """

    mean: Tensor  # on the model's device

    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        self.frozen, self.module = frozen, frozen.module
        side = frozen.side
        names = frozen.layer_names("all") if frozen.depth else [LAST]
        found = frozen(torch.zeros(1, 3, side, side, dtype=torch.uint8), names)
        count = found[-1].shape[1]
        grid = math.isqrt(count)
        if grid**2 != count or side // (side // grid) != grid:
            raise UsageError(
                f"MODEL {frozen.name}: {count} features of {side} x {side} px do not form a square grid of patches",
                code="unsupported",
            )
        self.names = names if all(x.shape[1:] == found[-1].shape[1:] for x in found) else [LAST]
        self.blocks = range(len(self.names))
        name = type(frozen.module).__name__
        self.config = EncoderConfig(name, frozen.width, len(self.names), 1, 0, side // grid, side)
        self.register_buffer("mean", torch.zeros((), device=frozen.device), persistent=False)

    def encode(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """uint8 [B, 3, H, W] -> [B, N, D] per layer: the block's output after the last norm, if there is one."""
        return self.frozen(images, [self.names[layer] for layer in layers])
