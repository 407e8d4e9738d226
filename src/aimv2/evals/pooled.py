"""What knn, linear and fewshot share: splits, one pooled vector per image and layer, baselines, the result.

Legend: N images, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimv2.data.images.labelled import Labelled, limit
from aimv2.errors import UsageError
from aimv2.evals.harness import (
    Evaluation,
    LabelledSplits,
    baseline_figures,
    labelled_data,
    open_baselines,
    open_labelled_splits,
)
from aimv2.evals.options import PooledOptions
from aimv2.evals.result import about_model
from aimv2.evals.scores import per_class, top1, wilson
from aimv2.features.extraction import Cached, cached_features, features_home
from aimv2.features.frozen import LAST, Frozen


@dataclass(frozen=True)
class Pooled:
    """Features [N, D] float32 of the splits, one array per layer."""

    layers: tuple[str, ...]
    train: Cached
    val: Cached | None
    test: Cached
    classes: tuple[str, ...]
    device: torch.device

    def headline(self) -> int:
        """The layer if nothing chooses one: ``last`` if it is among the layers, else the first."""
        return self.layers.index(LAST) if LAST in self.layers else 0


Method = Callable[
    [Pooled], dict[str, Any]
]  # -> figures; ``chosen`` is a list of one dict with the headline's ``layer``


def open_splits(options: PooledOptions, train_limit: int = 0) -> LabelledSplits:
    """The data set's splits; of training and test images at most the limits, sampled.

    Raises:
        UsageError: see :func:`aimv2.evals.harness.open_labelled_splits`; a limit below an image per class.
    """
    splits = open_labelled_splits(options, options.seed)
    train, test = splits.train, splits.test
    if 0 < train_limit < len(train.classes):
        raise UsageError(f"--train-limit {train_limit}: an image per class ({len(train.classes)}) or more expected")
    train = limit(train, train_limit) if train_limit else train
    return replace(splits, train=train, test=limit(test, options.test_limit) if options.test_limit else test)


def evaluate_pooled(
    evaluation: Evaluation,
    options: PooledOptions,
    splits: LabelledSplits,
    protocol: dict[str, Any],
    method: Method,
    pool: str = "mean",
    seeds: list[int] | None = None,
) -> dict[str, Any]:
    """Opens the encoder, runs ``method`` on its features and on those of the baselines, writes the result.

    Args:
        evaluation: of the command.
        options: of the command.
        splits: of :func:`open_splits`.
        protocol: what the result says of the method.
        method: features to figures.
        pool: mean or attention.
        seeds: all random seeds; None: ``options.seed``.

    Raises:
        UsageError: a layer, a pool, a baseline that the encoder does not have, a folder of something else.
    """
    frozen = options.open(options.precision)
    layers = tuple(dict.fromkeys(frozen.layer_names(options.layers)))
    check_pool(frozen, options, pool, layers)
    others = open_baselines(options.baselines, frozen, options.seed)
    evaluation.open_folder()

    def figures_of(encoder: Frozen, layers: tuple[str, ...], name: str = "") -> dict[str, Any]:
        folder = features_home(options.cache, evaluation.home, encoder, name)
        return method(pooled_features(encoder, splits, layers, pool, options.batch_size, folder))

    def baseline(name: str, other: Frozen) -> dict[str, Any]:
        found = figures_of(other, (figures["chosen"][0]["layer"],), name)
        return {"features": other.name, **{key: found[key] for key in ("top1", "top1_interval", "chosen", "table")}}

    figures = figures_of(frozen, layers)
    figures |= baseline_figures(others, baseline)
    protocol = {**protocol, "layers": list(layers), "pool": pool}
    if splits.held_out:
        protocol["test_split"] = splits.held_out
    data = labelled_data(splits.train, splits.test, options.dataset)
    return evaluation.result(protocol, about_model(frozen), data, figures, options.seed if seeds is None else seeds)


def check_pool(frozen: Frozen, options: PooledOptions, pool: str, layers: tuple[str, ...]) -> None:
    """Reports before the forward pass what would fail after it."""
    if pool != "attention":
        return
    if frozen.head is None or layers != (LAST,):
        raise UsageError(
            f"--pool attention: {options.model} has no pooling head after these layers; --pool mean", code="unsupported"
        )
    if "pixels" in options.baselines:
        raise UsageError("--baselines pixels: pixels have no pooling head; --pool mean, or --baselines random")


def pooled_features(
    frozen: Frozen, splits: LabelledSplits, layers: tuple[str, ...], pool: str, batch_size: int, folder: Path
) -> Pooled:
    """One pass over each split, all layers at once."""

    def of_split(data: Labelled) -> Cached:
        cached = cached_features(frozen, data, layers, pool, folder, batch_size)
        for layer, values in zip(layers, cached.features):
            if not np.isfinite(values).all():
                raise UsageError(
                    f"MODEL {frozen.name}: layer {layer} gives non-finite values; other --layers", code="non-finite"
                )
        return cached

    val = of_split(splits.val) if splits.val is not None else None
    return Pooled(layers, of_split(splits.train), val, of_split(splits.test), splits.train.classes, frozen.device)


def scores_of(predicted: np.ndarray, pooled: Pooled) -> dict[str, Any]:
    """Figures of the headline: int64 [N] predicted for the test split -> top-1, its interval, accuracy by class."""
    labels, names = pooled.test.labels, pooled.classes
    splits = [split for split in (pooled.train, pooled.val, pooled.test) if split is not None]
    return {
        "top1": top1(predicted, labels),
        "top1_interval": list(wilson(int((predicted == labels).sum()), len(labels))),
        "interval": "95%, Wilson over test images",
        "per_class": dict(zip(names, per_class(predicted, labels, len(names)))),
        "unreadable": sum(len(split.rejected) for split in splits),
    }
