"""The image-text pair of locked-image tuning: frozen encoder with a pooling head, causal text tower, shared space
(AIMV2, locked-image tuning).

Legend: B images or texts, N patches, T tokens, D width, P width of the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import NORM_EPS, Block
from aimv2.models.sizes import EncoderConfig


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower; the defaults are the released one's."""

    width: int = 768
    depth: int = 12
    heads: int = 6
    hidden: int = 2048
    vocab_size: int = 49408  # CLIP's BPE
    max_text: int = 77
    end: int = 49407  # end-of-text token; the first one is where a text is pooled


@dataclass(frozen=True)
class LiTConfig:
    """Shape of a pair. ``encoder.pool_heads`` is set."""

    encoder: EncoderConfig
    text: TextConfig
    projection: int = 768
    temperature: float = 0.07  # at the start of training
    max_scale: float = 100.0  # of the logits


class TextEncoder(nn.Module):
    """Causal transformer over tokens, pooled at the first end of text."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(config.max_text, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.hidden) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T], T up to ``max_text`` -> [B, T, D] after the last norm.

        Raises:
            ValueError: more tokens than there are positions.
        """
        if tokens.shape[1] > self.config.max_text:
            raise ValueError(f"texts of at most {self.config.max_text} tokens expected, got {tokens.shape[1]}")
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, "causal")
        return self.norm(x)

    def pool(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> [B, D]: the features at each text's first end of text (causal: what follows is unseen).

        Without an end of text a row gives its first position; :class:`aimv2.data.clip_text.ClipTokenizer` always
        writes one.
        """
        features = self(tokens)
        at = (tokens == self.config.end).to(torch.int64).argmax(dim=1)
        return features[torch.arange(len(tokens), device=tokens.device), at]


class LiT(nn.Module):
    """Image encoder and text tower in one space; ``.image`` is the VisionEncoder."""

    def __init__(self, config: LiTConfig) -> None:
        super().__init__()
        self.config = config
        self.image = VisionEncoder(config.encoder)
        self.text = TextEncoder(config.text)
        self.image_projection = nn.Linear(config.encoder.width, config.projection, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.projection, bias=False)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.tokenizer: Any = None

    @property
    def encoder(self) -> VisionEncoder:
        """The image encoder."""
        return self.image

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by: exp of the learned logarithm, which is held in 0..ln(max_scale); []."""
        return self.log_scale.clamp(0, torch.tensor(self.config.max_scale).log().item()).exp()

    def config_dict(self) -> dict[str, Any]:
        """What ``config.json`` keeps of the pair."""
        return {"lit": {**asdict(self.config), "encoder": self.image.config_dict()}}

    def encode_image(self, images: Tensor | Sequence[Tensor], normalize: bool = True) -> Tensor:
        """uint8 or normalised float [B, 3, H, W], or a list of [3, H, W] -> [B, P], of unit length where ``normalize``."""
        out = self.image_projection(self.image.pooled(images))
        return F.normalize(out, dim=-1) if normalize else out

    def encode_text(self, texts: Tensor | list[str], normalize: bool = True) -> Tensor:
        """Tokens int64 [B, T], or texts (with ``.tokenizer``) -> [B, P], of unit length where ``normalize``."""
        if isinstance(texts, Tensor):
            tokens = texts
        elif self.tokenizer is None:
            raise ValueError("this pair came without a tokenizer; give tokens, or set .tokenizer (ClipTokenizer)")
        else:
            tokens = self.tokenizer(texts).to(self.log_scale.device)
        out = self.text_projection(self.text.pool(tokens))
        return F.normalize(out, dim=-1) if normalize else out

    def forward(self, images: Tensor | Sequence[Tensor], texts: Tensor | list[str]) -> Tensor:
        """Logits: every image beside every text, [images, texts]."""
        return self.scale * self.encode_image(images) @ self.encode_text(texts).T
