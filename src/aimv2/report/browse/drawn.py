"""The first samples of a run, through the same configuration, tokeniser and dataloader as training.

Legend: p patch side, h x w patch grid, I = h * w patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aimv2.batch import Batch, captions_of
from aimv2.config.load import check_keys, parse, read_recipe
from aimv2.config.schema import Config, Source
from aimv2.data.stream.samples import TrainStream, View, training_shards, training_sources
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.flops import step_flops
from aimv2.models.sizes import EncoderConfig
from aimv2.report.samples import class_names
from aimv2.tasks import task_of
from aimv2.tasks.pretrain import Pretrain, shapes
from aimv2.train import defaults, launch, outlook, prepare
from aimv2.train.view import make_view

DEMO = "captioned scenes"  # source name of the demo


@dataclass(frozen=True)
class DrawnSample:
    """A training sample at its first visit.

    Attributes:
        key: sample key.
        source: index of its source in the mixture.
        image: uint8 [h * p, w * p, 3], cropped, resized, perhaps flipped.
        grid: (h, w).
        prefix: prefix length, patches in raster order.
        tokens: ids of the drawn caption; [] without text.
        kept: int64 [K], positions that the decoder reads; None: all.
        label: its class; -1 without one.
    """

    key: str
    source: int
    image: NDArray[np.uint8]
    grid: tuple[int, int]
    prefix: int
    tokens: list[int]
    kept: NDArray[np.int64] | None = None
    label: int = -1


@dataclass
class Drawn:
    """The first samples of a run, with its resolved configuration.

    Attributes:
        config: the resolved configuration.
        encoder: the encoder's config.
        view: what the model takes of a sample.
        tokenizer: None without text.
        sources: sources of the mixture.
        total: samples in the training data.
        samples: the first samples, in order.
        bad: samples that can't be read, with the reason.
        classes: names of the classes of each source, where it has them.
    """

    config: Config
    encoder: EncoderConfig
    view: View
    tokenizer: Tokenizer | None
    sources: list[Source]
    total: int
    samples: list[DrawnSample]
    bad: list[str] = field(default_factory=list)
    classes: list[Sequence[str]] = field(default_factory=list)


def draw(recipe: str | None, given: dict[str, Any], count: int, scratch: Path) -> Drawn:
    """Draw the first ``count`` samples that ``pretrain`` would train on.

    Args:
        recipe, given: as in :func:`aimv2.api.pretrain`.
        count: number of samples.
        scratch: folder for the demo's scenes and the index of shards.

    Raises:
        UsageError: whatever ``pretrain`` rejects.
    """
    config, demo = settled(recipe, given, scratch)
    world = World(0, 1, torch.device("cpu"))
    tokenizer = prepare.get_tokenizer(config, None, world)
    task = task_of(config)
    encoder = task.encoder_config(tokenizer.vocab_size if tokenizer else 1)
    view = make_view(config, encoder, task.reads_text(), world)
    view.teacher = task.stored_width()
    if isinstance(task, Pretrain) and not demo:  # other models can't be known without building them
        for line in expected(config, tokenizer.vocab_size if tokenizer else 1):
            launch.say(line)
    stream = TrainStream(config.data, view, tokenizer, config.train.batch_size, config.seed)
    total = stream.samples
    for line in defaults.too_many_visits(config, total, defaults.most_visits(given)) if recipe is not None else ():
        launch.say(line)
    if view.native is None and count < config.train.batch_size:  # a part of the first batch is enough
        part = -(-count // stream.parts) * stream.parts
        stream = TrainStream(config.data, view, tokenizer, part, config.seed)
    try:
        drawn = (one for batch in batches(stream) for one in samples_of(batch, view, encoder.patch_size))
        samples = list(islice(drawn, count))
    finally:
        stream.close()
    sources = [Source("drawn on the spot", DEMO)] if demo else training_sources(config.data)
    classes = [class_names(shards) for shards in training_shards(config.data)]
    return Drawn(
        config,
        encoder,
        view,
        tokenizer,
        sources,
        total,
        samples,
        [str(bad) for bad in stream.rejected.named.values()],
        classes,
    )


def expected(config: Config, vocab_size: int) -> Iterator[str]:
    """Lines on time and memory that a pre-training run is expected to take on the device here."""
    encoder, decoder = shapes(config, vocab_size)
    model = defaults.unfilled(encoder, decoder)
    flops = step_flops(model, *outlook.expected_step(config, encoder))
    yield from outlook.beyond(config, model, flops, torch.device(defaults.kind_here()))


def settled(recipe: str | None, given: dict[str, Any], scratch: Path) -> tuple[Config, bool]:
    """The resolved configuration of a run with these values, its data located; and whether it is the demo."""
    base = read_recipe(recipe) if recipe else {}
    check_keys(given, "on the command line", base)
    options = parse({**base, **given})
    if options.resume:
        raise UsageError(
            "--resume: `data browse` shows the start of a run; leave it out (for a run's own values: --config RUN/config.yaml)",
            code="conflict",
        )
    recipe, base = launch.recipe_of(options, recipe, base, given)
    demo = launch.wants_demo(options, recipe)
    if demo:
        config = parse({**read_recipe(launch.DEMO), **given})
        task_of(config).check()
        config.data.train = launch.draw_scenes(config, scratch / "data")
        prepare.locate_data(config)
    else:
        config = parse({**base, **given})
        prepare.locate_data(config)
        config, _ = launch.settle(config, recipe, base, given)
        for line in prepare.remarks(config):
            launch.say(line)
    if config.data.features is not None:
        raise UsageError(
            "data.features: its batches hold stored features, not images; leave it out to browse the data",
            code="conflict",
        )
    config.data.index_dir = config.data.index_dir or str(scratch / "index")
    return config, demo


def batches(stream: TrainStream) -> Iterator[Batch]:
    """Batches of a stream, native ones one by one."""
    for batch in stream:
        yield from batch if isinstance(batch, list) else [batch]


def samples_of(batch: Batch, view: View, patch: int) -> Iterator[DrawnSample]:
    """Samples of a batch, each with its image.

    Args:
        batch: a batch of the stream.
        view: the stream's view.
        patch: p.
    """
    assert batch.prefix_len is not None
    captions, labels = captions_of(batch), batch.labels.tolist()
    for row, (key, source, image) in enumerate(zip(batch.keys, batch.sources, pictures(batch, view, patch))):
        kept = None if batch.kept is None else batch.kept[row].numpy()
        grid = image.shape[0] // patch, image.shape[1] // patch
        yield DrawnSample(key, source, image, grid, int(batch.prefix_len[row]), captions[row], kept, labels[row])


def pictures(batch: Batch, view: View, patch: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 [h * p, w * p, 3] of each image, reassembled from patches if the batch is native."""
    if batch.places is None or batch.image_len is None:
        for image in batch.images:
            yield image.permute(1, 2, 0).numpy()
        return
    begin = 0
    for row, count in enumerate(batch.image_len.tolist()):
        if batch.images.shape[0] == len(batch):  # one strip per image
            strip, places = batch.images[row, :, :, : count * patch], batch.places[row, :count]
        else:  # packed: all in one
            strip = batch.images[0, :, :, begin * patch : (begin + count) * patch]
            places = batch.places[0, begin : begin + count]
            begin += count
        yield from_strip(strip, places, patch)


def from_strip(strip: torch.Tensor, places: torch.Tensor, patch: int) -> NDArray[np.uint8]:
    """Place patches of a strip uint8 [3, p, I * p] at their rows and columns int64 [I, 2]: [h * p, w * p, 3]."""
    height, width = (int(side) + 1 for side in places.max(0).values)
    parts = strip.unflatten(2, (-1, patch)).permute(2, 1, 3, 0).numpy()  # [I, p, p, 3]
    out = np.zeros((height, patch, width, patch, 3), np.uint8)
    for part, (row, column) in zip(parts, places.tolist()):
        out[row, :, column] = part
    return out.reshape(height * patch, width * patch, 3)
