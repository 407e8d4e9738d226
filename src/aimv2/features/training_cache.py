"""The frozen encoder's features of every training image, computed once and read at each visit instead of the image.

A store of ``last.npy`` float16 [N, I, D] of the centre views; the notes hold the captions and the rejected samples.

Legend: N samples in the order of the shards, I patches, D width, B pairs of a rank's batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from aimv2.batch import Batch, make_batch
from aimv2.config.schema import DataConfig
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.labelled import Labelled
from aimv2.data.images.readers import contents_of_files
from aimv2.data.shards.format import captions_of, read_sample, scan_shard
from aimv2.data.stream.draws import draw_caption, sample_rng
from aimv2.data.stream.rejected import too_many_bad
from aimv2.data.stream.samples import image_bytes, training_shards, training_sources
from aimv2.data.stream.transforms import centre_crop_box, crop_resize
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import RankError, UsageError
from aimv2.features.extraction import fill
from aimv2.features.fingerprint import architecture, fingerprint, model_fingerprint, weights_hash
from aimv2.features.frozen import LAST, of_encoder
from aimv2.features.store import FeatureStore
from aimv2.models.encoder import VisionEncoder

BATCH = 64  # images per forward pass
PART_BATCHES = 16  # batches a part
Captions = dict[str, list[str]]  # by field


class TrainingRow(NamedTuple):
    """A training sample: its key, its source in the mixture, and where it lies."""

    key: str
    source: int
    shard: Path
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.shard.name}/{self.key}"


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of all training samples.

    Attributes:
        features: float16 [N, I, D], memory-mapped.
        rows: N samples.
        good: int64, for each source the rows that can be used.
        captions: of those, by row.
    """

    features: np.ndarray
    rows: list[TrainingRow]
    good: list[np.ndarray]
    captions: dict[int, Captions]


def training_features(
    config: DataConfig, encoder: VisionEncoder, device: torch.device, precision: str, rank: int = 0, ranks: int = 1
) -> TrainingFeatures:
    """The features in ``config.features``; each rank computes its part of what is missing.

    Args:
        config: of the data.
        encoder: frozen, with its weights; it is moved to the device.
        device: where it runs.
        precision: of the matmuls: fp32, bf16 or fp16.
        rank, ranks: this process among those that share the folder.

    Raises:
        UsageError: features of another encoder or other data, no room, a folder that can't be written, values too large for
            float16, more unusable samples than ``data.max_bad``.
    """
    assert config.features is not None
    rows, contents = training_rows(config)
    store_about = fingerprint(
        trunk_fingerprint(encoder, precision),
        {"image_size": encoder.config.image_size, "crop": "centre", "max_pixels": config.max_pixels},
        [LAST],
        "none",
        {"images": len(rows), "contents_sha256": contents},
    )
    store = FeatureStore(
        Path(config.features),
        store_about,
        "data.features",
        noted={"part_images": BATCH * PART_BATCHES},
        rank=rank,
        ranks=ranks,
    )
    frozen = replace(of_encoder("data.features", encoder.to(device)), precision=precision)
    captions, bad = dict[int, Captions](), list[str]()

    def centre_view(row: int) -> Image.Image:
        """As validation sees it."""
        at = rows[row]
        parts = read_sample(at.shard, at.start, at.end)
        captions[row] = captions_of(parts)
        if not any(captions[row].values()):
            raise ImageError("no caption")
        image = decode_image(image_bytes(parts), config.max_pixels)
        return crop_resize(image, centre_crop_box(*image.size), (frozen.side, frozen.side))

    def extra(good: list[int], rejected: list[dict[str, Any]]) -> dict[str, Any]:
        bad.extend(f"{rows[line['row']]} ({line['reason']})" for line in rejected)
        if config.max_bad is not None and len(bad) > config.max_bad:
            raise RankError(too_many_bad(bad, config.max_bad), code="limit")
        return {"captions": {row: captions.pop(row) for row in good}}

    images = Labelled("", "", "train", (), [row.key for row in rows], np.zeros(len(rows), np.int64), centre_view)
    try:
        store.array(LAST, np.float16, (len(rows), encoder.config.patches, encoder.config.width))
        notes = fill(store, frozen, images, [LAST], "none", BATCH, extra=extra)
    except OSError as error:
        message = f"data.features {store.folder}: can't be written: {error.strerror or error}; give another folder"
        raise UsageError(message, code="unreadable") from None
    captions = {int(row): found for note in notes for row, found in note["captions"].items()}
    return TrainingFeatures(store.read_array(LAST, len(rows)), rows, good_rows(config, rows, captions), captions)


def trunk_fingerprint(encoder: VisionEncoder, precision: str) -> dict[str, Any]:
    """Of an encoder without its pooling head, which is trained."""
    shape = {key: value for key, value in architecture(encoder).items() if key != "pool_heads"}
    return model_fingerprint(weights_hash(encoder, without="head."), shape, precision)


def training_rows(config: DataConfig) -> tuple[list[TrainingRow], str]:
    """Every training sample, source by source, by the headers of the shards.

    Returns:
        the samples, and a hash of the shards' places in the mixture, names, sizes and modification times.
    """
    found, contents = list[TrainingRow](), hashlib.sha256()
    for source, shards in enumerate(training_shards(config)):
        for shard in shards:
            scan = scan_shard(shard)
            found += [
                TrainingRow(key, source, shard, *span) for key, *span in zip(scan.keys, scan.offsets, scan.offsets[1:])
            ]
            contents.update(f"{source} {shard.name} {len(scan.keys)} {contents_of_files([shard])}\n".encode())
    return found, contents.hexdigest()


def good_rows(config: DataConfig, rows: Sequence[TrainingRow], captions: dict[int, Captions]) -> list[np.ndarray]:
    """For each source the rows that have a caption in a field of the mixture.

    Raises:
        UsageError: a source without any, or more others than ``data.max_bad``.
    """
    sources = training_sources(config)
    fields = [{name for name, weight in (source.captions or {}).items() if weight > 0} for source in sources]
    good: list[list[int]] = [[] for _ in sources]
    for row, found in sorted(captions.items()):
        source = rows[row].source
        if any(texts and (not fields[source] or name in fields[source]) for name, texts in found.items()):
            good[source].append(row)
    for one, kept in zip(sources, good):
        if not kept:
            raise UsageError(
                f"data.train: {one.name or one.path} has no image with a caption that can be read", code="missing"
            )
    bad = sorted(set(range(len(rows))) - set(chain(*good)))
    if config.max_bad is not None and len(bad) > config.max_bad:
        raise UsageError(too_many_bad([str(rows[row]) for row in bad], config.max_bad), code="limit")
    return [np.array(kept) for kept in good]


class CachedPairStream:
    """Endless batches of cached features and captions, restorable.

    A global batch is a pure function of (seed, step, how often each source was drawn from), whatever the ranks. Each source is
    permuted anew in each of its epochs.
    """

    def __init__(
        self,
        found: TrainingFeatures,
        config: DataConfig,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        """``batch_size`` is global. Raises UsageError where there are fewer samples than that."""
        self.found, self.tokenizer, self.rank, self.ranks, self.seed = found, tokenizer, rank, ranks, seed
        self.batch_size, self.max_tokens = batch_size, config.max_tokens
        self.sources = training_sources(config)
        self.samples = sum(len(part) for part in found.good)
        if self.samples < batch_size:
            raise UsageError(
                f"data.train holds {self.samples} samples, fewer than train.batch_size {batch_size}; "
                "give more data or a smaller batch",
                code="limit",
            )
        weights = np.array([source.weight for source in self.sources])
        self.weights = weights / weights.sum()
        self.step, self.taken = 0, [0] * len(self.sources)
        self.orders: dict[int, tuple[int, np.ndarray]] = {}

    def __next__(self) -> Batch:
        drawn = np.random.default_rng([self.seed, self.step]).choice(len(self.sources), self.batch_size, p=self.weights)
        rows = [self._next_of(int(source)) for source in drawn]
        size = self.batch_size // self.ranks
        own = range(self.rank * size, (self.rank + 1) * size)
        tokens = [self._tokens(rows[at], self.step * self.batch_size + at) for at in own]
        chosen = [rows[at] for at in own]
        self.step += 1
        features = torch.from_numpy(self.found.features[chosen])
        return make_batch(None, tokens, None, 0, [self.found.rows[row].key for row in chosen], features=features)

    def _next_of(self, source: int) -> int:
        """The next row of a source."""
        good = self.found.good[source]
        epoch, at = divmod(self.taken[source], len(good))
        self.taken[source] += 1
        known = self.orders.get(source)
        if known is None or known[0] != epoch:
            known = epoch, np.random.default_rng([self.seed, source, epoch]).permutation(good)
            self.orders[source] = known
        return int(known[1][at])

    def _tokens(self, row: int, visit: int) -> list[int]:
        """One caption of a sample at its ``visit``, the number of the pair since the run began."""
        at, captions = self.found.rows[row], self.found.captions[row]
        rng, weights = sample_rng(self.seed, at.key, 0, visit), self.sources[at.source].captions
        caption = draw_caption(rng, captions, weights)
        assert caption is not None, at  # good_rows left such samples out
        return self.tokenizer.encode(caption, self.max_tokens)

    def state(self) -> Any:
        """The position after the batches taken so far."""
        return {"step": self.step, "taken": list(self.taken)}

    def restore(self, state: Any) -> None:
        """Goes to a position that :meth:`state` gave."""
        self.step, self.taken, self.orders = state["step"], list(state["taken"]), {}

    def close(self) -> None:
        """Nothing is open."""
