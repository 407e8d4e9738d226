"""Images for a report: training samples as the run draws them, and held-out images.

Legend: p patch side, I patches of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from megatron.energon import WorkerConfig
from torch import Tensor, nn

from aimv2.config.schema import Config
from aimv2.data.images.class_names import names_beside
from aimv2.data.images.decode import ImageError
from aimv2.data.shards.format import read_samples
from aimv2.data.stream.draws import sample_rng
from aimv2.data.stream.samples import PairEncoder, View, training_shards, validation_shards
from aimv2.data.text.tokenizer import Tokenizer, load_tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.load import has_decoder, load_model, locate
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig
from aimv2.report.runs import Run
from aimv2.tasks import task_of
from aimv2.tasks.held_out import read_held_out
from aimv2.train.prepare import known_tokenizer
from aimv2.train.view import make_view


@dataclass(frozen=True)
class TrainingSample:
    """A training sample at one visit, as the model receives it.

    Attributes:
        key: sample key.
        source: name of its source in the mixture; "" with a single source.
        image: uint8 [3, h * p, w * p], cropped, resized, perhaps flipped.
        caption: the drawn caption, decoded from its tokens; "" without text.
        prefix: prefix length.
    """

    key: str
    source: str
    image: Tensor
    caption: str
    prefix: int


@dataclass(frozen=True)
class HeldOutImage:
    """A centre-cropped validation image uint8 [3, H, W], with its first caption and the name of its class ("": no label)."""

    key: str
    image: Tensor
    caption: str
    label: str


def open_model(folder: Path, device: str | torch.device | None) -> AIMv2 | VisionEncoder:
    """Load the model of a checkpoint, with decoder and tokeniser if it has them; of a LiT pair the image tower.

    Raises:
        UsageError: nothing to load there.
    """
    at = locate(folder)
    model: nn.Module = load_model(at, decoder=has_decoder(at), device=device)
    if isinstance(model, AIMv2):
        if (at.folder / "tokenizer_config.json").is_file():
            model.tokenizer = load_tokenizer(at.folder, option="MODEL")
        return model
    encoder = getattr(model, "image", model)
    assert isinstance(encoder, VisionEncoder)
    return encoder


def view_of(config: Config, encoder: EncoderConfig) -> View:
    """The view of a run's samples, in one process whatever the run had.

    Raises:
        UsageError: options that do not fit the encoder.
    """
    return make_view(config, encoder, task_of(config).reads_text(), World(0, 1, torch.device("cpu")))


def tokenizer_of(run: Run) -> Tokenizer | None:
    """The run's tokeniser; None for images only, or where it is not available."""
    if not task_of(run.config).reads_text():
        return None
    home = known_tokenizer(run.folder)
    source = home if home is not None else run.config.data.tokenizer
    try:
        return None if source == "auto" else load_tokenizer(source)
    except UsageError:
        return None


def training_samples(
    config: Config, view: View, tokenizer: Tokenizer | None, count: int, visit: int = 0
) -> list[TrainingSample]:
    """The first samples of each source at one visit, with crop, flip, caption and prefix drawn as in training.

    Args:
        config: the run's configuration.
        view: see :func:`view_of`.
        tokenizer: None: no captions.
        count: number of samples over all sources.
        visit: index that crops, captions and prefixes depend on.

    Raises:
        UsageError: no data there.
    """
    encoder = PairEncoder(
        config.data, replace(view, teacher=0), tokenizer, config.seed, WorkerConfig(rank=0, world_size=1, num_workers=0)
    )
    shards = training_shards(config.data)
    counts = [count // len(shards) + (at < count % len(shards)) for at in range(len(shards))]
    found = []
    for number, (tars, wanted) in enumerate(zip(shards, counts)):
        source = encoder.sources[number]
        name = (source.name or Path(source.path).name) if len(shards) > 1 else ""
        for key, parts in islice((pair for tar in tars for pair in read_samples(tar)), wanted):
            sample = {"__key__": key, "__restore_key__": (), "__subflavors__": {"source": number}, **parts}
            try:
                drawn = encoder.draw(sample, sample_rng(config.seed, key, 0, visit))
            except ImageError:
                continue
            caption = tokenizer.decode(drawn["tokens"]) if tokenizer else ""
            found.append(TrainingSample(key, name, torch.from_numpy(drawn["image"]), caption, drawn["prefix"]))
    return found


def class_names(shards: Sequence[Path]) -> Sequence[str]:
    """Class names of classes.txt next to shards; () without one."""
    return names_beside(*dict.fromkeys(shard.parent for shard in shards)) or ()


def class_name(label: int, names: Sequence[str]) -> str:
    """Name of a label: of ``names`` (classes.txt) if there is one, else its number; "" for -1."""
    if label < 0:
        return ""
    return names[label] if label < len(names) else f"class {label}"


def held_out_images(config: Config, view: View, tokenizer: Tokenizer | None, count: int) -> list[HeldOutImage]:
    """The first images of the validation split; [] without one."""
    shards = validation_shards(config.data)
    found = read_held_out(shards, replace(view, captions=False), tokenizer, count, config.data.max_tokens)
    names = class_names(shards)
    labels = [class_name(label, names) for label in found.labels.tolist()]
    return [HeldOutImage(*one) for one in zip(found.keys, found.images, found.captions, labels)]
