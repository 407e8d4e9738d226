"""The attentive probe. Heavy imports happen inside."""

from __future__ import annotations

import math
from typing import Any

from aimv2.errors import UsageError, nearest


def probe(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    protocol: str = "attentive",
    features: str = "cached",
    layers: str = "last",
    epochs: int = 100,
    warmup: float = 0.0,
    batch_size: int = 512,
    rates: str = "5e-5,1e-4,2e-4,3e-4,5e-4,1e-3,2e-3",
    decays: str = "0.05,0.1",
    heads: int | None = None,
    flip: bool = False,
    select: str = "auto",
    seeds: str = "0",
    baselines: str | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int | str | None = None,
    trunk_batch: int = 64,
    workers: int = 2,
    device: str | None = None,
    precision: str = "fp32",
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Measure a frozen encoder by probes on its patch features: the whole grid of rates and decays at once (AIMV2, Table A2).

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder that convert --to openvino wrote
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: a registered name, whose counts are then checked; null: any data set
        protocol: attentive, or efficient (several queries, no key projection)
        features: cached (the trunk runs once, no augmentation) or augmented (random crop, flip, jitter, RandAugment)
        layers: last, avg6, all, or blocks with commas; several are trained in the same pass
        epochs: over the training images
        warmup: epochs of warm-up (the paper has 5 for ImageNet)
        batch_size: images a step (the paper has 1024 for ImageNet)
        rates: peak learning rates of the grid
        decays: weight decays of the grid
        heads: of the attention, or queries; null: width / 64, or 32
        flip: cached features of mirrored images too
        select: where the best head is chosen: auto (the validation split, else a held-out tenth of the training images),
            val, heldout, or test (as the paper reports it; the result says so)
        seeds: of heads and order, with commas
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        train_limit: training images, drawn; 0: all
        test_limit: test images, drawn; 0: all
        image_size: pixels a side, learned positions interpolated; native: each image at its own size (native models)
        trunk_batch: images at once in the trunk
        workers: processes that augment
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the trunk's products, fp32 or bf16; the heads are fp32
        cache: folder of features that several verbs share; null: in the result's folder
        out: folder of result.json, feature cache and checkpoints; interrupted and started again it goes on
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    from aimv2.api.features import usual_device
    from aimv2.evals.probe import ProbeSettings
    from aimv2.evals.probe_result import Asked, open_and_measure
    from aimv2.features.pixels import read_stats

    _check(data, protocol, features, select, baselines)
    _at_least_one(epochs, batch_size, trunk_batch)
    if not 0 <= warmup < epochs:
        raise UsageError(f"--warmup {warmup:g}: part of the {epochs} --epochs; 0 or more and less than that expected")
    settings = ProbeSettings(
        protocol, ("last",), *_grid(rates, decays), epochs, warmup, batch_size, heads, features == "augmented", flip
    )
    asked = Asked(
        str(data), dataset, settings, select, whole_seeds(seeds), words(baselines), train_limit, test_limit, trunk_batch,
        workers, out, cache,
    )  # fmt: skip
    where, stats = usual_device(device), read_stats(image_mean, image_std)
    return open_and_measure(model, where, image_size, precision, layers, asked, stats)


def _grid(rates: str, decays: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Learning rates and weight decays; raises UsageError for a rate of 0."""
    grid = numbers(rates, "--rates"), numbers(decays, "--decays")
    if not all(grid[0]):
        raise UsageError(f"--rates {rates}: numbers above 0 expected")
    return grid


def _at_least_one(epochs: int, batch_size: int, trunk_batch: int) -> None:
    """Raises UsageError for one that is below 1."""
    for option, number in (("--epochs", epochs), ("--batch-size", batch_size), ("--trunk-batch", trunk_batch)):
        if number < 1:
            raise UsageError(f"{option} {number}: at least 1 expected")


def _check(data: str | None, protocol: str, features: str, select: str, baselines: str | None) -> None:
    """Raises UsageError for words that are none of those known."""
    from aimv2.evals.probe_result import BASELINES, SELECT
    from aimv2.models.probe_head import PROTOCOLS

    if data is None:
        raise UsageError("--data is missing: labelled images (class folders, shards, CIFAR's pickles, a CSV list)")
    for option, value, known in (
        ("--protocol", protocol, PROTOCOLS),
        ("--features", features, ("cached", "augmented")),
        ("--select", select, SELECT),
        *(("--baselines", name, BASELINES) for name in words(baselines)),
    ):
        if value not in known:
            raise UsageError(f"{option} {value}: one of {', '.join(known)} is expected{nearest(value, known)}")


def words(text: str | None) -> tuple[str, ...]:
    """``"a,b"`` -> ("a", "b"); None: ()."""
    return tuple(word.strip() for word in str(text or "").split(",") if word.strip())


def numbers(text: str, option: str) -> tuple[float, ...]:
    """``"1,2"`` -> (1.0, 2.0).

    Raises:
        UsageError: not numbers, or none.
    """
    try:
        found = tuple(float(word) for word in words(text))
    except ValueError:
        found = ()
    if not found or not all(0 <= number < math.inf for number in found):
        raise UsageError(f"{option} {text}: numbers with commas, none below 0, expected")
    return found


def whole_seeds(text: str) -> tuple[int, ...]:
    """``"0,1"`` -> (0, 1).

    Raises:
        UsageError: no whole numbers, or one of them twice: its figures would count as two draws.
    """
    found = words(str(text))
    if not found or not all(word.isdecimal() for word in found):
        raise UsageError(f"--seeds {text}: whole numbers from 0 on with commas expected")
    seeds = tuple(map(int, found))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: the same seed twice; different ones expected")
    return seeds
