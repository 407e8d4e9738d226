"""The plain step that ours is measured against: what one writes first, and it is fixed.

Separate query, key and value linears, ``scaled_dot_product_attention`` with a boolean mask, captions padded to 77, fp32 logits
at every text position, eager, unfused AdamW, autocast for bf16. One width for encoder and decoder.

Legend: B pairs, I patches, T = 77 text positions, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = 77
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Shape:
    """Of encoder and decoder. The default is what two cores can train: width 384, 6 + 3 blocks, head dim 64."""

    width: int = 384
    heads: int = 6
    hidden: int = 1024
    encoder_blocks: int = 6
    decoder_blocks: int = 3
    image: int = 224
    patch: int = 14
    vocabulary: int = 32_000

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


SMALL = Shape()
LARGE = Shape(1024, 8, 2816, 24, 12)  # L/14-224 with the paper's decoder
TINY = Shape(32, 2, 64, 2, 1, 32, 8, 600)  # to try a benchmark


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(shape.width, eps=1e-5), nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = PlainAttention(shape.width, shape.heads)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainModel(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.patches = shape.width, shape.patches
        self.patch = nn.Conv2d(3, width, shape.patch, shape.patch)
        self.patch_norm = nn.RMSNorm(width, eps=1e-5)
        self.position = nn.Parameter(torch.randn(1, shape.patches, width) * 0.02)
        self.encoder = nn.ModuleList(PlainBlock(shape) for _ in range(shape.encoder_blocks))
        self.encoder_norm = nn.RMSNorm(width, eps=1e-5)
        self.project = nn.Linear(width, width)
        self.tokens = nn.Embedding(shape.vocabulary, width)
        self.bos = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.text_position = nn.Parameter(torch.randn(1, TEXT + 1, width) * 0.01)
        self.decoder = nn.ModuleList(PlainBlock(shape) for _ in range(shape.decoder_blocks))
        self.decoder_norm = nn.RMSNorm(width, eps=1e-5)
        self.pixels = nn.Linear(width, 3 * shape.patch**2, bias=False)
        self.vocabulary = nn.Linear(width, shape.vocabulary, bias=False)

    def forward(self, images: Tensor, text: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """float [B, 3, H, W], int64 [B, 77], int64 [B] -> pixels [B, I, P], logits [B, 77, V]."""
        place = torch.arange(self.patches)
        mask = (place[None, :] <= place[:, None]) | (place < prefix[:, None])[:, None, :]
        x = self.patch_norm(self.patch(images).flatten(2).transpose(1, 2)) + self.position
        for block in self.encoder:
            x = block(x, mask[:, None])
        x = self.project(self.encoder_norm(x))
        words = torch.cat([self.bos.expand(len(text), -1, -1), self.tokens(text)], 1) + self.text_position
        x = torch.cat([x, words], 1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for block in self.decoder:
            x = block(x, causal)
        x = self.decoder_norm(x)
        return self.pixels(x[:, : self.patches]), self.vocabulary(x[:, self.patches : -1]).float()


class PlainStep:
    """Forward, backward, clip and update, as our step does them, on torch's default device."""

    def __init__(self, precision: str, shape: Shape = SMALL) -> None:
        torch.manual_seed(0)
        self.shape, self.model = shape, PlainModel(shape)
        self.device = torch.get_default_device()
        self.bf16 = precision == "bf16"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), foreach=False)

    def __call__(self, images: Tensor, text: Tensor, lengths: Tensor, prefix: Tensor) -> float:
        """uint8 [B, 3, H, W], int64 [B, 77], int64 [B], int64 [B] -> the loss."""
        images, text, lengths, prefix = (part.to(self.device) for part in (images, text, lengths, prefix))
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
        x = (images.float() / 255 - mean) / std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            pixels, logits = self.model(x, text, prefix)
        grid, patch = self.shape.image // self.shape.patch, self.shape.patch
        targets = x.reshape(len(x), 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
        scored = torch.arange(self.shape.patches) >= prefix[:, None]
        error = (pixels[:, :-1].float() - targets[:, 1:]).square().mean(-1)
        pixel_loss = (error * scored[:, 1:]).sum() / scored[:, 1:].sum()
        wanted = text.masked_fill(torch.arange(TEXT) >= lengths[:, None], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100) + 0.4 * pixel_loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=False)
        self.optimizer.step()
        return loss.item()
