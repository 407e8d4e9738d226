"""Validation on a split of its own: deterministic views, fixed prefix lengths, fp32 (unlike the released training code)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from aimv2.batch import Batch, make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.shards.format import Parts, captions_of, label_of, read_samples
from aimv2.data.stream.samples import View, image_bytes
from aimv2.data.stream.transforms import Box, centre_crop_box, crop_resize, to_pixels
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.objectives import Terms
from aimv2.objectives.pretrain import PretrainObjective


@dataclass
class HeldOut:
    """Validation samples, transformed for the model.

    Attributes:
        images: uint8 [V, 3, H, W], centre crop; or a list of V whole images [3, h * p, w * p] of one area (native).
        captions: the first caption of each, as text; "" without one.
        tokens: its ids.
        labels: from .cls; -1 without.
        keys: names.
    """

    images: torch.Tensor | list[torch.Tensor]
    captions: list[str]
    tokens: list[list[int]]
    labels: torch.Tensor
    keys: list[str]


class HeldOutSample(NamedTuple):
    """One of them: pixels uint8 [3, H, W], key, first caption ("" without one), label (-1 without)."""

    pixels: np.ndarray
    key: str
    caption: str
    label: int


def held_out_samples(
    shards: Sequence[Path], view: View, limit: int, rank: int = 0, world_size: int = 1
) -> Iterator[HeldOutSample]:
    """The first ``limit`` samples in shard order (0: all), every ``world_size``-th for ``rank``; unreadable ones left out."""
    return transformed((pair for shard in shards for pair in read_samples(shard)), view, limit, rank, world_size)


def transformed(
    samples: Iterable[tuple[str, Parts]], view: View, limit: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[HeldOutSample]:
    """See :func:`held_out_samples`."""
    count = 0
    for key, sample in samples:
        if limit and count >= limit:
            break
        texts = [text for field in captions_of(sample).values() for text in field]
        if view.captions and not texts:
            continue
        count += 1
        if (count - 1) % world_size != rank:
            continue
        try:
            image = decode_image(image_bytes(sample))
        except ImageError:
            continue
        box: Box = (0, 0, *image.size)
        size = view.image_size, view.image_size
        if view.native is None:
            box = centre_crop_box(*image.size)
        else:
            from aimv2.data.stream.native import fit_area, middle_area

            columns, rows = fit_area(*image.size, middle_area(view.native.areas))
            size = columns * view.native.patch, rows * view.native.patch
        pixels = to_pixels(crop_resize(image, box, size))
        yield HeldOutSample(pixels, key, texts[0] if texts else "", label_of(sample))


def read_held_out(
    shards: Sequence[Path],
    view: View,
    tokenizer: Tokenizer | None,
    limit: int,
    max_tokens: int = 77,
    rank: int = 0,
    world_size: int = 1,
) -> HeldOut:
    """Those of :func:`held_out_samples`, all in memory."""
    return hold(held_out_samples(shards, view, limit, rank, world_size), view, tokenizer, max_tokens)


def hold(
    samples: Iterable[HeldOutSample], view: View, tokenizer: Tokenizer | None = None, max_tokens: int = 77
) -> HeldOut:
    """Samples of a view, all in memory."""
    found = list(samples)
    images: Any = [torch.from_numpy(one.pixels) for one in found]
    if view.native is None:
        images = (
            torch.stack(images) if found else torch.zeros(0, 3, view.image_size, view.image_size, dtype=torch.uint8)
        )
    captions = [one.caption for one in found]
    tokens = [tokenizer.encode(caption, max_tokens) if tokenizer and caption else [] for caption in captions]
    return HeldOut(images, captions, tokens, torch.tensor([one.label for one in found]), [one.key for one in found])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and uncompiled, as validation has it; afterwards as it was."""
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        yield
    model.train(was_training)


def held_out_batches(data: HeldOut, patch: int, size: int, fraction: float, text: bool) -> list[Batch]:
    """Batches of ``size`` pairs, the last one smaller, all with the same fraction of patches as prefix.

    Args:
        data: what to score.
        patch: p.
        size: pairs a batch.
        fraction: 0..1, of an image's patches that are prefix; held in 1..I-1 of them.
        text: with the captions.
    """
    batches = []
    for at in range(0, len(data.keys), size):
        images, keys = data.images[at : at + size], data.keys[at : at + size]
        counts = [(image.shape[1] // patch) * (image.shape[2] // patch) for image in images]
        prefix = [min(max(round(fraction * count), 1), max(count - 1, 1)) for count in counts]
        tokens = data.tokens[at : at + size] if text else [[]] * len(keys)
        if isinstance(images, list):
            from aimv2.data.stream.native import make_native_batch

            batches.append(make_native_batch(images, tokens, prefix, patch, max(counts), keys))
        else:
            batches.append(make_batch(images, tokens, prefix, counts[0], keys))
    return batches


def mean_loss(
    model: nn.Module, objective: Callable[[nn.Module, Batch], Terms], batches: Sequence[Batch], world: World
) -> float:
    """The objective's one term over all batches of all ranks: sum / count.

    Ranks run equally many batches, since a sharded model gathers its weights in each; a rank that has fewer repeats its
    last one unscored.
    """
    most = int(world.max(torch.tensor(float(len(batches)), device=world.device)))
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for number in range(most):
        batch = batches[min(number, len(batches) - 1)].to(world.device)
        (term,) = objective(model, batch).values()
        if number < len(batches):
            total += torch.stack([term[0].double(), term[1].double()])
    done, count = world.sum(total).tolist()
    return done / max(count, 1)


@torch.no_grad()
def validate_pairs(
    model: nn.Module,
    data: HeldOut,
    patch: int,
    prefixes: Sequence[float],
    world: World,
    text: bool = True,
    pixels: bool = True,
    size: int = 64,
) -> dict[str, float]:
    """Losses on held-out pairs.

    The pixel loss is scored at each prefix length (fraction of the patches, of side ``patch``) with prefix attention; the
    text loss with bidirectional attention over all patches, as captions are written.

    Returns:
        ``val_text_loss`` (nats a token), ``val_perplexity``, ``val_pixel_loss`` (mean over the prefixes) and
        ``val_pixel_loss_10`` and so on (a prefix of 10%).
    """
    figures: dict[str, float] = {}
    with evaluating(model):
        if text:
            objective = PretrainObjective(ObjectiveConfig(targets="text", attention="bidirectional"))
            loss = mean_loss(model, objective, held_out_batches(data, patch, size, 1.0, True), world)
            figures |= {"val_text_loss": loss, "val_perplexity": math.exp(min(loss, 50.0))}
        if pixels:
            objective = PretrainObjective(ObjectiveConfig(targets="image"))
            losses = {}
            for fraction in prefixes:
                batches = held_out_batches(data, patch, size, fraction, False)
                losses[f"val_pixel_loss_{round(100 * fraction)}"] = mean_loss(model, objective, batches, world)
            figures |= {"val_pixel_loss": sum(losses.values()) / len(losses), **losses}
    return figures


@torch.no_grad()
def validate_classes(model: nn.Module, data: HeldOut, world: World, size: int = 64) -> dict[str, float]:
    """Loss and top-1 accuracy on the labelled held-out images of all ranks.

    Returns:
        ``val_class_loss`` (nats an image) and ``val_top1`` (0..1).
    """
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, right, labelled
    with evaluating(model):
        for at in range(0, len(data.keys), size):
            images, labels = data.images[at : at + size], data.labels[at : at + size]
            assert isinstance(images, torch.Tensor)
            batch = make_batch(images, [[]] * len(labels), None, 0, labels=labels).to(world.device)
            logits = model(batch).float()
            known = batch.labels.masked_fill(batch.labels >= logits.shape[1], -1)
            loss = nn.functional.cross_entropy(logits, known, ignore_index=-1, reduction="sum")
            right = (logits.argmax(-1) == known).sum()
            sums += torch.stack([loss.double(), right.double(), (known >= 0).sum().double()])
    loss_sum, right_sum, count = world.sum(sums).tolist()
    return {"val_class_loss": loss_sum / max(count, 1), "val_top1": right_sum / max(count, 1)}
