"""The attentive probe on a frozen encoder (AIMV1, attentive probe), in its smallest form: one head on cached features.

Legend: N images, I patches, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.models.encoder import VisionEncoder
from aimv2.models.probe_head import AttentiveProbe


@torch.no_grad()
def features(encoder: Any, images: Tensor, size: int = 256, flip: bool = False) -> Tensor:
    """Frozen post-norm features, bidirectional: uint8 [N, 3, H, W] -> bf16 [N, I, D] on the CPU."""
    device = encoder.mean.device
    parts = []
    with torch.compiler.set_stance("force_eager"):
        for part in images.split(size):
            seen = part.to(device)
            parts.append(encoder(seen.flip(-1) if flip else seen).to(torch.bfloat16).cpu())
    return torch.cat(parts)


def attentive_probe(
    encoder: VisionEncoder,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int = 10,
    lr: float = 1e-3,
    heads: int | None = None,
    flip: bool = False,
    seed: int = 0,
) -> float:
    """Trains the probe on frozen features and tests it; ``flip``: on the mirrored images too.

    Args:
        encoder: stays as it is.
        train, test: (uint8 [N, 3, H, W], int64 labels [N]).
        epochs, lr, heads, seed: see :func:`train_probe`.

    Returns:
        top-1 accuracy on ``test``, 0..1.
    """
    encoder.eval()
    views = [features(encoder, train[0])] + ([features(encoder, train[0], flip=True)] if flip else [])
    return train_probe(views, train[1], features(encoder, test[0]), test[1], epochs, lr, heads, seed=seed)


def train_probe(
    views: Sequence[Tensor],
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    epochs: int = 10,
    lr: float = 1e-3,
    heads: int | None = None,
    weight_decay: float = 0.05,
    size: int = 256,
    seed: int = 0,
) -> float:
    """One head on features that were computed before.

    Args:
        views: of the training images, [N, I, D] each; one of them is drawn for each batch.
        labels: int64 [N].
        test, test_labels: [M, I, D], int64 [M].
        epochs: over the training images.
        lr: peak of a cosine with half an epoch of warm-up; AdamW, betas 0.9 and 0.999, clip 3.0.
        heads: of the probe's attention; None: width / 64.
        weight_decay: of AdamW.
        size: batch.
        seed: of the head and the order.

    Returns:
        top-1 accuracy on the test features, 0..1.
    """
    classes = int(max(labels.max(), test_labels.max())) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AttentiveProbe(views[0].shape[-1], classes, heads)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    order = torch.Generator().manual_seed(seed)
    batches = -(-len(labels) // size)
    total, warmup, step = epochs * batches, max(1, batches // 2), 0
    head.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(size):
            view = views[int(torch.randint(len(views), (1,), generator=order))]
            rate = min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            loss = F.cross_entropy(head(view[rows].float()), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 3.0)
            optimizer.step()
            step += 1
    return top1(head, test, test_labels)


@torch.no_grad()
def top1(head: AttentiveProbe, seen: Tensor, labels: Tensor, size: int = 512) -> float:
    """Share of images whose likeliest class is right."""
    head.eval()
    device = head.query.device
    right = sum(
        int((head(part.to(device).float()).argmax(-1).cpu() == wanted).sum())
        for part, wanted in zip(seen.split(size), labels.split(size))
    )
    return right / max(len(labels), 1)
