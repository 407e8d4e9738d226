"""A run without a recipe: values that fit its data and the kind of its device, and a line where a run goes past their limits.

The values (docs/tutorials/own-photographs.md) follow from three facts: whether there is a GPU, the number of pairs, and the median of
the images' shorter sides. Never from free memory or from a measured speed: two machines of one kind train the same model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn

from aimv2.config.schema import Config
from aimv2.data.images.decode import ImageError, header_size
from aimv2.data.stream.samples import image_bytes
from aimv2.models.flops import step_flops
from aimv2.models.sizes import DecoderConfig, EncoderConfig

VISITS = 40  # of a pair, at most: more learn the captions by heart; a recipe may have twice as many
HOURS = 2.0
CAPTION = 20  # tokens of a caption, assumed
NATIVE = 256  # patches of a native image, assumed
SHORT = 0.5  # hours; in a shorter run compiling costs more than it saves
FEW, MANY = 10_000, 100_000  # pairs


@dataclass(frozen=True)
class Kind:
    """What is assumed of a kind of device: FLOP/s of a training step, pairs of a step, and the precision."""

    rate: float
    batch: int
    precision: str


KINDS = {"cpu": Kind(40e9, 64, "fp32"), "cuda": Kind(40e12, 256, "bf16")}


def kind_here() -> str:
    """The kind of the device that training would use: ``cuda`` or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def median_side(samples: list[dict[str, bytes]]) -> float:
    """Median of the shorter sides of the first 64 images, px; 224 where none can be read."""
    sides = []
    for sample in samples[:64]:
        try:
            sides.append(min(header_size(image_bytes(sample))))
        except ImageError:
            continue
    return median(sides) if sides else 224


def size_for(kind: str, pairs: int, side: float) -> str:
    """The model of the sizes table: tiny on a CPU; on a GPU tiny, mini or small by the number of pairs."""
    size = "tiny" if kind == "cpu" or pairs < FEW else "mini" if pairs < MANY else "small"
    if side <= 48:
        return f"aimv2-{size}-patch4-32"
    return f"aimv2-{size}-patch14-{224 if size == 'small' and side > 160 else 112}"


def defaults_for(
    samples: list[dict[str, bytes]],
    pairs: int,
    kind: str,
    config: Config,
    given: set[str],
    init: EncoderConfig | None = None,
) -> dict[str, Any]:
    """Values for data without a recipe: at most 40 visits of a pair and two hours at the kind's assumed rate.

    Args:
        samples: the first ones of the training data.
        pairs: of the training data; a step has at most so many.
        kind: of the device, a key of ``KINDS``.
        config: the user's own values: the steps follow its model and batch, checkpoints and validation its steps.
        given: keys of the user's own values.
        init: the encoder of ``init``, which the steps follow.
    """
    from aimv2.tasks.pretrain import shapes

    assumed = KINDS[kind]
    name = size_for(kind, pairs, median_side(samples)) if config.model.name == "auto" else config.model.name
    vocab_size = 2048 if pairs < FEW else 4096
    most = min(assumed.batch, 1 << max(pairs, 1).bit_length() - 1)
    batch = config.train.batch_size if "train.batch_size" in given else most
    encoder, decoder = shapes(replace(config, model=replace(config.model, name=name)), vocab_size)
    seconds = batch * pair_flops(init or encoder, decoder) / assumed.rate  # of a step
    steps = max(1, min(VISITS * pairs // batch, int(3600 * HOURS / seconds)))
    if "train.steps" in given and config.train.steps is not None:  # null where epochs count
        steps = config.train.steps
    elif config.train.epochs is not None:
        steps = math.ceil(config.train.epochs * pairs / batch)
    every = max(1, min(1000, steps // 6))
    return {
        "model.name": name,
        "data.vocab_size": vocab_size,
        "train.steps": steps,
        "train.batch_size": batch,
        "train.precision": assumed.precision,
        "train.compile": "off" if steps * seconds < 3600 * SHORT else "auto",
        "train.save_every": every,
        "eval.every": every,
        "eval.samples": 500,
    }


@cache
def unfilled(encoder: EncoderConfig, decoder: DecoderConfig) -> nn.Module:
    """The model of a pre-training run without memory for its weights."""
    from aimv2.models.aimv2 import AIMv2

    with torch.device("meta"):
        return AIMv2(encoder, decoder)


def pair_flops(encoder: EncoderConfig, decoder: DecoderConfig) -> float:
    """FLOPs of a training step for one pair whose caption has 20 tokens (a native image: 256 patches)."""
    return step_flops(unfilled(encoder, decoder), 1, patches_of(encoder), CAPTION)


def patches_of(encoder: EncoderConfig) -> int:
    """Patches of an image; 256 are assumed of a native one."""
    return encoder.patches if encoder.image_size is not None else NATIVE


# ---- limits ----


def most_visits(given: Collection[str]) -> int:
    """Visits of a pair that need no word: 40 where the user changes the length of a recipe, else twice as many."""
    return VISITS if {"train.steps", "train.epochs", "train.batch_size"} & set(given) else 2 * VISITS


def too_many_visits(config: Config, pairs: int, limit: int) -> Iterator[str]:
    """A line where the run visits each pair more than ``limit`` times (a step of a native run has no number of pairs)."""
    train = config.train
    most = math.ceil(VISITS * pairs / train.batch_size)  # as train.epochs counts: the last step may end beyond
    if train.patch_budget is None and train.steps > most * limit / VISITS:
        yield (
            f"train.steps {train.steps} of {train.batch_size} pairs see each of the {pairs} pairs "
            f"{train.steps * train.batch_size / max(pairs, 1):.1f} times; after more than {VISITS} a model knows its captions by heart "
            f"(--train.epochs {VISITS} is {most} steps)"
        )
