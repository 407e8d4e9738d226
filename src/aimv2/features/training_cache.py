"""The frozen encoder's features of every training image, computed once and read at each visit instead of the image.

A store of ``features.npy`` float16 [N, I, D] of the centre views; the notes hold the captions and the rejected samples.

Legend: N samples in the order of the shards, I patches, D width, B pairs of a rank's batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aimv2.batch import Batch, make_batch
from aimv2.config.schema import DataConfig
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.prefetch import ahead, batched
from aimv2.data.shards.format import captions_of, read_sample, scan_shard
from aimv2.data.stream.samples import (
    draw_caption,
    image_bytes,
    sample_rng,
    too_many_bad,
    training_shards,
    training_sources,
)
from aimv2.data.stream.transforms import centre_crop_box, crop_resize, to_pixels
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import RankError, UsageError
from aimv2.features.contents import contents_of_files
from aimv2.features.fingerprint import architecture, fingerprint, model_fingerprint, weights_hash
from aimv2.features.store import FeatureStore, open_arrays, progress_bar
from aimv2.models.encoder import VisionEncoder

BATCH = 64  # images in the encoder at once
PART_BATCHES = 16  # batches a part
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
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


class CentreView(NamedTuple):
    """A sample as the encoder sees it: uint8 [3, S, S] and captions; or why it can't be used."""

    row: int
    pixels: np.ndarray | None
    captions: Captions
    reason: str


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
    shape = {key: value for key, value in architecture(encoder).items() if key != "pool_heads"}  # the head is not run
    about = fingerprint(
        model_fingerprint(weights_hash(encoder, without="head."), shape, precision),
        {"image_size": encoder.config.image_size, "crop": "centre", "max_pixels": config.max_pixels},
        (),
        "none",
        {"images": len(rows), "contents_sha256": contents},
    )
    store = FeatureStore(
        Path(config.features),
        about,
        "data.features",
        noted={"part_images": BATCH * PART_BATCHES},
        rank=rank,
        ranks=ranks,
    )
    size = int(store.about["part_images"])
    parts = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    try:
        features = store.array("features", np.float16, (len(rows), encoder.config.patches, encoder.config.width))
        fill(store, features, parts, config, encoder.to(device), rows, precision)
    except OSError as error:
        message = f"data.features {store.folder}: can't be written: {error.strerror or error}; give another folder"
        raise UsageError(message, code="unreadable") from None
    notes = store.gather(len(parts))
    captions = {int(row): found for note in notes for row, found in note["captions"].items()}
    return TrainingFeatures(
        open_arrays(store.folder, ["features"], len(rows))[0], rows, good_rows(config, rows, captions), captions
    )


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
            raise UsageError(f"data.train: {one.name or one.path} has no image with a caption that can be read")
    if len(bad := sorted(set(range(len(rows))) - set(chain(*good)))) > config.max_bad:
        raise UsageError(too_many_bad([str(rows[row]) for row in bad], config.max_bad), code="limit")
    return [np.array(kept) for kept in good]


def fill(
    store: FeatureStore,
    features: np.ndarray,
    parts: Sequence[range],
    config: DataConfig,
    encoder: VisionEncoder,
    rows: Sequence[TrainingRow],
    precision: str,
) -> None:
    """Computes this rank's missing parts."""
    if not (missing := store.missing(len(parts))):
        return
    size, bad = encoder.config.image_size or 0, list[str]()
    own = list(chain.from_iterable(parts[part] for part in missing))
    views = ahead(lambda row: centre_view(row, rows[row], config, size), own)
    with progress_bar("features", len(own), shown=store.rank == 0) as advance:
        for part in missing:
            rejected, captions = list[dict[str, Any]](), dict[int, Captions]()
            for batch in batched(islice(views, len(parts[part])), BATCH):
                lost = [one for one in batch if one.pixels is None]
                bad += [f"{rows[one.row]} ({one.reason})" for one in lost]
                if len(bad) > config.max_bad:
                    raise RankError(too_many_bad(bad, config.max_bad), code="limit")
                rejected += [{"row": one.row, "key": rows[one.row].key, "reason": one.reason} for one in lost]
                good = {one.row: one.pixels for one in batch if one.pixels is not None}
                if good:
                    features[list(good)] = run(encoder, torch.from_numpy(np.stack(list(good.values()))), precision)
                captions |= {one.row: one.captions for one in batch if one.row in good}
                advance(len(batch))
            features.flush()  # type: ignore[attr-defined]
            store.commit(part, {"rows": len(captions), "rejected": rejected, "captions": captions})


def centre_view(row: int, at: TrainingRow, config: DataConfig, size: int) -> CentreView:
    """The centre view of a sample, as validation sees it."""
    parts = read_sample(at.shard, at.start, at.end)
    captions = captions_of(parts)
    if not any(captions.values()):
        return CentreView(row, None, {}, "no caption")
    try:
        image = decode_image(image_bytes(parts), config.max_pixels)
    except ImageError as error:
        return CentreView(row, None, {}, str(error))
    view = crop_resize(image, centre_crop_box(*image.size), (size, size))
    return CentreView(row, to_pixels(view), captions, "")


@torch.inference_mode()
def run(encoder: VisionEncoder, pixels: Tensor, precision: str) -> np.ndarray:
    """uint8 [B, 3, S, S] -> float16 [B, I, D].

    Raises:
        UsageError: a feature that float16 can't hold.
    """
    device = encoder.mean.device
    half = nullcontext() if precision == "fp32" else torch.autocast(device.type, HALF[precision])
    with half, torch.compiler.set_stance("force_eager"):
        found = encoder(pixels.to(device)).half()
    if not bool(torch.isfinite(found).all()):
        raise UsageError("data.features: a feature is larger than float16 holds; leave data.features out")
    return found.cpu().numpy()


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
        return make_batch(features, tokens, None, 0, [self.found.rows[row].key for row in chosen])

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
