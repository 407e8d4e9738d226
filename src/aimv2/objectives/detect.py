"""Detection: predictions are matched to the boxes of their picture one to one, then classes, boxes and masks are learned.

Sums over the boxes of all pictures, divided by whoever holds all counts: transformers' own losses divide by the boxes of a batch, and
where the pictures of a batch have different texts they look labels up in the wrong one.

Legend: B pictures, Q queries, N boxes of a batch, n of a picture, C classes or tokens, P cells of a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.data.text.phrases import phrase_numbers
from aimv2.detect.model import Predictions, corners
from aimv2.objectives import Terms

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
BOXES = {"class": 2.0, "box": 5.0, "giou": 2.0}  # weights in the loss and in matching (DINO)
MASKS = {"class": 2.0, "mask": 5.0, "dice": 5.0}  # Mask2Former
NOTHING = 0.1  # weight of a query that finds nothing (Mask2Former)


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (arXiv 1902.09630) of boxes [..., 4] as corners."""

    def area(left_top: Tensor, right_bottom: Tensor) -> Tensor:
        return (right_bottom - left_top).clamp(min=0).prod(-1)

    inside = area(torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:]))
    around = area(torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:]))
    union = area(one[..., :2], one[..., 2:]) + area(other[..., :2], other[..., 2:]) - inside
    iou = inside / union.clamp(min=1e-9)
    return iou, iou - (around - union) / around.clamp(min=1e-9)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of each logit (arXiv 1708.02002); ``target`` 0 or 1."""
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = p * (1 - target) + (1 - p) * target
    return (ALPHA * target + (1 - ALPHA) * (1 - target)) * wrong**GAMMA * loss


def varifocal(logits: Tensor, target: Tensor) -> Tensor:
    """Varifocal loss of each logit (arXiv 2008.13367); ``target``: IoU of what is matched, else 0."""
    weight = torch.where(target > 0, target, (1 - ALPHA) * logits.detach().sigmoid() ** GAMMA)
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class MatchTargets(NamedTuple):
    """What the pictures of a batch should give.

    Attributes:
        boxes: [N, 4].
        owner: int64 [N], picture of each box.
        classes: [N, C], 1 for the class, or for the tokens of the phrase.
        real: bool [B, 1, C], classes or tokens that count.
        masks: [N, P], 0 or 1; None without.
        counts: boxes of each picture.
    """

    boxes: Tensor
    owner: Tensor
    classes: Tensor
    real: Tensor
    masks: Tensor | None
    counts: list[int]


class DetectObjective:
    """Losses of a head, summed over its layers.

    Attributes:
        head: grounding, closed or masks.
        weights: of the terms.
    """

    def __init__(self, head: str, classes: int) -> None:
        """``classes``: of a head with a fixed list."""
        self.head, self.classes = head, classes
        self.weights: dict[str, float] = dict(MASKS if head == "masks" else BOXES)
        if head == "closed":
            self.weights["class"] = 1.0  # RT-DETR

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Boxes of the batch, for every term."""
        number = batch.targets.counts.sum()
        return dict.fromkeys(self.weights, number)

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """``{term: (sum, boxes)}``; fp32 [] and int64 [].

        Args:
            model: a Detector, in training mode.
            batch: pictures with ``targets``, on the model's device.
        """
        return self.terms(model(batch), batch)

    def terms(self, layers: list[Predictions], batch: Batch) -> Terms:
        """The losses of predictions that there are."""
        number, wanted = batch.targets.counts.sum(), self.wanted(batch, layers[-1])
        sums: dict[str, Tensor] = {}
        for layer in layers:
            for name, value in self.layer(layer, wanted).items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: (sums[name], number) for name in self.weights}

    def wanted(self, batch: Batch, layer: Predictions) -> MatchTargets:
        targets, device = batch.targets, layer.logits.device
        counts = targets.counts.tolist()
        owner = torch.repeat_interleave(torch.arange(len(counts), device=device), targets.counts)
        if self.head == "grounding":
            numbers = phrase_numbers(batch.text)
            classes = (numbers[owner] == targets.labels[:, None]).float()
            real = (numbers >= 0)[:, None]
        else:
            classes = F.one_hot(targets.labels, layer.logits.shape[-1]).float()
            real = torch.ones(1, 1, classes.shape[-1], dtype=torch.bool, device=device)
        masks = None
        if targets.masks is not None and layer.masks is not None:
            masks = F.interpolate(targets.masks[:, None].float(), layer.masks.shape[-2:], mode="area")[:, 0]
            masks = (masks >= 0.5).float().flatten(1)
        return MatchTargets(targets.boxes, owner, classes, real, masks, counts)

    @torch.no_grad()
    def match(self, layer: Predictions, wanted: MatchTargets) -> tuple[Tensor, Tensor]:
        """The query of each box and the box: int64 [N'] and [N'], at most Q of a picture, by the least sum of costs."""
        from scipy.optimize import linear_sum_assignment

        costs = []
        for picture, own in enumerate(wanted.boxes.split(wanted.counts)):
            rows = slice(sum(wanted.counts[:picture]), sum(wanted.counts[: picture + 1]))
            classes, logits = wanted.classes[rows], layer.logits[picture].float()
            if layer.masks is not None:
                assert wanted.masks is not None
                masks, given = layer.masks[picture].float().flatten(1), wanted.masks[rows]
                unlike = (F.softplus(masks).sum(-1, keepdim=True) - masks @ given.T) / masks.shape[1]
                p = masks.sigmoid()
                dice = 1 - (2 * p @ given.T + 1) / (p.sum(-1, keepdim=True) + given.sum(-1) + 1)
                cost = -MASKS["class"] * logits.softmax(-1) @ classes.T + MASKS["mask"] * unlike + MASKS["dice"] * dice
            else:
                assert layer.boxes is not None
                boxes = layer.boxes[picture].float()
                shown = logits.masked_fill(~wanted.real[picture % len(wanted.real)], -30)
                gain = focal(shown, torch.ones_like(shown)) - focal(shown, torch.zeros_like(shown))
                each = gain @ (classes / classes.sum(-1, keepdim=True).clamp(min=1)).T
                _, giou = overlap(corners(boxes)[:, None], corners(own)[None])
                cost = BOXES["class"] * each + BOXES["box"] * torch.cdist(boxes, own, p=1) - BOXES["giou"] * giou
            costs.append(torch.nan_to_num(cost, 1e6, 1e6, -1e6).flatten())
        flat = torch.cat(costs).cpu()  # one wait for the device
        queries, chosen, first, at = [], [], 0, 0
        for count in wanted.counts:
            size = count * layer.logits.shape[1]
            query, box = linear_sum_assignment(flat[at : at + size].view(layer.logits.shape[1], count).numpy())
            queries.append(torch.from_numpy(query))
            chosen.append(torch.from_numpy(box) + first)
            first, at = first + count, at + size
        return torch.cat(queries).to(layer.logits.device), torch.cat(chosen).to(layer.logits.device)

    def layer(self, layer: Predictions, wanted: MatchTargets) -> dict[str, Tensor]:
        """Summed losses of one layer's predictions."""
        queries, chosen = self.match(layer, wanted)
        owner, logits = wanted.owner[chosen], layer.logits.float()
        if layer.masks is not None:
            assert wanted.masks is not None
            masks, given = layer.masks.float()[owner, queries].flatten(1), wanted.masks[chosen]
            unlike = F.binary_cross_entropy_with_logits(masks, given, reduction="none").mean(1).sum()
            p = masks.sigmoid()
            dice = (1 - (2 * (p * given).sum(1) + 1) / (p.sum(1) + given.sum(1) + 1)).sum()
            labels = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
            labels[owner, queries] = wanted.classes[chosen].argmax(-1)
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            weight = torch.full_like(each, NOTHING)
            weight[owner, queries] = 1.0
            return {"class": (weight * each).sum(), "mask": unlike, "dice": dice}
        assert layer.boxes is not None
        boxes, given = layer.boxes.float()[owner, queries], wanted.boxes[chosen]
        iou, giou = overlap(corners(boxes), corners(given))
        target = torch.zeros_like(logits)
        found = wanted.classes[chosen]
        target[owner, queries] = found * iou.detach()[:, None] if self.head == "closed" else found
        logits = logits.masked_fill(~wanted.real, 0.0)
        loss = varifocal(logits, target) if self.head == "closed" else focal(logits, target)
        return {
            "class": loss.masked_fill(~wanted.real, 0.0).sum(),
            "box": (boxes - given).abs().sum(),
            "giou": (1 - giou).sum(),
        }
