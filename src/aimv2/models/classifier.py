"""An encoder with an attentive probe on top: frozen (probing) or trained end to end (fine-tuning; AIMV2, Table A2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.models.encoder import VisionEncoder
from aimv2.models.probe_head import AttentiveProbe
from aimv2.models.sizes import EncoderConfig


class Classifier(nn.Module):
    """Image classifier: ``.encoder`` (bidirectional attention) and ``.probe``."""

    def __init__(self, encoder: EncoderConfig, classes: int, heads: int | None = None) -> None:
        super().__init__()
        self.classes, self.heads = classes, heads
        self.encoder = VisionEncoder(encoder)
        self.probe = AttentiveProbe(encoder.width, classes, heads)

    def block_lists(self) -> list[nn.ModuleList]:
        """Transformer blocks of the encoder."""
        return [self.encoder.blocks]

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the batch's images: [B, classes]."""
        return self.probe(self.encoder(batch.images))

    def config_dict(self) -> dict[str, Any]:
        """Contents of ``config.json``."""
        return {"encoder": self.encoder.config_dict(), "probe": {"classes": self.classes, "heads": self.heads}}
