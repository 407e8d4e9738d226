"""The AIMV2 objective: next patch and next token (AIMV2, Figure 1).

Legend: B pairs, I patches, S scored patches, R caption rows, P = p * p * 3 values a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.decoder import IGNORED, Prediction
from aimv2.models.encoder import VisionEncoder
from aimv2.models.positions import pixel_patches
from aimv2.objectives import Terms

TARGET_EPS = 1e-6


def normalized_patches(images: Tensor, patch: int) -> Tensor:
    """Pixel targets: patches with mean 0 and variance 1 each, ``(x - mean) / sqrt(var + 1e-6)``, unbiased variance.

    Args:
        images: float [B, 3, H, W], normalised by mean and std.
        patch: p.

    Returns:
        fp32 [B, I, P].

    Raises:
        ValueError: integers, which are not normalised yet, or another shape.
    """
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"float images [B, 3, H, W], normalised by mean and std (encoder.normalize), expected, got {images.dtype} "
            f"{list(images.shape)}"
        )
    x = pixel_patches(images.float(), patch)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + TARGET_EPS).sqrt()


def pixel_targets(encoder: VisionEncoder, batch: Batch) -> Tensor:
    """The patch after each scored position: fp32 [S, P]."""
    rows = batch.patch_rows + 1 if batch.target_rows is None else batch.target_rows
    targets = normalized_patches(encoder.normalize(batch.images), encoder.config.patch_size)
    return targets.flatten(0, 1).index_select(0, rows)


def text_targets(batch: Batch) -> Tensor:
    """The token of each caption row, -100 for padding rows: int64 [R]."""
    padded = torch.cat([batch.text.flatten(), batch.text.new_full((1,), IGNORED)])
    return padded.index_select(0, batch.token_rows)


class PretrainObjective:
    """``L_text + alpha * L_img``; each term is a sum and a count, divided once by whoever holds all the counts."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.bidirectional = config.attention == "bidirectional"
        self.weights = {
            "text": 1.0 if config.targets != "image" else 0.0,
            "pixel": {"both": config.alpha, "image": 1.0, "text": 0.0}[config.targets],
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens and patches of a batch, known before any forward pass: int64 [] each."""
        known = {"text": batch.token_count, "pixel": batch.patch_count}
        return {term: known[term] for term, weight in self.weights.items() if weight}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Sums and counts of a batch.

        Args:
            model: an AIMv2 with the heads that the targets need.
            batch: on the model's device.

        Returns:
            ``text``: (summed cross-entropy of R' tokens in nats, R'); ``pixel``: (summed squared error, each patch's
            a mean over its P values, S'). fp32 [] and int64 []. A term that is not trained is left out.
        """
        return self.terms(model(batch, self.targets(batch), self.bidirectional), model, batch)

    def targets(self, batch: Batch) -> Tensor | None:
        """What the model needs to sum the text loss; None without one."""
        return text_targets(batch) if self.weights["text"] else None

    def terms(self, prediction: Prediction, model: nn.Module, batch: Batch) -> Terms:
        """The sums and counts of a prediction of the model's; see :meth:`__call__`."""
        terms: Terms = {}
        if self.weights["text"]:
            assert prediction.text is not None
            terms["text"] = (prediction.text, batch.token_count)
        if self.weights["pixel"]:
            assert prediction.pixels is not None
            with torch.autocast(batch.images.device.type, enabled=False):
                wanted = pixel_targets(model.encoder, batch)  # type: ignore[arg-type]
                error = (prediction.pixels.float() - wanted).square().mean(-1)  # [S]
                real = torch.arange(len(error), device=error.device) < batch.patch_count
                terms["pixel"] = ((error * real).sum(), batch.patch_count)
        return terms
