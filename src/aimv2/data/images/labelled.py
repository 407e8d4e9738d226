"""A split of labelled images: names, labels, and what reads image i; parts of it, and two of them joined.

Legend: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from aimv2.data.images.readers import ChosenImages, JoinedImages
from aimv2.errors import UsageError

Split = Literal["train", "val", "test"]
HELD_OUT = 0.2  # of each class's images, where a data set has no split for them


@dataclass(frozen=True)
class Labelled:
    """A split of a data set.

    Attributes:
        name: of the registered set, else of the folder or hub data set.
        source: as the user gave it.
        split: train, val or test.
        classes: C names, in the labels' order.
        keys: N names.
        labels: int64 [N], 0..C-1.
        image: i -> the decoded, upright RGB image; raises :class:`aimv2.data.images.decode.ImageError`. Threads may share it.
    """

    name: str
    source: str
    split: str
    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: np.ndarray
    image: Callable[[int], Image.Image]


def subset(data: Labelled, rows: np.ndarray) -> Labelled:
    """The given rows (int [M]) in their order; classes stay."""
    rows = np.asarray(rows, np.int64)
    keys = [data.keys[row] for row in rows]
    return replace(data, keys=keys, labels=data.labels[rows], image=ChosenImages(data.image, rows))


def joined(first: Labelled, second: Labelled) -> Labelled:
    """The images of both splits of a data set, under the name of the first."""
    labels = np.concatenate([first.labels, second.labels])
    images = JoinedImages((first.image, len(first.labels)), (second.image, len(second.labels)))
    return replace(first, keys=[*first.keys, *second.keys], labels=labels, image=images)


def limit(data: Labelled, count: int, seed: int = 0) -> Labelled:
    """A draw of ``count`` images in which classes differ by one image at most, as far as they have any left.

    Args:
        data: all images; returned as it is where it has no more than ``count``.
        count: images; in training at least one a class.
        seed: of the draw.

    Raises:
        UsageError: too few.
    """
    least = len(data.classes) if data.split == "train" else 1
    if count < least:
        raise UsageError(f"--limit {count}: at least {least} expected ({len(data.classes)} classes in {data.split})")
    if count >= len(data.labels):
        return data
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(data.labels))
    drawn = drawn[np.argsort(data.labels[drawn], kind="stable")]  # class by class, each in random order
    sizes = np.bincount(data.labels, minlength=len(data.classes))
    turn = np.arange(len(drawn)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # first of its class, second, ...
    # all firsts, then all seconds, ...: cut anywhere, the classes differ by one at most while they last
    order = np.lexsort((rng.random(len(drawn)), turn))
    return subset(data, np.sort(drawn[order[:count]]))


def hold_out(labels: np.ndarray, seed: int, fraction: float = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Rows (kept, held out), rising: ``fraction`` of each class's images is held out, drawn; all of its images never.

    Raises:
        UsageError: no class has images enough.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held[rows[:count]] = True
    if not held.any():
        raise UsageError("--data: no class has two training images; a validation split or more images expected")
    return np.flatnonzero(~held), np.flatnonzero(held)


def equal_parts(labels: np.ndarray, seed: int, count: int) -> list[np.ndarray]:
    """Rows of ``count`` disjoint parts, rising, drawn: in size and in images of a class they differ by one at most.

    Raises:
        UsageError: no class has images enough.
    """
    if np.bincount(labels).max() < 2:
        raise UsageError("--data: no class has two training images; a validation split or more images expected")
    drawn = np.random.default_rng(seed).permutation(len(labels))
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    return [np.sort(drawn[part::count]) for part in range(min(count, len(labels)))]
