"""``aimv2 data teach``: a teacher's patch features next to the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from aimv2.config.types import Bounds, Fraction, PathText
from aimv2.errors import UsageError

EXAMPLES = "aimv2 data teach aimv2-large-patch14-224 shards/mine shards/taught"
FIRST = "views batch_size device precision"


@dataclass(kw_only=True)
class DataTeachOptions:
    """Write a teacher's patch features of random views of each image into new shards, for objective.teacher=stored.

    Args:
        teacher: released name, hub id, folder, RUN, a transformers vision model, or timm:NAME
        data: folder, glob, brace pattern or one tar of shards
        out: folder for the new shards, the same samples with KEY.teacher; an interrupted command continues there
        views: random views of each image; a run samples one of them at each visit
        crop_scale: smallest fraction of the image's area that a crop keeps; the run's data.crop_scale must be the same
        crop_ratio: range of the crop's aspect ratio; as data.crop_ratio
        flip: probability of a horizontal flip; as data.flip
        seed: random seed of crops and flips
        batch_size: views per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the matmuls: fp32 or bf16
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

    teacher: PathText
    data: PathText
    out: PathText
    views: Annotated[int, Bounds(1, 1000)] = 2
    crop_scale: Annotated[float, Bounds(1e-3, 1)] = 0.4
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: Fraction = 0.5
    seed: int = 0
    batch_size: Annotated[int, Bounds(1, 1_000_000)] = 64
    device: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    image_mean: str | None = None
    image_std: str | None = None


def run(options: DataTeachOptions) -> dict[str, Any]:
    import torch

    from aimv2.distributed import default_device
    from aimv2.features.pixels import read_stats
    from aimv2.features.teach import Lesson, teach
    from aimv2.features.teacher import open_teacher

    low, high = options.crop_ratio
    if not 0 < low <= high:
        raise UsageError(f"--crop-ratio {[low, high]}: two positive numbers in order expected")
    stats = read_stats(options.image_mean, options.image_std)
    where = torch.device(default_device(options.device))
    known = open_teacher(options.teacher, where, option="TEACHER", precision=options.precision, stats=stats)
    assert known.run is not None
    lesson = Lesson(
        options.teacher, known.sha256, known.image_size, known.grid, known.width, options.views, options.crop_scale,
        (low, high), options.flip, options.seed, known.fingerprint,
    )  # fmt: skip
    return teach(options.data, options.out, lesson, known.run, options.batch_size)
