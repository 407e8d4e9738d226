"""The attentive probe on a frozen encoder (AIMV1, attentive probe), in its smallest form: one head on cached features.

Legend: N images, I patches, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.models.encoder import VisionEncoder
from aimv2.models.probe_head import AttentiveProbe


@torch.no_grad()
def features(encoder: VisionEncoder, images: Tensor, size: int = 256, flip: bool = False) -> Tensor:
    """Frozen post-norm features, bidirectional: uint8 [N, 3, H, W] -> bf16 [N, I, D] on the CPU."""
    device = next(encoder.parameters()).device
    encoder.eval()
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
    weight_decay: float = 0.05,
    size: int = 256,
    flip: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> float:
    """Trains the probe on frozen features and tests it.

    Args:
        encoder: stays as it is.
        train, test: (uint8 [N, 3, H, W], int64 labels [N]).
        epochs: over the training images.
        lr: peak of a cosine with half an epoch of warm-up; AdamW, betas 0.9 and 0.999, clip 3.0.
        heads: of the probe's attention; None: width / 64.
        weight_decay: of AdamW.
        size: batch.
        flip: train on the mirrored images too (features cached for both).
        seed: of the head and the order.
        progress: gets a line an epoch.

    Returns:
        top-1 accuracy on ``test``, 0..1.
    """
    views = [features(encoder, train[0])] + ([features(encoder, train[0], flip=True)] if flip else [])
    labels = train[1]
    device = next(encoder.parameters()).device
    classes = int(max(labels.max(), test[1].max())) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AttentiveProbe(views[0].shape[-1], classes, heads).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    order = torch.Generator().manual_seed(seed)
    batches = -(-len(labels) // size)
    total, warmup, step = epochs * batches, max(1, batches // 2), 0
    head.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(size):
            view = views[int(torch.randint(len(views), (1,), generator=order))]
            rate = min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            loss = F.cross_entropy(head(view[rows].to(device).float()), labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 3.0)
            optimizer.step()
            step += 1
        if progress is not None:
            progress(f"probe epoch {epoch + 1}/{epochs} loss {loss.item():.3f}")
    return top1(head, features(encoder, test[0]), test[1])


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
