"""The training dataloader: shards -> samples -> crops and tokens -> batches, through megatron-energon.

All randomness of a sample is a function of (seed, key, global worker, the worker's own sample index), so a restart repeats
nothing and no two workers share a random stream.
"""

from __future__ import annotations

import atexit
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.energon import Cooker, SkipSample, TaskEncoder, WorkerConfig, get_savable_loader, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from PIL import Image

from aimv2.batch import Batch, join_batches, make_batch
from aimv2.config.schema import DataConfig, Source
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.shards.format import captions_of, find_shards, image_of, label_of, why_no_image
from aimv2.data.shards.index import build_index, count_samples
from aimv2.data.shards.tars import without_dead_links
from aimv2.data.stream.draws import draw_caption, draw_kept, draw_prefix, native_crop_box, sample_rng
from aimv2.data.stream.rejected import CUT, UNREAD, BadSample, Rejected
from aimv2.data.stream.transforms import crop_resize, random_crop_box, to_pixels
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import RankError, UsageError, first_line
from aimv2.io import say

if TYPE_CHECKING:
    from aimv2.data.stream.workers import Watched

FATAL = "the data stream ends: "  # marks our own message within the one that energon builds around it
HOPELESS = 10_000  # bad samples in a row, at most, after which a worker gives up
# energon's messages where offsets and tar differ
BAD_INDEX = ("Inconsistent sample base name",)


@dataclass
class View:
    """What the model takes of a sample.

    Attributes:
        image_size: pixels per side.
        patches: I, patches per image.
        captions: whether a sample without a caption is bad.
        keep: fraction of the image positions that the decoder reads.
        native: native resolution instead of ``image_size``.
        teacher: E, width of the teacher features stored with each image, whose crops are then used; 0: none.
    """

    image_size: int
    patches: int
    captions: bool = True
    keep: float = 1.0
    native: Native | None = None
    teacher: int = 0


@dataclass
class Native:
    """How images of native resolution are batched.

    Attributes:
        patch: p.
        areas: {area: fraction of the mini-batches}.
        budget: patches per mini-batch of one worker; every area divides it.
        rounds: mini-batches per worker and step.
        pack: mini-batches in a packed row; 0: strips of one area.
    """

    patch: int
    areas: dict[int, float]
    budget: int
    rounds: int = 1
    pack: int = 0


def image_bytes(parts: dict[str, bytes]) -> bytes:
    """The encoded image of a WebDataset sample. Raises ImageError where there is none."""
    found = image_of(parts)
    if found is None:
        raise ImageError(why_no_image(parts))
    return found[1]


def _as_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


class PairEncoder(TaskEncoder):
    """Energon task encoder, run in each worker: sample to pixels and token ids, samples to a Batch."""

    decoder = None
    cookers = (Cooker(stateless(_as_is)),)

    def __init__(
        self, config: DataConfig, view: View, tokenizer: Tokenizer | None, seed: int, worker: WorkerConfig
    ) -> None:
        self.config, self.view, self.tokenizer, self.seed, self.worker = config, view, tokenizer, seed, worker
        self.sources = training_sources(config)
        self.bad, self.fresh = 0, list[BadSample]()
        self.hopeless, self.streak = HOPELESS, 0
        self.note: Callable[[str], None] = lambda name: None  # of what is read

    def place(self) -> tuple[int, int]:
        """(global worker, the worker's own index of the current sample)."""
        workers = max(self.worker.num_workers, 1)
        local = self.worker.rank_worker_id()
        return self.worker.rank * workers + local, self.current_sample_index // workers

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        key = sample["__key__"]
        self.note(self.name_of(sample))
        try:
            if (why := sample.get(UNREAD)) is not None:
                raise ImageError(str(why))
            drawn = self.draw(sample, sample_rng(self.seed, key, *self.place()))
        except ImageError as error:
            self.reject(BadSample(self.name_of(sample), str(error)))
            raise SkipSample() from None
        except (SkipSample, FatalSampleError):
            raise
        except (UsageError, MemoryError) as error:  # not the sample's fault: energon would try a hundred more
            raise FatalSampleError(f"{FATAL}{self.name_of(sample)}: {type(error).__name__}: {error}") from error
        except Exception as error:  # what nobody thought of; a mistake of ours is soon more than data.max_bad
            self.reject(BadSample(self.name_of(sample), f"{type(error).__name__}: {first_line(error)}"))
            raise SkipSample() from None
        finally:
            self.note("")
        self.streak = 0
        return drawn

    def name_of(self, sample: dict[str, Any]) -> str:
        """Shard and key of a sample, in a mixture with its source."""
        name = f"{sample.get('__shard__', '')}/{sample['__key__']}"
        if len(self.sources) == 1:
            return name
        source = self.sources[sample["__subflavors__"]["source"]]
        return f"{source.name or Path(source.path).name}/{name}"

    def reject(self, bad: BadSample) -> None:
        """Record a bad sample for the next batch; the worker ends only where no good one comes any more."""
        self.bad += 1
        self.fresh.append(bad)
        self.streak += 1
        if self.streak > self.hopeless:
            raise FatalSampleError(
                f"{FATAL}data.train: none of {self.streak:,} samples in a row can be used, such as {', '.join(map(str, self.fresh[:5]))}"
            )

    def draw(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Decode a sample and draw its crop, flip, caption and prefix."""
        config, size, native = self.config, self.view.image_size, self.view.native
        patches, area = self.view.patches, 0
        if native is not None:
            from aimv2.data.stream.native import draw_area

            area = draw_area(rng, native.areas)
            size = math.ceil(math.sqrt(area) * native.patch)
        draft = math.ceil(1.2 * size / math.sqrt(config.crop_scale))
        parts = {name.lower(): part for name, part in sample.items() if not name.startswith("__")}
        image = decode_image(image_bytes(parts), config.max_pixels, draft)
        stored = None
        if self.view.teacher:
            from aimv2.data.stream.teacher_views import draw_view

            stored = draw_view(rng, parts, patches, self.view.teacher)
            image = crop_resize(image, stored.place(*image.size), (size, size))
        elif native is None:
            box = random_crop_box(rng, *image.size, config.crop_scale, config.crop_ratio)
            image = crop_resize(image, box, (size, size))
        else:
            from aimv2.data.stream.native import fit_area

            columns, rows = fit_area(*image.size, area)
            box = native_crop_box(rng, *image.size, config.crop_scale)
            image = crop_resize(image, box, (columns * native.patch, rows * native.patch))
        if stored.flip if stored is not None else rng.random() < config.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tokens: list[int] = []
        if self.tokenizer is not None:
            source = self.sources[sample["__subflavors__"]["source"]]
            caption = draw_caption(rng, captions_of(parts), source.captions)
            if caption is None:
                raise ImageError("no caption")
            tokens = self.tokenizer.encode(caption, config.max_tokens)
        if native is not None:
            patches = columns * rows
        drawn = {
            "__key__": sample["__key__"],
            "__restore_key__": sample["__restore_key__"],
            "image": to_pixels(image),
            "tokens": tokens,
            "prefix": draw_prefix(rng, patches),
            "label": label_of(parts),
            "area": area,
            "source": sample["__subflavors__"]["source"],
        }
        if self.view.keep < 1:
            drawn["kept"] = draw_kept(rng, patches, self.view.keep)
        if stored is not None:
            drawn["teacher"] = (stored.features, stored.scales)
        return drawn

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> Batch:
        fresh, self.fresh = self.fresh, []
        kept = None
        if self.view.keep < 1:
            kept = torch.from_numpy(np.stack([sample["kept"] for sample in samples]))
        teacher = None
        if self.view.teacher:
            levels, units = (np.stack([sample["teacher"][part] for sample in samples]) for part in (0, 1))
            teacher = torch.from_numpy(levels), torch.from_numpy(units)
        return make_batch(
            torch.from_numpy(np.stack([sample["image"] for sample in samples])),
            [sample["tokens"] for sample in samples],
            [sample["prefix"] for sample in samples],
            self.view.patches,
            [sample["__key__"] for sample in samples],
            fresh,
            labels=[sample["label"] for sample in samples],
            kept=kept,
            teacher=teacher,
            sources=[sample["source"] for sample in samples],
        )


def training_sources(config: DataConfig) -> list[Source]:
    """The mixture as a list of sources, each with a path.

    Raises:
        UsageError: no data given, or a source without a path.
    """
    if config.train is None:
        raise UsageError("data.train is not set: give a folder of shards by --data.train or $AIMV2_DATA")
    if isinstance(config.train, str):
        return [Source(config.train)]
    if not config.train:
        raise UsageError("data.train is an empty list; expected a path or a list of {name, path, weight}")
    for source in config.train:
        if not source.path:
            raise UsageError(
                f"data.train: source '{source.name}' has no path; give a list of {{name, path}} by --data.train, or one "
                "path, or set $AIMV2_DATA to a folder with a sub-folder of that name",
                code="missing",
            )
    return config.train


def training_shards(config: DataConfig) -> list[list[Path]]:
    """The tars of each source."""
    found = [find_shards(source.path, "train", option="data.train") for source in training_sources(config)]
    for source, shards in zip(training_sources(config), found):
        if not shards:
            raise UsageError(
                f"data.train: {source.path} holds validation shards only (val-*, test-*); train-* are expected"
            )
        without_dead_links(shards, "data.train")
    return found


def validation_shards(config: DataConfig) -> list[Path]:
    """``data.val``, or the val-* (or test-*) tars in the folder of the training ones; [] without either."""
    if config.val is not None:
        try:
            return find_shards(config.val, "val", option="data.val") or find_shards(
                config.val, "train", option="data.val"
            )
        except UsageError as error:
            if error.code != "not-found":
                raise
            hint = "without data.val the val-* shards next to the training ones are read (`aimv2 data import --val-fraction`)"
            raise UsageError(f"{error}; {hint}", option=error.option, code=error.code) from None
    sources = [s for s in training_sources(config) if Path(s.path).is_dir()]
    return [tar for source in sources for tar in find_shards(source.path, "val", option="data.val")]


def training_samples(config: DataConfig) -> int:
    """Samples of all sources; shards without an index get one."""
    return sum(
        count_samples(build_index(shards, _index_dir(config), progress=True)) for shards in training_shards(config)
    )


class TrainStream:
    """Endless batches of this rank; the position can be saved and restored to the sample.

    A global step takes the same number of samples from each global worker, so any split of the same number of workers
    over ranks gives the same global batches.
    """

    def __init__(
        self,
        config: DataConfig,
        view: View,
        tokenizer: Tokenizer | None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``batch_size`` is global; a native view has a patch budget instead.

        Raises:
            UsageError: ``batch_size`` does not divide, or there are too few samples.
        """
        self.view, self.rejected, self.noted = view, Rejected(config.max_bad), set[str]()
        self.parts = max(config.workers, 1)
        if view.native is None and batch_size % (world_size * self.parts):
            raise UsageError(
                f"train.batch_size {batch_size} does not divide by {world_size} ranks x {self.parts} data workers; "
                "change train.batch_size or data.workers",
                code="mismatch",
            )
        self.indices = [build_index(shards, _index_dir(config), progress=True) for shards in training_shards(config)]
        self.samples = sum(count_samples(index) for index in self.indices)
        if view.native is None and self.samples < batch_size:
            raise UsageError(
                f"data.train holds {self.samples} samples, fewer than train.batch_size {batch_size}; "
                "give more data or a smaller train.batch_size",
                code="limit",
            )
        from aimv2.data.stream.tar_reader import read_by_our_rules

        read_by_our_rules()
        worker = WorkerConfig(rank=rank, world_size=world_size, num_workers=config.workers, seed_offset=seed)
        size = batch_size // (world_size * self.parts)
        encoder = self.encoder(config, view, tokenizer, seed, worker, size)
        encoder.hopeless = min(HOPELESS, 2 * self.samples)
        dataset = encoder.build_train_datasets(
            datasets=_load(self.indices, encoder.sources, worker),
            worker_config=worker,
            batch_size=size if view.native is None else None,
            batch_drop_last=False,
            packing_buffer_size=None,
            virtual_epoch_length=0,
            shuffle_buffer_size=config.shuffle_buffer or None,
            blend_mode=DatasetBlendMode.DATASET_WEIGHT,
            repeat=True,
        )
        warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")  # energon always sets pin_memory
        from aimv2.data.stream import workers

        # a restart decodes again what was read since a worker's last own checkpoint, at most ten seconds' worth
        self.loader = get_savable_loader(dataset, checkpoint_every_sec=10, watchdog_timeout_seconds=None)
        self.batches: Iterator[Batch] | None = None
        self.watched: Watched | None = None  # the same, from worker processes
        self.known: Any = None  # this and the next: see workers.position
        self.taken: tuple[list[int], int] | None = None
        if config.workers:
            self.watched = workers.Watched(self.loader, config.workers, config.timeout)
            encoder.note = self.watched.notes.write

    def encoder(
        self, config: DataConfig, view: View, tokenizer: Tokenizer | None, seed: int, worker: WorkerConfig, size: int
    ) -> PairEncoder:
        """What each worker makes of its samples, ``size`` of them a step."""
        if view.native is None:
            return PairEncoder(config, view, tokenizer, seed, worker)
        from aimv2.data.stream.native_pairs import NativePairEncoder

        return NativePairEncoder(config, view, tokenizer, seed, worker)

    def __iter__(self) -> Iterator[Batch | list[Batch]]:
        return self

    def __next__(self) -> Batch | list[Batch]:
        if self.batches is None:
            self.batches = self.watched or iter(self.loader)
            atexit.register(self.close)
        try:
            rounds = 1 if self.view.native is None else self.view.native.rounds
            parts = [next(self.batches) for _ in range(self.parts * rounds)]
            self.taken = [*self.loader._worker_sample_counters], self.loader._next_worker_id
        except FatalSampleError as error:
            line = str(error).rpartition(FATAL)[2].split("\n")[0]  # a worker's traceback follows
            raise RankError(line.strip() or str(error)) from None
        except Exception as error:
            if not any(words in str(error) for words in BAD_INDEX):
                raise
            raise RankError(
                "data.train: a shard does not match its index: it changed, or its .tar.idx is wrong; remove that file and "
                f"{' and '.join(map(str, self.indices))}, which are rebuilt, and start again",
                code="mismatch",
            ) from None
        for part in parts:
            self.note(part)
        return self.joined(parts)

    def note(self, part: Batch) -> None:
        """Count the bad samples that a worker met."""
        for bad in part.bad:
            self.reject(BadSample(*bad))

    def reject(self, bad: BadSample) -> bool:
        """Whether a bad sample was not known yet; a line for the first one of a shard that is cut, or of an unforeseen error."""
        new, cut, error = self.rejected.add(bad), bad.why == CUT, bad.why.partition(": ")[0]
        what = bad.name.rpartition("/")[0] if cut else error
        if new and (cut or (error.isidentifier() and error.endswith("Error"))) and what not in self.noted:
            self.noted.add(what)
            why = "was cut or damaged since it was indexed" if cut else "caused an error that no sample should"
            say(f"data.train: {what if cut else bad} {why}; what is lost is left out, and counts in data.max_bad")
        return new

    def joined(self, parts: list[Batch]) -> Batch | list[Batch]:
        """The workers' parts of a step as a batch, or as micro-batches."""
        if self.view.native is None:
            return join_batches(parts, self.view.patches)
        from aimv2.data.stream.native import pack

        row = self.view.native.pack
        return [pack(parts[at : at + row]) for at in range(0, len(parts), row)] if row else parts

    def close(self) -> None:
        """Shut down the dataloader workers."""
        atexit.unregister(self.close)
        self.batches = None
        if self.watched is not None:
            self.watched.close()

    def state(self) -> Any:
        """The data position after the batches taken so far (picklable); also where workers ended or hang."""
        if self.watched is None:
            return self.loader.save_state_rank()
        if self.batches is None:
            return self.known
        from aimv2.data.stream.workers import position

        self.known = position(self.watched, self.loader, self.known, self.taken)
        return self.known

    def restore(self, state: Any) -> None:
        """Restore a position of :meth:`state`; only before the first batch."""
        self.loader.restore_state_rank(state)
        self.known = state


def _index_dir(config: DataConfig) -> Path | None:
    return None if config.index_dir is None else Path(config.index_dir)


def _load(indices: Sequence[Path], sources: Sequence[Source], worker: WorkerConfig) -> list[LoadedDataset]:
    from megatron.energon import load_dataset

    loaded = []
    for number, (index, source) in enumerate(zip(indices, sources)):
        found = load_dataset(str(index)).get_datasets(
            training=True,
            split_part="train",
            worker_config=worker,
            subflavors={"source": number},
            decoder=None,
            max_samples_per_sequence=100,
        )
        loaded.append(LoadedDataset(dataset=found.datasets[0].dataset, weight=source.weight))
    return loaded
