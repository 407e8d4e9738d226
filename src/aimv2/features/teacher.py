"""A frozen model of any origin as a teacher: patch features on a square grid, and the features that a batch brings along.

What opens a model is imported inside: objectives need the rest.

Legend: B pairs, I patches, E width of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.batch import Batch
from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.features.frozen import Frozen
    from aimv2.features.pixels import Stats


@dataclass(frozen=True)
class Teacher:
    """A frozen model as distillation knows it.

    Attributes:
        name: as the user gave it.
        sha256: of its weights.
        image_size: pixels a side of its input.
        grid: patches a side.
        width: E.
        run: uint8 images [B, 3, image_size, image_size] -> patch features [B, I, E], normalising with its own mean and
            std; None: the features come with the batch.
        flops: of one image, forward; 0: not known, or nothing runs here.
        former: the ``sha256`` that versions before 0.2 recorded of the same model; "": the same.
        changed: why its features differ from those of such a version; "": they do not.
        fingerprint: see :func:`aimv2.features.fingerprint.model_fingerprint`.
    """

    name: str
    sha256: str
    image_size: int
    grid: int
    width: int
    run: Callable[[Tensor], Tensor] | None
    flops: float = 0.0
    former: str = ""
    changed: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict, compare=False)

    def features(self, batch: Batch) -> Tensor:
        """Its features of a batch's images: fp32 [B, I, E], without gradient."""
        if self.run is None:
            return stored_features(batch)
        images = resize(batch.images, self.image_size)
        with torch.inference_mode():
            found = self.run(images)
        return found.float().clone()  # an inference tensor can't be kept for a backward pass, its copy can


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, size, size], bicubic, antialiased."""
    if images.shape[-2:] == (size, size):
        return images
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def stored_features(batch: Batch) -> Tensor:
    """The features that a batch brings along: fp32 [B, I, E]."""
    assert batch.teacher is not None and batch.teacher_scale is not None
    return batch.teacher.float() * batch.teacher_scale[..., None].float()


def open_teacher(
    source: str,
    device: torch.device,
    grid: int | None = None,
    option: str = "objective.teacher",
    precision: str = "fp32",
    stats: Stats | None = None,
    options: tuple[str, str] | None = None,
) -> Teacher:
    """Opens a model for its patch features, without gradients.

    Args:
        source: any frozen encoder; see :func:`aimv2.features.frozen.open_frozen`.
        device: where it runs.
        grid: patches a side; only a native model follows it.
        option: that named it, for messages.
        precision: of the matmuls outside of any autocast: fp32 or bf16.
        stats, options: see there.

    Raises:
        UsageError: nothing that can be loaded, or no square grid of patches.
    """
    from aimv2.features.fingerprint import weights_hash
    from aimv2.features.frozen import of_encoder, open_frozen
    from aimv2.features.pixels import OPTIONS
    from aimv2.models.encoder import VisionEncoder
    from aimv2.models.flops import count_flops

    options = options or OPTIONS
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
        message = f"{option} {source}: {patches} patch features of an image of {size} px are no square grid"
        raise UsageError(message, code="unsupported")
    former, changed = "", ""
    if module is not None and frozen.pixels is not None:
        former, changed = weights_hash(module), changed_since(frozen, options)
    return Teacher(source, frozen.sha256, size, side, width, run, flops, former, changed, frozen.fingerprint())


def changed_since(frozen: Frozen, options: tuple[str, str]) -> str:
    """Why a run that a version before 0.2 began would resume with other features of the same weights; "" where it would not."""
    from aimv2.features.foreign import MASKED
    from aimv2.features.pixels import former_pixels
    from aimv2.interop.load import locate

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
