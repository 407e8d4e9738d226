"""The attentive probe: the head that measures a frozen encoder (AIMV1, attentive probe).

Legend: B images, N tokens, D width, H heads, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentiveProbe(nn.Module):
    """Batch norm without affine, one learned query over keys and values without bias, then a linear classifier."""

    def __init__(self, width: int, classes: int, heads: int | None = None) -> None:
        """``heads`` None: width / 64, at least 1 (released v1 models: width / 128)."""
        super().__init__()
        self.heads = heads or max(1, width // 64)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] frozen features -> logits [B, C]."""
        batch, length, width = features.shape
        x = self.norm(features.transpose(1, 2)).transpose(1, 2)
        k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.key, self.value)
        )  # [B, H, N, d]
        q = self.query.expand(batch, -1, -1).view(batch, 1, self.heads, -1).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, width)
        return self.linear(pooled)
