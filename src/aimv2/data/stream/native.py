"""Native-resolution training (AIMV2, native resolution): areas, strips of patches, packed rows.

An area A is a number of patches; an image is scaled to at most A patches with its aspect ratio kept. A mini-batch of one
area holds strips [B, 3, p, A * p]: an image's patches side by side, zero-padded at the end (as in the paper). Packed, images
of several areas share one strip without padding.

Legend: B images, p patch side, h x w grid, A area, N patches of a packed row, T padded caption length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from aimv2.batch import PATCH_BUCKET, Batch, PackedLayout, captions_of, make_batch, pad_rows, scored
from aimv2.models.positions import grid_places


def area_probabilities(low: int, high: int) -> dict[int, float]:
    """Distribution of areas A = 2^n, n a normal truncated to [-1, 1], mapped to [low, high] and rounded.

    Returns:
        {A: probability}, summing to 1.
    """
    middle, half = (low + high) / 2, max((high - low) / 2, 0.5)

    def below(n: float) -> float:
        return 0.5 * (1 + math.erf(min(max((n - middle) / half, -1.0), 1.0) / math.sqrt(2)))

    if low == high:
        return {2**low: 1.0}
    mass = {2**n: below(n + 0.5) - below(n - 0.5) for n in range(low, high + 1)}
    total = sum(mass.values())
    return {area: part / total for area, part in mass.items()}


def middle_area(areas: dict[int, float]) -> int:
    """The area used in evaluation."""
    return list(areas)[len(areas) // 2]


def draw_area(rng: np.random.Generator, areas: dict[int, float]) -> int:
    """Sample the area of one image.

    A mini-batch of area A takes C / A images, so an image draws A with 1 / A of the mini-batches' probability, renormalised.
    """
    sizes = np.array(list(areas))
    weights = np.array(list(areas.values())) / sizes
    return int(rng.choice(sizes, p=weights / weights.sum()))


def fit_area(width: int, height: int, area: int) -> tuple[int, int]:
    """The grid of at most ``area`` patches that fits the aspect ratio of an image best.

    Returns:
        (columns, rows).
    """
    factor = math.sqrt(area / (width * height))
    w, h = max(1, round(width * factor)), max(1, round(height * factor))
    while w * h > area:
        w, h = (w - 1, h) if w >= h else (w, h - 1)
    return w, h


def to_strip(image: Tensor, patch: int) -> Tensor:
    """[3, h * p, w * p] -> [3, p, h * w * p], the patches side by side in row-major order."""
    channels, height, width = image.shape
    x = image.reshape(channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 1, 3, 4).reshape(channels, patch, -1)


def make_native_batch(
    images: Sequence[Tensor],
    captions: Sequence[Sequence[int]],
    prefix_len: Sequence[int],
    patch: int,
    area: int,
    keys: Sequence[str] = (),
    bad: Sequence[tuple[str, str]] = (),
    labels: Sequence[int] | None = None,
    sources: Sequence[int] = (),
) -> Batch:
    """Collate a mini-batch of one area.

    Args:
        images: B images uint8 [3, h * p, w * p], each of at most ``area`` patches.
        captions, keys, bad, labels, sources: see :func:`aimv2.batch.make_batch`.
        prefix_len: B prefix lengths, each in 1..h * w - 1 of its image.
        patch: p.
        area: A.
    """
    strips = torch.zeros(len(images), 3, patch, area * patch, dtype=images[0].dtype)
    places = torch.zeros(len(images), area, 2, dtype=torch.int64)
    lengths = []
    for row, image in enumerate(images):
        grid = image.shape[1] // patch, image.shape[2] // patch
        count = grid[0] * grid[1]
        assert count <= area, f"{count} patches in an area of {area}"
        strips[row, :, :, : count * patch] = to_strip(image, patch)
        places[row, :count] = grid_places(*grid)
        lengths.append(count)
    sizes = torch.tensor(lengths)
    batch = make_batch(strips, captions, prefix_len, area, keys, bad, labels=labels, image_len=sizes, sources=sources)
    return replace(batch, places=places, layout=strip_layout(area, batch))


def pack(batches: Sequence[Batch]) -> Batch:
    """Pack mini-batches of one area each into one row without padding.

    Only attention pads, to the longest sequence of each mini-batch.
    """
    strips, places, lengths = [], [], []
    for batch in batches:
        assert batch.places is not None and batch.image_len is not None
        patch = batch.images.shape[2]
        for image, place, count in zip(batch.images, batch.places, batch.image_len.tolist()):
            strips.append(image[:, :, : count * patch])
            places.append(place[:count])
            lengths.append(count)
    captions = [caption for batch in batches for caption in captions_of(batch)]
    prefix = torch.cat([batch.prefix_len for batch in batches if batch.prefix_len is not None])
    image_len = torch.tensor(lengths)
    # the widest image as the number of patches: the rows are recomputed below
    joined = make_batch(
        torch.cat(strips, dim=2)[None],
        captions,
        prefix,
        max(lengths),
        [key for batch in batches for key in batch.keys],
        [bad for batch in batches for bad in batch.bad],
        labels=torch.cat([batch.labels for batch in batches]),
        image_len=image_len,
        sources=[source for batch in batches for source in batch.sources],
    )
    starts = image_len.cumsum(0) - image_len
    rows = torch.cat(
        [start + keep.nonzero().flatten() for start, keep in zip(starts, scored(prefix, max(lengths), image_len))]
    )
    return replace(
        joined,
        places=torch.cat(places)[None],
        patch_rows=pad_rows(rows, PATCH_BUCKET, 0),
        layout=lay_out(
            [len(batch) for batch in batches], image_len, joined.text_len, joined.token_rows, joined.text.shape[1]
        ),
    )


def strip_layout(area: int, batch: Batch) -> PackedLayout:
    """The decoder's slots of strips: [B * A] image rows, then the captions, each after its image's real patches."""
    assert batch.image_len is not None
    width = batch.text.shape[1]
    length, count = area + width, len(batch)
    position = torch.arange(area)
    image = torch.arange(count)[:, None] * length + position
    image = image.masked_fill(position >= batch.image_len[:, None], count * length).flatten()
    text = _text_slots(batch.token_rows, width, batch.image_len, torch.arange(count) * length, count * length)
    return PackedLayout(image[:0], (), torch.cat([image, text]), ((count, length),))


def _text_slots(token_rows: Tensor, width: int, image_len: Tensor, starts: Tensor, total: int) -> Tensor:
    """int64 [R]: the slot of each caption row, after its image's patches; ``total`` for padding rows."""
    sample, token = token_rows // width, token_rows % width
    own = sample.clamp(max=len(image_len) - 1)
    return torch.where(sample >= len(image_len), total, starts[own] + image_len[own] + token)


def lay_out(sizes: Sequence[int], image_len: Tensor, text_len: Tensor, token_rows: Tensor, width: int) -> PackedLayout:
    """The attention slots of a packed row.

    Args:
        sizes: images per group, in order.
        image_len: int64 [B], patches of each image.
        text_len: int64 [B], tokens of each caption.
        token_rows: int64 [R], see :class:`Batch`.
        width: T.
    """
    image_groups, groups, image_at, at = [], [], [], []
    image_total = total = begin = 0
    for count in sizes:
        own = slice(begin, begin + count)
        longest, whole = int(image_len[own].max()), int((image_len[own] + text_len[own]).max())
        image_at += [image_total + i * longest for i in range(count)]
        at += [total + i * whole for i in range(count)]
        image_groups.append((count, longest))
        groups.append((count, whole))
        image_total, total, begin = image_total + count * longest, total + count * whole, begin + count
    owner = torch.repeat_interleave(torch.arange(len(image_len)), image_len)  # [N], the image of each row
    within = torch.arange(len(owner)) - (image_len.cumsum(0) - image_len)[owner]
    starts = torch.tensor(at)
    text_slots = _text_slots(token_rows, width, image_len, starts, total)
    return PackedLayout(
        torch.tensor(image_at)[owner] + within,
        tuple(image_groups),
        torch.cat([starts[owner] + within, text_slots]),
        tuple(groups),
    )
