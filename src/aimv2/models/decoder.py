"""The multimodal decoder: causal attention over image features, [BOS] and the caption (AIMV2, Figure 1).

Legend: B pairs, I patches, T padded caption, R caption rows, S scored patches, D decoder width, P = p * p * 3, V vocabulary.

Rows without padding ("packed") go through every linear; only attention uses the padded [B, I + T]. The last block and
the heads run on scored rows only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimv2.batch import Batch
from aimv2.models.layers import NORM_EPS, Block, Cache, Packed, Spans, dtype_of
from aimv2.models.sizes import DecoderConfig, EncoderConfig

CHUNK_ROWS = 1024  # text logits in chunks of this many rows once there are more than twice as many
IGNORED = -100  # the target of a padding row


class Prediction(NamedTuple):
    """Decoder outputs at scored positions.

    Attributes:
        pixels: [S, P] predicted patches, per-patch-normalised values, channel last (None: no pixel head).
        text: the logits [R, V], or with targets the summed fp32 cross-entropy [] (None: no text head).
        features: the encoder's, for the feature term of distillation (None: not requested).
    """

    pixels: Tensor | None
    text: Tensor | None
    features: Tensor | None = None


class TextHead(nn.Module):
    """Vocabulary logits, or their cross-entropy in chunks, so that large R never materialises [R, V] in fp32."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab_size, bias=False)

    def forward(self, rows: Tensor, targets: Tensor | None = None) -> Tensor:
        """[R, D] -> logits [R, V]; with targets int64 [R] (-100: ignored) the summed cross-entropy [] in fp32."""
        return self.linear(rows) if targets is None else summed_cross_entropy(self.linear, rows, targets)


def summed_cross_entropy(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy [] in fp32 of a head's logits for rows [R, D]; targets int64 [R] (-100: ignored). Of many rows in chunks."""

    def loss(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), wanted, ignore_index=IGNORED, reduction="sum")

    if len(rows) <= 2 * CHUNK_ROWS:
        return loss(rows, targets)
    total = rows.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS)):
        total = total + checkpoint(loss, part, wanted, use_reentrant=False, preserve_rng_state=False)
    return total


class Trunk(nn.Module):
    """Causal blocks and the last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.hidden) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)

    def forward(
        self,
        x: Tensor,
        packed: Packed | None = None,
        keep: Tensor | None = None,
        mask: Any = "causal",
        caches: Iterable[Cache] | None = None,
    ) -> Tensor:
        """Apply the blocks and the norm.

        Args:
            x: packed rows [B * I + R, D], or [B, N, D].
            packed: the row layout, for packed input.
            keep: int64 [K]; only these rows (of the flat [B * N] where not packed) leave the trunk.
            mask: see :meth:`aimv2.models.layers.Attention.attend` (padded input only).
            caches: of each block; ``x`` holds the new positions.

        Returns:
            like ``x``, or [K, D].
        """
        each = repeat(None) if caches is None else iter(caches)
        for block in self.blocks:
            last = packed is not None and block is self.blocks[-1]
            x = block(x, mask, packed, keep if last else None, next(each))
        return self.norm(x if keep is None or packed is not None else x.flatten(0, 1).index_select(0, keep))

    def step(self, x: Tensor, caches: Iterable[Cache] | None) -> Tensor:
        """New positions [B, N, D] that follow the cached ones (None: no cache) -> [B, N, D]."""
        return self(x, caches=caches)


class MultimodalDecoder(nn.Module):
    """Predict the next patch at image positions and the next token at caption positions.

    Joint (the paper's): one causal trunk over [image ; BOS, caption]. Separate (Table 9d): one trunk for pixels over
    the image, one for text over both. Image positions get no further position embedding; [BOS] is a learned vector.
    """

    def __init__(self, config: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(encoder.width, config.width)
        image_only = not config.text
        if config.pixels and (config.separate or image_only):
            self.pixel_trunk = Trunk(config)  # over image positions only
        if config.text:
            self.trunk = Trunk(config)
            self.token_embed = nn.Embedding(config.vocab_size, config.width)
            self.text_position = nn.Parameter(torch.empty(config.max_text + 1, config.width))
            self.bos = nn.Parameter(torch.empty(config.width))
            self.text_head = TextHead(config.width, config.vocab_size)
        if config.pixels:
            self.pixel_head = nn.Linear(config.width, 3 * encoder.patch_size**2, bias=False)

    def caption_inputs(self, text: Tensor, length: int) -> Tensor:
        """Embeddings of [BOS], text[0], .., text[length - 2]: the inputs that predict text[0..length-1].

        Args:
            text: int64 [B, T]; length: 1..T+1.

        Returns:
            [B, length, D].
        """
        bos = self.bos.expand(len(text), 1, -1)
        tokens = torch.cat([bos, self.token_embed(text[:, : length - 1])], dim=1)
        beyond = max(0, length - len(self.text_position))  # T is a bucket: what exceeds the last position is padding
        return tokens + F.pad(self.text_position, (0, 0, 0, beyond))[:length]

    def forward(self, features: Tensor, batch: Batch, text_targets: Tensor | None = None) -> Prediction:
        """Decode image features and captions.

        Args:
            features: [B, I, D of the encoder].
            batch: which rows exist and which are scored.
            text_targets: int64 [R]: return the summed cross-entropy instead of logits.

        Returns:
            predictions at scored image positions and at every real caption position.
        """
        if batch.kept is not None:
            features = features.gather(1, batch.kept[:, :, None].expand(-1, -1, features.shape[2]))  # [B, K, D]
        image = self.project(features).to(dtype_of(self))  # [B, I, D]; the residual stream stays fp32
        samples, patches, width = len(batch.text), image.shape[1], image.shape[2]
        causal: Any = "causal"
        spans = None
        if batch.layout is not None:
            if batch.layout.image_groups:
                causal = Spans(batch.layout.image_slots, batch.layout.image_groups)
            spans = Spans(batch.layout.slots, batch.layout.groups)
        if not self.config.text:
            return Prediction(self.pixel_head(self.pixel_trunk(image, None, batch.patch_rows, causal)), None)
        padded = self.caption_inputs(batch.text, batch.text.shape[1])  # [B, T, D]
        text = padded.flatten(0, 1).index_select(0, batch.token_rows.clamp(max=samples * batch.text.shape[1] - 1))
        rows = torch.cat([image.reshape(-1, width), text])
        packed = Packed(batch.token_rows, samples, patches, batch.text.shape[1], spans)
        text_rows = torch.arange(len(rows) - len(text), len(rows), device=rows.device)
        joint = self.config.pixels and not self.config.separate
        keep = torch.cat([batch.patch_rows, text_rows]) if joint else text_rows
        out = self.trunk(rows, packed, keep)
        pixels = None
        if joint:
            pixels, out = self.pixel_head(out[: len(batch.patch_rows)]), out[len(batch.patch_rows) :]
        elif self.config.pixels:
            pixels = self.pixel_head(self.pixel_trunk(image, None, batch.patch_rows, causal))
        return Prediction(pixels, self.text_head(out, text_targets))

    def new_caches(self) -> list[Cache]:
        """Empty key-value caches, one per block of the text trunk."""
        return [Cache() for _ in self.trunk.blocks]

    def read_image(self, features: Tensor, caches: list[Cache]) -> None:
        """Prefill the caches with the image positions, once for all tokens that follow."""
        self.trunk.step(self.project(features), caches)

    def next_logits(self, tokens: Tensor | None, position: int, samples: int, caches: list[Cache]) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 [B], the previous token; None: [BOS].
            position: index of this input in the caption, 0 for [BOS].
            samples: B.
            caches: keys and values of the image and of earlier inputs.

        Returns:
            [B, V].
        """
        x = self.bos.expand(samples, -1) if tokens is None else self.token_embed(tokens)
        x = (x + self.text_position[position])[:, None]
        return self.text_head(self.trunk.step(x, caches))[:, 0]

    def full_logits(self, features: Tensor, text: Tensor) -> Tensor:
        """Logits after each of [BOS], text[0], .., without a cache (reference path, padded).

        Args:
            features: [B, I, D of the encoder]; text: int64 [B, t], t may be 0.

        Returns:
            [B, t + 1, V].
        """
        x = torch.cat([self.project(features), self.caption_inputs(text, text.shape[1] + 1)], dim=1)
        return self.text_head(self.trunk.step(x, None)[:, features.shape[1] :])
