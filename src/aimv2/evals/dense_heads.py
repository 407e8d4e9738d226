"""Heads on the patch map of a frozen encoder, for segmentation and depth: many at once, and what they score.

The linear head is batch norm without affine and a 1x1 linear layer, upsampled bilinearly: DINOv2's linear heads (their batch norm
has an affine part, which the linear layer after it makes superfluous). Depth is a plain linear regression in metres by
least squares, where DINOv2 classifies into 256 bins of depth. The other head is DPT's (:mod:`aimv2.models.dpt_head`).

Legend: B images, I = h * w patches, D width (all layers together), G heads of a sweep, C outputs (classes, or 1),
S side of what the encoder sees, H x W size of a map, N images of a split, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.data.prefetch import prefetch_map
from aimv2.features.frozen import LAST
from aimv2.models.dpt_head import seeded_heads
from aimv2.models.probe_head import NORM_EPS
from aimv2.progress import tracked

BUDGET = 2**22  # values of upsampled outputs that are in memory at once
NOTHING = -1  # ignored, in a mask


@dataclass(frozen=True)
class DenseSettings:
    """Everything that decides a dense probe besides encoder and data.

    Attributes:
        layers: names of layers, whose features are concatenated.
        rates: peak learning rates, up to 1; all heads are trained at once.
        weight_decay: of AdamW (``lr * decay``), 0..1; biases are not decayed.
        epochs: over the training images, on a cosine down to 0.
        batch_size: images a step.
        seeds: of weights and order.
        head: linear or dpt.
    """

    layers: tuple[str, ...] = (LAST,)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    weight_decay: float = 1e-4
    epochs: int = 20
    batch_size: int = 16
    seeds: tuple[int, ...] = (0,)
    head: str = "linear"


class DenseTask(Protocol):
    """What a head predicts, its loss and its metric."""

    @property
    def outputs(self) -> int:
        """C."""

    @property
    def headline(self) -> str:
        """The figure that chooses among heads."""

    @property
    def sign(self) -> int:
        """1 where a larger headline is better, else -1."""

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """Sum over the pixels that count of [B, C, H, W] against [B, H, W]."""

    def counts(self, target: Tensor) -> Tensor:
        """How many pixels count."""

    def tally(self, low: Tensor, target: Tensor) -> np.ndarray:
        """What one image, low-resolution outputs [C, h, w] against [H, W], adds to the sums of a split."""

    def figures(self, sums: np.ndarray) -> dict[str, Any]:
        """From sums to figures."""


class Segmentation:
    """Class ids, -1 ignored; cross-entropy; the confusion is what is summed."""

    headline, sign = "miou", 1

    def __init__(self, classes: int) -> None:
        self.outputs = classes

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(maps, target.long(), ignore_index=NOTHING, reduction="sum")

    def counts(self, target: Tensor) -> Tensor:
        return (target != NOTHING).sum()

    def tally(self, low: Tensor, target: Tensor) -> np.ndarray:
        """int64 [C, C]: row the true class, column the predicted one."""
        predicted = likeliest(low, (target.shape[0], target.shape[1]))
        known = target != NOTHING
        cells = target[known].long() * self.outputs + predicted[known]
        return torch.bincount(cells, minlength=self.outputs**2).view(self.outputs, -1).cpu().numpy()

    def figures(self, sums: np.ndarray) -> dict[str, Any]:
        return scores_of_confusion(sums)


@dataclass(frozen=True)
class Depth:
    """Metres, 0 nothing; least squares on ``(metres - mean) / std``; predictions are kept within the training depths.

    Attributes:
        mean, std, low, high: of the training depths, in metres.
    """

    mean: float
    std: float
    low: float
    high: float
    outputs: int = 1
    headline: str = "rmse"
    sign: int = -1

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        error = maps[:, 0] - (target - self.mean) / self.std
        return (error.square() * (target > 0)).sum()

    def counts(self, target: Tensor) -> Tensor:
        return (target > 0).sum()

    def tally(self, low: Tensor, target: Tensor) -> np.ndarray:
        """float64 [4]: pixels, and over them the sums of squared errors, relative errors, and ratios below 1.25."""
        metres = upsample(low[None], (target.shape[0], target.shape[1]))[0, 0] * self.std + self.mean
        known = target > 0
        return depth_sums(metres.clamp(self.low, self.high)[known], target[known])

    def figures(self, sums: np.ndarray) -> dict[str, Any]:
        pixels = sums[0]
        return {
            "rmse": math.sqrt(sums[1] / pixels),
            "abs_rel": float(sums[2] / pixels),
            "delta1": float(sums[3] / pixels),
        }


def scores_of_confusion(confusion: np.ndarray) -> dict[str, Any]:
    """``miou``, ``pixel_accuracy`` (0..1) and ``per_class_iou`` of counts [C, C], rows true, columns predicted.

    A class that is neither there nor predicted has no IoU (None) and is left out of the mean.
    """
    right = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    ious = [float(r / u) if u else None for r, u in zip(right, union)]
    known = [iou for iou in ious if iou is not None]
    return {
        "miou": float(np.mean(known)),
        "pixel_accuracy": float(right.sum() / confusion.sum()),
        "per_class_iou": ious,
    }


def depth_sums(metres: Tensor, true: Tensor) -> np.ndarray:
    """float64 [4] of depths above 0, predicted and true [P]: P, squared errors, relative errors, ratios below 1.25."""
    metres, true = metres.double(), true.double()
    ratio = torch.maximum(metres / true, true / metres)
    parts = ((metres - true).square(), (metres - true).abs() / true, (ratio < 1.25).double())
    return np.array([true.numel(), *(float(part.sum()) for part in parts)])


def upsample(low: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear."""
    return F.interpolate(low, size=size, mode="bilinear", align_corners=False)


def likeliest(low: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of every pixel: [C, h, w] -> int64 [H, W]; some classes at a time where the map is large."""
    step = max(1, BUDGET // (size[0] * size[1]))
    best: Tensor | None = None
    found = torch.zeros(size, dtype=torch.int64, device=low.device)
    for at in range(0, len(low), step):
        value, index = upsample(low[None, at : at + step], size)[0].max(0)
        better = value > best if best is not None else torch.ones_like(value, dtype=torch.bool)
        found = torch.where(better, index + at, found)
        best = torch.where(better, value, best) if best is not None else value
    return found


class DenseHeads(nn.Module):
    """G linear heads on one map after one batch norm (it has no weights, so all heads share it).

    ``forward``: features [B, I, D], layers side by side -> [G, B, C, h, w].
    """

    def __init__(self, width: int, outputs: int, count: int, seed: int) -> None:
        """All heads start from the same weights (normal, std 0.01), so that their rates are what differs."""
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS, momentum=None)  # plain mean over all steps
        first = torch.empty(outputs, width).normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.ParameterList(nn.Parameter(first.clone()) for _ in range(count))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(outputs)) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        """[B, I, D] -> [G, B, C, h, w], one product for all heads."""
        batch, patches, width = features.shape
        side = math.isqrt(patches)
        x = self.norm(features.reshape(-1, width))
        maps = F.linear(x, torch.cat(list(self.weights)), torch.cat(list(self.biases)))  # [BI, GC]
        return maps.view(batch, side, side, len(self.weights), -1).permute(3, 0, 4, 1, 2)

    def decayed(self) -> list[tuple[list[nn.Parameter], list[nn.Parameter]]]:
        """Of each head the parameters that decay, and those that do not."""
        return [([weight], [bias]) for weight, bias in zip(self.weights, self.biases)]


class DptHeads(nn.Module):
    """G DPT heads after one batch norm without weights, on up to four layers; outputs are four times as fine."""

    def __init__(self, widths: Sequence[int], outputs: int, count: int, seed: int) -> None:
        """All heads start from the same weights, so that their rates are what differs."""
        super().__init__()
        self.norm = nn.BatchNorm1d(sum(widths), affine=False, eps=NORM_EPS, momentum=None)
        self.heads = seeded_heads(widths, outputs, count, seed)

    def forward(self, features: Tensor) -> Tensor:
        """[B, I, sum of D] -> [G, B, C, 4h, 4w]."""
        x = self.norm(features.flatten(0, 1)).view_as(features)
        return torch.stack([head(x) for head in self.heads])

    def decayed(self) -> list[tuple[list[nn.Parameter], list[nn.Parameter]]]:
        """Of each head the parameters that decay, and those that do not."""
        found = []
        for head in self.heads:
            parts = list(head.parameters())
            found.append(([p for p in parts if p.ndim > 1], [p for p in parts if p.ndim <= 1]))
        return found


def take(layers: Sequence[np.ndarray], rows: np.ndarray, device: torch.device) -> Tensor:
    """Cached features of some images, layers side by side: float32 [B, I, D]."""
    return torch.from_numpy(np.concatenate([layer[rows] for layer in layers], -1)).to(device).float()


def train_heads(
    task: DenseTask,
    layers: Sequence[np.ndarray],
    maps: Callable[[np.ndarray], np.ndarray],
    rows: np.ndarray,
    settings: DenseSettings,
    seed: int,
    device: torch.device,
) -> DenseHeads | DptHeads:
    """One head a rate, all in one pass over the features.

    Args:
        task: of the heads.
        layers: cached features, [N, I, D] each.
        maps: rows [B] to their maps [B, S, S].
        rows: of the images to learn from.
        settings: see there.
        seed: of weights and order.
        device: where the heads are trained.
    """
    widths, count = [layer.shape[-1] for layer in layers], len(settings.rates)
    made: DenseHeads | DptHeads = (
        DenseHeads(sum(widths), task.outputs, count, seed)
        if settings.head == "linear"
        else DptHeads(widths, task.outputs, count, seed)
    )
    heads = made.to(device).train()
    groups = [
        {"params": part, "lr": rate, "peak": rate, "weight_decay": decay}
        for parts, rate in zip(heads.decayed(), settings.rates)
        for part, decay in zip(parts, (settings.weight_decay, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups)
    size = min(settings.batch_size, len(rows))
    steps = settings.epochs * (len(rows) // size)
    order = batches(rows, size, seed)
    for step in tracked(range(steps), f"heads, seed {seed}", steps):
        picked = next(order)
        low = heads(take(layers, picked, device))
        target = torch.from_numpy(maps(picked)).to(device)
        gradient = output_gradient(task, low.detach(), target)  # finite: features are, rate and decay are at most 1
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        low.backward(gradient)
        optimizer.step()
    return heads.eval()


def batches(rows: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Without end: ``size`` of the rows, in a new order each epoch; what does not fill a batch waits for another epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows)
        for at in range(0, len(order) - size + 1, size):
            yield np.sort(order[at : at + size])


def output_gradient(task: DenseTask, low: Tensor, target: Tensor) -> Tensor:
    """Gradient of each head's own mean loss at S x S by its outputs [G, B, C, h, w]; a part at a time where they are many."""
    heads, batch, _, h, w = low.shape
    flat = low.flatten(0, 1)
    side = target.shape[-1]
    weight = 1 / task.counts(target).clamp(min=1)
    part = max(1, BUDGET // (task.outputs * side * side))
    found = []
    for at in range(0, heads * batch, part):
        piece = flat[at : at + part].requires_grad_()
        image = torch.arange(at, at + len(piece), device=low.device) % batch
        loss = task.loss(upsample(piece, (side, side)), target[image]) * weight
        found.append(torch.autograd.grad(loss, piece)[0])
    return torch.cat(found).view(heads, batch, -1, h, w)


@torch.no_grad()
def sums_of(
    task: DenseTask,
    heads: DenseHeads | DptHeads,
    which: Sequence[int],
    layers: Sequence[np.ndarray],
    map_of: Callable[[int], np.ndarray],
    rows: np.ndarray,
    device: torch.device,
    size: int = 16,
) -> list[np.ndarray]:
    """What the heads ``which`` score over ``rows``: one array of sums a head.

    ``map_of`` gives the map [H, W] of a row; outputs are upsampled to its size.
    """
    sums: list[Any] = [0] * len(which)
    targets = prefetch_map(map_of, rows.tolist())
    for at in tracked(range(0, len(rows), size), f"scoring, in batches of {size} images", -(-len(rows) // size)):
        low = heads(take(layers, rows[at : at + size], device))
        for image in range(low.shape[1]):
            target = torch.from_numpy(next(targets)).to(device)
            for place, head in enumerate(which):
                sums[place] = sums[place] + task.tally(low[head, image], target)
    return sums
