"""Locked-image tuning: an image and its caption are nearer to each other than to any other of the global batch.

Legend: B pairs of this rank, G pairs of all ranks, P width of the shared space.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.lit import PairFeatures
from aimv2.objectives import Terms


class _Gather(torch.autograd.Function):
    """The rows of every rank, rank by rank; backwards each rank gets the sum of all ranks' gradients of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """[B, P] of each rank -> [G, P] on every rank, equally many of each, with gradients to all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


def first_row() -> int:
    """How many ranks stand before this one."""
    return dist.get_rank() if dist.is_initialized() else 0


def softmax_loss(image: Tensor, text: Tensor, images: Tensor, texts: Tensor, scale: Tensor, first: int) -> Tensor:
    """CLIP's symmetric cross-entropy, summed over own pairs, nats: the mean of image to text and text to image.

    Args:
        image, text: fp32 [B, P], of unit length, the pairs that are summed.
        images, texts: fp32 [G, P], what each of them chooses from.
        scale: fp32 [1].
        first: row of the own pairs in the global batch.
    """
    own = first + torch.arange(len(image), device=image.device)
    to_text = F.cross_entropy(scale * image @ texts.T, own, reduction="sum")
    to_image = F.cross_entropy(scale * text @ images.T, own, reduction="sum")
    return (to_text + to_image) / 2


def sigmoid_loss(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    """``-sum log sigmoid(z * (scale * cosine + bias))`` of own images with all texts, z = 1 for a pair, else -1 (SigLIP).

    Args: see :func:`softmax_loss`; ``bias`` fp32 [1].
    """
    own = first + torch.arange(len(image), device=image.device)
    pair = own[:, None] == torch.arange(len(texts), device=image.device)  # [B, G]
    logits = scale * image @ texts.T + bias
    return -F.logsigmoid(torch.where(pair, logits, -logits)).sum()


def summed_loss(own: PairFeatures, images: Tensor, texts: Tensor, first: int) -> Tensor:
    """The loss of own pairs among all, summed: sigmoid where there is a bias, else softmax; fp32 []."""
    if own.bias is not None:
        return sigmoid_loss(own.image, texts, own.scale, own.bias, first)
    return softmax_loss(own.image, own.text, images, texts, own.scale, first)


class ContrastiveObjective:
    """Every pair of the global batch against every other: softmax (CLIP) or sigmoid (SigLIP), in fp32.

    Each rank sums over its own pairs and sees the features of all; with gradients through both sides, the sum over ranks
    has the gradient of one process with the whole batch.
    """

    weights: ClassVar[dict[str, float]] = {"contrastive": 1.0}

    def __init__(self, config: ObjectiveConfig) -> None:
        self.contrast = config.contrast

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Pairs of a batch: int64 []."""
        return {"contrastive": batch.text_len.new_full((), len(batch))}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """``contrastive``: (loss in nats summed over this rank's pairs, their number); fp32 [] and int64 [].

        Args:
            model: a TunedLiT, with a bias for sigmoid.
            batch: on the model's device, equally many pairs on every rank.
        """
        own: PairFeatures = model(batch)
        assert (own.bias is not None) == (self.contrast == "sigmoid")
        with torch.autocast(own.image.device.type, enabled=False):
            texts = gather(own.text)
            images = gather(own.image) if own.bias is None else own.image
            loss = summed_loss(own, images, texts, first_row() * len(own.image))
        return {"contrastive": (loss, self.counts(batch)["contrastive"])}
