"""Batches for a sweep of probes: cached features, or images augmented anew at each visit.

Both are endless, their order is a pure function of (seed, epoch), and their state is the number of batches taken.

Legend: B images, N tokens, D width, V cached views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aimv2.batch import Batch, make_batch
from aimv2.data.images.decode import ImageError
from aimv2.data.stream.augment import augment
from aimv2.data.stream.transforms import to_pixels
from aimv2.features.ragged import Ragged

if TYPE_CHECKING:
    from aimv2.data.images.labelled import Labelled
    from aimv2.data.stream.workers import Watched


class Order:
    """Rows by step: each epoch is a permutation of 0 .. images - 1 by (seed, epoch), drawn once; what does not fill a batch at
    its end is left out of that epoch."""

    def __init__(self, images: int, size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, size, seed
        self.epoch, self.permutation = -1, np.zeros(0, np.int64)

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and rows [size] of a step."""
        epoch, at = divmod(step, self.images // self.size)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.images)
        return epoch, self.permutation[at * self.size : (at + 1) * self.size]


class FeatureStream:
    """Batches of cached ``features``, float16 or float32 [B, layers, N, D].

    Of images with different numbers of tokens they are [layers, R, D], R all tokens of the batch, and ``image_len`` says
    how many are each image's.
    """

    def __init__(self, views: Sequence[Sequence[Any]], labels: np.ndarray, size: int, seed: int) -> None:
        """``views``: of the same images, each a list of one array [N, tokens, D] or Ragged a layer; one is drawn for each
        batch."""
        self.views, self.labels, self.seed, self.step = views, labels, seed, 0
        self.order = Order(len(labels), size, seed)

    def __next__(self) -> Batch:
        rows = np.sort(self.order.rows(self.step)[1])  # in the file's order: it is read from disk
        view = self.views[int(np.random.default_rng([self.seed, self.step, 1]).integers(len(self.views)))]
        self.step += 1
        if isinstance(view[0], Ragged):
            lengths = torch.tensor([len(view[0][int(row)]) for row in rows])
            layers = [np.concatenate([layer[int(row)] for row in rows]) for layer in view]
            return replace(_batch(None, self.labels[rows], torch.from_numpy(np.stack(layers))), image_len=lengths)
        features = torch.from_numpy(np.stack([layer[rows] for layer in view], axis=1))
        return _batch(None, self.labels[rows], features)

    def state(self) -> int:
        return self.step

    def restore(self, state: int) -> None:
        self.step = state

    def close(self) -> None:
        """Nothing is open."""


class JoinedRows:
    """Images of several arrays of features in a row, read when they are indexed: by rising rows, or one image."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: Any) -> np.ndarray:
        if np.ndim(rows) == 0:
            part = int(np.searchsorted(self.starts, rows, side="right")) - 1
            return self.parts[part][rows - self.starts[part]]
        cuts = np.searchsorted(rows, self.starts)
        ranges = zip(self.parts, self.starts, cuts, cuts[1:])
        return np.concatenate([part[rows[low:high] - start] for part, start, low, high in ranges if high > low])


class JoinedRagged(JoinedRows, Ragged):
    """The same of images with different numbers of tokens."""


def join_features(parts: Sequence[Any]) -> Any:
    """Features of one layer of several splits, as those of one."""
    if len(parts) == 1:
        return parts[0]
    return JoinedRagged(parts) if isinstance(parts[0], Ragged) else JoinedRows(parts)


class ImageStream:
    """Batches of augmented images, uint8 [B, 3, S, S]; decoded in worker processes."""

    def __init__(self, data: Labelled, image_size: int, size: int, seed: int, workers: int) -> None:
        self.step = 0
        self.batches: Iterator[Any] | None = None
        views = _Views(data, image_size, seed)
        order = _Steps(lambda: self.step, Order(len(data.labels), size, seed))
        # as energon: workers have memory in common with this process
        how = "fork" if workers else None
        self.loader: Any = torch.utils.data.DataLoader(
            views, batch_sampler=order, num_workers=workers, collate_fn=_collate, multiprocessing_context=how
        )
        self.watched: Watched | None = None  # the batches of worker processes
        if workers:
            from aimv2.data.stream.workers import Watched

            self.watched = Watched(self.loader, workers)
            views.note = self.watched.notes.write

    def __next__(self) -> Batch:
        if self.batches is None:
            self.batches = self.watched or iter(self.loader)
        batch = next(self.batches)
        self.step += 1
        return batch

    def state(self) -> int:
        return self.step

    def restore(self, state: int) -> None:
        self.step, self.batches = state, None

    def close(self) -> None:
        """Ends the worker processes."""
        if self.watched is not None:
            self.watched.close()
        self.batches = None


class _Steps:
    """(epoch, row) of each image of each step, from ``first()`` on, without end."""

    def __init__(self, first: Callable[[], int], order: Order) -> None:
        self.first, self.order = first, order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in count(self.first()):
            epoch, rows = self.order.rows(step)
            yield [(epoch, int(row)) for row in rows]


class _Views(torch.utils.data.Dataset[Any]):
    """Augmented images by (epoch, row)."""

    def __init__(self, data: Labelled, image_size: int, seed: int) -> None:
        self.data, self.image_size, self.seed = data, image_size, seed
        self.note: Callable[[str], None] = lambda name: None

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, int]:
        """(pixels uint8 [3, S, S], label); an image that can't be read is gray and has no label."""
        epoch, row = place
        self.note(self.data.keys[row])
        name = int.from_bytes(hashlib.sha256(self.data.keys[row].encode()).digest()[:8], "little")
        rng = np.random.default_rng([self.seed, epoch, row, name])
        try:
            view = augment(self.data.image(row), self.image_size, rng)
        except ImageError:
            return np.full((3, self.image_size, self.image_size), 128, np.uint8), -1
        finally:
            self.note("")
        return to_pixels(view), int(self.data.labels[row])


def _collate(samples: list[tuple[np.ndarray, int]]) -> Batch:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in samples]))
    return _batch(pixels, np.array([label for _, label in samples]))


def _batch(images: torch.Tensor | None, labels: np.ndarray, features: torch.Tensor | None = None) -> Batch:
    classes = torch.from_numpy(labels.astype(np.int64))
    return make_batch(images, [[]] * len(labels), None, 0, labels=classes, features=features)
