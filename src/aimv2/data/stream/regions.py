"""The stream of pictures with boxes: samples of shards to squares of one size with boxes, classes or phrases, and those to batches.

Legend: B pictures, N boxes of a batch, S side of the square, T tokens; a target box is [centre x, centre y, width, height] relative to S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import WorkerConfig, stateless
from PIL import Image
from torch import Tensor

from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.detect import DetectTaskOptions
from aimv2.config.schema import DataConfig
from aimv2.data.images.boxes import BOX_FAULTS, UNUSABLE, Regions, class_of, listed, regions_of, stated_classes
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.passed import PassedOver
from aimv2.data.shards.format import Parts, json_of, read_samples
from aimv2.data.stream.samples import PairEncoder, TrainStream, View, image_bytes
from aimv2.data.stream.transforms import crop_resize, to_pixels
from aimv2.data.text.phrases import Prompts, mirrored
from aimv2.io import say
from aimv2.progress import tracked

MASK_STRIDE = 4  # pixels of the square per cell of a mask, as Mask2Former predicts them


@dataclass
class RegionTargets:
    """Boxes of the pictures of a batch, picture by picture.

    Attributes:
        boxes: float32 [N, 4].
        labels: int64 [N], class, or number of the phrase in the picture's text.
        counts: int64 [B], boxes of each picture.
        masks: uint8 [N, S / 4, S / 4], 1 inside the object; None where they are not learned.
    """

    boxes: Tensor
    labels: Tensor
    counts: Tensor
    masks: Tensor | None = None

    def each(self, change: Any) -> RegionTargets:
        """The same with every tensor changed."""
        masks = None if self.masks is None else change(self.masks)
        return RegionTargets(change(self.boxes), change(self.labels), change(self.counts), masks)

    def to(self, device: torch.device | str) -> RegionTargets:
        pinned = self if not str(device).startswith("cuda") or self.boxes.is_pinned() else self.pin_memory()
        return pinned.each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> RegionTargets:
        return self.each(lambda value: value.pin_memory())

    @staticmethod
    def joined(parts: Sequence[RegionTargets]) -> RegionTargets:
        """Those of several batches, in order."""
        masks = None if parts[0].masks is None else torch.cat([part.masks for part in parts])  # type: ignore[misc]
        boxes, labels, counts = (torch.cat([getattr(part, n) for part in parts]) for n in ("boxes", "labels", "counts"))
        return RegionTargets(boxes, labels, counts, masks)

    def part(self, start: int, end: int) -> RegionTargets:
        """Those of the pictures ``start`` to ``end``."""
        first, last = int(self.counts[:start].sum()), int(self.counts[:end].sum())
        masks = None if self.masks is None else self.masks[first:last]
        return RegionTargets(self.boxes[first:last], self.labels[first:last], self.counts[start:end], masks)


@dataclass(frozen=True)
class Place:
    """Where a picture lies in the square: resized, cut where it is larger, mirrored, its upper left corner in that of the square.

    Attributes:
        resized: width and height of the whole resized picture, pixels.
        left, top: of the cut within it.
        width, height: of what is kept.
        flip: mirrored after the cut.
    """

    resized: tuple[float, float]
    left: float
    top: float
    width: int
    height: int
    flip: bool = False

    @classmethod
    def whole(cls, size: tuple[int, int], side: int) -> Place:
        """The whole picture of ``size`` (width, height), its longer side ``side`` pixels."""
        width, height = (max(1, round(length * side / max(size))) for length in size)
        return cls((width, height), 0, 0, width, height)

    @classmethod
    def drawn(
        cls, rng: np.random.Generator, size: tuple[int, int], side: int, zoom: tuple[float, float], flip: float
    ) -> Place:
        """Size uniform in ``zoom``, the cut uniform over the picture, mirrored with probability ``flip``."""
        factor, across, down, turned = rng.uniform(*zoom), rng.random(), rng.random(), rng.random() < flip
        width, height = (max(1.0, length * factor * side / max(size)) for length in size)
        kept = min(side, max(1, round(width))), min(side, max(1, round(height)))
        left, top = max(0.0, width - kept[0]) * across, max(0.0, height - kept[1]) * down
        return cls((width, height), left, top, *kept, turned)

    def square(self, image: Image.Image, side: int, fill: tuple[int, ...]) -> Image.Image:
        """The picture in its place, the rest of the square filled."""
        across, down = image.width / self.resized[0], image.height / self.resized[1]
        box = (
            self.left * across,
            self.top * down,
            min((self.left + self.width) * across, image.width),
            min((self.top + self.height) * down, image.height),
        )
        part = crop_resize(image, box, (self.width, self.height))
        if self.flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        square = Image.new("RGB", (side, side), fill)
        square.paste(part, (0, 0))
        return square

    def boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes xyxy of the picture of ``size``, in pixels of the square and cut at the edge, and the part of each that is left."""
        scale = np.array([self.resized[0] / size[0], self.resized[1] / size[1]] * 2)
        moved = boxes * scale - np.array([self.left, self.top] * 2)
        cut = np.clip(moved, 0, [self.width, self.height] * 2)
        before, after = (np.prod(np.maximum(found[:, 2:] - found[:, :2], 0), axis=1) for found in (moved, cut))
        if self.flip:
            cut = np.stack([self.width - cut[:, 2], cut[:, 1], self.width - cut[:, 0], cut[:, 3]], 1)
        return cut, after / np.maximum(before, 1e-9)

    def back(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Boxes xyxy in pixels of the square as boxes of the whole picture, cut at its edge; for places that are not mirrored."""
        scale = np.array([size[0] / self.resized[0], size[1] / self.resized[1]] * 2)
        return np.clip((boxes + np.array([self.left, self.top] * 2)) * scale, 0, [*size] * 2)


@dataclass
class RegionRow:
    """A picture ready for a batch: uint8 pixels [3, S, S], target boxes float32 [n, 4], labels, the tokens of its text, masks."""

    key: str
    pixels: np.ndarray
    boxes: np.ndarray
    labels: list[int]
    tokens: list[int] = field(default_factory=list)
    masks: np.ndarray | None = None


class RegionMaker:
    """Samples to rows.

    Attributes:
        options: of the task.
        side: of a picture's longer side, pixels.
        square: S, at least ``side``.
        fill: colour around a picture, 0..255.
        classes: names of each source of the mixture; of a head that reads words those that may be absent ones.
        prompts: of a head that reads words; None: labels are numbers of ``classes`` of all sources.
    """

    def __init__(
        self, options: DetectTaskOptions, side: int, square: int, fill: tuple[int, ...], classes: list[list[str]],
        prompts: Prompts | None, flip: float, max_pixels: int,
    ) -> None:  # fmt: skip
        self.options, self.side, self.square, self.fill = options, side, square, fill
        self.classes, self.prompts, self.flip, self.max_pixels = classes, prompts, flip, max_pixels
        self.names = list(dict.fromkeys(name for names in classes for name in names))
        self.number = {name: at for at, name in enumerate(self.names)}

    def read(self, parts: Parts) -> tuple[Image.Image, Regions]:
        """The picture of a sample and its regions.

        Raises:
            ImageError: none to be read, or regions that can't be used.
        """
        image = decode_image(image_bytes(parts), self.max_pixels)
        regions, faults = regions_of(json_of(parts), image.size)
        if bad := [fault for fault in faults if fault in UNUSABLE]:
            raise ImageError(BOX_FAULTS[bad[0]])
        return image, regions

    def __call__(self, key: str, parts: Parts, rng: np.random.Generator, source: int) -> RegionRow:
        """The row of a visit to a sample. Raises ImageError where there is nothing to learn from."""
        image, regions = self.read(parts)
        options, grounding = self.options, self.prompts is not None
        speaks = grounding and bool(regions.phrases)
        looks = bool(len(regions.boxes)) or not speaks
        if speaks and (not looks or rng.random() < options.phrases):
            zoom = tuple(min(one, 1.0) for one in options.zoom)  # words may speak of all of the picture
            place = Place.drawn(rng, regions.size, self.side, zoom, self.flip)  # type: ignore[arg-type]
            return self.spoken(key, image, regions, place, rng)
        place = Place.drawn(rng, regions.size, self.side, options.zoom, self.flip)
        return self.classed(key, image, regions, place, rng, source)

    def row(
        self, key: str, image: Image.Image, place: Place, boxes: np.ndarray, labels: list[int], phrases: list[str]
    ) -> RegionRow:
        pixels = to_pixels(place.square(image, self.square, self.fill))
        centred = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / self.square
        tokens = self.prompts.encode(phrases) if self.prompts is not None else []
        return RegionRow(key, pixels, centred.astype(np.float32), labels, tokens)

    def spoken(
        self, key: str, image: Image.Image, regions: Regions, place: Place, rng: np.random.Generator
    ) -> RegionRow:
        """Some phrases of a picture, no two of them of the same box."""
        assert self.prompts is not None
        most, met = int(rng.integers(1, len(regions.phrases) + 1)), set[tuple[float, ...]]()
        chosen: list[tuple[str, np.ndarray]] = []
        for at in rng.permutation(len(regions.phrases)).tolist():
            phrase, boxes = regions.phrases[at]
            own = {tuple(box) for box in boxes.round(1).tolist()}
            if len(chosen) < most and not own & met:
                chosen.append((mirrored(phrase) if place.flip else phrase, boxes))
                met |= own
        chosen = chosen[: self.prompts.fitting([phrase for phrase, _ in chosen])]
        boxes, _ = place.boxes(np.concatenate([own for _, own in chosen]), regions.size)
        labels = [number for number, (_, own) in enumerate(chosen) for _ in own]
        return self.row(key, image, place, boxes, labels, [phrase for phrase, _ in chosen])

    def classed(
        self, key: str, image: Image.Image, regions: Regions, place: Place, rng: np.random.Generator, source: int
    ) -> RegionRow:
        """The classes of a picture, among some that are absent where the head reads words."""
        boxes, left = place.boxes(regions.boxes, regions.size)
        keep = (left >= self.options.keep_area) & ~regions.crowd & (boxes[:, 2:] > boxes[:, :2]).all(1)
        found = [self.turned(name, place) for name in regions.classes]
        shown = [name for name, kept in zip(found, keep) if kept]
        if self.prompts is None:
            row = self.row(key, image, place, boxes[keep], [self.number[name] for name in shown], [])
            if self.options.head == "masks":
                from aimv2.data.stream.region_masks import masks_of

                kept = [one for one, there in zip(regions.segmentations, keep) if there]
                row.masks = masks_of(kept, boxes[keep], regions.size, place, self.square, MASK_STRIDE)
            return row
        words = self.words(list(dict.fromkeys(shown)), {*found}, regions, rng, source)
        number = {name: at for at, name in enumerate(words)}
        inside = [name in number for name in shown]  # all but those that do not fit the text
        labels = [number[name] for name in shown if name in number]
        return self.row(key, image, place, boxes[keep][np.array(inside, bool)], labels, words)

    def turned(self, name: str, place: Place) -> str:
        """A class in a mirrored picture, where there is one such: left shoe, right shoe."""
        other = mirrored(name) if place.flip else name
        return other if self.prompts is not None or other in self.number else name

    def words(
        self, shown: list[str], there: set[str], regions: Regions, rng: np.random.Generator, source: int
    ) -> list[str]:
        """The shown classes and absent ones, as many as fit, in random order; of a picture that shows none at least one absent class."""
        assert self.prompts is not None
        known = regions.negative if regions.negative or regions.not_exhaustive else self.classes[source]
        absent = [name for name in known if name not in there and name not in regions.not_exhaustive]
        count = min(len(absent), self.options.negatives)
        if rng.random() < 0.5:
            count = int(rng.integers(0 if shown else min(1, count), count + 1))
        drawn = rng.permutation(len(absent))[:count].tolist()
        words = [shown[at] for at in rng.permutation(len(shown)).tolist()] + [absent[at] for at in drawn]
        words = words[: self.prompts.fitting(words)] if words else words
        return [words[at] for at in rng.permutation(len(words)).tolist()]


def rows_to_batch(rows: Sequence[RegionRow], bad: Sequence[tuple[str, str]] = (), sources: Sequence[int] = ()) -> Batch:
    """Rows, their texts right-padded, their boxes in ``targets``."""
    masks = None
    if rows[0].masks is not None:
        masks = torch.from_numpy(np.concatenate([row.masks for row in rows if row.masks is not None]))
    targets = RegionTargets(
        torch.from_numpy(np.concatenate([row.boxes for row in rows])),
        torch.tensor([label for row in rows for label in row.labels], dtype=torch.int64),
        torch.tensor([len(row.boxes) for row in rows]),
        masks,
    )
    images = torch.from_numpy(np.stack([row.pixels for row in rows]))
    keys = [row.key for row in rows]
    return replace(
        make_batch(images, [row.tokens for row in rows], None, 0, keys, bad, sources=sources), targets=targets
    )


class RegionEncoder(PairEncoder):
    """Samples to rows, rows to batches, in each worker."""

    def __init__(self, config: DataConfig, view: View, seed: int, worker: WorkerConfig, make: RegionMaker) -> None:
        super().__init__(config, view, None, seed, worker)
        self.make = make

    def draw(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        source = sample["__subflavors__"]["source"]
        parts = {name.lower(): part for name, part in sample.items() if not name.startswith("__")}
        row = self.make(sample["__key__"], parts, rng, source)
        return {**{name: sample[name] for name in ("__key__", "__restore_key__")}, "row": row, "source": source}

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        fresh, self.fresh = self.fresh, []
        return rows_to_batch([one["row"] for one in samples], fresh, [one["source"] for one in samples])


class RegionStream(TrainStream):
    """Endless micro-batches of pictures with boxes, of this rank; see :class:`TrainStream`."""

    def __init__(
        self, config: DataConfig, make: RegionMaker, batch_size: int, seed: int, rank: int, ranks: int, accumulate: int
    ) -> None:
        self.make, self.accumulate, self.next_line = make, accumulate, 1
        super().__init__(config, View(make.square, 0, False), None, batch_size, seed, rank, ranks)

    def encoder(
        self, config: DataConfig, view: View, tokenizer: Any, seed: int, worker: WorkerConfig, size: int
    ) -> RegionEncoder:
        return RegionEncoder(config, view, seed, worker, self.make)

    def joined(self, parts: list[Batch]) -> list[Batch]:
        if (count := len(self.rejected)) >= self.next_line:
            last = next(reversed(self.rejected.named.values()))
            say(f"data.train: {count:,} samples so far can't be used and are left out, such as {last}")
            self.next_line = 10 * count
        batch = super().joined(parts)
        assert isinstance(batch, Batch)
        return split_batch(batch, self.accumulate, 0)


@dataclass
class HeldRegions:
    """A held-out picture: uint8 pixels [3, S, S] of all of it (None: another rank has them), where it lies in the square, its regions."""

    key: str
    pixels: np.ndarray | None
    place: Place
    regions: Regions


def held_out_regions(
    shards: Sequence[Path], make: RegionMaker, limit: int, rank: int, ranks: int
) -> tuple[list[HeldRegions], PassedOver]:
    """The first ``limit`` usable samples in shard order (0: all); bad ones are counted.

    Every rank has all regions, and the pixels of the first picture and of every ``ranks``-th.
    """
    found, passed = list[HeldRegions](), PassedOver()
    for key, parts in (pair for shard in shards for pair in read_samples(shard)):
        if limit and len(found) >= limit:
            break
        try:
            image, regions = make.read(parts)
        except ImageError as error:
            passed.add(str(error), key)
            continue
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # what nobody thought of
            passed.add(f"{type(error).__name__} in its sample", key)
            continue
        place, own = Place.whole(image.size, make.side), not found or len(found) % ranks == rank
        pixels = to_pixels(place.square(image, make.square, make.fill)) if own else None
        found.append(HeldRegions(key, pixels, place, regions))
    return found, passed


def class_names(shards: Sequence[Path]) -> list[str]:
    """Class names of shards: as their manifest states them, else all that occur, sorted."""
    if stated := stated_classes(shards).get("classes"):
        return list(stated)
    pairs = tracked((pair for shard in shards for pair in read_samples(shard)), "reading class names, samples", None)
    return sorted({name for _, parts in pairs for name in names_in(json_of(parts))})


def learned_names(shards: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Class names without those that the data hold out: as absent words they would be learned to be nowhere."""
    stated = stated_classes(shards)
    held_out = () if stated.get("only_held_out") else stated.get("held_out", ())
    return [name for name in names if name not in held_out]


def names_in(about: dict[str, Any]) -> set[str]:
    """Classes of a KEY.json, of objects and of what was checked to be absent."""
    found = {class_of(thing) for thing in listed(about, "objects") if isinstance(thing, dict)}
    return (found | {name for name in listed(about, "negative") if isinstance(name, str)}) - {""}


def phrases_in(about: dict[str, Any]) -> list[str]:
    """Phrases of a KEY.json."""
    given = listed(about, "phrases")
    return [one["phrase"] for one in given if isinstance(one, dict) and isinstance(one.get("phrase"), str)]
