"""Probe heads on a frozen encoder: attentive (AIMV1, attentive probe; AIMV2, Table A2), efficient, and sweeps of either.

Legend: B images, N tokens, D width, H heads or queries, d = D / H, C classes, G probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch

NORM_EPS = 1e-6


class AttentiveProbe(nn.Module):
    """Batch norm without affine, one learned query over keys and values without bias, then a linear classifier."""

    def __init__(self, width: int, classes: int, heads: int | None = None, norm: bool = True) -> None:
        """``heads`` None: width / 64, at least 1 (released v1 models: width / 128). ``norm`` False: the caller applies it."""
        super().__init__()
        self.heads = heads or max(1, width // 64)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS) if norm else None
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] frozen features -> logits [B, C]."""
        batch, length, width = features.shape
        x = features if self.norm is None else self.norm(features.transpose(1, 2)).transpose(1, 2)
        k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.key, self.value)
        )  # [B, H, N, d]
        q = self.query.expand(batch, -1, -1).view(batch, 1, self.heads, -1).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, width)
        return self.linear(pooled)

    def scorers(self) -> Tensor:
        """Score vectors [H, D]: the key projection folded into each head's query, ``K^T q / sqrt(d)``."""
        key = self.key.weight.unflatten(0, (self.heads, -1))  # [H, d, D]
        query = self.query.view(self.heads, -1)  # [H, d]
        return torch.einsum("hd,hdw->hw", query, key) / math.sqrt(query.shape[1])


class EfficientProbe(nn.Module):
    """Several learned queries on the tokens themselves (no key projection), each pooling its own slice of the values;
    then batch norm without affine and a linear classifier (efficient probing, arXiv 2506.10178, and its code)."""

    def __init__(self, width: int, classes: int, heads: int | None = None, norm: bool = True) -> None:
        """``heads``: number of queries; None: 32, or as many as divide the width. ``norm`` False: the caller applies it."""
        super().__init__()
        self.heads = heads or math.gcd(32, width)
        self.query = nn.Parameter(torch.empty(1, self.heads, width))
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS) if norm else None
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] frozen features -> logits [B, C]."""
        batch, length, width = features.shape
        attention = (features @ self.scorers().t()).softmax(1)  # [B, N, H]
        v = self.value(features).view(batch, length, self.heads, -1)
        pooled = torch.einsum("bnh,bnhd->bhd", attention, v).reshape(batch, width)
        return self.linear(pooled if self.norm is None else self.norm(pooled))

    def scorers(self) -> Tensor:
        """Score vectors [H, D]: the queries, divided by sqrt(D)."""
        return self.query[0] / math.sqrt(self.query.shape[-1])


@dataclass(frozen=True)
class Trial:
    """One head of a sweep: its features, peak learning rate and weight decay."""

    layer: str
    lr: float
    weight_decay: float


class ProbeSweep(nn.Module):
    """G probes trained at once on the same frozen features, each with its own learning rate and weight decay.

    Queries are learned constants and no projection has a bias, so the key matrix is folded into the query and the value matrix
    is applied after averaging. A probe then costs 4 N D H multiply-adds per image instead of 4 N D D, with the same result and
    gradients; all probes of a layer are two batched matmuls over its tokens. The probes only hold the weights: it is this
    module's forward that runs, not theirs.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        trials: Sequence[Trial],
        protocol: str = "attentive",
        heads: int | None = None,
        trunk: Any = None,
    ) -> None:
        """
        Args:
            width: D.
            classes: C.
            trials: G of them, the same number for every layer.
            protocol: attentive or efficient.
            heads: attention heads, or queries; None: the default of the probe.
            trunk: :class:`aimv2.features.frozen.Frozen` that turns a batch's images into features; None: they are features.
        """
        super().__init__()
        self.trials, self.protocol, self.classes, self.width = list(trials), protocol, classes, width
        self.layers = list(dict.fromkeys(trial.layer for trial in trials))
        kind = AttentiveProbe if protocol == "attentive" else EfficientProbe
        self.heads = nn.ModuleList(kind(width, classes, heads, norm=False) for _ in trials)
        # the attentive probe's norm comes first and has no weights: one serves all probes of a layer
        norms = len(self.layers) if protocol == "attentive" else len(self.trials)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, affine=False, eps=NORM_EPS) for _ in range(norms))
        self.trunk = [trunk]  # in a list, so that the frozen weights are not registered in this module

    def forward(self, batch: Batch) -> Tensor:
        """Logits of every probe: [G, B, C]. Without a trunk ``batch.features`` are [B, layers, N, D], or [layers, R, D] of
        images with ``batch.image_len`` tokens each."""
        if batch.features is None:
            found = self.trunk[0](batch.images, self.layers)
            return self.logits([x.clone() for x in found])  # inference tensors can't enter autograd
        if batch.image_len is None:
            return self.logits(list(batch.features.unbind(1)))
        lengths = batch.image_len.tolist()
        return self.logits([layer.split(lengths) for layer in batch.features])

    def logits(self, features: Sequence[Tensor | Sequence[Tensor]]) -> Tensor:
        """[B, N, D] of each layer, or B tensors [N, D] of different lengths -> [G, B, C], in fp32."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            found: list[Tensor] = [torch.empty(0)] * len(self.trials)
            for at, layer in enumerate(self.layers):
                mine = [g for g, trial in enumerate(self.trials) if trial.layer == layer]
                for g, logits in zip(mine, self._of_layer(features[at], at, mine)):
                    found[g] = logits
            return torch.stack(found)

    def _of_layer(self, features: Tensor | Sequence[Tensor], at: int, mine: Sequence[int]) -> Tensor:
        """Logits [g, B, C] of the probes ``mine`` on the tokens [B, N, D] of layer number ``at``, or on B times [N, D]."""
        one_length = isinstance(features, Tensor)
        x = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
        x = x.float()  # [all tokens, D]
        if self.protocol == "attentive":
            x = self.norms[at](x)
        probes: list[Any] = [self.heads[g] for g in mine]
        count = probes[0].heads
        scorers = torch.cat([probe.scorers() for probe in probes])  # [gH, D]
        scores = x @ scorers.t()
        if one_length:
            x, scores = (part.unflatten(0, features.shape[:2]) for part in (x, scores))  # type: ignore[union-attr]
            means = scores.softmax(1).transpose(1, 2) @ x  # [B, gH, D]
        else:  # image by image, without padding
            lengths = [len(tokens) for tokens in features]
            pairs = zip(scores.split(lengths), x.split(lengths))
            means = torch.stack([of_one.softmax(0).t() @ tokens for of_one, tokens in pairs])
        means = means.unflatten(1, (len(mine), count)).permute(1, 2, 0, 3)  # [g, H, B, D]
        value = torch.stack([probe.value.weight.unflatten(0, (count, -1)) for probe in probes])  # [g, H, d, D]
        pooled = (means @ value.transpose(2, 3)).permute(0, 2, 1, 3).flatten(2)  # [g, B, D]
        if self.protocol == "efficient":
            pooled = torch.stack([self.norms[g](part) for g, part in zip(mine, pooled)])
        weight = torch.stack([probe.linear.weight for probe in probes])  # [g, C, D]
        bias = torch.stack([probe.linear.bias for probe in probes])  # [g, C]
        return torch.baddbmm(bias[:, None], pooled, weight.transpose(1, 2))

    def config_dict(self) -> dict[str, Any]:
        """Contents of ``config.json``: everything needed to rebuild the heads."""
        return {
            "sweep": {
                "width": self.width,
                "classes": self.classes,
                "protocol": self.protocol,
                "heads": getattr(self.heads[0], "heads"),  # noqa: B009  to mypy it is a plain Module
                "trials": [asdict(trial) for trial in self.trials],
            }
        }
