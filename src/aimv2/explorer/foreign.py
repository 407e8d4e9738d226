"""A vision model of another origin behind the face through which the explorer reads features.

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

_FEATURES = "This is a model of another origin: of such a one only the features are shown,"
CANNOT = {
    "attention": f"{_FEATURES} not where its patches look.",
    "caption": f"{_FEATURES} and it writes no captions.",
    "paint": f"{_FEATURES} and it predicts no patches.",
    "search": f"{_FEATURES} and no text is compared with them; `aimv2 retrieve` does so for pairs such as CLIP.",
}


class ForeignEncoder(nn.Module):
    """Layers of patch features, asked for by the index of a block as of a :class:`aimv2.VisionEncoder`.

    Args:
        frozen: any of kind transformers or timm. Where its inside can't be asked for, or its blocks have other grids than
            its last features, it counts as one block.

    Raises:
        UsageError: features that lie on no square grid.
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
                f"MODEL {frozen.name}: {count} features of {side} x {side} px lie on no square grid of patches"
            )
        self.names = names if all(x.shape[1:] == found[-1].shape[1:] for x in found) else [LAST]
        self.blocks = range(len(self.names))
        name = type(frozen.module).__name__
        self.config = EncoderConfig(name, frozen.width, len(self.names), 1, 0, side // grid, side)
        self.register_buffer("mean", torch.zeros((), device=frozen.device), persistent=False)

    def encode(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """uint8 [B, 3, H, W] -> [B, N, D] a layer: the output of that block through the last norm, where there is one."""
        return self.frozen(images, [self.names[layer] for layer in layers])
