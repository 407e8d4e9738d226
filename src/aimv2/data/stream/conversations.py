"""The stream of conversations: samples of shards to rows of tokens with the pixels of their images, rows to batches.

Legend: B rows, G images of them, T padded tokens, S side of an image, g tiles a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import SkipSample, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.task_encoder.base import TaskEncoder
from megatron.energon.wrappers.packing_dataset import PackingDataset
from PIL import Image

from aimv2.batch import ROW_BUCKET, Batch, make_batch, pad_rows, split_batch
from aimv2.config.schema import DataConfig
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import Parts, captions_of, json_of, read_samples
from aimv2.data.stream.draws import draw_caption
from aimv2.data.stream.rejected import BadSample
from aimv2.data.stream.samples import FATAL, PairEncoder, TrainStream, View
from aimv2.data.text.chat import Chat, ChatError
from aimv2.data.text.conversations import (
    BAD,
    IMAGE,
    Conversation,
    ConversationError,
    Turn,
    conversation_of,
    holds_conversation,
    images_of,
    spread,
)
from aimv2.errors import first_line
from aimv2.io import say

MANY = 1_000  # rows of a worker, after which it looks at how many of them were bad


class TooLong(Exception):
    """A row that has more tokens than fit, and is left out."""


class BadRow(ImageError):
    """A sample that can't be trained on.

    Attributes:
        kind: a value of :data:`BAD`.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = BAD[code]


@dataclass
class Row:
    """A conversation, ready for a batch.

    Attributes:
        key: of its sample.
        ids: token ids, image tokens repeated for each feature.
        scored: of each token, whether it is part of an answer.
        pixels: of each image uint8 [3, S, S]; tiles [1 + g * g, 3, S, S]; a native image in the corner of its [3, S, S].
        sizes: height and width of each image: of its pixels, of tiles those of the original.
        cut: tokens that were left out at its end.
    """

    key: str
    ids: list[int]
    scored: list[bool]
    pixels: list[np.ndarray]
    sizes: list[tuple[int, int]]
    cut: int = 0


class ImagePart:
    """The image part of a processor of ``aimv2 vlm build``, without its normalization.

    Attributes:
        shape: of an image's pixels.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, about = processor, processor.image_processor
        self.tiles = len(getattr(about, "image_grid_pinpoints", None) or ())
        self.native = getattr(about.size, "max_height", None) is not None
        self.side = int(about.size.max_height if self.native else about.size.height)
        grid = round(about.image_grid_pinpoints[0][0] / self.side) if self.tiles else 0
        self.shape = (1 + grid**2, 3, self.side, self.side) if self.tiles else (3, self.side, self.side)
        self.fill = tuple(int(255 * value) for value in about.image_mean)
        self.exact = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int], int]:
        """Pixels, size and number of tokens of an RGB image; see :class:`Row`."""
        patch = self.processor.patch_size
        if not self.tiles and not self.native:  # as the processor does it, at a tenth of the time
            pixels = np.asarray(self.squared(image)).transpose(2, 0, 1)
            return pixels, (self.side, self.side), (self.side // patch) ** 2
        found = self.processor.image_processor(images=[image], **self.exact)
        pixels = np.asarray(found["pixel_values"][0])
        pixels = pixels if pixels.dtype == np.uint8 else pixels.round().clip(0, 255).astype(np.uint8)
        if self.tiles:
            count = self.processor._get_number_of_features(image.height, image.width, self.side, self.side)
            return pixels, (image.height, image.width), count
        rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
        canvas = np.zeros(self.shape, np.uint8)
        canvas[:, : rows * patch, : columns * patch] = pixels[:, : rows * patch, : columns * patch]
        return canvas, (rows * patch, columns * patch), rows * columns

    def squared(self, image: Image.Image) -> Image.Image:
        """Padded to a square with the mean colour, then resized (AIMV2, Table C1)."""
        side = max(image.size)
        if image.width != image.height:
            square = Image.new("RGB", (side, side), self.fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return image if side == self.side else image.resize((self.side, self.side), Image.Resampling.BICUBIC)


class RowMaker:
    """Samples to rows.

    Attributes:
        chat: template and tokenizer.
        image: of the processor.
        limit: most tokens of a row; None: no limit.
        cut: a longer row ends there; else it is left out.
        prompt: the question of a sample that has captions only.
        max_pixels: of an image.
    """

    def __init__(self, processor: Any, limit: int | None, cut: bool, prompt: str, max_pixels: int) -> None:
        self.chat, self.image = Chat(processor.tokenizer), ImagePart(processor)
        self.limit, self.cut, self.prompt, self.max_pixels = limit, cut, prompt, max_pixels

    def __call__(
        self, key: str, parts: Parts, rng: np.random.Generator | None = None, weights: dict[str, float] | None = None
    ) -> Row:
        """The row of a sample.

        Args:
            key: of the sample.
            parts: of the sample.
            rng: draws a caption where there is no conversation; None: the first one.
            weights: of caption fields.

        Raises:
            BadRow: nothing to train on in it, with the reason.
            TooLong: more tokens than fit.
        """
        try:
            conversation, images = self.read(parts, rng, weights)
            ids, scored = self.chat.encode(conversation)
        except (ConversationError, ChatError) as error:
            raise BadRow(getattr(error, "code", "template"), str(error)) from None
        try:
            found = [self.image(decode_image(data, self.max_pixels)) for data in images]
        except ImageError as error:
            raise BadRow("image-unreadable", str(error)) from None
        except (ValueError, ArithmeticError, LookupError) as error:  # a shape that no processor foresees: 1 x 60,000
            raise BadRow("image-unreadable", f"{type(error).__name__}: {first_line(error)}") from None
        if (tokens := ids.count(self.chat.image_id)) != len(images):
            raise BadRow("template", f"{tokens} image tokens in its text for {len(images)} images")
        if images:
            counts = [count for _, _, count in found]
            scored = spread(scored, ids, self.chat.image_id, counts)
            ids = spread(ids, ids, self.chat.image_id, counts)
        row = Row(key, ids, scored, [pixels for pixels, _, _ in found], [size for _, size, _ in found])
        return row if self.limit is None or len(ids) <= self.limit else self.shortened(row, self.limit)

    def read(
        self, parts: Parts, rng: np.random.Generator | None, weights: dict[str, float] | None
    ) -> tuple[Conversation, list[bytes]]:
        """The conversation of a sample and its encoded images; of captions one question and its answer."""
        about, images, captions = json_of(parts), images_of(parts), captions_of(parts)
        if not captions or holds_conversation(about):
            return conversation_of(about, len(images)), images
        every = [text for field in captions.values() for text in field]
        caption = draw_caption(rng, captions, weights) if rng is not None else next(iter(every), None)
        if caption is None or not caption.strip():
            raise ConversationError("no-answer", "no conversation and no caption")
        question = f"{IMAGE}\n" * len(images) + self.prompt
        return Conversation((Turn("user", question), Turn("assistant", caption))), images

    def shortened(self, row: Row, limit: int) -> Row:
        """A row that ends at ``limit``, where that is wanted and keeps its images and an answer."""
        more = len(row.ids) - limit
        if not self.cut or self.chat.image_id in row.ids[limit:] or not any(row.scored[:limit]):
            raise TooLong(f"{len(row.ids):,} tokens, {row.ids.count(self.chat.image_id):,} of them of images")
        return Row(row.key, row.ids[:limit], row.scored[:limit], row.pixels, row.sizes, more)


def rows_to_batch(
    rows: Sequence[Row], shape: tuple[int, ...], bad: Sequence[tuple[str, str]] = (), sources: Sequence[int] = ()
) -> Batch:
    """Rows, right-padded; ``token_rows`` are the tokens of the answers.

    Args:
        rows: B of them.
        shape: of an image's pixels, for a batch without images.
        bad: samples that could not be read.
        sources: of the rows in the mixture.
    """
    pixels = [one for row in rows for one in row.pixels]
    images = torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, *shape, dtype=torch.uint8)
    return make_batch(
        images, [row.ids for row in rows], None, 0, [row.key for row in rows], bad, sources=sources,
        image_count=[len(row.pixels) for row in rows], answers=[row.scored for row in rows],
        sizes=[size for row in rows for size in row.sizes],
    )  # fmt: skip


def pack_texts(batch: Batch) -> Batch:
    """The same conversations in fewer rows, each as long as the longest one at most: the longest first, each into the first row with room.

    Args:
        batch: of :func:`rows_to_batch`.
    """
    lengths, width = batch.text_len.tolist(), batch.text.shape[1]
    bins, room = list[list[int]](), list[int]()
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = next((row for row, left in enumerate(room) if left >= lengths[number]), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(width)
        bins[row].append(number)
        room[row] -= lengths[number]
    scored = torch.zeros(batch.text.numel(), dtype=torch.bool)
    scored[batch.real_tokens()] = True
    scored, text = scored.view_as(batch.text), torch.zeros(len(bins), width, dtype=torch.int64)
    marks, positions = torch.zeros_like(text, dtype=torch.bool), torch.zeros_like(text)
    for row, numbers in enumerate(bins):
        at = 0
        for number in numbers:
            own, there = slice(0, lengths[number]), slice(at, at + lengths[number])
            text[row, there], marks[row, there] = batch.text[number, own], scored[number, own]
            positions[row, there] = torch.arange(lengths[number])
            at += lengths[number]
        positions[row, at:] = torch.arange(width - at)
    order = [number for numbers in bins for number in numbers]
    assert batch.image_count is not None
    ends = batch.image_count.cumsum(0).tolist()
    counts = batch.image_count.tolist()
    images = [at for number in order for at in range(ends[number] - counts[number], ends[number])]
    rows = marks.flatten().nonzero().flatten()
    return replace(
        batch,
        text=text,
        text_len=torch.tensor([width - left for left in room]),
        token_rows=pad_rows(rows, ROW_BUCKET, text.numel()),
        positions=positions,
        images=batch.images[images],
        image_count=batch.image_count[order],
        sizes=[batch.sizes[at] for at in images],
        keys=[batch.keys[number] for number in order],
        sources=[batch.sources[number] for number in order] if batch.sources else [],
    )


class _QuietPacking(PackingDataset):
    """Without energon's own progress bar."""

    def _fill_reading_buffer(self, source_iter: Iterator[Any], log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter, False)


class ConversationEncoder(PairEncoder):
    """Samples to rows, rows of similar length to batches.

    Attributes:
        make: samples to rows.
        window: rows from which those of similar length are put together; 0: rows go as they come.
    """

    def __init__(self, config: DataConfig, view: View, seed: int, worker: WorkerConfig, make: RowMaker) -> None:
        super().__init__(config, view, None, seed, worker)
        self.make, self.window, self.size = make, 0, 1
        self.long = self.drawn = self.rows = 0
        self.kinds: list[str] = []

    def draw(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        source = sample["__subflavors__"]["source"]
        parts = {name.lower(): part for name, part in sample.items() if not name.startswith("__")}
        self.drawn += 1
        try:
            row = self.make(sample["__key__"], parts, rng, self.sources[source].captions)
        except TooLong as error:
            self.long += 1
            if self.drawn >= MANY and not self.rows:
                raise FatalSampleError(
                    f"{FATAL}data.train: none of the first {self.drawn:,} rows is a conversation that fits (the last one: {error}); "
                    "objective.row_tokens, objective.long_rows"
                ) from None
            raise SkipSample() from None
        except BadRow as error:
            self.kinds.append(error.kind)
            raise
        self.rows += 1
        self.long += row.cut > 0
        about = {name: sample[name] for name in ("__key__", "__restore_key__")}
        return {**about, "row": row, "source": source}

    def reject(self, bad: BadSample) -> None:
        """Record a bad row; without ``data.max_bad`` the worker ends where more than half of its rows are bad."""
        super().reject(bad)
        if self.config.max_bad is None and self.drawn >= MANY and 2 * self.bad > self.drawn:
            raise FatalSampleError(
                f"{FATAL}data.train: {self.bad:,} of the first {self.drawn:,} rows are bad: {', '.join(map(str, self.fresh[-3:]))}, ...; "
                "`aimv2 data check` counts them by kind"
            )

    def build_batch(
        self, dataset: Any, *, batch_size: int | None, packing_buffer_size: int | None = None,
        worker_config: WorkerConfig, **more: Any,
    ) -> Any:  # fmt: skip
        """Energon's, or with ``window`` batches of rows of similar length."""
        assert batch_size is not None
        if not self.window:
            return TaskEncoder.build_batch(self, dataset, batch_size=batch_size, worker_config=worker_config, **more)
        self.size = batch_size
        return _QuietPacking(dataset, self.window, self.alike, self.batch, worker_config=worker_config)

    def alike(self, samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Batches of rows of similar length, in an order that depends on the seed and the number of the window, equal in all workers."""
        number = self.current_sample_index // max(self.worker.num_workers, 1)
        ordered = sorted(samples, key=lambda sample: len(sample["row"].ids))
        batches = [ordered[at : at + self.size] for at in range(0, len(ordered), self.size)]
        order = np.random.default_rng([self.seed, number]).permutation(len(batches))
        return [batches[at] for at in order.tolist()]

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        fresh, self.fresh = self.fresh, []
        kinds, self.kinds, long, self.long = self.kinds, [], self.long, 0
        rows, sources = [sample["row"] for sample in samples], [sample["source"] for sample in samples]
        batch = rows_to_batch(rows, self.make.image.shape, fresh, sources)
        batch.long, batch.kinds = long, kinds
        return batch


class ConversationStream(TrainStream):
    """Endless micro-batches of conversations of this rank; see :class:`TrainStream`.

    Attributes:
        long: rows so far that were longer than the limit.
        passed: bad rows so far, by kind.
    """

    def __init__(
        self, config: DataConfig, make: RowMaker, batch_size: int, seed: int, rank: int, ranks: int, window: int, accumulate: int,
        pack: bool,
    ) -> None:  # fmt: skip
        """``window``: global batches from which rows of similar length are put together."""
        self.make, self.window, self.accumulate, self.pack = make, window, accumulate, pack
        self.long, self.next_line = 0, 1
        self.passed, self.met, self.said, self.next_bad = PassedOver(), 0, 0, 1
        super().__init__(config, View(0, 0, False), None, batch_size, seed, rank, ranks)

    def encoder(
        self, config: DataConfig, view: View, tokenizer: Any, seed: int, worker: WorkerConfig, size: int
    ) -> ConversationEncoder:
        made = ConversationEncoder(config, view, seed, worker, self.make)
        whole = size * max(worker.num_workers, 1) * worker.world_size
        batches = min(self.window, self.samples // whole)  # a row twice in a window would be twice in a batch
        made.window = size * batches if batches > 1 else 0
        return made

    def note(self, part: Batch) -> None:
        for kind, bad in zip(part.kinds, part.bad):
            if self.reject(named := BadSample(*bad)):
                self.passed.add(kind, str(named))
                self.met += 1  # without those of the run before a resume, whose kinds are not kept

    def joined(self, parts: list[Batch]) -> list[Batch]:
        self.long += sum(part.long for part in parts)
        if self.long >= self.next_line:
            what = "cut there" if self.make.cut else "left out"
            say(
                f"data.train: {self.long:,} rows so far are longer than {self.make.limit:,} tokens and were {what} (objective.row_tokens, "
                "objective.long_rows)"
            )
            self.next_line = 10 * self.long
        if self.met >= self.next_bad:
            self.say_bad()
        batch = super().joined(parts)
        assert isinstance(batch, Batch)
        micro = split_batch(batch, self.accumulate, 0)
        return [pack_texts(one) for one in micro] if self.pack else micro

    def say_bad(self) -> None:
        """Bad rows so far, a line for each kind."""
        for line in passed_lines(self.passed.result(), "data.train: bad rows so far, left out"):
            say(line)
        self.said, self.next_bad = self.met, 10 * self.met

    def close(self) -> None:
        if self.met > self.said:
            self.say_bad()
        super().close()


def held_out_rows(
    shards: Sequence[Path], make: RowMaker, limit: int, rank: int, ranks: int
) -> tuple[list[Row], int, PassedOver]:
    """The first ``limit`` samples in shard order (0: all), every ``ranks``-th for ``rank``, without those that are too long or bad.

    Returns:
        the rows, the number of those that were too long, and the bad ones by kind.
    """
    rows, long, passed = list[Row](), 0, PassedOver()
    samples = islice((pair for shard in shards for pair in read_samples(shard)), limit or None)
    for key, parts in islice(samples, rank, None, ranks):
        try:
            rows.append(make(key, parts))
        except TooLong:
            long += 1
        except BadRow as error:
            passed.add(error.kind, f"{key} ({error})")
    return rows, long, passed
