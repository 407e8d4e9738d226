"""AIMv2: encoder and decoder joined for pre-training and captioning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.models.decoder import MultimodalDecoder, Prediction
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import DecoderConfig, EncoderConfig


class AIMv2(nn.Module):
    """A vision encoder with prefix attention under a causal multimodal decoder (PAPER.md Figure 1)."""

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.encoder = VisionEncoder(encoder)
        self.decoder = MultimodalDecoder(decoder, encoder)

    def forward(
        self, batch: Batch, text_targets: Tensor | None = None, bidirectional: bool = False
    ) -> Prediction:
        """Predicts the next patch and the next token.

        Args:
            batch: images, captions, prefix lengths, scored rows.
            text_targets: see :meth:`MultimodalDecoder.forward`.
            bidirectional: let all patches see each other (Cap with full attention, Table 9a).
        """
        features = self.encoder(batch.images, None if bidirectional else batch.prefix_len)
        return self.decoder(features, batch, text_targets)

    def config_dict(self) -> dict[str, Any]:
        """What ``config.json`` keeps: encoder and decoder."""
        return {"encoder": self.encoder.config_dict(), "decoder": asdict(self.decoder.config)}
