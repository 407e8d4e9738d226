"""Heads that start as a linear classifier on the averaged features, and learn from there: on a few images an attentive probe from
random weights may stay behind one (linear probing, then fine-tuning: arXiv 2202.10054).

Legend: N images, I patches, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from aimv2.data.images.labelled import hold_out
from aimv2.evals.linear import logistic, sweep_lbfgs
from aimv2.features.ragged import Ragged
from aimv2.models.probe_head import NORM_EPS, ProbeSweep

ABSENT = -10.0  # bias of a class without images, below the lowest of the others


class Averages(NamedTuple):
    """Of a layer: the mean of each image's patches, float32 [N, D]; of all ``patches`` the sum and that of squares, float64 [D]."""

    means: np.ndarray
    patches: int
    total: np.ndarray
    squares: np.ndarray


def averages(features: Any, size: int = 256) -> Averages:
    """One pass over the features of a layer, [N, I, D] or a :class:`Ragged`, ``size`` images at once."""
    width = (features.rows if isinstance(features, Ragged) else features).shape[-1]
    total, squares, patches, means = np.zeros(width), np.zeros(width), 0, []
    for at in range(0, len(features), size):
        rows = np.arange(at, min(at + size, len(features)))
        for x in [features[int(row)][None] for row in rows] if isinstance(features, Ragged) else [features[rows]]:
            x = np.asarray(x, np.float32)
            means.append(x.mean(1))
            flat = x.reshape(-1, width).astype(np.float64)
            total, squares, patches = total + flat.sum(0), squares + (flat**2).sum(0), patches + len(flat)
    return Averages(np.concatenate(means), patches, total, squares)


def together(parts: Sequence[Averages]) -> Averages:
    """Of several splits, one after another."""
    means, patches, total, squares = zip(*parts)
    return Averages(np.concatenate(means), sum(patches), np.sum(total, axis=0), np.sum(squares, axis=0))


def strength_of(x: np.ndarray, labels: np.ndarray, select: tuple[np.ndarray, np.ndarray] | None, layer: str) -> float:
    """C of the linear classifier, as ``aimv2 linear`` chooses it.

    Args:
        x, labels: averaged features [N, D] and classes int64 [N] of the training images, in the order of the data set.
        select: the same of a validation split; None: a fifth of the training images is held out.
        layer: its name, for the progress line.
    """
    train = x, labels
    if select is None:
        kept, held = hold_out(labels, 0)
        train, select = (x[kept], labels[kept]), (x[held], labels[held])
    if not len(select[1]) or len(np.unique(train[1])) < 2:
        return 1.0
    rows, chosen = sweep_lbfgs(train, select, layer)
    return float(rows[chosen]["C"])


def classifier(x: np.ndarray, labels: np.ndarray, classes: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The linear classifier of ``aimv2 linear``.

    Args:
        x: averaged features [N, D].
        labels: int64 [N] of at least two classes.
        classes: C.
        strength: see :func:`strength_of`.

    Returns:
        weights [C, D] and biases [C]; of a class without images weights of 0 and a bias below all others.
    """
    fitted = logistic(x, labels, strength)[0]
    own, biases = fitted.coef_, fitted.intercept_
    if len(own) == 1:  # two classes: one margin
        own, biases = np.concatenate([-own, own]) / 2, np.concatenate([-biases, biases]) / 2
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, biases.min() + ABSENT)
    weight[fitted.classes_], bias[fitted.classes_] = own, biases
    return weight, bias


@torch.no_grad()
def start_linear(sweep: ProbeSweep, layers: Sequence[Any], labels: np.ndarray, strengths: Sequence[float]) -> None:
    """Attention that averages, values as they are, and the linear classifier of each layer, in place: the same answers as its.

    Args:
        sweep: attentive heads.
        layers: of the features of each layer of the sweep.
        labels: int64 [N]; of one class the heads stay as they are.
        strengths: of each layer, see :func:`strength_of`.
    """
    if len(np.unique(labels)) < 2:
        return
    norms: list[Any] = list(sweep.norms)
    heads: list[Any] = list(sweep.heads)
    for name, norm, (means, patches, total, squares), strength in zip(sweep.layers, norms, layers, strengths):
        mean = total / patches
        variance = squares / patches - mean**2
        weight, bias = classifier(means, labels, sweep.classes, strength)
        norm.running_mean.copy_(torch.from_numpy(mean))
        norm.running_var.copy_(torch.from_numpy(variance))
        scaled = torch.from_numpy(weight * np.sqrt(variance + NORM_EPS))
        for head in (head for head, trial in zip(heads, sweep.trials) if trial.layer == name):
            head.query.zero_()
            torch.nn.init.eye_(head.value.weight)
            head.linear.weight.copy_(scaled)
            head.linear.bias.copy_(torch.from_numpy(bias + weight @ mean))
