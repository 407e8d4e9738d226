"""kNN accuracy of a run's encoder while it trains (``eval.knn``): no training, no random number, so a run is the same with it.

Legend: N labelled images of this rank, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from aimv2.config.schema import Config
from aimv2.data.shards.format import label_of, read_sample, read_samples
from aimv2.data.shards.listing import list_shard
from aimv2.data.stream.samples import View, training_shards, validation_shards
from aimv2.distributed import World, gather_rows
from aimv2.errors import UsageError
from aimv2.progress import tracked
from aimv2.tasks.held_out import HeldOut, evaluating, hold, transformed

KNN = "val_knn_top1"
FIRST = 64  # samples of each split that are looked at for a label before a run


def check_knn(config: Config) -> None:
    """Raises UsageError where ``eval.knn`` is on and the training or the validation samples have no labels."""
    if not config.eval.knn:
        return
    splits = {
        "training": [tar for shards in training_shards(config.data) for tar in shards],
        "validation": validation_shards(config.data),
    }
    for split, shards in splits.items():
        if not any(label_of(sample) >= 0 for sample in first_of(shards)):
            why = f"none of the first {FIRST} {split} samples has a KEY.cls" if shards else f"there is no {split} split"
            raise UsageError(
                f"eval.knn: labels missing: {why}; leave eval.knn out, or import a class-folder tree with a validation split",
                option="eval.knn",
                code="missing",
            )


def first_of(shards: Sequence[Path]) -> Iterator[Any]:
    """The first samples of a split."""
    return islice((sample for _, sample in chain.from_iterable(map(read_samples, shards))), FIRST)


def read_voters(config: Config, view: View, rank: int = 0, ranks: int = 1) -> HeldOut:
    """This rank's part of the labelled training images that vote: ``eval.knn_samples``, evenly over the data, which may lie class by
    class. Only these are read.

    Raises:
        UsageError: fewer than ranks.
    """
    places = [
        (keys[row], tar, int(offsets[row]), int(offsets[row + 1]))
        for shards in training_shards(config.data)
        for tar in shards
        for keys, offsets, labels in [list_shard(tar)]
        for row in np.flatnonzero(labels >= 0)
    ]
    count = min(config.eval.knn_samples or len(places), len(places))
    if count < ranks:
        raise UsageError(
            f"eval.knn_samples: {count} labelled training images on {ranks} ranks; one a rank or more expected",
            option="eval.knn_samples",
            code="limit",
        )
    own = [places[at * len(places) // count] for at in range(count)][rank::ranks]
    samples = ((key, read_sample(tar, start, end)) for key, tar, start, end in own)
    view = replace(view, captions=False)
    return hold(tracked(transformed(samples, view), "reading images of eval.knn", len(own)), view)


@torch.no_grad()
def knn_top1(model: nn.Module, train: HeldOut, test: HeldOut, world: World, size: int = 64) -> dict[str, float]:
    """Top-1 of the encoder as it is on the labelled held-out images of all ranks, as ``aimv2 knn --k 20`` measures it.

    Args:
        model: with ``.encoder``, sharded or not.
        train: this rank's images that vote, labelled or not.
        test: this rank's images to classify.
        world: the ranks.
        size: images at once.

    Returns:
        ``val_knn_top1``, 0..1: mean-pooled features after the last norm, cosine, the class of most of the 20 nearest.
    """
    from aimv2.evals.knn import DEFAULT_K, KnnSettings, predict
    from aimv2.evals.scores import top1

    with evaluating(model), gathered(model):
        (known, labels), (found, wanted) = (all_features(model, data, world, size) for data in (train, test))
    score = 0.0
    if world.main and len(labels) and len(wanted):
        settings = KnnSettings((min(DEFAULT_K, len(labels)),))
        classes = int(labels.max()) + 1
        (predicted,) = predict(known.numpy(), labels.numpy(), found.numpy(), classes, settings, world.device)
        score = top1(predicted, wanted.numpy())
    return {KNN: world.broadcast(score)}


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The weights outside of the blocks of a sharded model are whole: its encoder is called by itself."""
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    if isinstance(model, FSDPModule):
        model.reshard()


def all_features(model: nn.Module, data: HeldOut, world: World, size: int) -> tuple[Tensor, Tensor]:
    """Pooled features float32 [N, D] and labels int64 [N] of the labelled images of all ranks, in the order of the data.

    Ranks run equally many batches, since a sharded model gathers its weights in each; a rank that has fewer repeats its first.
    """
    starts = list(range(0, len(data.keys), size))
    if -int(world.max(torch.tensor(-float(len(starts)), device=world.device))) == 0:
        raise UsageError(
            f"eval.knn: one of {world.size} ranks has no readable image of a split; fewer ranks, or leave eval.knn out",
            option="eval.knn",
            code="limit",
        )
    most = int(world.max(torch.tensor(float(len(starts)), device=world.device)))
    rows = list[Tensor]()
    for number in range(most):
        at = starts[number] if number < len(starts) else 0
        part = data.images[at : at + size]
        images: Any = part.to(world.device) if isinstance(part, Tensor) else [one.to(world.device) for one in part]
        pooled = model.encoder.encode(images, pool="mean")  # type: ignore[operator, union-attr]
        rows += [x.float() for x in pooled] if number < len(starts) else []
    places = torch.arange(len(data.keys), device=world.device) * world.size + world.rank
    about = gather_rows(torch.stack([places, data.labels.to(world.device)], 1), world).cpu()
    features = gather_rows(torch.stack(rows), world).cpu()
    order = about[:, 0].argsort()
    order = order[about[order, 1] >= 0]
    return features[order], about[order, 1]
