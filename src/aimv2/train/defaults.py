"""A run without a recipe: values that fit its data and the kind of its device, and a line where a run goes past their limits.

The values (docs/tutorials/own-photographs.md) follow from three facts: whether there is a GPU, the number of pairs, and the median of
the images' shorter sides. Never from free memory or from a measured speed: two machines of one kind train the same model.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn

from aimv2.config.schema import Config
from aimv2.data.stream.samples import image_bytes
from aimv2.io import machine_memory
from aimv2.models.flops import peak_flops, step_flops
from aimv2.models.layers import Block
from aimv2.models.sizes import DecoderConfig, EncoderConfig

VISITS = 40  # of a pair, at most: more learn the captions by heart
HOURS = 2.0
MEMORY = 0.8  # of the device's
CAPTION = 20  # tokens of a caption, assumed
NATIVE = 256  # patches of a native image, assumed
SHORT = 0.5  # hours; in a shorter run compiling costs more than it saves
FRACTION = 0.3  # of the device's peak that a step is expected to reach
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
    from PIL import Image

    sides = []
    for sample in samples[:64]:
        try:
            sides.append(min(Image.open(io.BytesIO(image_bytes(sample))).size))
        except (OSError, ValueError):
            continue
    return median(sides) if sides else 224


def size_for(kind: str, pairs: int, side: float) -> str:
    """The model of the sizes table: tiny on a CPU; on a GPU tiny, mini or small by the number of pairs."""
    size = "tiny" if kind == "cpu" or pairs < FEW else "mini" if pairs < MANY else "small"
    if side <= 48:
        return f"aimv2-{size}-patch4-32"
    return f"aimv2-{size}-patch14-{224 if size == 'small' and side > 160 else 112}"


def defaults_for(
    samples: list[dict[str, bytes]], pairs: int, kind: str, config: Config, given: set[str]
) -> dict[str, Any]:
    """Values for data without a recipe: at most 40 visits of a pair and two hours at the kind's assumed rate.

    Args:
        samples: the first ones of the training data.
        pairs: of the training data; a step has at most so many.
        kind: of the device, a key of ``KINDS``.
        config: the user's own values: the steps follow its model and batch, checkpoints and validation its steps.
        given: keys of the user's own values.
    """
    from aimv2.tasks.pretrain import shapes

    assumed = KINDS[kind]
    name = size_for(kind, pairs, median_side(samples)) if config.model.name == "auto" else config.model.name
    vocab_size = 2048 if pairs < FEW else 4096
    most = min(assumed.batch, 1 << max(pairs, 1).bit_length() - 1)
    batch = config.train.batch_size if "train.batch_size" in given else most
    shaped = replace(config, model=replace(config.model, name=name))
    seconds = batch * pair_flops(*shapes(shaped, vocab_size)) / assumed.rate  # of a step
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


def too_many_visits(config: Config, pairs: int, own: bool) -> Iterator[str]:
    """A line where the run sees each pair more than 40 times (a step of a native run has no number of pairs).

    Args:
        config: of the run.
        pairs: of the training data.
        own: the steps are the user's or nobody's choice; those of a recipe may be twice as many.
    """
    train = config.train
    most = math.ceil(VISITS * pairs / train.batch_size)  # as train.epochs counts: the last step may end beyond
    if train.patch_budget is None and train.steps > most * (1 if own else 2):
        yield (
            f"train.steps {train.steps} of {train.batch_size} pairs see each of the {pairs} pairs "
            f"{train.steps * train.batch_size / max(pairs, 1):.1f} times; after more than {VISITS} a model knows its captions by heart "
            f"(--train.epochs {VISITS} is {most} steps)"
        )


def too_long(config: Config, hours: float) -> Iterator[str]:
    """A line where the run takes longer than two hours and no clock ends it."""
    if hours > HOURS and config.train.max_hours is None:
        yield (
            f"about {hours:,.1f} hours on this device, where a run without a recipe keeps to {HOURS:g}: fewer steps (train.steps), a "
            "smaller model (model.name), or an end by the clock (train.max_hours)"
        )


def too_large(gigabytes: float, device: torch.device) -> Iterator[str]:
    """A line where the run takes more than 80% of the device's memory.

    Args:
        gigabytes: what it takes, 1e9 bytes.
        device: that it takes them from.
    """
    there = (
        torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else machine_memory()[0]
    )
    if gigabytes > MEMORY * there:
        yield (
            f"about {gigabytes:.1f} GB of this device's {there:.1f} GB, where {MEMORY:.0%} are safe: fewer pairs at once "
            "(train.accumulate), train.checkpointing, or a smaller model (model.name)"
        )


def beyond(
    config: Config, model: nn.Module, flops: float | None, device: torch.device, ranks: int = 1
) -> Iterator[str]:
    """Lines on time and memory that a run is expected to take, before it starts.

    Args:
        config: of the run.
        model: that it trains; its tensors may be on the device "meta".
        flops: of a step of all ranks, None where unknown.
        device: of a rank.
        ranks: that share the work and, with it, the weights.
    """
    peak, steps = peak_flops(device, config.train.precision), config.train.steps
    within = 3600 * HOURS * KINDS[device.type].rate  # what the defaults allow themselves
    if flops is not None and peak is not None and steps * flops > 1.05 * within:
        yield from too_long(config, steps * flops / (FRACTION * peak * ranks) / 3600)
    yield from too_large(step_memory(config, model, ranks) / 1e9, device)


def expected_step(config: Config, encoder: EncoderConfig) -> tuple[float, float, float]:
    """Pairs of a step of all ranks, patches of a pair, and caption tokens of the step; a native image has 256 patches."""
    patches, budget = patches_of(encoder), config.train.patch_budget
    pairs = config.train.batch_size if budget is None else budget / patches
    return pairs, patches, pairs * CAPTION


def step_memory(config: Config, model: nn.Module, ranks: int = 1) -> float:
    """Bytes that a step takes on each rank: 16 a trained parameter (weight, gradient, two moments), what its blocks keep for the
    backward pass, and the logits."""
    train = config.train
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 4 * sum(p.numel() for p in model.parameters()) + (16 if train.ema else 12) * trained
    half = train.precision != "fp32"
    pairs, patches, _ = expected_step(config, model.encoder.config)  # type: ignore[union-attr, arg-type]
    kept = 0.0
    for name, block in model.named_modules():
        if isinstance(block, Block) and any(p.requires_grad for p in block.parameters()):
            width, hidden = block.attn.proj.in_features, block.mlp.down.in_features
            row = 4 * width if train.checkpointing else 50 * width + 11 * hidden if half else 44 * width + 16 * hidden
            part = name.partition(".")[0]
            kept += row * ((0 if part == "text" else patches) + (0 if part in ("encoder", "image") else CAPTION))
    decoder = getattr(model, "decoder", None)
    kept += 12 * CAPTION * decoder.config.vocab_size if decoder is not None and decoder.config.text else 0
    return fixed / ranks + kept * pairs / (ranks * train.accumulate)
