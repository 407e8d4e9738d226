"""A frozen model of any origin as a teacher: what distillation and stored features need of it, and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.features.fingerprint import weights_hash
from aimv2.features.foreign import MASKED
from aimv2.features.frozen import Frozen, of_encoder, open_frozen
from aimv2.features.pixels import OPTIONS, Stats, former_pixels
from aimv2.interop.load import locate
from aimv2.models.encoder import VisionEncoder
from aimv2.models.flops import count_flops
from aimv2.objectives.distill import Teacher


def open_teacher(
    source: str,
    device: torch.device,
    grid: int | None = None,
    option: str = "objective.teacher",
    precision: str = "fp32",
    stats: Stats | None = None,
    options: tuple[str, str] = OPTIONS,
) -> Teacher:
    """Opens a model for its patch features; it keeps nothing for a backward pass.

    Args:
        source: anything that a probe measures; see :func:`aimv2.features.frozen.open_frozen`.
        device: where it runs.
        grid: patches a side that are wanted; only a native model heeds it.
        option: that named it, for messages.
        precision: of its products, where nothing around it says: fp32 or bf16.
        stats, options: see there.

    Raises:
        UsageError: nothing that can be loaded, or no square grid of patches.
    """
    frozen = open_frozen(source, device, precision=precision, stats=stats, options=options)
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
        features, flops = count_flops(lambda: run(blank))
    except ValueError as error:  # a native model, and a grid beyond its range
        raise UsageError(f"{option} {source}: {error}") from None
    patches, width = features.shape[1:]
    side = math.isqrt(patches)
    if side * side != patches:
        raise UsageError(f"{option} {source}: {patches} patch features an image of {size} px are no square grid")
    former, changed = "", ""
    if module is not None and frozen.pixels is not None:
        former, changed = weights_hash(module), since_then(frozen, options)
    return Teacher(source, frozen.sha256, size, side, width, run, flops, former, changed)


def since_then(frozen: Frozen, options: tuple[str, str]) -> str:
    """Why a run that an earlier version began would go on with other features of the same weights; "" where it would not."""
    if frozen.kind != "transformers":
        return ""
    if getattr(getattr(frozen.module, "config", None), "model_type", "") == MASKED:
        return "an earlier version read it through a random mask; start another run"
    old = former_pixels(locate(frozen.name).folder)
    if str(old) == str(frozen.pixels):
        return ""
    assert old.stats is not None and frozen.pixels is not None
    said = f"an earlier version showed it pixels as {old}, its image processor says {frozen.pixels}; "
    if frozen.pixels.bgr:
        return said + "start another run"
    values = (f"--{option} [{','.join(f'{v:g}' for v in part)}]" for option, part in zip(options, old.stats))
    return said + f"to go on as it began give {' '.join(values)}, else start another run"
