"""Classification on top of the encoder: the attentive probe, or with it the whole encoder.

Legend: B images, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.objectives import Terms

UNLABELLED = -1


class ProbeObjective:
    """Cross-entropy of the labelled images, in fp32."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.smoothing, self.classes = config.smoothing, config.classes
        self.weights = {"class": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Labelled images of a batch: int64 []."""
        return {"class": (self.labels(batch) != UNLABELLED).sum()}

    def labels(self, batch: Batch) -> Tensor:
        """int64 [B]; a label beyond the classes is none."""
        labels = batch.labels
        return labels if self.classes is None else labels.masked_fill(labels >= self.classes, UNLABELLED)

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """``class``: (summed cross-entropy in nats, labelled images); fp32 [] and int64 []."""
        logits = model(batch)
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.cross_entropy(
                logits.float(),
                self.labels(batch),
                ignore_index=UNLABELLED,
                reduction="sum",
                label_smoothing=self.smoothing,
            )
        return {"class": (loss, self.counts(batch)["class"])}


class SweepObjective:
    """Cross-entropy of many probes at once; the sum over them, since each gets only the gradient of its own part."""

    weights: ClassVar[dict[str, float]] = {"sweep": 1.0}

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # of each call, on the device: mean cross-entropy of each probe, fp32 [G]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Labelled images of a batch: int64 []."""
        return {"sweep": (batch.labels != UNLABELLED).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """``sweep``: (cross-entropy in nats summed over images and probes, labelled images); fp32 [] and int64 []."""
        logits = model(batch).float()  # [G, B, C]
        labels = batch.labels.expand(len(logits), -1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED, reduction="none")
        count = self.counts(batch)["sweep"]
        by_probe = losses.view_as(labels).sum(1)
        self.losses.append(by_probe.detach() / count)
        return {"sweep": (by_probe.sum(), count)}
