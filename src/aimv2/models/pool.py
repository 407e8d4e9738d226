"""The attention pooling head of the released LiT pair (AIMV2, Table 1): one learned query over all patch tokens.

Legend: B images, N tokens, D width, H heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """A learned query (no projection) over keys and values without bias, then a linear with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] -> [B, D]."""
        batch, length, width = features.shape
        k, v = (part(features).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.key, self.value))
        q = self.query.to(k.dtype).view(1, 1, self.heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)  # [B, H, 1, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, width))
