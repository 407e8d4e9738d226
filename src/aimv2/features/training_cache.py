"""The frozen encoder's features of every training image, computed once and read at each visit instead of the image.

A cache is a folder: ``features.npy`` float16 [N, I, D] of the centre views, ``state.npy`` uint8 [N] (0 not there yet, 1 there, 2
can't be used), ``captions-RANK.jsonl``, and ``about.json`` with what it was made from. An interrupted pass goes on.

Legend: N samples in the order of the shards, I patches, D width, B pairs of a rank's batch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
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
from aimv2.models.encoder import VisionEncoder

ABOUT, FEATURES, STATE = "about.json", "features.npy", "state.npy"
GOOD, BAD = 1, 2
SIZE = 64  # images in the encoder at once
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Row(NamedTuple):
    """A training sample: its key, its source in the mixture, and where it lies."""

    key: str
    source: int
    shard: Path
    start: int
    end: int


class Seen(NamedTuple):
    """A sample as the encoder sees it: uint8 [3, S, S] and captions by field; or why it can't be used."""

    row: int
    pixels: np.ndarray | None
    captions: dict[str, list[str]]
    reason: str


@dataclass(frozen=True)
class Ranks:
    """This process among all, and how they wait for each other."""

    rank: int
    size: int
    wait: Callable[[], None]


@dataclass(frozen=True)
class Features:
    """A complete cache.

    Attributes:
        features: float16 [N, I, D], memory-mapped.
        rows: N samples.
        good: int64, for each source the rows that can be used.
        captions: by row, the captions of those.
    """

    features: np.ndarray
    rows: list[Row]
    good: list[np.ndarray]
    captions: dict[int, dict[str, list[str]]]


def cached_features(
    config: DataConfig, encoder: VisionEncoder, device: torch.device, precision: str, ranks: Ranks
) -> Features:
    """The cache in ``config.features``; the encoder runs over what is not there yet, each rank over its part.

    Args:
        config: of the data.
        encoder: frozen, with its weights; it is moved to the device.
        device: where it runs.
        precision: of its products: fp32, bf16 or fp16.
        ranks: all processes; they share the folder.

    Raises:
        UsageError: a cache of another encoder or other data, no room, a folder that can't be written, features too large for
            float16, more unusable samples than ``data.max_bad``.
    """
    assert config.features is not None
    folder = Path(config.features)
    rows, data = training_rows(config)
    about = describe(encoder, data, len(rows), precision)
    shape = (len(rows), encoder.config.patches, encoder.config.width)
    if ranks.rank == 0 and not (folder / ABOUT).is_file():
        create(folder, about, shape)
    ranks.wait()
    check(folder, about)
    try:
        fill(folder, config, encoder.to(device), rows, precision, ranks)
    except OSError as error:
        raise UsageError(f"data.features {folder} can't be written: {error.strerror or error}") from None
    ranks.wait()
    state = np.load(folder / STATE)
    captions = read_captions(folder, state)
    return Features(np.load(folder / FEATURES, mmap_mode="r"), rows, good_rows(config, rows, state, captions), captions)


def training_rows(config: DataConfig) -> tuple[list[Row], str]:
    """Every training sample, source by source, by the headers of the shards.

    Returns:
        the samples, and a hash of their places, of the sizes of their files and of their captions: other captions beside the
        same images are other data. The images are not read; a file of another picture has another size as a rule.
    """
    found, data = list[Row](), hashlib.sha256()
    for source, shards in enumerate(training_shards(config)):
        for shard in shards:
            with shard.open("rb") as file:
                scan = scan_shard(shard, met=partial(add_member, data, file))
            rows = [Row(key, source, shard, *span) for key, *span in zip(scan.keys, scan.offsets, scan.offsets[1:])]
            data.update(f"{source} {shard.name} {len(rows)}\n".encode())
            found += rows
    return found, data.hexdigest()


def add_member(data: Any, file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Adds a file of a shard to the hash ``data``: name, place and size, and what is in it where it may hold captions."""
    data.update(f"{member.name} {member.offset_data} {member.size}\n".encode())
    if member.name.lower().endswith((".txt", ".json")):
        file.seek(member.offset_data)
        data.update(file.read(member.size))


def good_rows(
    config: DataConfig, rows: Sequence[Row], state: np.ndarray, captions: dict[int, dict[str, list[str]]]
) -> list[np.ndarray]:
    """For each source the rows that are there and have a caption in a field that the mixture asks for.

    Raises:
        UsageError: a source without any, or more others than ``data.max_bad``.
    """
    good = []
    for number, source in enumerate(training_sources(config)):
        fields = source.captions and {name for name, weight in source.captions.items() if weight > 0}
        own = [row for row in np.flatnonzero(state == GOOD).tolist() if rows[row].source == number]
        kept = [
            row for row in own if any(text and (not fields or name in fields) for name, text in captions[row].items())
        ]
        if not kept:
            raise UsageError(f"data.train: {source.name or source.path} has no image with a caption that can be read")
        good.append(np.array(kept))
    bad = sorted(set(range(len(rows))) - {row for part in good for row in part.tolist()})
    if len(bad) > config.max_bad:
        raise UsageError(too_many_bad([f"{rows[row].shard.name}/{rows[row].key}" for row in bad], config.max_bad))
    return good


def describe(encoder: VisionEncoder, data: str, samples: int, precision: str) -> dict[str, Any]:
    """What a cache was made from: the trunk's weights, the samples (``data``: their hash), and how it was computed."""
    trunk = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        if not name.startswith("head."):
            trunk.update(f"{name} {tuple(value.shape)}\n".encode())
            trunk.update(value.detach().cpu().float().contiguous().numpy().data)
    return {
        "encoder": trunk.hexdigest(),
        "data": data,
        "samples": samples,
        "image_size": encoder.config.image_size,
        "mean_std": [list(encoder.config.mean), list(encoder.config.std)],
        "precision": precision,
        "view": "centre",
    }


def create(folder: Path, about: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """An empty cache.

    Raises:
        UsageError: something else in the folder, no room, not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"data.features {folder}: something else is there; give a new folder, or an empty one")
        need, free = 2 * int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(folder).free
        if need > free:
            raise UsageError(
                f"data.features {folder}: features of {shape[0]} images take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                "free there; leave data.features out"
            )
        for name, kind, dims in ((FEATURES, np.float16, shape), (STATE, np.uint8, shape[:1])):
            np.lib.format.open_memmap(folder / name, mode="w+", dtype=kind, shape=dims)
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"data.features {folder} can't be written: {error.strerror}") from None


def check(folder: Path, about: dict[str, Any]) -> None:
    """Raises UsageError where a cache was made from something else."""
    try:
        stored = json.loads((folder / ABOUT).read_text())
        different = [key for key in about if stored.get(key) != about[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"data.features {folder / ABOUT} can't be read: {error!r}") from None
    if different:
        raise UsageError(
            f"data.features {folder}: a cache of other features (another {', '.join(different)} than here); give a new "
            "folder, or the model and data that it was made from"
        )


def fill(
    folder: Path, config: DataConfig, encoder: VisionEncoder, rows: Sequence[Row], precision: str, ranks: Ranks
) -> None:
    """Computes what is not there yet; rank r takes every size-th batch of rows from the r-th on."""
    state = np.lib.format.open_memmap(folder / STATE, mode="r+")
    features = np.lib.format.open_memmap(folder / FEATURES, mode="r+")
    places = [range(at, min(at + SIZE, len(rows))) for at in range(0, len(rows), SIZE)][ranks.rank :: ranks.size]
    missing = [row for place in places for row in place if not state[row]]
    if not missing:
        return
    size, bad = encoder.config.image_size or 0, list[str]()
    seen = ahead(lambda row: see(row, rows[row], config, size), missing)
    total = -(-len(missing) // SIZE)
    console = Console(file=sys.stderr)
    shown = track(
        batched(seen, SIZE), "features", total, console=console, transient=True, disable=ranks.rank > 0 or not console.is_terminal
    )  # fmt: skip
    with (folder / f"captions-{ranks.rank:05d}.jsonl").open("a", encoding="utf-8") as captions:
        captions.write("\n")  # behind a line that was cut
        for batch in shown:
            bad += [f"{rows[one.row].shard.name}/{rows[one.row].key} ({one.reason})" for one in batch if one.reason]
            if len(bad) > config.max_bad:
                raise RankError(too_many_bad(bad, config.max_bad))
            good = [one for one in batch if one.pixels is not None]
            if good:
                pixels = torch.from_numpy(np.stack([one.pixels for one in good if one.pixels is not None]))
                features[[one.row for one in good]] = run(encoder, pixels, precision)
            # a row counts as done after everything of it is written
            captions.write("".join(json.dumps({"row": one.row, "captions": one.captions}) + "\n" for one in good))
            captions.flush()
            features.flush()
            state[[one.row for one in batch]] = [BAD if one.reason else GOOD for one in batch]
            state.flush()


def see(row: int, at: Row, config: DataConfig, size: int) -> Seen:
    """The centre view of a sample, as validation sees it."""
    parts = read_sample(at.shard, at.start, at.end)
    captions = captions_of(parts)
    if not any(captions.values()):
        return Seen(row, None, {}, "no caption")
    try:
        image = decode_image(image_bytes(parts), config.max_pixels)
    except ImageError as error:
        return Seen(row, None, {}, str(error))
    view = crop_resize(image, centre_crop_box(*image.size), (size, size))
    return Seen(row, to_pixels(view), captions, "")


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


def read_captions(folder: Path, state: np.ndarray) -> dict[int, dict[str, list[str]]]:
    """Captions of the rows that are there; half-written lines belong to rows that were done again."""
    found: dict[int, dict[str, list[str]]] = {}
    for file in sorted(folder.glob("captions-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                stored = json.loads(line)
                found[stored["row"]] = stored["captions"]
            except (ValueError, KeyError, TypeError):
                continue
    if lost := [row for row in np.flatnonzero(state == GOOD).tolist() if row not in found]:
        raise UsageError(f"data.features {folder}: the captions of {len(lost)} images are missing; give a new folder")
    return found


class FeatureStream:
    """Endless batches of cached features and captions, restorable.

    What is drawn is a pure function of (seed, step, how often each source was drawn from), whatever the ranks. Every source is
    a permutation anew in each of its epochs.
    """

    def __init__(
        self, found: Features, config: DataConfig, tokenizer: Tokenizer, batch_size: int, seed: int, ranks: Ranks
    ) -> None:
        """``batch_size`` is global. Raises UsageError where there are fewer samples than that."""
        self.found, self.tokenizer, self.ranks, self.seed = found, tokenizer, ranks, seed
        self.batch_size, self.max_tokens = batch_size, config.max_tokens
        self.sources = training_sources(config)
        self.samples = sum(len(part) for part in found.good)
        if self.samples < batch_size:
            raise UsageError(
                f"data.train holds {self.samples} samples, fewer than train.batch_size {batch_size}; "
                "give more data or a smaller batch"
            )
        shares = np.array([source.weight for source in self.sources])
        self.shares = shares / shares.sum()
        self.step, self.taken = 0, [0] * len(self.sources)
        self.orders: dict[int, tuple[int, np.ndarray]] = {}

    def __next__(self) -> Batch:
        drawn = np.random.default_rng([self.seed, self.step]).choice(len(self.sources), self.batch_size, p=self.shares)
        rows = [self._next_of(int(source)) for source in drawn]
        share = self.batch_size // self.ranks.size
        own = range(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        tokens = [self._tokens(rows[at], self.step * self.batch_size + at) for at in own]
        chosen = [rows[at] for at in own]
        self.step += 1
        features = torch.from_numpy(self.found.features[chosen])
        return make_batch(features, tokens, [1] * share, 2, [self.found.rows[row].key for row in chosen])

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
