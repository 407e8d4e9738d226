"""What knn, linear and fewshot share: splits, one pooled vector an image for each layer, baselines, the result.

Legend: N images, D width.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimv2.data.images.labelled import Labelled, limit, open_labelled, require_labelled
from aimv2.errors import UsageError
from aimv2.evals.result import about_model, check_out, make_result, write_result
from aimv2.evals.scores import per_class, top1, wilson
from aimv2.features.extraction import Cached, cached_features, features_home
from aimv2.features.frozen import LAST, Frozen, open_frozen, random_twin, raw_pixels
from aimv2.features.pixels import Stats


@dataclass(frozen=True)
class Asked:
    """What a user asked for beside the method; see :func:`aimv2.api.knn`."""

    model: str
    data: str
    dataset: str | None
    layers: str
    pool: str
    baselines: tuple[str, ...]
    train_limit: int
    test_limit: int
    image_size: int | str | None
    batch_size: int
    seed: int
    device: str
    out: str | None
    precision: str = "fp32"
    cache: str | None = None
    stats: Stats | None = None


@dataclass(frozen=True)
class Splits:
    """The images to learn from, to choose on (where the data set has such a split) and to test on."""

    train: Labelled
    val: Labelled | None
    test: Labelled


@dataclass(frozen=True)
class Pooled:
    """Features [N, D] float32 of the splits, an array for each of ``layers``."""

    layers: tuple[str, ...]
    train: Cached
    val: Cached | None
    test: Cached
    classes: tuple[str, ...]
    device: torch.device

    def headline(self) -> int:
        """Where nothing chooses a layer: ``last`` among the layers, else the first."""
        return self.layers.index(LAST) if LAST in self.layers else 0


Measure = Callable[
    [Pooled], dict[str, Any]
]  # -> figures; ``chosen`` is a list of one dict with the headline's ``layer``


def open_splits(asked: Asked) -> Splits:
    """The data set's splits; of training and test images at most the limits, drawn.

    Raises:
        UsageError: no training or test split, splits with different classes, a limit below an image a class.
    """
    train, test = (require_labelled(asked.data, split, asked.dataset) for split in ("train", "test"))
    val = open_labelled(asked.data, "val", asked.dataset)
    for other in (val, test):
        if other is not None and other.classes != train.classes:
            different = sorted(set(other.classes) ^ set(train.classes)) or ["their order"]
            raise UsageError(
                f"--data {asked.data}: the splits train and {other.split} have different classes ({different[0]}); "
                "the same expected in both"
            )
    if 0 < asked.train_limit < len(train.classes):
        raise UsageError(f"--train-limit {asked.train_limit}: an image a class ({len(train.classes)}) or more expected")
    train = limit(train, asked.train_limit) if asked.train_limit else train
    return Splits(train, val, limit(test, asked.test_limit) if asked.test_limit else test)


def measure(
    verb: str,
    asked: Asked,
    splits: Splits,
    protocol: dict[str, Any],
    method: Measure,
    started: float,
    seed: int | list[int] | None = None,
) -> dict[str, Any]:
    """Opens the encoder, runs ``method`` on its features and on those of the baselines, writes the result.

    Args:
        verb: of the command line.
        asked: see there.
        splits: of :func:`open_splits`.
        protocol: what the result says of the method.
        method: features to figures.
        started: ``time.perf_counter()`` when the verb began.
        seed: or all of them; None: ``asked.seed``.

    Raises:
        UsageError: a layer, a pool, a baseline that the encoder does not have, a folder of something else.
    """
    frozen = open_frozen(asked.model, asked.device, asked.image_size, asked.precision, asked.stats)
    layers = tuple(dict.fromkeys(frozen.layer_names(asked.layers)))
    _check_pool(frozen, asked, layers)
    others = {
        name: random_twin(frozen, asked.seed) if name == "random" else raw_pixels(frozen) for name in asked.baselines
    }
    out = check_out(asked.out, verb)
    with tempfile.TemporaryDirectory() as scratch:
        home = out or Path(scratch)
        figures = method(_features(frozen, splits, layers, asked, features_home(asked.cache, home, frozen)))
        headline = (figures["chosen"][0]["layer"],)
        baselines = {}
        for name, other in others.items():
            found = method(_features(other, splits, headline, asked, features_home(asked.cache, home, other, name)))
            kept = {key: found[key] for key in ("top1", "top1_interval", "chosen", "table")}
            baselines[name] = {"features": other.name, **kept}
        if baselines:
            figures["baselines"] = baselines
    about = {
        "name": splits.test.name,
        "dataset": asked.dataset,
        "source": splits.test.source,
        "split": splits.test.split,
        "train_images": len(splits.train.labels),
        "test_images": len(splits.test.labels),
        "classes": len(splits.test.classes),
    }
    protocol = {**protocol, "layers": list(layers), "pool": asked.pool}
    seconds = time.perf_counter() - started
    used = asked.seed if seed is None else seed
    return write_result(out, make_result(verb, protocol, about_model(frozen), about, figures, seconds, used))


def _check_pool(frozen: Frozen, asked: Asked, layers: tuple[str, ...]) -> None:
    """Says before the trunk runs what would fail after it."""
    if asked.pool != "attention":
        return
    if frozen.head is None or layers != (LAST,):
        raise UsageError(f"--pool attention: {asked.model} has no pooling head behind these layers; --pool mean")
    if "pixels" in asked.baselines:
        raise UsageError("--baselines pixels: pixels have no pooling head; --pool mean, or --baselines random")


def _features(frozen: Frozen, splits: Splits, layers: tuple[str, ...], asked: Asked, home: Path) -> Pooled:
    """One pass over each split, all layers at once."""

    def see(data: Labelled) -> Cached:
        cached = cached_features(frozen, data, layers, asked.pool, home, asked.batch_size)
        for layer, values in zip(layers, cached.features):
            if not np.isfinite(values).all():
                raise UsageError(f"MODEL {frozen.name}: layer {layer} gives values that are not finite; other --layers")
        return cached

    val = see(splits.val) if splits.val is not None else None
    return Pooled(layers, see(splits.train), val, see(splits.test), splits.train.classes, frozen.device)


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
