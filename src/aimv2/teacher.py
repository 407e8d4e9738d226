"""A frozen model of any origin as a teacher: what distillation and stored features need of it, and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.evals.frozen import of_encoder, open_frozen
from aimv2.evals.pixels import Stats
from aimv2.evals.weights import weights_hash
from aimv2.models.encoder import VisionEncoder
from aimv2.objectives.distill import Teacher
from aimv2.train.flops import counted


def open_teacher(
    source: str,
    device: torch.device,
    grid: int | None = None,
    option: str = "objective.teacher",
    precision: str = "fp32",
    stats: Stats | None = None,
) -> Teacher:
    """Opens a model for its patch features; it keeps nothing for a backward pass.

    Args:
        source: anything that a probe measures; see :func:`aimv2.evals.frozen.open_frozen`.
        device: where it runs.
        grid: patches a side that are wanted; only a native model heeds it.
        option: that named it, for messages.
        precision: of its products, where nothing around it says: fp32 or bf16.
        stats: see there.

    Raises:
        UsageError: nothing that can be loaded, or no square grid of patches.
    """
    frozen = open_frozen(source, device, precision=precision, stats=stats)
    module = frozen.module
    if module is not None:
        module.requires_grad_(False)
    if isinstance(module, VisionEncoder) and module.config.image_size is None and grid is not None:
        frozen = replace(of_encoder(source, module, grid * module.config.patch_size), precision=precision)
    size = frozen.side

    def run(images: Tensor) -> Tensor:
        return frozen(images)[0]

    try:
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        features, flops = counted(lambda: run(blank))
    except ValueError as error:  # a native model, and a grid beyond its range
        raise UsageError(f"{option} {source}: {error}") from None
    patches, width = features.shape[1:]
    side = math.isqrt(patches)
    if side * side != patches:
        raise UsageError(f"{option} {source}: {patches} patch features an image of {size} px are no square grid")
    former = weights_hash(module) if module is not None and frozen.pixels is not None else ""
    return Teacher(source, frozen.sha256, size, side, width, run, flops, former)
