"""AIMv2: encoder and decoder joined for pre-training and captioning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.errors import UsageError
from aimv2.models.decoder import MultimodalDecoder, Prediction
from aimv2.models.encoder import VisionEncoder
from aimv2.models.generate import generate
from aimv2.models.sizes import DecoderConfig, EncoderConfig


class CaptionTokenizer(Protocol):
    """What captioning needs of a tokeniser."""

    eos_id: int

    def decode(self, ids: list[int]) -> str: ...


class AIMv2(nn.Module):
    """A vision encoder with prefix attention under a causal multimodal decoder (AIMV2, Figure 1)."""

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.encoder = VisionEncoder(encoder)
        self.decoder = MultimodalDecoder(decoder, encoder)
        self.tokenizer: CaptionTokenizer | None = None  # set by whoever loads the model

    def block_lists(self) -> list[nn.ModuleList]:
        """Its blocks, trunk by trunk."""
        trunks = [self.decoder.get_submodule(name) for name in ("trunk", "pixel_trunk") if hasattr(self.decoder, name)]
        return [self.encoder.blocks, *(trunk.blocks for trunk in trunks)]  # type: ignore[list-item]

    def forward(self, batch: Batch, text_targets: Tensor | None = None, bidirectional: bool = False) -> Prediction:
        """Predicts the next patch and the next token.

        Args:
            batch: images, captions, prefix lengths, scored rows.
            text_targets: see :meth:`MultimodalDecoder.forward`.
            bidirectional: let all patches see each other (Cap with full attention, Table 9a).
        """
        features = self.encoder.forward_batch(batch, bidirectional)
        return self.decoder(features, batch, text_targets)

    def caption(
        self,
        images: Tensor,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        beams: int = 1,
        seed: int = 0,
        tokenizer: CaptionTokenizer | None = None,
    ) -> list[str]:
        """Captions of images, in evaluation mode.

        Args:
            images: uint8 or normalised float [B, 3, H, W].
            max_tokens: end of text included; None: as many as the decoder can write.
            temperature: 0 takes the likeliest token each time.
            top_p: draw from the smallest set of tokens with this mass.
            beams: more than 1: beam search.
            seed: of the draw.
            tokenizer: other than the model's own.

        Raises:
            ValueError: options out of range, no text head.
            UsageError: no tokeniser.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise UsageError(
                "the model has no tokenizer (its folder held none): give tokenizer=, or load a RUN, which has one"
            )
        images = images.to(next(self.parameters()).device)
        limit = self.decoder.config.max_text if max_tokens is None else max_tokens
        was_training = self.training
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                ids = generate(self, images, tokenizer.eos_id, limit, temperature, top_p, beams, seed)
        finally:
            self.train(was_training)
        return [tokenizer.decode(caption) for caption in ids]

    def config_dict(self) -> dict[str, Any]:
        """What ``config.json`` keeps: encoder and decoder."""
        return {"encoder": self.encoder.config_dict(), "decoder": asdict(self.decoder.config)}
