"""Locked-image tuning (LiT): frozen image encoder with a pooling head and a causal text tower, in one embedding space.

Legend: B images or texts, N patches, T tokens, D width, P width of the joint embedding space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import NORM_EPS, Block
from aimv2.models.sizes import EncoderConfig


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower; the defaults are the released model's."""

    width: int = 768
    depth: int = 12
    heads: int = 6
    hidden: int = 2048
    vocab_size: int = 49408  # CLIP's BPE
    max_text: int = 77
    end: int = 49407  # end-of-text id; a text is pooled at the first one


@dataclass(frozen=True)
class LiTConfig:
    """Shape of a LiT pair. ``encoder.pool_heads`` is set."""

    encoder: EncoderConfig
    text: TextConfig
    projection: int = 768
    temperature: float = 0.07  # at the start of training
    max_scale: float = 100.0  # upper bound of the logit scale


class TextEncoder(nn.Module):
    """Causal text transformer, pooled at the first end of text."""

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
        """int64 [B, T] -> [B, D]: the features at each text's first end of text (causal: later tokens have no effect).

        A row without an end of text gives its first position; :class:`aimv2.data.text.clip.ClipTokenizer` always
        appends one.
        """
        features = self(tokens)
        at = (tokens == self.config.end).to(torch.int64).argmax(dim=1)
        return features[torch.arange(len(tokens), device=tokens.device), at]


class LiT(nn.Module):
    """Image encoder and text tower in one embedding space; ``.image`` is the VisionEncoder."""

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
        """Logit scale (inverse temperature): exp of the learned logarithm, clamped to 0..ln(max_scale); []."""
        log_scale = self.log_scale
        inside = (log_scale >= 0) & (log_scale <= self.max_log_scale)
        # not torch.clamp: newer versions have gradient 0 at the bound itself, where the scale would then stay for ever
        return torch.where(inside, log_scale, log_scale.detach().clamp(0, self.max_log_scale)).exp()

    @property
    def max_log_scale(self) -> float:
        """ln(max_scale) in fp32."""
        return torch.tensor(self.config.max_scale).log().item()

    def config_dict(self) -> dict[str, Any]:
        """Contents of ``config.json``."""
        return {"lit": {**asdict(self.config), "encoder": self.image.config_dict()}}

    def encode_image(self, images: Tensor | Sequence[Tensor], normalize: bool = True) -> Tensor:
        """uint8 or normalised float [B, 3, H, W], or a list of [3, H, W] -> [B, P], of unit length where ``normalize``."""
        out = self.image_projection(self.image.pooled(images))
        return F.normalize(out, dim=-1) if normalize else out

    def encode_text(self, texts: Tensor | list[str], normalize: bool = True) -> Tensor:
        """Tokens int64 [B, T], or texts (with ``.tokenizer``) -> [B, P], of unit length where ``normalize``."""
        if isinstance(texts, str):
            raise ValueError(f"a list of texts is expected, got one text: [{texts!r}]")
        if isinstance(texts, Tensor):
            tokens = texts
        elif self.tokenizer is None:
            raise ValueError("this pair came without a tokenizer; give tokens, or set .tokenizer (ClipTokenizer)")
        else:
            tokens = self.tokenizer(texts).to(self.log_scale.device)
        out = self.text_projection(self.text.pool(tokens))
        return F.normalize(out, dim=-1) if normalize else out

    def forward(self, images: Tensor | Sequence[Tensor], texts: Tensor | list[str]) -> Tensor:
        """Logits of every image with every text, [images, texts]."""
        return self.scale * self.encode_image(images) @ self.encode_text(texts).T


class PairFeatures(NamedTuple):
    """Inputs of a contrastive loss, all fp32."""

    image: Tensor  # [B, P], of unit length
    text: Tensor  # [B, P], of unit length
    scale: Tensor  # [1], logit scale
    bias: Tensor | None  # [1], added to the logits; sigmoid loss only


class TunedLiT(LiT):
    """A LiT pair in training: the image trunk is frozen; pooling head, text tower, projections and scale are trained.

    Scale and bias have shape [1], since FSDP2 shards no scalars. The bias of the sigmoid loss is not saved: it shifts all
    logits alike, so no ranking of texts or images depends on it.
    """

    def __init__(self, config: LiTConfig, bias: bool, from_features: bool = False) -> None:
        """``bias``: for the sigmoid loss. ``from_features``: training reads cached features of the trunk."""
        super().__init__(config)
        assert self.image.head is not None
        self.from_features = from_features
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1)) if bias else None
        self.image.requires_grad_(False)
        self.image.head.requires_grad_(True)

    def block_lists(self) -> list[nn.ModuleList]:
        """Transformer blocks, one list per tower."""
        return [self.image.blocks, self.text.blocks]

    def forward(self, batch: Batch) -> PairFeatures:  # type: ignore[override]  # the loss needs more than the logits
        """Features of a batch's images and captions.

        Args:
            batch: ``images`` uint8 or normalised float [B, 3, H, W], or ``features`` of the trunk, [B, N, D]; ``text`` rows
                of start, caption, end.
        """
        features = batch.features
        if features is None:
            with torch.no_grad():
                features = self.image(batch.images)
        assert self.image.head is not None
        image = self.image_projection(self.image.head(features.float()))
        text = self.text_projection(self.text.pool(batch.text[:, : self.config.text.max_text]))
        with torch.autocast(text.device.type, enabled=False):
            unit = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
            return PairFeatures(*unit, self.scale, None if self.bias is None else self.bias.clone())

    def saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to save: all but the bias."""
        return {key: value for key, value in weights.items() if key != "bias"}
