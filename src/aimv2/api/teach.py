"""Features of a teacher, stored beside the images that a student will see. Heavy imports happen inside."""

from __future__ import annotations

from typing import Any

from aimv2.errors import UsageError


def data_teach(
    teacher: str,
    data: str,
    out: str,
    views: int = 2,
    crop_scale: float = 0.4,
    crop_ratio: tuple[float, float] = (0.75, 1.3333),
    flip: float = 0.5,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    precision: str = "fp32",
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Write the patch features that a teacher sees in random views of each image beside it, for objective.teacher=stored.

    Args:
        teacher: released name, hub id, folder, RUN, a transformers vision model, or timm:NAME
        data: folder, glob, brace pattern or one tar of shards
        out: folder of the new shards, the same samples and KEY.teacher; interrupted and started again it goes on
        views: random views of each image; a run draws one of them at each visit
        crop_scale: smallest share of the image's area that a crop keeps; the run's data.crop_scale must be the same
        crop_ratio: range of the crop's aspect ratio; as data.crop_ratio
        flip: probability of a horizontal flip; as data.flip
        seed: of crops and flips
        batch_size: views at once
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the products: fp32 or bf16
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    import torch

    from aimv2.api.features import usual_device
    from aimv2.features.pixels import read_stats
    from aimv2.features.teach import Lesson, teach
    from aimv2.features.teacher import open_teacher

    low, high = crop_ratio
    for option, value, least, most in (
        ("views", views, 1, 1000), ("crop-scale", crop_scale, 1e-3, 1), ("flip", flip, 0, 1), ("batch-size", batch_size, 1, 1e6),
    ):  # fmt: skip
        if not least <= value <= most:
            raise UsageError(f"--{option} {value}: {least:g} to {most:g} expected")
    if not 0 < low <= high:
        raise UsageError(f"--crop-ratio {[low, high]}: two positive numbers in order expected")
    stats = read_stats(image_mean, image_std)
    where = torch.device(usual_device(device))
    known = open_teacher(teacher, where, option="TEACHER", precision=precision, stats=stats)
    assert known.run is not None
    lesson = Lesson(
        teacher, known.sha256, known.image_size, known.grid, known.width, views, crop_scale, (low, high), flip, seed
    )
    return teach(data, out, lesson, known.run, batch_size)
