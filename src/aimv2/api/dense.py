"""Linear probes on the patch map: segmentation and depth. Heavy imports happen inside."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from aimv2.errors import UsageError, nearest

if TYPE_CHECKING:
    from aimv2.evals.dense import Asked
    from aimv2.features.frozen import Frozen


def segment(
    model: str,
    data: str | None = None,
    classes: int | None = None,
    ignore: int = 255,
    reduce_zero: bool = False,
    val_list: str | None = None,
    val_fraction: float = 0.0,
    layers: str = "last",
    rates: str = "1e-4,3e-4,1e-3,3e-3,1e-2",
    weight_decay: float = 1e-4,
    epochs: int = 20,
    batch_size: int = 16,
    seeds: str = "0",
    baselines: str | None = None,
    image_size: int | str | None = None,
    trunk_batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Segment by a linear probe on frozen patch features: mIoU, 0 to 1.

    Classes that are neither there nor predicted are left out of the mean.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder that convert --to openvino wrote
        data: images and masks (PNG of class ids): ROOT/{train,val}/{images,masks}, ROOT/{images,masks}/{train,val} (ADE20K:
            images/training, annotations/training), or ROOT/{images,masks} with a list or a fraction
        classes: how many; null: the largest id in the masks and one more
        ignore: mask value that counts as nothing; -1: none
        reduce_zero: mask value 0 counts as nothing too and ids move down by one (ADE20K)
        val_list: of data without a test split: a file with an image's name a line; null: ROOT/val.txt where it is there
        val_fraction: of data without a test split: the share of images that is drawn for it
        layers: last, avg6, or blocks with commas; several are concatenated
        rates: peak learning rates; all are trained at once and one is chosen on a held-out tenth of the training images
        weight_decay: of AdamW, 0 to 1
        epochs: over the training images
        batch_size: images a step
        seeds: of weights and order, with commas
        baselines: random (the same encoder untrained), pixels, or both with a comma
        image_size: pixels a side, learned positions interpolated
        trunk_batch: images at once in the trunk
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder of result.json and feature cache
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    from aimv2.data.images.maps import masks
    from aimv2.evals.dense import measure, segmentation_work

    if classes is not None and classes < 2:
        raise UsageError(f"--classes {classes}: at least two expected")
    frozen, asked = _open(
        "segment", model, data, val_list, val_fraction, layers, rates, weight_decay, epochs, batch_size, seeds,
        baselines, image_size, trunk_batch, device, out, image_mean, image_std,
    )  # fmt: skip
    kind, side = masks(ignore, reduce_zero), frozen.side
    protocol = {
        **_protocol(side),
        "loss": f"cross-entropy of each pixel at {side} x {side}, the mask resized to the nearest",
        "mean": "over the classes that are there or predicted; the confusion summed over the test split",
        "ignore": ignore,
        "reduce_zero": reduce_zero,
    }
    return measure(
        "segment", frozen, asked, lambda scratch: segmentation_work(asked, kind, side, classes, scratch), protocol
    )


def depth(
    model: str,
    data: str | None = None,
    depth_scale: float = 1000.0,
    val_list: str | None = None,
    val_fraction: float = 0.0,
    layers: str = "last",
    rates: str = "1e-4,3e-4,1e-3,3e-3,1e-2",
    weight_decay: float = 1e-4,
    epochs: int = 20,
    batch_size: int = 16,
    seeds: str = "0",
    baselines: str | None = None,
    image_size: int | str | None = None,
    trunk_batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Estimate depth by a linear probe on frozen patch features: RMSE in metres, abs-rel, delta1 (ratio below 1.25).

    The probe is a linear regression of metres by least squares, kept within the range of the training depths.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder that convert --to openvino wrote
        data: images and depth maps (16-bit PNG, 0 where there is no value): ROOT/{train,val}/{images,depth},
            ROOT/{images,depth}/{train,val}, or ROOT/{images,depth} with a list or a fraction
        depth_scale: units of the depth maps per metre
        val_list: of data without a test split: a file with an image's name a line; null: ROOT/val.txt where it is there
        val_fraction: of data without a test split: the share of images that is drawn for it
        layers: last, avg6, or blocks with commas; several are concatenated
        rates: peak learning rates; all are trained at once and one is chosen on a held-out tenth of the training images
        weight_decay: of AdamW, 0 to 1
        epochs: over the training images
        batch_size: images a step
        seeds: of weights and order, with commas
        baselines: random (the same encoder untrained), pixels, or both with a comma
        image_size: pixels a side, learned positions interpolated
        trunk_batch: images at once in the trunk
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder of result.json and feature cache
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    from aimv2.data.images.maps import depths
    from aimv2.evals.dense import depth_work, measure

    if not depth_scale > 0:
        raise UsageError(f"--depth-scale {depth_scale}: units per metre, above 0, expected")
    frozen, asked = _open(
        "depth", model, data, val_list, val_fraction, layers, rates, weight_decay, epochs, batch_size, seeds,
        baselines, image_size, trunk_batch, device, out, image_mean, image_std,
    )  # fmt: skip
    kind, side = depths(depth_scale), frozen.side
    protocol = {
        **_protocol(side),
        "target": "metres, by least squares on standardised depth; predictions kept within the training depths",
        "loss": f"squared error of each pixel with a depth at {side} x {side}, the map resized to the nearest",
        "mean": "over all pixels with a depth of the test split",
        "depth_scale": depth_scale,
    }
    return measure("depth", frozen, asked, lambda scratch: depth_work(asked, kind, side, scratch), protocol)


def _protocol(side: int) -> dict[str, Any]:
    return {
        "head": "batch norm without affine, 1x1 linear, bilinear upsampling",
        "view": f"the whole image resized to {side} x {side}",
        "metric_at": "each map's own size",
    }


def _open(
    verb: str,
    model: str,
    data: str | None,
    val_list: str | None,
    val_fraction: float,
    layers: str,
    rates: str,
    weight_decay: float,
    epochs: int,
    batch_size: int,
    seeds: str,
    baselines: str | None,
    image_size: int | str | None,
    trunk_batch: int,
    device: str | None,
    out: str | None,
    image_mean: str | None,
    image_std: str | None,
) -> tuple[Frozen, Asked]:
    """The encoder, and what is asked of it, checked.

    Raises:
        UsageError: an option out of its range, an encoder that can't be opened or can't see that size.
    """
    from aimv2.api.features import usual_device
    from aimv2.api.probe import numbers, whole_seeds, words
    from aimv2.evals.dense import BASELINES, Asked, check_view
    from aimv2.evals.dense_heads import DenseSettings
    from aimv2.features.frozen import open_frozen
    from aimv2.features.pixels import read_stats

    if data is None:
        raise UsageError(f"--data is missing: a folder of images and {'masks' if verb == 'segment' else 'depth maps'}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{verb}: its batch norm sees one process; start it without torchrun")
    for option, number in (("--epochs", epochs), ("--batch-size", batch_size), ("--trunk-batch", trunk_batch)):
        if number < 1:
            raise UsageError(f"{option} {number}: at least 1 expected")
    if not 0 <= weight_decay <= 1:
        raise UsageError(f"--weight-decay {weight_decay}: 0 to 1 expected")
    if not all(0 < rate <= 1 for rate in numbers(rates, "--rates")):
        raise UsageError(f"--rates {rates}: above 0, at most 1 expected")
    others = words(baselines or "")
    for name in others:
        if name not in BASELINES:
            raise UsageError(f"--baselines {name}: one of {', '.join(BASELINES)} is expected{nearest(name, BASELINES)}")
    if isinstance(image_size, str):
        raise UsageError(f"--image-size {image_size}: maps are of one size here; pixels a side expected")
    frozen = open_frozen(model, usual_device(device), image_size, stats=read_stats(image_mean, image_std))
    check_view(frozen, image_size)
    settings = DenseSettings(
        layers=tuple(dict.fromkeys(frozen.layer_names(layers))),
        rates=tuple(dict.fromkeys(numbers(rates, "--rates"))),
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
        seeds=whole_seeds(seeds),
    )
    return frozen, Asked(data, val_list, val_fraction, settings, others, trunk_batch, out)
