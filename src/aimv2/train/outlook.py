"""What is expected of a run before it starts: visits of the data, time, memory and disk; a line where it goes past the limits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2.config.schema import Config
from aimv2.data.shards.format import scan_shard
from aimv2.data.stream.samples import validation_shards
from aimv2.io import machine_memory
from aimv2.models.flops import peak_flops
from aimv2.models.layers import Block
from aimv2.models.sizes import EncoderConfig
from aimv2.train.defaults import CAPTION, HOURS, KINDS, patches_of

MEMORY = 0.8  # of the device's, that a run keeps to
FRACTION = 0.3  # of the device's peak that a step is expected to reach
VALUE = 4  # bytes of a weight, a moment or an average


def visits(config: Config, samples: int, pairs: float) -> dict[str, Any]:
    """How much data there is, and how often a run sees it.

    Args:
        config: of the run.
        samples: of the training data.
        pairs: of a step, over all ranks.
    """
    return {
        "samples": samples,
        "validation_samples": sum(len(scan_shard(tar).keys) for tar in validation_shards(config.data)),
        "visits_a_sample": config.train.steps * pairs / max(samples, 1),
    }


def disk_room(config: Config, model: nn.Module) -> dict[str, Any]:
    """Bytes (1e9) of the checkpoints of a run, and those that are free where it goes."""
    one, kept = checkpoint_bytes(config, model), most_kept(config, config.train.steps)
    there = existing_folder(Path(config.run or "."))
    return {
        "checkpoints_gb": one * kept / 1e9,
        "disk_free_gb": shutil.disk_usage(there).free / 1e9,
    }


def most_kept(config: Config, steps: int) -> int:
    """Checkpoints that lie on the disk at once, the one that is written included."""
    train = config.train
    saves = math.ceil(steps / train.save_every) if train.save_every else 1
    return min(train.keep + 1 + (config.eval.best is not None), saves) if train.keep else saves


def checkpoint_bytes(config: Config, model: nn.Module) -> int:
    """Bytes of one checkpoint: the model's folder and the state."""
    sizes = [(part.numel(), part.requires_grad) for part in model.parameters()]
    weights, trained = sum(count for count, _ in sizes), sum(count for count, learns in sizes if learns)
    return VALUE * (2 * weights + 2 * trained + (trained if config.train.ema else 0))


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


# ---- limits ----


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
            row = {
                "off": 50 * width + 11 * hidden if half else 44 * width + 16 * hidden,
                "selective": 12 * width + 4 * hidden if half else 20 * width + 8 * hidden,
                "full": 4 * width,
            }[train.checkpointing]
            part = name.partition(".")[0]
            kept += row * ((0 if part == "text" else patches) + (0 if part in ("encoder", "image") else CAPTION))
    decoder = getattr(model, "decoder", None)
    kept += 12 * CAPTION * decoder.config.vocab_size if decoder is not None and decoder.config.text else 0
    return fixed / ranks + kept * pairs / (ranks * train.accumulate)
